"""The papers' probe: a light MLP on frozen visual tokens (IDL A.6, A.7, tables 11 and 12; fact sheet §1.4).

Per token Linear(C → 256) and GELU, flattened, then two hidden layers 1024 and 512 with GELU and dropout. Losses:
behaviour cloning L1 on the six motion dims + 0.01 · BCE on the gripper, proprioception L1. What the paper leaves open
and is chosen here: the dropout rate (0.1); targets in the data set's own units, so that losses of encoders trained with
other normalisations can be compared; the last 10 % of each task's demonstrations validate.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from data.sampler import sample_at
from vla.policy import GRIPPER

PROJECTION, HIDDEN = 256, 512


class ProbeHead(nn.Module):
    """Tokens (B, P, C) → (B, outputs)."""

    def __init__(self, tokens: int, channels: int, outputs: int, dropout: float = 0.1):
        super().__init__()
        self.project = nn.Sequential(nn.Linear(channels, PROJECTION), nn.GELU())
        self.mlp = nn.Sequential(
            nn.Linear(tokens * PROJECTION, 2 * HIDDEN),
            nn.GELU(),
            nn.Dropout(dropout),
            nn.Linear(2 * HIDDEN, HIDDEN),
            nn.GELU(),
            nn.Dropout(dropout),
            nn.Linear(HIDDEN, outputs),
        )

    def forward(self, tokens: Tensor) -> Tensor:
        return self.mlp(self.project(tokens).flatten(1))


def cloning_loss(predicted: Tensor, actions: Tensor, valid: Tensor, gripper_weight: float) -> Tensor:
    """L1 of motion + gripper_weight · BCE, each a mean over valid steps (and dims).

    Args:
        predicted: (B, H·7), gripper as a logit.
        actions: (B, H, 7), gripper in {0, 1}.
        valid: bool (B, H).
    """
    predicted = predicted.view_as(actions)
    motion = (predicted[..., :GRIPPER] - actions[..., :GRIPPER]).abs().mean(-1)
    gripper = F.binary_cross_entropy_with_logits(predicted[..., GRIPPER], actions[..., GRIPPER], reduction="none")
    weight = valid.float() / valid.sum().clamp(min=1)
    return ((motion + gripper_weight * gripper) * weight).sum()


@dataclass(frozen=True)
class ProbeSettings:
    """How a head is trained; `steps` of Adam at `lr`, validated every `validate_every`."""

    steps: int
    batch_size: int
    lr: float
    validate_every: int
    dropout: float
    seed: int


@dataclass(frozen=True)
class Fit:
    """A trained head and what it cost: mean training loss over all steps, mean of the validation losses."""

    head: ProbeHead
    train: float
    validation: float
    train_curve: list[float]
    validation_curve: list[tuple[int, float]]


def fit_probe(
    tokens: Callable[[np.ndarray], Tensor],
    loss: Callable[[Tensor, np.ndarray], Tensor],
    shape: tuple[int, int],
    outputs: int,
    train: np.ndarray,
    validation: np.ndarray,
    settings: ProbeSettings,
    device: str = "cpu",
) -> Fit:
    """Train one head.

    Args:
        tokens: sample numbers (int64 (B,)) → frozen tokens (B, P, C).
        loss: (head's output (B, outputs), the same sample numbers) → scalar.
        shape: (P, C).
        train, validation: sample numbers.
    """
    torch.manual_seed(settings.seed)
    head = ProbeHead(*shape, outputs, settings.dropout).to(device)
    optimizer = torch.optim.Adam(head.parameters(), lr=settings.lr)
    losses, validations = [], []
    for step in range(1, settings.steps + 1):
        positions = np.arange((step - 1) * settings.batch_size, step * settings.batch_size)
        batch = train[sample_at(positions, len(train), settings.seed)]
        value = loss(head(tokens(batch).to(device)), batch)
        optimizer.zero_grad(set_to_none=True)
        value.backward()
        optimizer.step()
        losses.append(value.detach())
        if step % settings.validate_every == 0 or (step == settings.steps and not validations):
            validations.append((step, _validate(head, tokens, loss, validation, settings.batch_size, device)))
    curve = torch.stack(losses).tolist()
    means = float(np.mean(curve)), float(np.mean([value for _, value in validations]))
    return Fit(head.eval(), *means, curve, validations)


@torch.no_grad()
def _validate(
    head: ProbeHead,
    tokens: Callable[[np.ndarray], Tensor],
    loss: Callable[[Tensor, np.ndarray], Tensor],
    samples: np.ndarray,
    batch_size: int,
    device: str,
) -> float:
    head.eval()
    total = 0.0
    for start in range(0, len(samples), batch_size):
        batch = samples[start : start + batch_size]
        total += float(loss(head(tokens(batch).to(device)), batch)) * len(batch)
    head.train()
    return total / len(samples)


def split_demonstrations(episodes: np.ndarray, share: float) -> np.ndarray:
    """bool per sample, true in the last `share` of the demonstrations `episodes` (n,): one at least, never all."""
    found = np.unique(episodes)
    held_out = min(max(1, round(share * len(found))), len(found) - 1)
    return episodes >= found[len(found) - held_out]
