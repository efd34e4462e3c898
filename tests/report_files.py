"""A small experiment as evaluate.py and train.py leave it, made up: every kind of result that the report knows."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import yaml
from PIL import Image

from envs.worker import write_video
from vla.analysis.vqa_records import Answers

ARMS, SEEDS = ("aux", "ptr", "vanilla"), (0, 1)
TASKS = ("put_the_bowl_on_the_plate", "open_the_middle_drawer_of_the_cabinet", "push_the_plate_to_the_front")
SUBTASKS = ("open_drawer", "lift_red_block_table", "stack_block", "turn_on_led", "push_into_drawer")
VERSIONS = {"torch": "2.13.0+cpu", "python": "3.11.7"}


def header(arm: str, seed: int, benchmark: str = "libero_goal", **extra) -> dict:
    policy = {"size": "tiny", "steps": 300, "data_hash": "d" * 64, "commit": "abcdef012345", "versions": VERSIONS}
    about = {"benchmark": benchmark, "baseline": "vlm4vla", "arm": arm, "train_seed": seed, "policy": policy}
    return about | {"checkpoint": f"{seed}{arm}" + "c" * 40, "config": f"{arm}-{seed}", "evaluation": "rollout"} | extra


def write_json(folder: Path, name: str, content: dict) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / name).write_text(json.dumps(content))


def write_rollouts(folder: Path, head: dict, outcomes: dict[str, Sequence[bool | int]], missing: int = 0) -> None:
    """`outcomes`: success of each seed from 30 on per task; of CALVIN's chains how many subtasks were done."""
    rows = []
    for task, done in outcomes.items():
        for seed, result in enumerate(done, 30):
            chain = "calvin" in head["benchmark"]
            tried = SUBTASKS[: min(int(result) + 1, 5)] if chain else ()
            subtasks = [{"task": name, "success": bool(i < result), "steps": 40} for i, name in enumerate(tried)]
            row = {"benchmark": head["benchmark"], "task": task, "seed": seed}
            row |= {"steps": 90, "seconds": 2.5, "subtasks": subtasks, "attempts": 1, "config": head["config"]}
            row |= {"checkpoint": head["checkpoint"], "execute_steps": 8, "renderer": "osmesa"}
            rows.append(row | {"versions": {"mujoco": "3.3.2"}, "success": bool(result == 5 if chain else result)})
    write_json(folder, "run.json", head | {"env_kwargs": {"start_displacement": 0.05}, "execute_steps": 8})
    (folder / "episodes.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    write_json(folder, "summary.json", {"n": len(rows), "missing": missing})


def film(path: Path, color: tuple[int, int, int]) -> None:
    """Twenty-one frames in which a square crosses the picture."""
    frames = []
    for step in range(21):
        frame = np.full((64, 64, 3), 235, np.uint8)
        frame[20:36, 2 * step : 2 * step + 16] = color
        frames.append(frame)
    write_video(path, frames)


def write_results(root: Path, arms: Sequence[str] = ARMS, seeds: Sequence[int] = SEEDS) -> None:
    rng = np.random.default_rng(0)
    for place, arm in enumerate(arms):
        for seed in seeds:
            name = f"policy{place}-s{seed}"  # an arm may have a name that no folder can have
            folder = root / "libero_goal" / name
            rates = 0.25 + 0.2 * place
            write_rollouts(folder, header(arm, seed), {task: rng.random(12) < rates for task in TASKS})
            chains = header(arm, seed, "calvin_abc_d")
            write_rollouts(root / "calvin" / name, chains, {"chain": rng.binomial(5, 0.4 + 0.1 * place, 20)})
            write_analyses(root / "analyses" / name, arm, seed, place, rng)
            write_accuracies(root / "representations" / name, arm, seed, place, rng)
        times = {f"p{q}_ms": 40.0 + q for q in (50, 90, 99)} | {f"p{q}_ms_per_action": 5 + q / 8 for q in (50, 90, 99)}
        latency = {"device": "x86_64, 2 threads", "chunk": 8, "repeats": 20, "predict": times, "server": times}
        write_json(root / "latency" / str(place), "latency.json", header(arm, 0, evaluation="latency") | latency)
        outcome = "success" if place else "failure"
        film(root / "libero_goal" / f"policy{place}-s0" / "videos" / f"{TASKS[0]}_seed30_{outcome}.mp4", (0, 114, 178))


def write_analyses(folder: Path, arm: str, seed: int, place: int, rng: np.random.Generator) -> None:
    scores = {}
    for metric in ("cosine", "scale"):
        value = 0.2 + 0.25 * place + 0.05 * rng.normal()
        scores[metric] = {"value": value, "low": value - 0.03, "high": value + 0.03, "n": 6000}
    about = header(arm, seed, tap="post_projector")
    write_json(folder, "alignment.json", about | scores | {"evaluation": "alignment"})
    pose, pixel, noise = rng.random((3, 600))
    distances = {"cosine": place * pose + pixel + noise, "scale": noise, "pose": pose, "pixel": pixel}
    np.savez(folder / "alignment_pairs.npz", **distances)
    error = {"value": 9.0 - place, "low": 8.5 - place, "high": 9.5 - place, "n": 12}
    write_json(folder, "ridge_probe.json", about | {"mae_mm": error, "evaluation": "ridge_probe"})
    curve = (0.3 * np.exp(-np.arange(200) / 60) + 0.05 + 0.01 * rng.random(200)).round(5).tolist()
    losses = 0.2 - 0.03 * place + 0.01 * rng.normal(size=(len(TASKS), 2))
    tasks = [{"task": task, "train": a, "validation": b} for task, (a, b) in zip(TASKS, losses.tolist(), strict=True)]
    write_json(folder, "bc_probe.json", about | {"evaluation": "bc_probe", "tasks": tasks})
    for task in TASKS:
        write_json(folder / "probes", f"{task}.json", {"train_curve": curve})
    state = {
        "evaluation": "state_probe",
        "train": 0.03 + 0.001 * rng.random(),
        "validation": 0.031 + 0.001 * rng.random(),
    }
    write_json(folder, "state_probe.json", about | state | {"train_curve": curve})


def write_accuracies(folder: Path, arm: str, seed: int, place: int, rng: np.random.Generator) -> None:
    for name in ("textvqa", "gqa"):
        about = header(arm, seed, "vqa", evaluation="vqa", set=name, missing=0)
        right = (rng.random(60) < 0.3 + 0.15 * place).astype(float)
        rows = [
            {"id": str(i), "image": f"{i}.jpg", "group": "", "said": "yes", "score": float(score)}
            for i, score in enumerate(right)
        ]
        with Answers(folder / name, about) as answers:
            answers.append(rows)
        accuracy = {"value": right.mean(), "low": right.mean() - 0.12, "high": right.mean() + 0.12, "n": 60}
        write_json(folder / name, "vqa_probe.json", about | {"accuracy": accuracy})
    right = rng.random(80) < 0.5 + 0.1 * place
    accuracy = {"value": right.mean(), "low": right.mean() - 0.1, "high": right.mean() + 0.1, "n": 80}
    about = header(arm, seed, "cifar10", evaluation="cifar10", tap="post_projector")
    write_json(folder / "cifar10", "cifar10_probe.json", about | {"accuracy": accuracy})
    np.savez(folder / "cifar10" / "cifar10_probe.npz", test=np.arange(80), right=right)
    pixels = rng.integers(0, 256, (60, 75, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(folder / "cifar10" / "tsne.png")


def write_runs(
    root: Path, arms: Sequence[str] = ARMS, seeds: Sequence[int] = SEEDS, changes: dict | None = None, rows: int = 150
) -> None:
    """Run directories whose configurations are those that train.py composes, changed by `changes` {"a.b": value}."""
    from dataclasses import asdict

    from vla.cli import compose_config

    rng = np.random.default_rng(1)
    for place, arm in enumerate(arms):
        known = arm if arm in ARMS else "vanilla"
        config = asdict(compose_config("train", f"ablation={known}")) | {"arm": arm}
        for key, value in (changes or {}).items():
            *path, last = key.split(".")
            branch = config
            for name in path:
                branch = branch[name]
            branch[last] = value
        for seed in seeds:
            folder = root / f"vlm4vla-tiny-run{place}-libero_goal-s{seed}"
            folder.mkdir(parents=True)
            (folder / "config.yaml").write_text(yaml.safe_dump(json.loads(json.dumps(config | {"seed": seed}))))
            steps = np.arange(9, 10 * rows, 10)
            loss = 0.2 * np.exp(-steps / 500) + 0.02 + 0.01 * place + 0.005 * rng.random(rows)
            lines = [f"{step},{value:.6f},{3 * value:.6f}" for step, value in zip(steps, loss, strict=True)]
            (folder / "metrics.csv").write_text("\n".join(["step,loss,inverse_loss", *lines]) + "\n")
            about = {"arm": arm, "train_seed": seed, "steps": 300, "seconds": 90.0, "config_hash": f"{arm}-{seed}"}
            about |= {"data_hash": "d" * 64, "commit": "abcdef012345", "versions": VERSIONS}
            write_json(folder / "policy", "config.json", {"baseline": "vlm4vla", "about": about})
