"""Evaluate an exported policy: rollouts in the real simulator, or a probe of its vision encoder.

    python evaluate.py policy=runs/<run>/policy benchmark=libero_goal evaluation=rollout episodes=20
    python evaluate.py --help

Writes results/<benchmark>/<arm>-s<training seed>-<hash>/: one record per episode, from which scripts/tables.py makes
tables. The same command again runs only what is missing. With shard=K shards=N it runs its share of that, beside other
jobs (envs/shards.py). SIGTERM, SIGUSR1 or SIGUSR2 end it with 75, "run me again".
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path

from vla.cli import main
from vla.config import EXPERT, NOTHING, REPLAY, EvaluateConfig
from vla.errors import UserError
from vla.experiment import RUN, policy_of_run


@main("evaluate")
def run(cfg: EvaluateConfig) -> None:
    from envs.stopping import stop_on_signals

    stop_on_signals()
    evaluate(cfg)


def evaluate(cfg: EvaluateConfig) -> dict:
    """Run one evaluation; returns what it wrote as its summary."""
    if cfg.evaluation.name == "rollout":
        return rollout(cfg)
    if cfg.shard is not None or cfg.shards is not None:
        raise UserError(f"evaluation={cfg.evaluation.name} cannot be cut; leave shard= and shards= out")
    if cfg.policy.startswith(REPLAY) or cfg.policy in (EXPERT, NOTHING):
        raise UserError(f"evaluation={cfg.evaluation.name} needs a trained policy; {cfg.policy} has no vision encoder")
    others = {"bc_probe": bc_probe, "state_probe": state_probe, "latency": latency, "vqa": vqa, "cifar10": cifar10}
    return others.get(cfg.evaluation.name, measure)(cfg)


def rollout(cfg: EvaluateConfig) -> dict:
    """`episodes` rollouts of every task, seeds first_seed … first_seed + episodes − 1 (SimplerEnv: 0 is all)."""
    if cfg.episodes < (0 if cfg.benchmark.family == "simpler" else 1):
        raise UserError(f"episodes={cfg.episodes} runs nothing; give episodes=1 or more")
    from envs.early import early_workers
    from envs.shards import shard_of

    shard_of(cfg.shard, cfg.shards)  # before the policy is read
    with early_workers(cfg, described(cfg)) as early:
        return rollout_with(cfg, early)


def rollout_with(cfg: EvaluateConfig, early: list) -> dict:
    from envs.episodes import execution

    policy, about, checkpoint = load(cfg)
    ensemble, steps = execution(cfg, policy)
    header = identity(cfg, about, checkpoint) | {"evaluation": "rollout"} | compiled(cfg, policy)
    if cfg.benchmark.family == "simpler":
        header |= {"protocol": cfg.benchmark.suite, "groups": cfg.benchmark.groups}
    return roll_out(cfg, policy, about, header, ensemble, steps, early=early)


def roll_out(
    cfg: EvaluateConfig,
    policy,
    about: dict,
    header: dict,
    ensemble: float | None,
    steps: int,
    out: Path | None = None,
    early: Sequence = (),
) -> dict:
    """Run what is missing of the episodes and print the rate; `out` is the folder to put a folder of records into."""
    from envs.episodes import interpreter, simulator
    from envs.rollout import run_rollouts
    from envs.shards import shard_of

    env, env_kwargs, episodes = simulator(cfg, policy, about)
    what = header | env_kwargs | {"execute_steps": steps, "exact": cfg.evaluation.exact, "ensemble": ensemble}
    place = folder(cfg, what)
    if out is not None:
        place = out / f"rollouts-{place.name.rpartition('-')[2]}"
    result = run_rollouts(
        policy,
        episodes,
        place,
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
        python=interpreter(cfg),
        shard=shard_of(cfg.shard, cfg.shards),
        early=early,
    )
    summary = result.summary
    arm = about["arm"] if result.whole else f"{about['arm']}, shard {cfg.shard} of {cfg.shards}, others to come"
    state = "" if summary["complete"] else f", INCOMPLETE: {summary['missing']} missing"
    if not summary["n"]:
        print(f"{arm}: no episode{state}; {place}")
        return summary
    low, high = summary["interval"]
    rate = f"{summary['successes']}/{summary['n']} = {summary['rate']:.2f} [{low:.2f}, {high:.2f}]"
    speed = result.env_steps / max(result.seconds, 1e-9)
    if chains := summary.get("chains"):
        from vla.analysis.statistics import format_interval

        interval = format_interval(*(chains["avg_len"]["interval"] or (float("nan"),) * 2))
        shares = " / ".join(f"{100 * sr['rate']:.1f}" for sr in chains["sr"])
        print(f"{arm}: SR 1-5 {shares} %, Avg. Len. {chains['avg_len']['value']:.2f} {interval}")
    print(f"{arm}: {rate} (95 % Wilson){state}; {speed:.0f} env steps/s; {place}")
    return summary


def compiled(cfg: EvaluateConfig, policy) -> dict:
    """Compiles the policy where that is asked for; what the header says of it."""
    if not cfg.evaluation.compile:
        return {}
    if cfg.policy.startswith(REPLAY) or cfg.policy in (EXPERT, NOTHING):
        raise UserError(f"policy={cfg.policy} has nothing to compile; set evaluation.compile=false")
    from vla.compiled import compile_policy

    compile_policy(policy, cfg.device, cfg.benchmark.resolution)
    return {"compile": True}


def bc_probe(cfg: EvaluateConfig) -> dict:
    """Behaviour cloning heads on frozen tokens and `episodes` rollouts per task with each (0: losses only)."""
    from vla.analysis.frozen import cloning_probes

    policy, about, checkpoint = load(cfg, tap=cfg.evaluation.tap)
    store = demonstrations(cfg, policy, about)
    header = identity(cfg, about, checkpoint) | {"tap": policy.tap, "data_hash": store.meta.content_hash}
    header |= {"evaluation": "bc_probe", "probe": asdict(cfg.evaluation.probe)}
    out = folder(cfg, header)
    losses, probed = cloning_probes(cfg, policy, checkpoint, store, header, out)
    print_estimates(about["arm"], losses, ("train", "validation"), "loss", out)
    if cfg.episodes:
        steps = cfg.evaluation.execute_steps or probed.chunk
        losses["rollouts"] = roll_out(cfg, probed, about, header, None, steps, out)
    return losses


def state_probe(cfg: EvaluateConfig) -> dict:
    """A head that reads the proprioceptive state from frozen tokens."""
    from vla.analysis.frozen import proprioception_probe

    policy, about, checkpoint = load(cfg, tap=cfg.evaluation.tap)
    store = demonstrations(cfg, policy, about)
    header = identity(cfg, about, checkpoint) | {"tap": policy.tap, "data_hash": store.meta.content_hash}
    header |= {"evaluation": "state_probe", "probe": asdict(cfg.evaluation.probe)}
    out = folder(cfg, header)
    losses = proprioception_probe(cfg, policy, checkpoint, store, header, out)
    print(f"{about['arm']}: state L1 train {losses['train']:.4f}, validation {losses['validation']:.4f}; {out}")
    return losses


def measure(cfg: EvaluateConfig) -> dict:
    """A measure of the vision encoder on the demonstrations of data.path (no simulator)."""
    from vla.analysis.encoder import alignment_of, ridge_probe_of

    policy, about, checkpoint = load(cfg, tap=cfg.evaluation.tap)
    store = demonstrations(cfg, policy, about)
    of = {"alignment": alignment_of, "ridge_probe": ridge_probe_of}[cfg.evaluation.name]
    header = identity(cfg, about, checkpoint) | {"tap": policy.tap, "data_hash": store.meta.content_hash}
    scores, pairs = of(policy, store, cfg.device)
    result = header | {"evaluation": cfg.evaluation.name} | scores
    out = folder(cfg, header)
    out.mkdir(parents=True, exist_ok=True)
    from vla.files import write_arrays, write_atomic

    if pairs:  # what scripts/report.py draws
        write_arrays(out / f"{cfg.evaluation.name}_pairs.npz", pairs)
    write_atomic(out / f"{cfg.evaluation.name}.json", json.dumps(result, indent=2))
    print_estimates(about["arm"], result, ("mae_mm", "cosine", "scale"), "", out)
    return result


def latency(cfg: EvaluateConfig) -> dict:
    """Milliseconds per action with percentiles, of the policy alone and through its server."""
    from vla.bench.latency import describe
    from vla.bench.served import latency_of, tell
    from vla.files import write_atomic

    if cfg.evaluation.repeats < 1:
        raise UserError(f"evaluation.repeats={cfg.evaluation.repeats} times nothing; give 1 or more")
    policy, about, checkpoint = load(cfg)
    header = identity(cfg, about, checkpoint) | {"evaluation": "latency", "device": describe(cfg.device)}
    header |= compiled(cfg, policy)
    result = header | latency_of(policy, about, cfg)
    out = folder(cfg, header)
    out.mkdir(parents=True, exist_ok=True)
    write_atomic(out / "latency.json", json.dumps(result, indent=2) + "\n")
    for line in tell(result):
        print(f"{header['arm']}: {line}; {out}")
    return result


def vqa(cfg: EvaluateConfig) -> dict:
    """Questions about pictures to the policy's own language model; nothing of `benchmark` or `data` is read."""
    from vla.analysis.vqa import vqa_probe

    policy, about, checkpoint = load(cfg)
    cfg = replace(cfg, benchmark=replace(cfg.benchmark, name="vqa"))
    who = identity(cfg, about, checkpoint)
    results = vqa_probe(cfg.evaluation.vqa, policy, who, lambda header: folder(cfg, header), cfg.device)
    for name, result in results.items():
        unasked = f", {result['missing']} not asked" if result["missing"] else ""
        print_estimates(who["arm"], {name: result["accuracy"]}, (name,), "accuracy", f"{result['folder']}{unasked}")
    return results


