"""SpatialVLA's action tokens: three per step, on grids whose cells the training actions fill evenly (fact sheet §5.3).

A step's translation, in spherical coordinates, is one token, its rotation another, the gripper the third. Every
coordinate is cut at the equal-probability quantiles of a Gaussian fitted to the normalised training actions and
truncated to the coordinate's range. A token decodes to the middle of its cell.

Two things differ from the public code, both in the re-adaptation of embeddings. It lists the grid points of a (θ, φ, r)
grid in the order (φ, θ, r), so that embeddings meet other cells' coordinates; here every cell keeps its own. And it
interpolates over a triangulation, which is ambiguous on a regular grid; here linearly along each axis.
"""

from __future__ import annotations

import math

import numpy as np
import torch
from scipy.interpolate import RegularGridInterpolator
from scipy.stats import norm
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from vla.errors import UserError

RANGES = {
    "theta": (0.0, math.pi),
    "phi": (-math.pi, math.pi),
    "r": (0.0, math.sqrt(3)),
    "roll": (-1.0, 1.0),
    "pitch": (-1.0, 1.0),
    "yaw": (-1.0, 1.0),
}
"""Polar angle from +z, azimuth and length of the translation; the rotation's three components."""

TOKENS_PER_STEP = 3
SMALLEST_SIGMA = 1e-6
"""Of a coordinate that never moves, whose cells would otherwise be empty."""


class SpatialGrid(nn.Module):
    """Normalised actions (…, 7) ↔ token indices (…, 3).

    The boundaries are buffers, so that they travel with a policy's weights; uniform, and `fitted` 0, until `fit`.

    Args:
        bins: cells of theta, phi, r, roll, pitch and yaw; the released models' 16, 32, 8, 16, 16, 16 give 8194 tokens:
            translations 0 … 4095, rotations 4096 … 8191, gripper 8192 (closed) and 8193 (open).
    """

    fitted: Tensor

    def __init__(self, bins: list[int]):
        super().__init__()
        if len(bins) != len(RANGES) or min(bins) < 1:
            raise UserError(f"policy.bins={bins} must be six positive numbers of cells: {', '.join(RANGES)}")
        self.bins = list(bins)
        self.translations, self.rotations = math.prod(bins[:3]), math.prod(bins[3:])
        self.size = self.translations + self.rotations + 2
        for (name, (low, high)), cells in zip(RANGES.items(), bins, strict=True):
            self.register_buffer(name, torch.linspace(low, high, cells + 1, dtype=torch.float64))
        self.register_buffer("fitted", torch.zeros((), dtype=torch.float64))  # averages of weights take buffers too

    def edges(self) -> list[Tensor]:
        """The six coordinates' boundaries, float64, each one longer than its number of cells."""
        return [getattr(self, name).double() for name in RANGES]

    def fit(self, actions: Tensor, min_sigma: float = 0.0) -> None:
        """Cut every coordinate at the quantiles of the Gaussian that fits normalised `actions` (N, 7)."""
        for (name, (low, high)), values, cells in zip(
            RANGES.items(), coordinates(actions.double()), self.bins, strict=True
        ):
            sigma = max(values.std(correction=0).item(), min_sigma, SMALLEST_SIGMA)
            edges = quantile_edges(values.mean().item(), sigma, low, high, cells)
            getattr(self, name).copy_(torch.from_numpy(edges))
        self.fitted.fill_(1)

    def encode(self, actions: Tensor) -> Tensor:
        """Indices 0 … size − 1, int64 (…, 3); motion beyond ±1 is clipped, a gripper of 0.5 is open."""
        theta, phi, r, roll, pitch, yaw = (
            torch.bucketize(values.contiguous(), edges[1:-1].contiguous(), right=True)
            for values, edges in zip(coordinates(actions.double()), self.edges(), strict=True)
        )
        _, phis, rs, _, pitches, yaws = self.bins
        translation = (theta * phis + phi) * rs + r
        rotation = (roll * pitches + pitch) * yaws + yaw + self.translations
        gripper = (actions[..., 6] >= 0.5).long() + self.translations + self.rotations
        return torch.stack([translation, rotation, gripper], dim=-1)

    def decode(self, indices: Tensor) -> Tensor:
        """Normalised actions float32 (…, 7), gripper 0 or 1; an index of another kind becomes its own's nearest."""
        _, phis, rs, _, pitches, yaws = self.bins
        translation = indices[..., 0].clamp(0, self.translations - 1)
        rotation = (indices[..., 1] - self.translations).clamp(0, self.rotations - 1)
        gripper = (indices[..., 2] - self.translations - self.rotations).clamp(0, 1)
        cells = (
            translation // (phis * rs), translation // rs % phis, translation % rs,
            rotation // (pitches * yaws), rotation // yaws % pitches, rotation % yaws,
        )  # fmt: skip
        theta, phi, r, *angles = (
            ((edges[:-1] + edges[1:]) / 2)[cell] for edges, cell in zip(self.edges(), cells, strict=True)
        )
        # The sphere of all r holds the cube of all translations; what is outside the cube is clipped to its faces.
        offset = [r * theta.sin() * phi.cos(), r * theta.sin() * phi.sin(), r * theta.cos()]
        return torch.stack([*(x.clamp(-1, 1) for x in offset), *angles, gripper], dim=-1).float()


