"""Proprioception's normalisation, and what stands in action steps that do not exist."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from data.normalization import ActionNormalizer, ActionStatistics
from vla.errors import UserError
from vla.policy import hold_last


def normalizer(scheme: str, states: np.ndarray | None) -> ActionNormalizer:
    return ActionNormalizer(ActionStatistics.of(np.random.default_rng(0).normal(size=(300, 7)), states), scheme)


@pytest.fixture(scope="module")
def states() -> np.ndarray:
    """(500, 4): spread, shifted, tiny, and one that never moves."""
    rng = np.random.default_rng(1)
    return np.stack([rng.normal(0, 3, 500), rng.uniform(5, 6, 500), rng.normal(0, 1e-3, 500), np.full(500, 0.25)], 1)


def test_zscore_covers_every_dim(states):
    got = normalizer("zscore", states).normalize_state(torch.from_numpy(states).float()).double().numpy()
    for dim in range(4):
        expected = (states[:, dim] - states[:, dim].mean()) / (states[:, dim].std() + 1e-6)
        np.testing.assert_allclose(got[:, dim], expected, atol=2e-3)
    np.testing.assert_allclose(got[:, :3].mean(0), 0, atol=1e-3)
    assert (got[:, 3] == 0).all(), "a dim that never moves is 0, not a division by nothing"


@pytest.mark.parametrize("scheme", ["q99", "q99_clip065"])
def test_quantiles_map_to_plus_minus_one_and_clip(states, scheme):
    got = normalizer(scheme, states).normalize_state(torch.from_numpy(states).float()).double().numpy()
    for dim in range(3):
        low, high = np.quantile(states[:, dim], [0.01, 0.99])
        for row in range(0, 500, 7):
            expected = min(1.0, max(-1.0, 2 * (states[row, dim] - low) / (high - low) - 1))
            assert got[row, dim] == pytest.approx(expected, abs=2e-4)
    assert got.min() == -1 and got.max() == 1 and (got[:, 3] == 0).all()


def test_the_gripper_of_the_state_is_normalised_like_the_rest(states):
    """Unlike the action's: no dim of the state is left out, wherever it stands."""
    turned = normalizer("zscore", states[:, ::-1].copy())
    forward = normalizer("zscore", states).normalize_state(torch.from_numpy(states).float())
    backward = turned.normalize_state(torch.from_numpy(states[:, ::-1].copy()).float())
    torch.testing.assert_close(forward.flip(-1), backward)


@pytest.mark.parametrize("scheme", ["none", "clip065"])
def test_schemes_without_statistics_leave_the_state(states, scheme):
    state = torch.from_numpy(states).float()
    assert torch.equal(normalizer(scheme, None).normalize_state(state), state)


@pytest.mark.parametrize("shape", [(4,), (3, 4), (2, 3, 4)])
def test_any_leading_shape(states, shape):
    state = torch.randn(shape)
    got = normalizer("zscore", states).normalize_state(state)
    rows = normalizer("zscore", states).normalize_state(state.reshape(-1, 4))
    assert got.shape == shape and torch.equal(got.reshape(-1, 4), rows)


def test_a_state_of_another_width_or_without_statistics_is_named(states):
    with pytest.raises(UserError, match="has 5 numbers, the policy's statistics describe 4"):
        normalizer("zscore", states).normalize_state(torch.zeros(2, 5))
    with pytest.raises(UserError, match="statistics describe 0"):
        normalizer("q99", None).normalize_state(torch.zeros(2, 4))


def test_state_statistics_are_no_weights(states):
    """They travel in statistics.json; a policy trained on other data must not load them."""
    assert not normalizer("zscore", states).state_dict()


def test_hold_last_repeats_the_last_valid_action():
    actions = torch.arange(3 * 5 * 7, dtype=torch.float32).reshape(3, 5, 7)
    counts = [5, 3, 1]
    valid = torch.tensor([[step < count for step in range(5)] for count in counts])
    held = hold_last(actions, valid)
    for row, count in enumerate(counts):
        for step in range(5):
            assert torch.equal(held[row, step], actions[row, min(step, count - 1)])


def test_hold_last_does_not_read_what_it_replaces():
    actions, valid = torch.randn(2, 4, 7), torch.tensor([[1, 1, 0, 0], [1, 0, 0, 0]]) > 0
    spoilt = torch.where(valid[..., None], actions, torch.nan)
    assert torch.equal(hold_last(spoilt, valid), hold_last(actions, valid))


def test_hold_last_leaves_a_whole_chunk_and_its_input_alone():
    actions = torch.randn(2, 4, 7)
    kept = actions.clone()
    assert torch.equal(hold_last(actions, torch.ones(2, 4, dtype=torch.bool)), kept)
    hold_last(actions, torch.tensor([[1, 0, 0, 0]] * 2) > 0)
    assert torch.equal(actions, kept)


def test_hold_last_passes_gradients_to_valid_steps_only():
    actions = torch.randn(1, 3, 7, requires_grad=True)
    hold_last(actions, torch.tensor([[True, True, False]])).sum().backward()
    assert actions.grad[0, :, 0].tolist() == [1.0, 2.0, 0.0]
