"""Results as evaluate.py leaves them, made up for the papers' tables (rows per run, headers as `identity` writes)."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

SUBTASKS = ("open_drawer", "lift_red_block_table", "stack_block", "turn_on_led", "push_into_drawer")


def identity(benchmark: str, baseline: str, arm: str, seed: int, size: str = "full", **extra) -> dict:
    header = {"benchmark": benchmark, "baseline": baseline, "arm": arm, "train_seed": seed, "checkpoint": "c" * 64}
    policy = {"size": size, "steps": 30000, "data_hash": "d", "commit": "e", "versions": {}}
    return header | {"config": "k", "policy": policy, "evaluation": "rollout"} | extra


def write_episodes(folder: Path, header: dict, episodes: Sequence[dict], missing: Sequence[dict] = ()) -> None:
    """`episodes`: task, seed, success, and perhaps benchmark and subtasks; `missing`: those that crashed."""
    folder.mkdir(parents=True)
    (folder / "run.json").write_text(json.dumps(header))
    common = {"benchmark": header["benchmark"], "steps": 90, "seconds": 2.5, "subtasks": [], "attempts": 1}
    common |= {"checkpoint": header["checkpoint"], "config": "k", "execute_steps": 4, "renderer": "egl", "versions": {}}
    lines = [json.dumps(common | episode) + "\n" for episode in episodes]
    (folder / "episodes.jsonl").write_text("".join(lines))
    lost = [{"benchmark": header["benchmark"], "reason": "crashed"} | episode for episode in missing]
    summary = {"n": len(lines), "missing": len(lost), "missing_episodes": lost}
    (folder / "summary.json").write_text(json.dumps(summary))


def chain(seed: int, done: int) -> dict:
    """An episode of CALVIN that did `done` of its five subtasks."""
    subtasks = [{"task": t, "success": i < done, "steps": 40} for i, t in enumerate(SUBTASKS[: min(done + 1, 5)])]
    return {"task": "chain", "seed": int(seed), "success": done == 5, "subtasks": subtasks}


def write_chains(
    folder: Path, baseline: str, arm: str, seed: int, lengths: Sequence[int], size: str = "full", **kwargs
) -> None:
    arguments = {"scene": "D", "cameras": ["static"], "max_steps": 360, "renderer": "egl"} | kwargs
    header = identity("calvin_abc_d", baseline, arm, seed, size, env="envs.calvin:CalvinChains", env_kwargs=arguments)
    write_episodes(folder, header, [chain(number, int(done)) for number, done in enumerate(lengths)])


def write_json(folder: Path, name: str, header: dict, **content) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / name).write_text(json.dumps(header | content))
