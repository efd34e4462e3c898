"""SpatialVLA's action grid against the fact sheet (§5.3, §14) and plain numpy written here."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch
from scipy.stats import norm, truncnorm

from vla.action_tokens.grid import SpatialGrid, adapt_embeddings, add_action_tokens, coordinates, quantile_edges
from vla.errors import UserError
from vla.tokenizer import byte_tokenizer

RELEASED = [16, 32, 8, 16, 16, 16]
RANGES = [(0, np.pi), (-np.pi, np.pi), (0, np.sqrt(3)), (-1, 1), (-1, 1), (-1, 1)]


def data(count: int = 5000) -> torch.Tensor:
    rng = np.random.default_rng(0)
    actions = rng.normal([0.1, 0.0, -0.2, 0, 0.1, 0, 0], [0.3, 0.3, 0.4, 0.3, 0.3, 0.2, 0], (count, 7)).clip(-1, 1)
    actions[:, 6] = rng.integers(0, 2, count)
    return torch.tensor(actions, dtype=torch.float32)


@pytest.fixture(scope="module")
def grid() -> SpatialGrid:
    grid = SpatialGrid(RELEASED)
    grid.fit(data())
    return grid


def polar(x: float, y: float, z: float) -> tuple[float, float, float]:
    return math.atan2(math.sqrt(x * x + y * y), z), math.atan2(y, x), math.sqrt(x * x + y * y + z * z)


def naive_encode(action: np.ndarray, edges: list[np.ndarray]) -> list[int]:
    """The sheet's rule, one action at a time: inner edges for the translation, digitize − 1 for the rotation."""
    values = [*polar(*action[:3]), *action[3:6]]
    theta, phi, r = (int(np.digitize(v, e[1:-1])) for v, e in zip(values[:3], edges[:3], strict=True))
    roll, pitch, yaw = (min(max(int(np.digitize(v, e)) - 1, 0), 15) for v, e in zip(values[3:], edges[3:], strict=True))
    return [theta * 256 + phi * 8 + r, 4096 + roll * 256 + pitch * 16 + yaw, 8192 + (1 if action[6] >= 0.5 else 0)]


def test_sizes_and_offsets(grid):
    assert (grid.translations, grid.rotations, grid.size) == (4096, 4096, 8194)
    assert 257153 + grid.size == 265347  # §10: text and <image>, then the actions
    ids = grid.encode(data())
    assert ids.dtype == torch.long
    low, high = ids.amin(0).tolist(), ids.amax(0).tolist()
    assert low[0] >= 0 and high[0] < 4096 <= low[1] and high[1] < 8192
    assert (low[2], high[2]) == (8192, 8193)


def test_encode_is_the_sheets_rule(grid):
    edges = [e.numpy() for e in grid.edges()]
    actions = data(300)
    expected = [naive_encode(action.double().numpy(), edges) for action in actions]
    assert grid.encode(actions).tolist() == expected
    assert grid.encode(actions.reshape(10, 30, 7)).reshape(300, 3).tolist() == expected


