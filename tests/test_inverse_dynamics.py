"""IDL §3 and A.1, against the formulas written out in loops."""

from __future__ import annotations

import numpy as np
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from data.normalization import ActionNormalizer, ActionStatistics
from vla.inverse_dynamics import InverseDynamics, InverseDynamicsHead, pseudo_time_reversal, reverse_actions
from vla.policy import VisualTokens


def statistics() -> ActionStatistics:
    rng = np.random.default_rng(0)
    return ActionStatistics.of(np.concatenate([rng.normal(0.3, 0.5, (500, 6)), rng.integers(0, 2, (500, 1))], axis=1))


def make(reverse_prob=0.5, reverse_space="physical", cameras=1):
    torch.manual_seed(0)
    objective = InverseDynamics(
        5, 8, 3, ActionNormalizer(statistics(), "q99"),
        dim=16, weight=0.1, gripper_weight=0.01, reverse_prob=reverse_prob, reverse_space=reverse_space,
    )  # fmt: skip
    actions = torch.randn(4, 3, 7)
    actions[..., 6] = (actions[..., 6] > 0).float()
    tokens = [{f"cam{i}": VisualTokens(z, z) for i, z in enumerate(torch.randn(cameras, 4, 5, 8))} for _ in range(2)]
    return objective, tokens[0], tokens[1], actions


@given(st.integers(1, 12), st.integers(0, 2**32 - 1))
@settings(max_examples=50)
def test_reversal_is_the_papers_formula_and_its_own_inverse(horizon, seed):
    actions = torch.from_numpy(np.random.default_rng(seed).normal(size=(horizon, 7)))
    reversed_ = reverse_actions(actions)
    for i in range(horizon):  # a†_{t+k:t} = (a†_{t+k-1}, …, a†_t)
        source = actions[horizon - 1 - i]
        assert torch.equal(reversed_[i], torch.cat([-source[:6], source[6:]]))
    assert torch.equal(reverse_actions(reversed_), actions)


def test_ptr_twice_is_the_identity_per_sample():
    current, future, actions = torch.randn(4, 5, 8), torch.randn(4, 5, 8), torch.randn(4, 3, 7)
    reverse = torch.tensor([True, False, True, False])
    once = pseudo_time_reversal(current, future, actions, reverse)
    assert torch.equal(once[0][0], future[0]) and torch.equal(once[0][1], current[1])
    for before, after in zip((current, future, actions), pseudo_time_reversal(*once, reverse), strict=True):
        assert torch.equal(before, after)


def test_head_reads_current_future_and_difference_token_by_token():
    head = InverseDynamicsHead(tokens=5, channels=8, dim=16, chunk=3)
    current, future = torch.randn(2, 5, 8), torch.randn(2, 5, 8)
    expected = []
    for b in range(2):
        fused = [head.fusion(torch.cat([current[b, p], future[b, p], future[b, p] - current[b, p]])) for p in range(5)]
        expected.append(head.action(torch.cat(fused)).reshape(3, 7))
    torch.testing.assert_close(head(current, future), torch.stack(expected))


def test_loss_is_l1_plus_weighted_bce_on_valid_samples_averaged_over_cameras():
    objective, current, future, actions = make(cameras=2)
    valid = torch.tensor([True, True, False, True])
    reverse = torch.tensor([True, False, True, False])
    out = objective(current, future, actions, valid, reverse)
    total = 0.0
    for camera in current:
        for b in (0, 1, 3):
            first, second = (future, current) if reverse[b] else (current, future)
            target = reverse_actions(actions[b]) if reverse[b] else actions[b]
            target = objective.normalizer.normalize(target)
            prediction = objective.head(first[camera].tap[b : b + 1], second[camera].tap[b : b + 1])[0]
            probability = torch.sigmoid(prediction[:, 6])
            bce = -(target[:, 6] * probability.log() + (1 - target[:, 6]) * (1 - probability).log()).mean()
            total += ((prediction[:, :6] - target[:, :6]).abs().mean() + 0.01 * bce) / 3 / 2
    torch.testing.assert_close(out["inverse_loss"], torch.as_tensor(total))


def test_spaces_differ_exactly_where_quantiles_are_not_symmetric():
    physical, current, future, actions = make(reverse_space="physical")
    normalised, *_ = make(reverse_space="normalised")
    normalised.load_state_dict(physical.state_dict())
    valid, never, always = (
        torch.ones(4, dtype=torch.bool),
        torch.zeros(4, dtype=torch.bool),
        torch.ones(4, dtype=torch.bool),
    )
    same = [m(current, future, actions, valid, never)["inverse_loss"] for m in (physical, normalised)]
    differ = [m(current, future, actions, valid, always)["inverse_loss"] for m in (physical, normalised)]
    assert torch.equal(*same) and not torch.equal(*differ)


def test_reversal_is_drawn_per_sample_with_the_given_probability():
    objective, current, future, actions = make(reverse_prob=0.3)
    drawn = []
    objective.head.register_forward_pre_hook(lambda _, inputs: drawn.append(inputs[0]))
    torch.manual_seed(0)
    for _ in range(250):
        objective(current, future, actions, torch.ones(4, dtype=torch.bool))
    reversed_ = torch.stack([(z == future["cam0"].tap).all((1, 2)) for z in drawn]).float()
    assert abs(reversed_.mean() - 0.3) < 0.06  # 1000 draws: four standard errors
    assert reversed_.mean(1).var() > 0  # not one draw for the whole batch


def test_no_valid_sample_is_a_zero_loss():
    objective, current, future, actions = make()
    assert objective(current, future, actions, torch.zeros(4, dtype=torch.bool))["inverse_loss"] == 0
