"""What a command would run, before it runs: `dry_run=true` behind any train.py or evaluate.py command line.

    python train.py -m experiment=idl_table1 dry_run=true
    python evaluate.py -m experiment=idl_table1 dry_run=true

For training: each run, whether it is finished, steps, GPU hours, memory of a device before activations, and disk. The
hours are arithmetic, not a measurement: 6 FLOPs a trained parameter and token (2 forward, 4 backward), TOKENS a sample,
MFU of PEAK. `max_steps` bounds the steps where `max_epochs` may end a run earlier, since nothing is read here.
"""

from __future__ import annotations

import shlex
import sys
from collections.abc import Iterable
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.progress import track
from rich.table import Table

from vla.config import EvaluateConfig, TrainConfig
from vla.errors import UserError
from vla.experiment import RUN, policy_of_run
from vla.run_identity import run_dir
from vla.saving import saved, step_of

if TYPE_CHECKING:
    from vla.memory import Sizes

DRY_RUN = "dry_run=true"
TOKENS = 300  # image and prompt; 96 (FLOWER, two cameras of 50) to 540 (π0 with two cameras)
PEAK, MFU = 989e12, 0.4  # bf16 FLOP/s of an H100 or H200; the share that training is taken to reach
ADAM_BYTES, WEIGHT_BYTES = 8, 4


def jobs(words: list[str]) -> list[list[str]]:
    """The override lists that Hydra's sweeper makes of a command line."""
    from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
    from hydra.core.override_parser.overrides_parser import OverridesParser

    overrides = [word for word in words if "=" in word and not word.startswith(("-", "hydra")) and word != DRY_RUN]
    parsed = OverridesParser.create().parse_overrides(overrides)
    return [job for batch in BasicSweeper.split_arguments(parsed, max_batch_size=None) for job in batch]


def command_line(job: list[str]) -> list[str]:
    """What a job composes: its own words, or those of the `cell` that it stands for (vla/experiment.py)."""
    from hydra.core.override_parser.overrides_parser import OverridesParser

    for override in OverridesParser.create().parse_overrides(job):
        if override.key_or_group == "cell":
            return shlex.split(override.value())
    return job


def with_progress(what: list[Any], doing: str) -> Iterable[Any]:
    """`what`, with a progress bar on a terminal: an experiment's configurations and models take some seconds."""
    return track(what, description=doing, console=Console(stderr=True), transient=True)


def show(program: str, configs: list[Any]) -> None:
    """Print the plan of a program's configurations."""
    if program not in ("train", "evaluate"):
        raise UserError(f"dry_run is of train.py and evaluate.py; {program} has none")
    table = training(configs) if program == "train" else evaluation(configs)
    Console(width=None if sys.stdout.isatty() else 200).print(table)


def training(configs: list[TrainConfig]) -> Table:
    table = Table(title=f"{len(configs)} runs", title_justify="left")
    for column in ("run", "state", "steps", "samples", "GPU h", "GB a device", "disk, GB"):
        table.add_column(column, justify="left" if column in ("run", "state") else "right", overflow="fold")
    hours = disk = open_runs = 0
    for cfg in with_progress(configs, "counting parameters"):
        state, steps = state_of(run_dir(cfg)), f"{'≤ ' if cfg.max_epochs else ''}{cfg.max_steps:,}"
        needed, size = (0.0 if cfg.untouched else gpu_hours(cfg)), gigabytes(cfg)
        samples = f"{cfg.max_steps * cfg.batch_size:,}"
        memory = "" if cfg.untouched else f"{device_gigabytes(cfg):,.1f}"
        table.add_row(run_dir(cfg).name, state, steps, samples, f"{needed:,.1f}", memory, f"{size:,.1f}")
        if state != "finished":
            hours, disk, open_runs = hours + needed, disk + size, open_runs + 1
    table.caption = (
        f"{open_runs} to run: about {hours:,.0f} GPU hours at {MFU:.0%} of {PEAK / 1e12:.0f} TFLOP/s and {TOKENS} "
        f"tokens a sample (arithmetic, not measured), {disk:,.0f} GB with checkpoints"
    )
    return table


def state_of(run: Path) -> str:
    """finished, unfinished at a step, or to run."""
    if (run / "policy" / "config.json").exists():
        return "finished"
    found = saved(run)
    return f"unfinished, step {step_of(found[-1])}" if found else "to run"


def gpu_hours(cfg: TrainConfig) -> float:
    _, trained = parameters(cfg.policy.name, cfg.size, cfg.policy.dual, cfg.policy.actions, cfg.policy.speaks)
    return 6 * trained * TOKENS * cfg.max_steps * cfg.batch_size / (MFU * PEAK) / 3600


def gigabytes(cfg: TrainConfig) -> float:
    """Checkpoints that are kept, with the optimiser's state, and the exported policy."""
    held, trained = parameters(cfg.policy.name, cfg.size, cfg.policy.dual, cfg.policy.actions, cfg.policy.speaks)
    average = held if cfg.optim.ema or cfg.optim.ema_power else 0
    checkpoint = WEIGHT_BYTES * (held + average) + ADAM_BYTES * trained
    kept = 0 if cfg.untouched else cfg.trainer.keep_checkpoints
    return (kept * checkpoint + WEIGHT_BYTES * held) / 1e9


def device_gigabytes(cfg: TrainConfig) -> float:
    """Weights, gradients, optimiser and average on a device, before activations (vla/memory.py)."""
    from vla.memory import need

    ideas = cfg.policy
    return need(cfg, sizes(ideas.name, cfg.size, ideas.dual, ideas.actions, ideas.speaks)).total / 1e9


def parameters(baseline: str, size: str, dual: bool, actions: str, speaks: bool) -> tuple[int, int]:
    """(all, trained) parameters of a policy."""
    found = sizes(baseline, size, dual, actions, speaks)
    return found.held, found.trained


@cache
def sizes(baseline: str, size: str, dual: bool, actions: str, speaks: bool) -> Sizes:
    """Of a policy, built without memory for its weights."""
    import torch

    from vla.bench.latency import random_policy
    from vla.memory import sizes_of

    ideas = [f"policy.dual={dual}", f"policy.actions={actions}", f"policy.speaks={speaks}"]
    if actions == "string":
        ideas.append("normalization=q99")
    with torch.device("meta"):
        policy, _ = random_policy(baseline, size, *ideas)
    return sizes_of(policy)


def evaluation(configs: list[EvaluateConfig]) -> Table:
    table = Table(title=f"{len(configs)} evaluations", title_justify="left")
    for column in ("policy", "state", "benchmark", "evaluation", "episodes a task"):
        table.add_column(column, overflow="fold")
    lacking = 0
    for cfg in configs:
        state = "there"
        if cfg.policy.startswith(RUN):
            try:
                policy_of_run(cfg.policy)
            except UserError:
                state, lacking = "not trained", lacking + 1
        episodes = "" if cfg.evaluation.name not in ("rollout", "bc_probe") else str(cfg.episodes or "all")
        table.add_row(cfg.policy.removeprefix(RUN), state, cfg.benchmark.name, cfg.evaluation.name, episodes)
    table.caption = f"{lacking} policies are not trained yet; what has records is not run again"
    return table