def test_an_edge_belongs_to_the_cell_above_and_the_range_is_clipped():
    grid = SpatialGrid(RELEASED)
    action = torch.tensor([0.0, 0, 0, 0, -1, 1, 0.5])  # roll on an inner edge, pitch and yaw on the outer ones
    rotation = grid.encode(action)[1].item() - 4096
    assert (rotation // 256, rotation // 16 % 16, rotation % 16) == (8, 0, 15)
    assert grid.encode(action)[2] == 8193
    assert grid.encode(action - torch.tensor([0, 0, 0, 0, 0, 0, 1e-3]))[2] == 8192
    beyond = torch.tensor([3.0, -4, 0.2, 5, -5, 0, 0])
    assert torch.equal(grid.encode(beyond), grid.encode(beyond.clamp(-1, 1)))


def test_decode_then_encode_is_the_identity_for_all_tokens(grid):
    """§14.1: of every centre that is a possible translation; the others lie outside the cube and come back clipped."""
    edges = [e.numpy() for e in grid.edges()]
    centres = [(e[:-1] + e[1:]) / 2 for e in edges]
    ids = torch.stack([torch.arange(4096), torch.arange(4096) + 4096, torch.full((4096,), 8193)], 1)
    ids[::2, 2] = 8192
    actions = grid.decode(ids)
    again = grid.encode(actions)
    assert torch.equal(again[:, 1:], ids[:, 1:])
    inside = 0
    for index, (theta, phi, r) in enumerate(itertools.product(*centres[:3])):
        point = r * np.array([np.sin(theta) * np.cos(phi), np.sin(theta) * np.sin(phi), np.cos(theta)])
        np.testing.assert_allclose(actions[index, :3], point.clip(-1, 1), atol=1e-6)
        if (np.abs(point) < 1).all():
            inside += 1
            assert again[index, 0] == index
    assert inside > 2800
    for index, angles in enumerate(itertools.product(*centres[3:])):
        np.testing.assert_allclose(actions[index, 3:6], angles, atol=1e-6)


def test_coordinates_with_different_numbers_of_cells():
    """Every rotation and small translation of a 2 × 4 × 3, 5 × 2 × 3 grid; the last coordinate varies fastest."""
    grid = SpatialGrid([2, 4, 3, 5, 2, 3])
    assert (grid.translations, grid.rotations, grid.size) == (24, 30, 56)
    edges = [e.numpy() for e in grid.edges()]
    for kind, offset in ((slice(0, 3), 0), (slice(3, 6), 24)):
        centres = [(e[:-1] + e[1:]) / 2 for e in edges[kind]]
        for index, (a, b, c) in enumerate(itertools.product(*centres)):
            action = np.zeros(7)
            inner = c < 1  # a radius within the cube whatever the direction
            action[kind] = (a, b, c) if offset else [
                c * math.sin(a) * math.cos(b), c * math.sin(a) * math.sin(b), c * math.cos(a)]  # fmt: skip
            column = 1 if offset else 0
            if offset or inner:
                assert grid.encode(torch.tensor(action))[column] == offset + index
                token = torch.tensor([0, 24, 54])
                token[column] = offset + index
                np.testing.assert_allclose(grid.decode(token)[kind], action[kind], atol=1e-6)


def test_foreign_ids_become_the_nearest_of_their_kind(grid):
    foreign = torch.tensor([[-50, 3, 0], [8193, 8193, 7], [5000, 9000, 9000]])
    nearest = torch.tensor([[0, 4096, 8192], [4095, 8191, 8192], [4095, 8191, 8193]])
    assert torch.equal(grid.decode(foreign), grid.decode(nearest))


def test_edges_are_truncated_quantiles():
    """Against scipy's own truncated normal, and the sheet's figures for the pretraining mixture's roll at σ = 0.5."""
    for mean, sigma, (low, high), cells in [(2.18, 0.785, RANGES[0], 16), (0.14, 1.79, RANGES[1], 32)]:
        reference = truncnorm((low - mean) / sigma, (high - mean) / sigma, mean, sigma)
        expected = reference.ppf(np.linspace(0, 1, cells + 1))
        np.testing.assert_allclose(quantile_edges(mean, sigma, low, high, cells), expected, atol=1e-9)
    np.testing.assert_allclose(quantile_edges(-0.017, 0.5, -1, 1, 16)[1:4], [-0.705, -0.548, -0.431], atol=2e-3)


def test_a_wide_gaussian_gives_equal_cells_and_the_ends_are_exact():
    """§14.2."""
    for (low, high), cells in zip(RANGES, RELEASED, strict=True):
        edges = quantile_edges(0.1, 1e5, low, high, cells)
        np.testing.assert_allclose(edges, np.linspace(low, high, cells + 1), atol=1e-6)
        narrow = quantile_edges(0.3, 0.01, low, high, cells)
        assert (narrow[0], narrow[-1]) == (low, high) and (np.diff(narrow) > 0).all()


def test_fit_is_the_datas_own_mean_and_deviation(grid):
    values = np.array([[*polar(*a[:3]), *a[3:6]] for a in data().double().numpy()])
    for edges, column, (low, high), cells in zip(grid.edges(), values.T, RANGES, RELEASED, strict=True):
        inner = norm.cdf(edges[1:-1].numpy(), column.mean(), column.std())
        ends = norm.cdf([low, high], column.mean(), column.std())
        np.testing.assert_allclose(np.diff([ends[0], *inner, ends[1]]), (ends[1] - ends[0]) / cells, atol=1e-9)
    assert grid.fitted == 1


def test_least_sigma_and_coordinates_that_never_move():
    still = data()
    still[:, 5] = 0
    grid = SpatialGrid(RELEASED)
    grid.fit(still)
    assert (grid.yaw.diff() > 0).all() and grid.decode(grid.encode(still))[:, 5].abs().max() < 1e-5
    grid.fit(still, min_sigma=0.5)
    np.testing.assert_allclose(grid.yaw.numpy(), quantile_edges(0, 0.5, -1, 1, 16))


def test_coordinates_clip_before_they_turn():
    x = coordinates(torch.tensor([2.0, 0, 0, -3, 0, 0, 0]))
    assert [round(v.item(), 4) for v in x] == [round(math.pi / 2, 4), 0, 1, -1, 0, 0]


def trilinear(value, knots: list[np.ndarray], point) -> np.ndarray:
    """Along one axis after the other; `value(i, j, k)` at the knots, which are centres with the range's ends added."""
    cell = [
        min(max(int(np.searchsorted(k, p, side="right")) - 1, 0), len(k) - 2) for k, p in zip(knots, point, strict=True)
    ]
    total = 0.0
    for corner in itertools.product((0, 1), repeat=3):
        weight = 1.0
        for axis in range(3):
            low, high = knots[axis][cell[axis]], knots[axis][cell[axis] + 1]
            share = (point[axis] - low) / (high - low)
            weight *= share if corner[axis] else 1 - share
        total = total + weight * value(*(c + d for c, d in zip(cell, corner, strict=True)))
    return total


def test_embeddings_move_to_the_new_cells_by_linear_interpolation():
    bins = [4, 6, 3, 5, 3, 4]
    old, new = SpatialGrid(bins), SpatialGrid(bins)
    old.fit(data(), min_sigma=0.7)
    new.fit(data() * 0.5)
    embeddings = torch.randn(old.size, 2, generator=torch.Generator().manual_seed(0))
    moved = adapt_embeddings(embeddings, old.edges(), new.edges())
    assert torch.equal(moved[-2:], embeddings[-2:])
    start = 0
    for kind in (slice(0, 3), slice(3, 6)):
        cells, ranges = bins[kind], RANGES[kind]
        before, after = ([e.numpy() for e in grid.edges()[kind]] for grid in (old, new))
        knots = [np.array([r[0], *(e[:-1] + e[1:]) / 2, r[1]]) for e, r in zip(before, ranges, strict=True)]

        def value(*index, cells=cells, start=start):
            i, j, k = (min(max(x - 1, 0), n - 1) for x, n in zip(index, cells, strict=True))
            return embeddings[start + (i * cells[1] + j) * cells[2] + k].numpy()

        for number, cell in enumerate(itertools.product(*map(range, cells))):
            centre = [(e[c] + e[c + 1]) / 2 for e, c in zip(after, cell, strict=True)]
            np.testing.assert_allclose(moved[start + number], trilinear(value, knots, centre), atol=1e-5)
        start += math.prod(cells)
    assert not torch.allclose(moved, embeddings, atol=0.1)


def test_the_same_grid_keeps_the_embeddings(grid):
    embeddings = torch.randn(grid.size, 3)
    torch.testing.assert_close(adapt_embeddings(embeddings, grid.edges(), grid.edges()), embeddings)


def test_action_tokens_are_named_and_last_in_the_vocabulary():
    tokenizer = byte_tokenizer()
    before = len(tokenizer)
    assert add_action_tokens(tokenizer, 8194) == before and len(tokenizer) == before + 8194
    assert tokenizer.convert_tokens_to_ids(["<ACTION00000>", "<ACTION04096>", "<ACTION08193>"]) == [
        before, before + 4096, before + 8193,
    ]  # fmt: skip
    assert add_action_tokens(tokenizer, 8194) == before and len(tokenizer) == before + 8194
    for other in (8193, 9000):
        with pytest.raises(UserError, match=r"policy\.bins"):
            add_action_tokens(tokenizer, other)


def test_wrong_bins_are_named():
    for bins in ([16, 32, 8], [16, 32, 8, 16, 0, 16]):
        with pytest.raises(UserError, match=r"policy\.bins"):
            SpatialGrid(bins)
