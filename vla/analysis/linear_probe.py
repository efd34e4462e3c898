"""A linear classifier on frozen features: multinomial logistic regression, its penalty chosen on held-out rows.

L-BFGS; features are standardised by the training rows. The objective is mean cross-entropy + l2 / 2 · |W|², the
bias free; scikit-learn's C is 1 / (n · l2).

    fit = fit_linear_probe(features, labels, classes=10, penalties=[1e-3, 1e-2], seed=0)
    predicted = fit(test_features).argmax(1)
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from vla.errors import UserError

HELD_OUT = 0.1
ITERATIONS = 500


@dataclass(frozen=True)
class LinearProbe:
    mean: Tensor
    std: Tensor
    weight: Tensor
    """(classes, C)"""
    bias: Tensor
    l2: float
    """The penalty that was best on held-out rows."""

    def __call__(self, features: Tensor) -> Tensor:
        """Logits (N, classes) of features (N, C)."""
        return F.linear((features - self.mean) / self.std, self.weight, self.bias)


def fit_linear_probe(
    features: Tensor, labels: Tensor, classes: int, penalties: Sequence[float], seed: int
) -> LinearProbe:
    """
    Args:
        features: float32 (N, C); the fit runs on their device.
        labels: int64 (N,) in 0 … classes − 1.
        penalties: each is tried on nine tenths of the rows and scored on the rest; one alone is taken as it is.

    Raises:
        UserError: no penalty, or a negative one.
    """
    if not penalties or min(penalties) < 0:
        raise UserError(f"evaluation.cifar10.l2={list(penalties)} must be one or several numbers from 0 on")
    mean, std = features.mean(0), features.std(0)
    std = torch.where(std > 1e-6 * std.max(), std, torch.ones_like(std))  # a constant feature says nothing
    x = (features - mean) / std
    best = penalties[0]
    if len(penalties) > 1:
        order = torch.randperm(len(x), generator=torch.Generator().manual_seed(seed)).to(x.device)
        held_out, kept = order.tensor_split([max(1, round(HELD_OUT * len(x)))])
        scores = []
        for l2 in penalties:
            weight, bias = _fit(x[kept], labels[kept], classes, l2)
            scores.append(int((F.linear(x[held_out], weight, bias).argmax(1) == labels[held_out]).sum()))
        best = max(zip(scores, penalties, strict=True))[1]  # of equals the strongest penalty
    return LinearProbe(mean, std, *_fit(x, labels, classes, best), best)


def _fit(x: Tensor, labels: Tensor, classes: int, l2: float) -> tuple[Tensor, Tensor]:
    weight = torch.zeros(classes, x.shape[1], device=x.device, requires_grad=True)
    bias = torch.zeros(classes, device=x.device, requires_grad=True)
    optimiser = torch.optim.LBFGS(
        [weight, bias], max_iter=ITERATIONS, tolerance_grad=1e-6, tolerance_change=1e-9, line_search_fn="strong_wolfe"
    )

    def objective() -> Tensor:
        optimiser.zero_grad()
        loss = F.cross_entropy(F.linear(x, weight, bias), labels) + l2 / 2 * weight.square().sum()
        loss.backward()
        return loss

    with torch.enable_grad():
        optimiser.step(objective)
    return weight.detach(), bias.detach()