def cifar10(cfg: EvaluateConfig) -> dict:
    """A linear probe and a t-SNE picture of the vision encoder's features on CIFAR-10."""
    from vla.analysis.cifar10 import cifar10_probe

    policy, about, checkpoint = load(cfg, tap=cfg.evaluation.tap)
    cfg = replace(cfg, benchmark=replace(cfg.benchmark, name="cifar10"))
    of = asdict(cfg.evaluation.cifar10)
    apart = ("path", "batch_size")  # neither can change an outcome
    header = identity(cfg, about, checkpoint) | {"evaluation": "cifar10", "tap": policy.tap}
    header |= {"cifar10": {key: value for key, value in of.items() if key not in apart}}
    out, keep = folder(cfg, header), cfg.evaluation.features == "keep"
    result = cifar10_probe(cfg.evaluation.cifar10, policy, checkpoint, header, out, cfg.device, keep)
    print_estimates(header["arm"], result, ("accuracy",), "", out)
    return result


def demonstrations(cfg: EvaluateConfig, policy, about: dict):
    """The frame store of data.path, seen the way up that the policy was trained with."""
    from data.source import open_source

    data = replace(cfg.data, image_rotation=about["image_rotation"])
    return open_source(cfg.benchmark, data, cameras=policy.cameras)