def coordinates(actions: Tensor) -> tuple[Tensor, ...]:
    """theta, phi, r, roll, pitch and yaw of normalised actions (…, 7), clipped to ±1 first."""
    x, y, z, roll, pitch, yaw = actions[..., :6].clamp(-1, 1).unbind(-1)
    planar = torch.hypot(x, y)
    return torch.atan2(planar, z), torch.atan2(y, x), torch.hypot(planar, z), roll, pitch, yaw


def quantile_edges(mean: float, sigma: float, low: float, high: float, cells: int) -> np.ndarray:
    """Boundaries (cells + 1) of equal probability under N(mean, sigma) truncated to [low, high]."""
    probability = np.linspace(norm.cdf(low, mean, sigma), norm.cdf(high, mean, sigma), cells + 1)
    edges = norm.ppf(probability, mean, sigma).clip(low, high)
    edges[0], edges[-1] = low, high
    return edges


def adapt_embeddings(embeddings: Tensor, old: list[Tensor], new: list[Tensor]) -> Tensor:
    """Token embeddings (size, D) of the grid with edges `old`, moved to the cells of `new`.

    Each new cell takes what linear interpolation between the old cells' centres gives at its own; beyond the outermost
    centre the embedding stays as it is there. The gripper's two are kept.
    """
    moved, start = embeddings.clone(), 0
    for kind in (slice(0, 3), slice(3, 6)):
        cells = [len(edges) - 1 for edges in old[kind]]
        count = math.prod(cells)
        values = embeddings[start : start + count].double().cpu().numpy().reshape(*cells, -1)
        knots = [np.concatenate([e[:1], _centres(e), e[-1:]]) for e in _numpy(old[kind])]
        padded = np.pad(values, [(1, 1)] * 3 + [(0, 0)], mode="edge")
        wanted = np.stack(np.meshgrid(*map(_centres, _numpy(new[kind])), indexing="ij"), axis=-1)
        at_new = RegularGridInterpolator(knots, padded)(wanted.reshape(count, 3))
        moved[start : start + count] = torch.from_numpy(at_new).to(embeddings)
        start += count
    return moved


def _numpy(edges: list[Tensor]) -> list[np.ndarray]:
    return [e.double().cpu().numpy() for e in edges]


def _centres(edges: np.ndarray) -> np.ndarray:
    return (edges[:-1] + edges[1:]) / 2


def action_token(index: int) -> str:
    """The name of token `index` in a tokenizer, `<ACTION00000>` the first."""
    return f"<ACTION{index:05d}>"


def add_action_tokens(tokenizer: PreTrainedTokenizerBase, count: int) -> int:
    """The id of the first of `count` action tokens, consecutive at the end of the vocabulary; added where missing.

    Raises:
        UserError: the tokenizer has action tokens already, but of another grid.
    """
    names = [action_token(index) for index in range(count)]
    if action_token(0) not in tokenizer.get_vocab():
        tokenizer.add_tokens(names, special_tokens=True)
    start = tokenizer.convert_tokens_to_ids(names[0])
    if tokenizer.convert_tokens_to_ids(names[-1]) != start + count - 1 or len(tokenizer) != start + count:
        raise UserError(
            f"the tokenizer's action tokens are not the {count} of policy.bins; set the bins it was made for"
        )
    return start
