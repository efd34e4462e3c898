"""Tests and intervals of the papers' tables: against scipy and published examples, and calibrated in simulation."""

from __future__ import annotations

import numpy as np
import pytest
import scipy.stats
from hypothesis import given, settings
from hypothesis import strategies as st

from vla.analysis import power, statistics
from vla.analysis.paper_results import Sample
from vla.analysis.paper_tables import compare, estimate
from vla.analysis.resampling import over_seeds, sign_flip_p, two_level_interval
from vla.errors import UserError

pair_counts = st.tuples(*[st.integers(0, 30)] * 3).filter(lambda c: sum(c) > 0)  # only a, only b, agreeing
DRAWS = 2000


def pairs(only_a, only_b, agreeing):
    a = [True] * only_a + [False] * only_b + [True] * agreeing
    b = [False] * only_a + [True] * only_b + [True] * agreeing
    return np.array(a, dtype=bool), np.array(b, dtype=bool)


def sample(values, keys=None):
    keys = [("task", i) for i in range(len(values))] if keys is None else keys
    return Sample(keys, np.asarray(values, dtype=float), np.full(len(values), 1 / len(values)))


@given(pair_counts)
def test_sign_flips_of_successes_are_mcnemars_mid_p(count):
    """Mid-p: the exact p-value less half the chance of what was seen, both tails."""
    only_a, only_b, agreeing = count
    a, b = pairs(only_a, only_b, agreeing)
    discordant = only_a + only_b
    seen = scipy.stats.binom.pmf(only_a, discordant, 0.5) if discordant else 0.0
    expected = 1.0 if only_a == only_b else statistics.paired_test(a, b).p - seen
    assert sign_flip_p(a.astype(int) - b) == pytest.approx(expected, abs=1e-12)


def test_mid_p_of_a_published_example():
    """Airway hyper-responsiveness again: exact 0.070, mid-p 0.039 (Fagerland, Lydersen and Laake 2013, table 3)."""
    a, b = pairs(1, 7, 13)
    assert sign_flip_p(a.astype(int) - b) == pytest.approx(0.039, abs=5e-4)
    assert statistics.paired_test(a, b).p == pytest.approx(0.070, abs=5e-4)


@settings(max_examples=25)
@given(st.lists(st.integers(-5, 5), min_size=2, max_size=9))
def test_sign_flips_of_lengths_equal_scipys_permutations(differences):
    """scipy counts ties whole, over all 2^n flips; mid-p counts them half."""
    values = np.array(differences, dtype=float)
    test = scipy.stats.permutation_test((values,), np.sum, permutation_type="samples", n_resamples=np.inf)
    ties = np.isclose(np.abs(test.null_distribution), abs(values.sum())).mean()
    expected = test.pvalue - ties / 2 if values.sum() else 1.0
    assert sign_flip_p(values) == pytest.approx(expected, abs=1e-9)


def test_weighted_sign_flips_equal_scipys_permutations():
    rng = np.random.default_rng(0)
    for shift in (0.0, 0.4):
        differences, weights = rng.normal(shift, 1, 12), rng.uniform(0.5, 2, 12)
        moves = (differences * weights,)
        expected = scipy.stats.permutation_test(moves, np.sum, permutation_type="samples", n_resamples=np.inf).pvalue
        assert sign_flip_p(differences, weights) == pytest.approx(expected, abs=0.015)
    with pytest.raises(UserError):
        sign_flip_p([])


def test_equal_networks_are_called_different_in_3_to_7_percent_but_not_by_the_exact_test():
    """McNemar's exact test is conservative by nature, hence mid-p; on shared episodes of which some are harder."""
    rng, mid_p, exact = np.random.default_rng(0), 0, 0
    for _ in range(DRAWS):
        a, b = rng.random((2, 100)) < np.clip(rng.normal(0.5, 0.3, 100), 0, 1)
        mid_p += compare({0: sample(a)}, {0: sample(b)}).p < statistics.ALPHA
        exact += statistics.paired_test(a, b).p < statistics.ALPHA
    assert 0.03 <= mid_p / DRAWS <= 0.07
    assert exact < 0.8 * mid_p


@pytest.mark.parametrize("n", [20, 100])
def test_equal_networks_on_chains_are_called_different_in_3_to_7_percent(n):
    rng = np.random.default_rng(0)
    ease = rng.beta(4, 1, (DRAWS, n))
    differences = rng.binomial(5, ease) - rng.binomial(5, ease)
    assert 0.03 <= np.mean([sign_flip_p(row) < statistics.ALPHA for row in differences]) <= 0.07


@pytest.mark.parametrize("seeds", [3, 5])
def test_equal_methods_are_called_different_in_3_to_7_percent_where_training_seeds_differ(seeds):
    """Both arms' success varies by training seed; the pooled episodes would be called different far more often."""
    rng, over, pooled = np.random.default_rng(0), 0, 0
    for draw in range(DRAWS):
        rates = np.clip(rng.normal(0.5, 0.1, (2, seeds, 1)), 0, 1)
        a, b = (rng.random((2, seeds, 100)) < rates).astype(int)
        over += over_seeds((a - b).mean(1))[2] < statistics.ALPHA
        if draw < 200:
            pooled += sign_flip_p((a - b).ravel()) < statistics.ALPHA
    assert 0.03 <= over / DRAWS <= 0.07
    assert pooled / 200 > 0.15


