"""Evaluate an exported policy: rollouts in the real simulator, or a probe of its vision encoder.

    python evaluate.py policy=runs/<run>/policy benchmark=libero_goal evaluation=rollout episodes=20
    python evaluate.py --help

Writes results/<benchmark>/<arm>-s<training seed>-<hash>/: one record per episode, from which scripts/tables.py makes
tables. The same command again runs only what is missing.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, replace
from pathlib import Path

from vla.cli import main
from vla.config import EvaluateConfig
from vla.errors import UserError

REPLAY = "replay:"
FACTORIES = {"libero": "envs.libero:LiberoEnv"}


@main("evaluate")
def run(cfg: EvaluateConfig) -> None:
    evaluate(cfg)


def evaluate(cfg: EvaluateConfig) -> dict:
    """Run one evaluation; returns what it wrote as its summary."""
    if cfg.evaluation.name == "rollout":
        return rollout(cfg)
    if cfg.policy.startswith(REPLAY):
        raise UserError(f"evaluation={cfg.evaluation.name} needs a trained policy; {cfg.policy} has no vision encoder")
    return probe(cfg)


def rollout(cfg: EvaluateConfig) -> dict:
    """`episodes` rollouts of every task, seeds first_seed … first_seed + episodes − 1."""
    if cfg.episodes < 1:
        raise UserError(f"episodes={cfg.episodes} runs nothing; give episodes=1 or more")
    from envs.libero import ensure_gl, task_list
    from envs.rollout import EpisodeSpec, run_rollouts

    names = [name for name, _ in task_list(cfg.benchmark.suite)]
    tasks = cfg.benchmark.tasks if cfg.benchmark.tasks is not None else range(len(names))
    if unknown := [task for task in tasks if not 0 <= task < len(names)]:
        raise UserError(f"benchmark.tasks={unknown} is not in {cfg.benchmark.suite}; choose from 0 … {len(names) - 1}")
    policy, about, checkpoint = load(cfg)
    ensure_gl()  # once here, not in every worker
    ensemble, steps = execution(cfg, policy)
    env_kwargs = environment(cfg, about) | {"cameras": list(getattr(policy, "cameras", ["static"]))}
    seeds = range(cfg.first_seed, cfg.first_seed + cfg.episodes)
    episodes = [EpisodeSpec(cfg.benchmark.name, names[t], seed, {"task_id": t}) for t in tasks for seed in seeds]
    header = identity(cfg, about, checkpoint) | {"evaluation": "rollout"}
    out = folder(
        cfg, header | env_kwargs | {"execute_steps": steps, "exact": cfg.evaluation.exact, "ensemble": ensemble}
    )
    result = run_rollouts(
        policy,
        episodes,
        out,
        env=FACTORIES[cfg.benchmark.family],
        env_kwargs=env_kwargs,
        workers=cfg.evaluation.workers,
        execute_steps=steps,
        episode_timeout_s=cfg.evaluation.episode_timeout,
        header=header,
        retries=cfg.evaluation.retries,
        max_batch=cfg.evaluation.max_batch,
        exact=cfg.evaluation.exact,
        ensemble=ensemble,
        videos=cfg.evaluation.videos,
    )
    summary = result.summary
    low, high = summary["interval"]
    rate = f"{summary['successes']}/{summary['n']} = {summary['rate']:.2f} [{low:.2f}, {high:.2f}]"
    state = "" if summary["complete"] else f", INCOMPLETE: {summary['missing']} missing"
    speed = result.env_steps / max(result.seconds, 1e-9)
    print(f"{about['arm']}: {rate} (95 % Wilson){state}; {speed:.0f} env steps/s; {out}")
    return summary


def probe(cfg: EvaluateConfig) -> dict:
    """A measure of the vision encoder on the demonstrations of data.path (no simulator)."""
    from data.source import open_source
    from vla.analysis.encoder import alignment_of, state_probe_of

    policy, about, checkpoint = load(cfg, tap=cfg.evaluation.tap)
    data = replace(cfg.data, image_rotation=about["image_rotation"])
    store = open_source(cfg.benchmark, data, cameras=policy.cameras)
    measure = {"alignment": alignment_of, "state_probe": state_probe_of}[cfg.evaluation.name]
    header = identity(cfg, about, checkpoint) | {"tap": policy.tap, "data_hash": store.meta.content_hash}
    result = header | {"evaluation": cfg.evaluation.name} | measure(policy, store, cfg.device)
    out = folder(cfg, header)
    out.mkdir(parents=True, exist_ok=True)
    from envs.records import write_atomic

    write_atomic(out / f"{cfg.evaluation.name}.json", json.dumps(result, indent=2))
    for name in ("mae_mm", "cosine", "scale"):
        if name in result:
            cell = result[name]
            interval = f"[{cell['low']:.3f}, {cell['high']:.3f}], n = {cell['n']}"
            print(f"{about['arm']}: {name} {cell['value']:.3f} {interval}; {out}")
    return result


def load(cfg: EvaluateConfig, tap: str | None = None):
    """The policy, what is known about it, and the hash of its weights."""
    import torch

    if cfg.threads:
        torch.set_num_threads(cfg.threads)
    if cfg.policy.startswith(REPLAY):
        from vla.replay import ReplayPolicy

        policy = ReplayPolicy(cfg.policy.removeprefix(REPLAY))
        return policy, {"arm": "replay", "train_seed": None, "image_rotation": cfg.data.image_rotation}, policy.hash()
    from vla.checkpoint import checkpoint_hash, load_policy

    policy, config = load_policy(Path(cfg.policy), cfg.device, tap)
    return policy, config["about"], checkpoint_hash(Path(cfg.policy))


def execution(cfg: EvaluateConfig, policy) -> tuple[float | None, int]:
    """(temperature of temporal ensembling or None, actions executed per query), the policy's own by default."""
    ensemble = cfg.evaluation.ensemble
    if ensemble == "policy":
        ensemble = getattr(policy, "ensemble", None)
    if ensemble is not None and not isinstance(ensemble, (int, float)):
        raise UserError(f"evaluation.ensemble={ensemble} is not known; give policy, null (off) or a temperature")
    steps = cfg.evaluation.execute_steps or (policy.chunk if ensemble is None else 1)
    if ensemble is not None and steps != 1:
        raise UserError(
            f"evaluation.execute_steps={steps} and temporal ensembling exclude each other; set evaluation.ensemble=null"
        )
    return ensemble, steps


