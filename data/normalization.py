"""Statistics of a data set, and the maps between physical and normalised actions (fact sheet §1.1, §3.6).

Statistics are computed when a frame store is written, live in it, and travel inside every checkpoint and exported
policy. Of an action only the six motion dims are normalised; the gripper stays {0, 1}, 1 = open. Proprioception is
normalised by the same scheme, all of its dims.

Schemes:
    none          unchanged
    q99           clip(2 (a − q01) / (q99 − q01 + 1e-8) − 1, −1, 1); dims that never move become 0
    clip065       clip(a, ±0.65) / 0.65 (VLM4VLA on CALVIN)
    q99_clip065   q99, then clip065 (VLM4VLA on OXE and LIBERO)
    zscore        (a − mean) / (std + 1e-6) (π0)
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from data.statistics import ActionStatistics
from vla.errors import UserError

SCHEMES = ("none", "q99", "clip065", "q99_clip065", "zscore")
MOTION = 6
CLIP = 0.65


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
            if statistics.state is not None:
                state = torch.tensor(statistics.state[name], dtype=torch.float32)
                self.register_buffer(f"state_{name}", state, persistent=False)

    def normalize_state(self, state: Tensor) -> Tensor:
        """(…, S) proprioception by the same scheme: z-score, or q01/q99 to [-1, 1]; "none" and "clip065" leave it.

        Raises:
            UserError: the statistics hold none of the state, or of a state of another width.
        """
        if self.scheme in ("none", "clip065"):
            return state
        known = 0 if self.statistics.state is None else len(self.state_mean)
        if known != state.shape[-1]:
            raise UserError(
                f"the state has {state.shape[-1]} numbers, the policy's statistics describe {known}; "
                "train on this benchmark's data"
            )
        if self.scheme == "zscore":
            return (state - self.state_mean) / (self.state_std + 1e-6)
        return _by_quantiles(state, self.state_q01, self.state_q99)

    def normalize(self, actions: Tensor) -> Tensor:
        motion = actions[..., :MOTION]
        if self.scheme.startswith("q99"):
            motion = _by_quantiles(motion, self.q01, self.q99)
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


def _by_quantiles(values: Tensor, q01: Tensor, q99: Tensor) -> Tensor:
    scaled = (2 * (values - q01) / (q99 - q01 + 1e-8) - 1).clamp(-1, 1)
    return torch.where(q99 > q01, scaled, torch.zeros_like(scaled))