def print_estimates(arm: str, result: dict, names: tuple[str, ...], unit: str, out: Path | str) -> None:
    for name in names:
        if cell := result.get(name):
            interval = f"[{cell['low']:.3f}, {cell['high']:.3f}], n = {cell['n']}"
            print(f"{arm}: {name} {unit} {cell['value']:.3f} {interval}; {out}".replace("  ", " "))


def described(cfg: EvaluateConfig) -> dict | None:
    """The policy directory's config.json; None where there is none that can be read, which `load` has words for."""
    try:
        return json.loads((directory(cfg) / "config.json").read_text())
    except (OSError, ValueError, UserError):
        return None


def directory(cfg: EvaluateConfig) -> Path:
    return policy_of_run(cfg.policy) if cfg.policy.startswith(RUN) else Path(cfg.policy)


def load(cfg: EvaluateConfig, tap: str | None = None):
    """The policy, what is known about it, and the hash of its weights."""
    import torch

    if cfg.threads:
        torch.set_num_threads(cfg.threads)
    if cfg.policy in (EXPERT, NOTHING):
        from vla.replay import ExpertPolicy, NothingPolicy

        policy = {EXPERT: ExpertPolicy, NOTHING: NothingPolicy}[cfg.policy]()
        return policy, {"arm": cfg.policy, "train_seed": None}, cfg.policy
    if cfg.policy.startswith(REPLAY):
        from vla.replay import ReplayPolicy

        policy = ReplayPolicy(cfg.policy.removeprefix(REPLAY))
        return policy, {"arm": "replay", "train_seed": None, "image_rotation": cfg.data.image_rotation}, policy.hash()
    from vla.checkpoint import checkpoint_hash, load_policy

    policy, config = load_policy(directory(cfg), cfg.device, tap)
    return policy, config["about"] | {"baseline": config["baseline"]}, checkpoint_hash(directory(cfg))


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