def test_several_seeds_are_compared_over_seeds():
    rng = np.random.default_rng(0)
    a, b = ({s: sample(rng.random(40) < rate) for s in range(3)} for rate in (0.7, 0.4))
    found = compare(a, b)
    means = [a[s].values.mean() - b[s].values.mean() for s in range(3)]
    assert (found.low, found.high, found.p) == pytest.approx(over_seeds(means))
    assert (found.n, found.seeds, found.difference) == (120, 3, pytest.approx(np.mean(means)))
    differences = np.concatenate([a[s].values - b[s].values for s in range(3)])
    assert found.p_networks == pytest.approx(sign_flip_p(differences))
    assert compare({0: a[0]}, {1: b[1]}) is None  # no shared training seed


@pytest.mark.parametrize(("seeds", "spread"), [(3, 0.0), (3, 0.15), (5, 0.05)])
def test_two_level_interval_covers(seeds, spread):
    """Percentiles of the same resamples cover 76 % at 3 seeds of spread 0.15."""
    rng = np.random.default_rng(0)
    covered = 0
    for _ in range(300):
        rates = np.clip(rng.normal(0.5, spread, seeds), 0, 1)
        low, high = two_level_interval([rng.random(300) < rate for rate in rates], bounds=(0, 1))
        covered += low <= 0.5 <= high
    assert covered / 300 > 0.93


def test_two_level_interval_is_the_t_interval_where_only_seeds_vary():
    means = [0.2, 0.5, 0.6, 0.65]
    expected = scipy.stats.t.interval(0.95, 3, np.mean(means), scipy.stats.sem(means))
    found = two_level_interval([np.full(50, mean) for mean in means])
    assert found == pytest.approx(expected, abs=0.02)
    low, high = two_level_interval([np.ones(20), np.zeros(20)], bounds=(0, 1))
    assert (low, high) == (0, 1)
    with pytest.raises(UserError):
        two_level_interval([np.ones(5)])


def test_two_level_interval_weighs_as_told():
    """Half the weight on the last of three values, in every seed: the mean is (0 + 0 + 2) / 4."""
    rng = np.random.default_rng(0)
    values = [np.tile([0.0, 0.0, 1.0], 200) + rng.normal(0, 1e-3, 600) for _ in range(4)]
    low, high = two_level_interval(values, [np.tile([1.0, 1.0, 2.0], 200)] * 4)
    assert (low + high) / 2 == pytest.approx(0.5, abs=2e-3) and high - low < 0.15


def test_over_seeds_equals_scipys_paired_t_test():
    a, b = np.array([0.5, 0.7, 0.6, 0.9]), np.array([0.4, 0.65, 0.62, 0.7])
    test = scipy.stats.ttest_rel(a, b)
    assert over_seeds(a - b) == pytest.approx((*test.confidence_interval(0.95), test.pvalue))
    assert np.isnan(over_seeds([0.1])).all()
    assert over_seeds([0.0, 0.0])[2] == 1.0 and np.isnan(over_seeds([0.5, 0.5])[2])


def test_a_single_seed_has_the_interval_of_its_kind():
    found = estimate({0: sample([1] * 14 + [0] * 6)})
    wilson = scipy.stats.binomtest(14, 20).proportion_ci(method="wilson")
    assert (found.low, found.high) == pytest.approx((wilson.low, wilson.high))
    lengths = [5, 3, 2, 5, 4, 1, 0]
    found = estimate({0: sample(lengths)})
    assert (found.low, found.high) == pytest.approx(statistics.mean_interval(lengths))
    assert estimate({}) is None and np.isnan(estimate({0: sample([0.4])}).low)


def test_chain_sd_is_that_of_the_lengths():
    lengths = np.array([0, 1, 1, 3, 5, 5, 2, 4])
    assert power.chain_sd([(lengths >= k).mean() for k in range(1, 6)]) == pytest.approx(lengths.std())


def test_power_is_reached_in_simulation():
    rng = np.random.default_rng(0)
    n = power.pairs_needed(0.1, 0.5)
    means = rng.normal(0.1, 0.5, (4000, n)).mean(1)
    assert (np.abs(means) > 1.959964 * 0.5 / np.sqrt(n)).mean() == pytest.approx(0.8, abs=0.02)
    n = power.arms_needed(0.5, 0.4, power.rate_sd(0.5), power.rate_sd(0.4))
    a, b = rng.binomial(n, 0.5, 20000) / n, rng.binomial(n, 0.4, 20000) / n
    pooled = (a + b) / 2
    assert (np.abs(a - b) > 1.959964 * np.sqrt(2 * pooled * (1 - pooled) / n)).mean() == pytest.approx(0.8, abs=0.02)
    with pytest.raises(UserError):
        power.pairs_needed(0.0, 1.0)


def test_unpaired_interval_is_the_z_tests():
    from statsmodels.stats.weightstats import _zconfint_generic, _zstat_generic

    error = np.sqrt((0.24 + 0.21) / 96)
    expected = _zconfint_generic(0.1, error, 0.05, "two-sided"), _zstat_generic(0.1, 0, error, "two-sided")[1]
    low, high, p = power.unpaired(0.4, 0.3, np.sqrt(0.24), np.sqrt(0.21), 96)
    assert ((low, high), p) == (pytest.approx(expected[0]), pytest.approx(expected[1]))
