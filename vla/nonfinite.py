"""A step whose loss or gradient is not finite: never taken, and written down so that it can be looked at again.

`trainer.on_nan=stop` ends the run there; `skip` leaves weights, optimiser and average as they are, goes on with the
next batch, and stops after `trainer.max_skipped` steps in all. Schedule and step counter go on, so that what a step
reads and draws stays a function of its number.

    run/nan/step=K/rank=R.json     sample indices, losses, seed and key of the random draws, newest checkpoint, versions
    .venv/bin/python scripts/replay_nan.py run/nan/step=K
"""

from __future__ import annotations

import copy
import importlib.metadata
import itertools
import json
import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

import lightning as L
import numpy as np
import torch
from torch import Tensor

from vla.saving import saved

if TYPE_CHECKING:
    from vla.module import VLAModule

PACKAGES = ("torch", "lightning", "transformers", "numpy")


def clip_to_norm(optimizer: torch.optim.Optimizer, most: float | None) -> Tensor:
    """The norm of all gradients together, before they are scaled down to `most` (0 or None: they are not)."""
    parameters = [p for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
    norm = torch.nn.utils.get_total_norm([p.grad for p in parameters])
    if hasattr(norm, "full_tensor"):  # of shards: the same on all processes
        norm = norm.full_tensor()
    if most:
        torch.nn.utils.clip_grads_with_norm_(parameters, most, norm)
    return norm


def running_statistics(module: torch.nn.Module) -> list[Tensor]:
    """What a forward pass changes: batch normalisations' averages."""
    norms = (part for part in module.modules() if isinstance(part, torch.nn.modules.batchnorm._BatchNorm))
    return [buffer for norm in norms for buffer in norm.buffers()]


def drop_gradients(optimizer: torch.optim.Optimizer) -> None:
    """Without a gradient a parameter is left alone by the optimiser, its moments and its decay too."""
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            parameter.grad = None


def write_down(trainer: L.Trainer, module: VLAModule, losses: list[dict[str, Tensor]], norm: Tensor) -> Path:
    """What replays the step, one file per process.

    Args:
        losses: of each backward pass of the step.
        norm: of the gradient.
    """
    step, run = trainer.global_step, Path(trainer.default_root_dir)
    older = [folder.name for folder in saved(run)]
    content = {
        "step": step,
        "rank": trainer.global_rank,
        "world_size": trainer.world_size,
        "seed": module.seed,
        "key": module.key,  # of the last pass, what torch was seeded with
        "batches": batches_of(trainer.train_dataloader.batch_sampler, step, len(losses)),
        "losses": [{name: told(value) for name, value in of.items()} for of in losses],
        "gradient_norm": told(norm),
        "skipped_before": module.skipped,
        "checkpoint": older[-1] if older else None,
        "versions": {name: importlib.metadata.version(name) for name in PACKAGES},
    }
    folder = run / "nan" / f"step={step}"
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"rank={trainer.global_rank}.json").write_text(json.dumps(content, indent=2) + "\n")
    return folder


def batches_of(sampler: Any, step: int, passes: int) -> list[Any]:
    """The indices that this process reads at a step, of each backward pass; with co-training (robot, question) ones."""
    sampler = copy.copy(sampler)
    if hasattr(sampler, "robot"):
        sampler.robot = copy.copy(sampler.robot)
    getattr(sampler, "robot", sampler).first_step = step
    batches = itertools.islice(sampler, passes)
    return [[part.tolist() for part in b] if isinstance(b, tuple) else np.asarray(b).tolist() for b in batches]


def told(value: Tensor) -> float | str:
    """A number for JSON, which has none that is not finite; with all its digits."""
    number = float(value)
    return number if math.isfinite(number) else str(number)