def environment(cfg: EvaluateConfig, about: dict) -> dict:
    """What the simulator is built with; the image orientation is the one the policy was trained on."""
    names = ("suite", "cameras", "resolution", "fixture_seed", "settle_steps", "start_displacement", "max_steps")
    return {name: getattr(cfg.benchmark, name) for name in names} | {"image_rotation": about["image_rotation"]}


def identity(cfg: EvaluateConfig, about: dict, checkpoint: str) -> dict:
    """Which policy this is, in the header of every result."""
    return {
        "benchmark": cfg.benchmark.name,
        "arm": cfg.arm or about["arm"],
        "train_seed": about["train_seed"],
        "checkpoint": checkpoint,
        "config": about.get("config_hash", "none"),
        "policy": {key: about.get(key) for key in ("size", "steps", "data_hash", "commit", "versions")},
    }


def folder(cfg: EvaluateConfig, what: dict) -> Path:
    """results/<benchmark>/<arm>-s<seed>-<hash of everything that can change an outcome>."""
    digest = hashlib.sha256(json.dumps(what, sort_keys=True, default=asdict).encode()).hexdigest()[:8]
    seed = "" if what["train_seed"] is None else f"-s{what['train_seed']}"
    return Path(cfg.results_root) / cfg.benchmark.name / f"{what['arm']}{seed}-{digest}"


if __name__ == "__main__":
    run()
