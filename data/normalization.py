"""Action statistics of a data set, and the maps between physical and normalised actions (fact sheet §1.1, §3.6).

Statistics are computed when a frame store is written, live in it, and travel inside every checkpoint and exported
policy. Only the six motion dims are normalised; the gripper stays {0, 1}, 1 = open.

Schemes:
    none          unchanged
    q99           clip(2 (a − q01) / (q99 − q01 + 1e-8) − 1, −1, 1); dims that never move become 0
    clip065       clip(a, ±0.65) / 0.65 (VLM4VLA on CALVIN)
    q99_clip065   q99, then clip065 (VLM4VLA on OXE and LIBERO)
    zscore        (a − mean) / (std + 1e-6) (π0)
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from vla.errors import UserError

SCHEMES = ("none", "q99", "clip065", "q99_clip065", "zscore")
MOTION = 6
CLIP = 0.65


@dataclass(frozen=True)
class ActionStatistics:
    """Per-dimension statistics of (N, 7) actions; lists of seven floats."""

    q01: list[float]
    q99: list[float]
    mean: list[float]
    std: list[float]
    min: list[float]
    max: list[float]
    count: int

    @classmethod
    def of(cls, actions: np.ndarray) -> ActionStatistics:
        actions = np.asarray(actions, dtype=np.float64)
        if not np.isfinite(actions).all():
            raise UserError("actions hold NaN or infinite values; find the episode with scripts/convert.py and drop it")
        q01, q99 = np.quantile(actions, [0.01, 0.99], axis=0)
        moments = dict(mean=actions.mean(0), std=actions.std(0), min=actions.min(0), max=actions.max(0))
        return cls(q01.tolist(), q99.tolist(), **{k: v.tolist() for k, v in moments.items()}, count=len(actions))

    def to_dict(self) -> dict:
        return dict(self.__dict__)


class ActionNormalizer(nn.Module):
    """Maps (…, 7) actions between physical and normalised units; differentiable, on any device.

    Its constants are not in state_dict: they come from `statistics`, which is saved beside the weights.
    """

    def __init__(self, statistics: ActionStatistics, scheme: str):
        super().__init__()
        if scheme not in SCHEMES:
            raise UserError(f"normalization={scheme} is not known; choose one of {', '.join(SCHEMES)}")
        self.statistics, self.scheme = statistics, scheme
        for name in ("q01", "q99", "mean", "std"):
            values = torch.tensor(getattr(statistics, name)[:MOTION], dtype=torch.float32)
            self.register_buffer(name, values, persistent=False)

    def normalize(self, actions: Tensor) -> Tensor:
        motion = actions[..., :MOTION]
        if self.scheme.startswith("q99"):
            moving = self.q99 > self.q01
            motion = (2 * (motion - self.q01) / (self.q99 - self.q01 + 1e-8) - 1).clamp(-1, 1)
            motion = torch.where(moving, motion, torch.zeros_like(motion))
        if self.scheme.endswith("clip065"):
            motion = motion.clamp(-CLIP, CLIP) / CLIP
        if self.scheme == "zscore":
            motion = (motion - self.mean) / (self.std + 1e-6)
        return torch.cat([motion, actions[..., MOTION:]], dim=-1)

    def unnormalize(self, actions: Tensor) -> Tensor:
        motion = actions[..., :MOTION]
        if self.scheme == "zscore":
            motion = motion * (self.std + 1e-6) + self.mean
        if self.scheme.endswith("clip065"):
            motion = motion * CLIP
        if self.scheme.startswith("q99"):
            moving = self.q99 > self.q01
            motion = torch.where(moving, 0.5 * (motion + 1) * (self.q99 - self.q01) + self.q01, self.q01)
        return torch.cat([motion, actions[..., MOTION:]], dim=-1)
