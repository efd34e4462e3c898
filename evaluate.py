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
from vla.experiment import RUN, policy_of_run

REPLAY, EXPERT = "replay:", "expert"


@main("evaluate")
def run(cfg: EvaluateConfig) -> None:
    evaluate(cfg)


def evaluate(cfg: EvaluateConfig) -> dict:
    """Run one evaluation; returns what it wrote as its summary."""
    if cfg.evaluation.name == "rollout":
        return rollout(cfg)
    if cfg.policy.startswith(REPLAY) or cfg.policy == EXPERT:
        raise UserError(f"evaluation={cfg.evaluation.name} needs a trained policy; {cfg.policy} has no vision encoder")
    return probe(cfg)


def rollout(cfg: EvaluateConfig) -> dict:
    """`episodes` rollouts of every task, seeds first_seed … first_seed + episodes − 1."""
    if cfg.episodes < 1:
        raise UserError(f"episodes={cfg.episodes} runs nothing; give episodes=1 or more")
    from envs.rollout import run_rollouts

    policy, about, checkpoint = load(cfg)
    ensemble, steps = execution(cfg, policy)
    env, env_kwargs, episodes = simulator(cfg, policy, about)
    header = identity(cfg, about, checkpoint) | {"evaluation": "rollout"}
    out = folder(
        cfg, header | env_kwargs | {"execute_steps": steps, "exact": cfg.evaluation.exact, "ensemble": ensemble}
    )
    result = run_rollouts(
        policy,
        episodes,
        out,
        env=env,
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
    if chains := summary.get("chains"):
        low, high = chains["avg_len"]["interval"] or (float("nan"),) * 2
        shares = " / ".join(f"{100 * sr['rate']:.1f}" for sr in chains["sr"])
        print(f"{about['arm']}: SR 1-5 {shares} %, Avg. Len. {chains['avg_len']['value']:.2f} [{low:.2f}, {high:.2f}]")
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
    if cfg.policy == EXPERT:
        from vla.replay import ExpertPolicy

        return ExpertPolicy(), {"arm": "expert", "train_seed": None}, "expert"
    if cfg.policy.startswith(REPLAY):
        from vla.replay import ReplayPolicy

        policy = ReplayPolicy(cfg.policy.removeprefix(REPLAY))
        return policy, {"arm": "replay", "train_seed": None, "image_rotation": cfg.data.image_rotation}, policy.hash()
    from vla.checkpoint import checkpoint_hash, load_policy

    path = policy_of_run(cfg.policy) if cfg.policy.startswith(RUN) else Path(cfg.policy)
    policy, config = load_policy(path, cfg.device, tap)
    return policy, config["about"] | {"baseline": config["baseline"]}, checkpoint_hash(path)


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


def simulator(cfg: EvaluateConfig, policy, about: dict) -> tuple[str, dict, list]:
    """(environment factory, its arguments, the episodes) of the benchmark, checked before anything starts."""
    benchmark, cameras = cfg.benchmark, list(getattr(policy, "cameras", ["static"]))
    seeds = range(cfg.first_seed, cfg.first_seed + cfg.episodes)
    from envs.pool import EpisodeSpec

    if benchmark.family == "calvin":
        from envs.calvin_sequences import TOTAL, sequences
        from envs.calvin_sim import package_root, resolve_renderer

        if seeds.stop > TOTAL:
            raise UserError(
                f"episodes up to seed {seeds.stop - 1} were asked for; CALVIN has the chains 0 to {TOTAL - 1}"
            )
        package_root()
        sequences()  # made once here, not in every worker
        env = "envs.calvin:ExpertChains" if cfg.policy == EXPERT else "envs.calvin:CalvinChains"
        arguments = {"scene": benchmark.scene, "cameras": cameras, "max_steps": benchmark.max_steps}
        arguments |= {"renderer": resolve_renderer(benchmark.renderer)}
        return env, arguments, [EpisodeSpec(benchmark.name, "chain", seed) for seed in seeds]

    from envs.libero import ensure_gl, task_list

    if cfg.policy == EXPERT:
        raise UserError(f"policy=expert acts in CALVIN only, not in {benchmark.name}")
    names = [name for name, _ in task_list(benchmark.suite)]
    tasks = benchmark.tasks if benchmark.tasks is not None else range(len(names))
    if unknown := [task for task in tasks if not 0 <= task < len(names)]:
        raise UserError(f"benchmark.tasks={unknown} is not in {benchmark.suite}; choose from 0 … {len(names) - 1}")
    ensure_gl()  # once here, not in every worker
    keys = ("suite", "resolution", "fixture_seed", "settle_steps", "start_displacement", "max_steps")
    arguments = {key: getattr(benchmark, key) for key in keys}
    # The image orientation is the one the policy was trained on.
    arguments |= {"cameras": cameras, "image_rotation": about["image_rotation"]}
    episodes = [EpisodeSpec(benchmark.name, names[t], seed, {"task_id": t}) for t in tasks for seed in seeds]
    return "envs.libero:LiberoEnv", arguments, episodes


def identity(cfg: EvaluateConfig, about: dict, checkpoint: str) -> dict:
    """Which policy this is, in the header of every result."""
    return {
        "benchmark": cfg.benchmark.name,
        "baseline": about.get("baseline"),
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
