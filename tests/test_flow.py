"""Flow matching's shared parts: times, paths, Euler steps, noise (fact sheet §4.4, §7.2, §14)."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy import stats

from vla.flow import beta_times, euler, initial_noise, interpolate, logit_normal_times, stratified_times


@pytest.mark.parametrize("seed", range(20))
def test_stratified_times_lie_one_batch_th_apart(seed):
    """§14: for B = 32 the sorted times are 1/32 apart, except where they wrap round at 1 − 1e-5."""
    torch.manual_seed(seed)
    times = stratified_times(32)
    gaps = times.sort().values.diff().numpy()
    wrapped = np.abs(gaps - 1 / 32) > 1e-6
    assert wrapped.sum() <= 1 and np.all(np.abs(gaps - 1 / 32) < 2e-5)
    assert times.min() >= 0 and times.max() < 1 - 1e-5 + 1e-7


def test_stratified_times_are_uniform_and_each_member_too():
    torch.manual_seed(0)
    times = torch.stack([stratified_times(4) for _ in range(2000)]).numpy()
    for member in range(4):
        assert stats.kstest(times[:, member], "uniform").pvalue > 1e-3
    assert stats.kstest(times[:, 0] ** 2, "uniform").pvalue < 1e-9  # the test can tell


def test_beta_times_are_beta_1_5_1():
    """§14: mean 0.6·0.999 + 0.001; never below 0.001; the distribution is scipy's."""
    torch.manual_seed(0)
    times = beta_times(20_000).double().numpy()
    assert times.mean() == pytest.approx(0.6 * 0.999 + 0.001, abs=5e-3)
    assert times.min() >= 0.001 and times.max() <= 1
    unscaled = (times - 0.001) / 0.999
    assert stats.kstest(unscaled, stats.beta(1.5, 1).cdf).pvalue > 1e-3
    assert stats.kstest(unscaled, stats.beta(1, 1.5).cdf).pvalue < 1e-9


def test_logit_normal_times(monkeypatch):
    torch.manual_seed(0)
    times = logit_normal_times(20_000).double().numpy()
    logits = np.log(times / (1 - times))
    assert stats.kstest(logits, "norm").pvalue > 1e-3
    assert stats.kstest(logits * 1.1, "norm").pvalue < 1e-9
    monkeypatch.setattr(torch, "randn", lambda *shape, device: torch.full(shape, 10.0))
    assert logit_normal_times(3).tolist() == pytest.approx([0.999] * 3)


def test_path_goes_from_action_to_noise_and_its_velocity_is_the_derivative():
    actions, noise = torch.randn(3, 5, 7, dtype=torch.float64), torch.randn(3, 5, 7, dtype=torch.float64)
    at = [interpolate(actions, noise, torch.full((3,), t, dtype=torch.float64))[0] for t in (0.0, 1.0)]
    assert torch.equal(at[0], actions) and torch.equal(at[1], noise)
    t = torch.tensor([0.2, 0.5, 0.9], dtype=torch.float64)
    x, velocity = interpolate(actions, noise, t)
    later, _ = interpolate(actions, noise, t + 1e-6)
    torch.testing.assert_close((later - x) / 1e-6, velocity, atol=1e-6, rtol=0)
    for row in range(3):
        torch.testing.assert_close(x[row], (1 - t[row]) * actions[row] + t[row] * noise[row])


@pytest.mark.parametrize("steps", [4, 8])
def test_euler_on_a_constant_velocity_is_exact(steps):
    """§14: z − v, exactly where 1/steps is a power of two and v has few bits."""
    noise = torch.randint(-64, 64, (2, 3, 7)) / 64
    velocity = torch.randint(-64, 64, (2, 3, 7)) / 64
    seen = []

    def constant(x, t):
        seen.append(t)
        return velocity

    assert torch.equal(euler(constant, noise, steps), noise - velocity)
    assert torch.stack(seen).tolist() == [[1 - i / steps] * 2 for i in range(steps)]


def test_euler_follows_a_field_that_depends_on_place_and_time():
    noise = torch.randn(2, 3, 7, dtype=torch.float64)
    expected = noise.clone()
    for t in (1.0, 0.75, 0.5, 0.25):
        expected = expected - (expected * t + 1) / 4
    got = euler(lambda x, t: x * t[:, None, None].double() + 1, noise, 4)
    torch.testing.assert_close(got, expected)


def observation(pairs):
    seeds, steps = zip(*pairs, strict=True)
    return {"instruction": ["open it"] * len(pairs), "seed": torch.tensor(seeds), "step": torch.tensor(steps)}


def test_noise_is_a_function_of_its_own_seed_and_step():
    """Whatever else is in the batch, wherever in it, and however often torch's generator was used."""
    alone = {pair: initial_noise(observation([pair]), (4, 7), "cpu")[0] for pair in [(0, 0), (0, 8), (1, 0), (10, 0)]}
    torch.manual_seed(5)
    before = torch.get_rng_state()
    together = initial_noise(observation([(10, 0), (0, 8), (0, 0), (0, 8), (1, 0)]), (4, 7), "cpu")
    assert torch.equal(torch.get_rng_state(), before)
    for row, pair in zip(together, [(10, 0), (0, 8), (0, 0), (0, 8), (1, 0)], strict=True):
        assert torch.equal(row, alone[pair])
    rows = list(alone.values())
    assert all(not torch.equal(rows[i], rows[j]) for i in range(4) for j in range(i))


def test_noise_is_standard_normal_with_and_without_seeds():
    pairs = [(seed, step) for seed in range(20) for step in range(10)]
    seeded = initial_noise(observation(pairs), (10, 7), "cpu")
    assert seeded.shape == (200, 10, 7) and seeded.dtype == torch.float32
    assert stats.kstest(seeded.flatten().numpy(), "norm").pvalue > 1e-3
    # Not only each row by itself: the same entry of all rows, too, or neighbouring seeds would be alike.
    assert min(stats.kstest(seeded[:, i, j].numpy(), "norm").pvalue for i in range(10) for j in range(7)) > 1e-4
    torch.manual_seed(0)
    free = initial_noise({"instruction": ["a"] * 200}, (10, 7), "cpu")
    assert stats.kstest(free.flatten().numpy(), "norm").pvalue > 1e-3
    assert not torch.equal(free, initial_noise({"instruction": ["a"] * 200}, (10, 7), "cpu"))
