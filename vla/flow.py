"""Flow matching: straight paths between actions and noise, shared by FLOWER and π0 (fact sheet §4.4, §7.2).

t = 1 is noise and t = 0 the action: x_t = (1 − t)·a + t·ε, the velocity to learn is ε − a, and sampling walks from
t = 1 to 0 in equal Euler steps.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable

import torch
from torch import Tensor

LAST = 1 - 1e-5
"""FLOWER keeps t below this."""


def interpolate(actions: Tensor, noise: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
    """(x_t, velocity target), both (B, H, A), for actions and noise (B, H, A) at times t (B,)."""
    t = t[:, None, None]
    return (1 - t) * actions + t * noise, noise - actions


def stratified_times(batch: int, device: torch.device | str = "cpu") -> Tensor:
    """One uniform draw per batch, its members 1/B apart: (u + i/B) mod (1 − 1e-5)."""
    return (torch.rand(1, device=device) + torch.arange(batch, device=device) / batch) % LAST


def logit_normal_times(batch: int, device: torch.device | str = "cpu") -> Tensor:
    """sigmoid of a standard normal, at most 0.999."""
    return torch.randn(batch, device=device).sigmoid().clamp(max=0.999)


def beta_times(batch: int, device: torch.device | str = "cpu", alpha: float = 1.5) -> Tensor:
    """Beta(α, 1)·0.999 + 0.001 (π0); a uniform draw to the power 1/α is Beta(α, 1)."""
    return torch.rand(batch, device=device) ** (1 / alpha) * 0.999 + 0.001


def euler(velocity: Callable[[Tensor, Tensor], Tensor], noise: Tensor, steps: int) -> Tensor:
    """Actions from noise (B, H, A) by `steps` equal steps of `velocity(x_t, t (B,))`."""
    x = noise
    for index in range(steps):
        t = torch.full((len(x),), 1 - index / steps, device=x.device)
        x = x - velocity(x, t) / steps
    return x


def initial_noise(observation: dict, shape: tuple[int, ...], device: torch.device | str) -> Tensor:
    """Standard normal (B, *shape) float32.

    A rollout's observation carries "seed" and "step" (B,): then each row is a function of its own pair, whatever else
    is in the batch, and an episode repeats exactly. Otherwise torch's global generator is used.
    """
    if "seed" not in observation:
        return torch.randn(len(observation["instruction"]), *shape, device=device)
    rows = []
    for seed, step in zip(observation["seed"].tolist(), observation["step"].tolist(), strict=True):
        key = hashlib.sha256(f"{seed}/{step}".encode()).digest()
        rows.append(torch.randn(shape, generator=torch.Generator().manual_seed(int.from_bytes(key[:7], "big"))))
    return torch.stack(rows).to(device)
