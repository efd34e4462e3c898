"""A frozen vision encoder beside the trained one (GenVLA §III-A; fact sheet §8.1): z = [frozen(o) ‖ trained(o)].

The frozen one is a copy of the baseline's pretrained tower or, where a baseline has two (OpenVLA), one of them.
Features are concatenated on channels, and the linear map behind them starts so that the model is the one with a single
encoder. The frozen tower stays in eval mode, has no gradient and no optimiser state, and sees only what the policy
decodes: o_{t+H} of inverse dynamics and the probes read the trained tower alone, and never make the other work.
"""

from __future__ import annotations

from copy import deepcopy
from typing import Any

import torch
from torch import Tensor, nn

from vla.errors import UserError


class Frozen(nn.Module):
    """A copy of `module` as it is now, for good."""

    def __init__(self, module: nn.Module):
        super().__init__()
        self.module = deepcopy(module).requires_grad_(False).eval()

    def train(self, mode: bool = True) -> Frozen:
        return super().train(False)

    @torch.no_grad()
    def forward(self, *inputs: Any, **options: Any) -> Any:
        return self.module(*inputs, **options)


def widened(linear: nn.Linear) -> nn.Linear:
    """A map of two features of `linear`'s width, [W/2 | W/2] with its bias: of a feature twice, what `linear` gives."""
    wide = nn.Linear(2 * linear.in_features, linear.out_features, bias=linear.bias is not None)
    wide = wide.to(linear.weight.device, linear.weight.dtype)
    with torch.no_grad():
        wide.weight.copy_(linear.weight.repeat(1, 2) / 2)
        if linear.bias is not None:
            wide.bias.copy_(linear.bias)
    return wide


def mixer(width: int) -> nn.Linear:
    """The same where no linear map is at hand (behind a whole tower): [I/2 | I/2], the mean of both to start with."""
    half = torch.eye(width) / 2
    linear = nn.Linear(2 * width, width)
    with torch.no_grad():
        linear.weight.copy_(torch.cat([half, half], dim=1))
        linear.bias.zero_()
    return linear


def beside(frozen: Tensor, trained: Tensor) -> Tensor:
    """(…, 2 C): the frozen features first."""
    return torch.cat([frozen.to(trained.dtype), trained], dim=-1)


def require_own_tap(tap: int | str) -> None:
    """UserError where the tap lies behind the map that joins both encoders (fact sheet §8.8)."""
    if tap == "post_projector":
        raise UserError(
            "inverse_dynamics.tap=post_projector lies behind both encoders of policy.dual=true; "
            "choose pre_projector or layer:k, where only the trained one is"
        )
