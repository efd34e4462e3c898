"""t-SNE (van der Maaten and Hinton, JMLR 9:2579, 2008), exact: every pair of points counts.

Memory is three float32 N × N matrices and time N² per step: 2,000 points take about a minute on a CPU, 10,000 want
a GPU. Schedule and learning rate are those scikit-learn has by default, as is the start from principal components:
the same input gives the same picture.

    points = tsne(features, perplexity=30)
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

EXAGGERATION, EXAGGERATED_STEPS = 12.0, 250
COMPONENTS = 50
TINY = 1e-12


@torch.no_grad()
def tsne(features: Tensor, perplexity: float = 30.0, steps: int = 1000) -> tuple[Tensor, float]:
    """
    Args:
        features: (N, C), N above 3 · perplexity or the neighbourhoods mean nothing.

    Returns:
        points float32 (N, 2), and the Kullback-Leibler divergence that is left (nats).
    """
    x = principal_components(features.float(), COMPONENTS)
    p = joint_probabilities(x, min(perplexity, (len(x) - 1) / 3))
    early = EXAGGERATION * p
    y = x[:, :2] / x[:, 0].std().clamp(min=TINY) * 1e-4
    rate = max(len(x) / EXAGGERATION / 4, 50.0)
    velocity, gain = torch.zeros_like(y), torch.ones_like(y)
    for step in range(steps):
        exaggerated = step < EXAGGERATED_STEPS
        gradient = kl_gradient(y, early if exaggerated else p)
        against = gradient * velocity < 0  # the step goes on as before
        gain = torch.where(against, gain + 0.2, gain * 0.8).clamp(min=0.01)
        velocity = (0.5 if exaggerated else 0.8) * velocity - rate * gain * gradient
        y = y + velocity
    q = _student(y)
    q = q / q.sum()
    return y, float((p * ((p + TINY) / (q + TINY)).log()).sum())


def principal_components(x: Tensor, count: int) -> Tensor:
    """(N, at most count) coordinates along the directions of most variance; each direction's largest is positive."""
    x = x - x.mean(0)
    _, _, directions = torch.linalg.svd(x, full_matrices=False)
    directions = directions[:count]
    largest = directions.gather(1, directions.abs().argmax(1, keepdim=True))
    return x @ (directions * largest.sign()).T


def joint_probabilities(x: Tensor, perplexity: float) -> Tensor:
    """(N, N) symmetric, summing to 1: each row's Gaussian is as wide as gives it that perplexity (bisection)."""
    distance = _squared_distances(x)
    distance.fill_diagonal_(math.inf)
    nearest = distance.amin(1, keepdim=True)
    low = torch.zeros(len(x), 1, device=x.device)
    high = torch.full_like(low, math.inf)
    precision = 1 / distance.nan_to_num(posinf=0).mean(1, keepdim=True).clamp(min=TINY)
    for _ in range(64):
        row = torch.exp(-(distance - nearest) * precision)
        row = row / row.sum(1, keepdim=True)
        entropy = -(row * (row + TINY).log()).sum(1, keepdim=True)
        too_wide = entropy > math.log(perplexity)
        low, high = torch.where(too_wide, precision, low), torch.where(too_wide, high, precision)
        precision = torch.where(high.isinf(), 2 * precision, (low + high.nan_to_num(posinf=0)) / 2)
    return ((row + row.T) / (2 * len(x))).clamp(min=TINY)  # numbers below float32's normal ones are slow


def kl_gradient(y: Tensor, p: Tensor) -> Tensor:
    """Of KL(P ‖ Q) by the points (N, 2): 4 Σ_j (p_ij − q_ij) (y_i − y_j) / (1 + |y_i − y_j|²)."""
    student = _student(y)
    pull = torch.mul(student, -1 / student.sum()).add_(p).mul_(student)  # in place: memory is what a step waits for
    return 4 * (pull.sum(1, keepdim=True) * y - pull @ y)


def _student(y: Tensor) -> Tensor:
    """(N, N) of 1 / (1 + squared distance), 0 on the diagonal."""
    return _squared_distances(y).add_(1).reciprocal_().fill_diagonal_(0)


def _squared_distances(x: Tensor) -> Tensor:
    square = x.square().sum(1)
    return torch.addmm(square, x, x.T, alpha=-2).add_(square[:, None]).clamp_(min=0)
