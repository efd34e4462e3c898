"""The optimiser, its schedules and the average of the weights, as the five baselines' references have them.

Schedules (`optim.schedule`), every one after `warmup` steps of linear warm-up:
    constant, linear, cosine   transformers' own: linear and cosine end at zero
    cosine_floor               openpi's: warm-up from lr/(warmup + 1), cosine to min_lr_ratio · lr (fact sheet §7.3)
    tristage                   FLOWER's: 5 % warm-up from lr/10, 10 % hold, cosine to min_lr_ratio · lr (§4.5)
"""

from __future__ import annotations

import math
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import WeightAveraging
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR, LRScheduler
from torch.optim.swa_utils import get_ema_avg_fn
from transformers import get_scheduler

from vla.config import OptimConfig
from vla.errors import UserError

FROM_TRANSFORMERS = {"constant": "constant_with_warmup", "cosine": "cosine", "linear": "linear"}
TRISTAGE = (0.05, 0.1, 0.85)
"""Shares of the schedule that FLOWER warms up, holds and decays."""


def make_optimizer(module: nn.Module, cfg: OptimConfig) -> torch.optim.AdamW:
    """AdamW over the trainable parameters; no decay where the name holds one of `cfg.no_decay`.

    On a GPU torch's fused kernel, which holds no temporaries of the weights' size.
    """
    decay, plain = [], []
    for name, parameter in module.named_parameters():
        if parameter.requires_grad:
            (plain if any(part in name for part in cfg.no_decay) else decay).append(parameter)
    groups = [{"params": decay, "weight_decay": cfg.weight_decay}, {"params": plain, "weight_decay": 0.0}]
    fused = all(parameter.is_cuda for group in groups for parameter in group["params"]) or None
    return torch.optim.AdamW([g for g in groups if g["params"]], lr=cfg.lr, betas=cfg.betas, eps=cfg.eps, fused=fused)


def make_schedule(optimizer: torch.optim.Optimizer, cfg: OptimConfig, warmup: int, max_steps: int) -> LRScheduler:
    """The learning rate per optimiser step; `cfg.schedule_steps` is its length where a run stops earlier or later.

    Raises:
        UserError: an unknown schedule.
    """
    steps = cfg.schedule_steps or max_steps
    if cfg.schedule in FROM_TRANSFORMERS:
        return get_scheduler(FROM_TRANSFORMERS[cfg.schedule], optimizer, warmup, steps)
    if cfg.schedule == "cosine_floor":
        return LambdaLR(optimizer, lambda step: cosine_floor(step, warmup, steps, cfg.min_lr_ratio))
    if cfg.schedule == "tristage":
        return LambdaLR(optimizer, lambda step: tristage(step, steps, cfg.min_lr_ratio, cfg.tristage_late))
    known = ", ".join((*FROM_TRANSFORMERS, "cosine_floor", "tristage"))
    raise UserError(f"optim.schedule={cfg.schedule} is not known; choose one of {known}")


def cosine_floor(step: int, warmup: int, steps: int, floor: float) -> float:
    """openpi's factor of the peak rate: 1/(warmup + 1) at step 0, 1 at `warmup`, `floor` from `steps` on."""
    if step < warmup:
        start = 1 / (warmup + 1)
        return start + (1 - start) * step / warmup
    return _cosine((step - warmup) / max(1, steps - warmup), floor)


def tristage(step: int, steps: int, floor: float, late: bool = False) -> float:
    """FLOWER's factor of the peak rate.

    Args:
        late: as the public code runs: the first step at the peak, and all later ones a step behind (fact sheet §0a.2).
    """
    if late:
        if step == 0:
            return 1.0
        step -= 1
    warmup, hold = (round(share * steps) for share in TRISTAGE[:2])
    if step < warmup:
        return 0.1 + 0.9 * step / warmup
    return _cosine((step - warmup - hold) / max(1, steps - warmup - hold), floor)


def _cosine(progress: float, floor: float) -> float:
    progress = min(max(progress, 0.0), 1.0)
    return floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * progress))


class Average(WeightAveraging):
    """Leaves out the steps that were not taken (vla/nonfinite.py)."""

    def on_train_batch_end(self, trainer: L.Trainer, module: L.LightningModule, *rest: Any) -> None:
        if module.skipped_step != trainer.global_step - 1:
            super().on_train_batch_end(trainer, module, *rest)


def weight_average(cfg: OptimConfig) -> WeightAveraging | None:
    """The callback that keeps the exported weights' average, or None."""
    if cfg.ema and cfg.ema_power:
        raise UserError(f"optim.ema={cfg.ema} and optim.ema_power={cfg.ema_power} exclude each other; set one to 0")
    if cfg.ema:
        return Average(avg_fn=get_ema_avg_fn(cfg.ema))
    if cfg.ema_power:
        return Average(avg_fn=lambda average, now, count: towards(average, now, ema_decay(count, cfg.ema_power)))
    return None


def ema_decay(updates: Tensor | int, power: float, largest: float = 0.9999) -> Tensor:
    """FLOWER's decay after `updates` earlier ones: min(1 − (1 + updates)^−power, largest), 0 at first (§4.5)."""
    return (1 - (1 + torch.as_tensor(updates, dtype=torch.float64)) ** -power).clamp(0, largest)


def towards(average: Tensor, now: Tensor, decay: Tensor) -> Tensor:
    """decay · average + (1 − decay) · now; integers (position ids, counters) are copied."""
    return torch.lerp(now, average, decay.to(now)) if now.is_floating_point() else now
