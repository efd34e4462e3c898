"""Intervals and tests against scipy, closed forms, published examples and brute force."""

import math

import numpy as np
import pytest
import scipy.stats
from hypothesis import example, given, settings
from hypothesis import strategies as st

from vla.analysis import statistics
from vla.errors import UserError

counts = st.integers(1, 400).flatmap(lambda n: st.tuples(st.integers(0, n), st.just(n)))
pair_counts = st.tuples(*[st.integers(0, 30)] * 3).filter(lambda c: sum(c) > 0)  # only a, only b, agreeing


@given(counts, st.sampled_from([0.8, 0.95, 0.99]))
def test_rate_interval_equals_scipy_wilson(count, confidence):
    successes, n = count
    expected = scipy.stats.binomtest(successes, n).proportion_ci(confidence, method="wilson")
    assert statistics.rate_interval(successes, n, confidence) == pytest.approx((expected.low, expected.high), abs=1e-12)


@given(counts)
def test_rate_interval_is_inside_0_1_contains_the_rate_and_shrinks_with_n(count):
    successes, n = count
    low, high = statistics.rate_interval(successes, n)
    assert 0 <= low <= successes / n <= high <= 1
    low_2, high_2 = statistics.rate_interval(4 * successes, 4 * n)
    assert high_2 - low_2 < high - low


@pytest.mark.parametrize(("successes", "n"), [(0, 0), (3, 2), (-1, 5)])
def test_rate_interval_refuses_impossible_counts(successes, n):
    with pytest.raises(UserError):
        statistics.rate_interval(successes, n)


def test_mean_interval_is_near_the_t_interval_for_normal_values():
    values = np.random.default_rng(3).normal(5, 2, size=400)
    expected = scipy.stats.t.interval(0.95, 399, values.mean(), scipy.stats.sem(values))
    assert statistics.mean_interval(values) == pytest.approx(expected, abs=0.03)
    assert statistics.mean_interval(values) == statistics.mean_interval(values)


@settings(max_examples=15)
@given(st.lists(st.floats(-100, 100), min_size=2, max_size=8))
@example([-0.05, -0.05, -0.05])  # whose sum divided by three is one unit in the last place outside
def test_mean_interval_stays_within_the_values(values):
    low, high = statistics.mean_interval(values)
    assert min(values) <= low <= high <= max(values)


def test_mean_interval_of_equal_values_is_that_value():
    assert statistics.mean_interval([2.0, 2.0, 2.0]) == (2.0, 2.0)


def test_weighted_mean_interval_draws_whole_clusters():
    """Two clusters: a resample holds the first, the second or both, so the percentile limits are the cluster means."""
    low, high = statistics.mean_interval([1.0, 3.0], weights=[9, 1])
    assert (low, high) == (1.0, 3.0)
    rng = np.random.default_rng(0)
    means, sizes = rng.normal(size=12), rng.integers(1, 50, size=12)
    draws = rng.integers(0, 12, size=(20000, 12))
    naive = (means * sizes)[draws].sum(1) / sizes[draws].sum(1)
    assert statistics.mean_interval(means, weights=sizes) == pytest.approx(np.quantile(naive, [0.025, 0.975]), abs=0.15)


@pytest.mark.parametrize("values", [[], [1.0], [1.0, math.nan]])
def test_mean_interval_refuses_too_little(values):
    with pytest.raises(UserError):
        statistics.mean_interval(values)


def pairs(only_a, only_b, agreeing):
    a = [True] * only_a + [False] * only_b + [True] * agreeing
    b = [False] * only_a + [True] * only_b + [True] * agreeing
    return np.array(a, dtype=bool), np.array(b, dtype=bool)


@given(pair_counts)
def test_paired_test_counts_and_exact_p(count):
    only_a, only_b, agreeing = count
    result = statistics.paired_test(*pairs(only_a, only_b, agreeing))
    assert (result.n, result.wins_a, result.wins_b) == (sum(count), only_a, only_b)
    assert result.difference == pytest.approx(result.rate_a - result.rate_b)
    discordant = only_a + only_b
    expected = scipy.stats.binomtest(only_a, discordant).pvalue if discordant else 1.0
    assert result.p == pytest.approx(expected, abs=1e-12)
    low, high = result.interval
    assert -1 <= low <= result.difference <= high <= 1
    mirrored = statistics.paired_test(*reversed(pairs(only_a, only_b, agreeing)))
    assert mirrored.p == result.p
    assert mirrored.interval == pytest.approx((-high, -low), abs=1e-7)


def score(only_a, only_b, n, delta):
    """Score statistic of a paired difference, the restricted likelihood maximised numerically."""
    from scipy.optimize import minimize_scalar

    def negative_log_likelihood(p_b):
        cells = np.array([p_b + delta, p_b, 1 - 2 * p_b - delta])
        seen = np.array([only_a, only_b, n - only_a - only_b])
        return -scipy.special.xlogy(seen, np.clip(cells, 1e-300, None)).sum()

    bounds = (max(0.0, -delta), (1 - delta) / 2)
    p_b = minimize_scalar(negative_log_likelihood, bounds=bounds, method="bounded", options={"xatol": 1e-12}).x
    return ((only_a - only_b) / n - delta) / math.sqrt((2 * p_b + delta - delta**2) / n)


@pytest.mark.parametrize(("only_a", "only_b", "n"), [(6, 2, 20), (12, 3, 20), (1, 7, 21), (5, 5, 50), (40, 20, 160)])
def test_tango_limits_are_where_the_score_test_just_rejects(only_a, only_b, n):
    low, high = statistics.tango_interval(only_a, only_b, n)
    assert score(only_a, only_b, n, low) == pytest.approx(1.959964, abs=1e-4)
    assert score(only_a, only_b, n, high) == pytest.approx(-1.959964, abs=1e-4)


def test_tango_interval_of_a_published_example():
    """Airway hyper-responsiveness, Fagerland, Lydersen and Laake 2014 (Stat. Med. 33:2850): -0.517 to -0.026."""
    assert statistics.tango_interval(1, 7, 21) == pytest.approx((-0.517, -0.026), abs=5e-4)


def test_tango_interval_without_discordant_pairs_has_its_closed_form():
    z2 = scipy.stats.norm.ppf(0.975) ** 2
    limit = z2 / (20 + z2)
    assert statistics.tango_interval(0, 0, 20) == pytest.approx((-limit, limit))


def test_tango_interval_covers():
    """Coverage at n = 40, exact sum over all tables of a trinomial: close to the nominal 95 %."""
    p_a, p_b, n = 0.3, 0.1, 40
    covered = 0.0
    for only_a in range(n + 1):
        for only_b in range(n + 1 - only_a):
            weight = scipy.stats.multinomial.pmf([only_a, only_b, n - only_a - only_b], n, [p_a, p_b, 1 - p_a - p_b])
            if weight > 1e-9:
                low, high = statistics.tango_interval(only_a, only_b, n)
                covered += weight * (low <= p_a - p_b <= high)
    assert 0.93 < covered < 0.97


@pytest.mark.parametrize(("a", "b"), [([], []), ([True], [True, False])])
def test_paired_test_refuses_unpaired_lists(a, b):
    with pytest.raises(UserError):
        statistics.paired_test(a, b)


@given(st.lists(st.floats(0, 1), max_size=8))
def test_holm_equals_the_textbook_loop(pvalues):
    expected, running = [0.0] * len(pvalues), 0.0
    for rank, index in enumerate(sorted(range(len(pvalues)), key=pvalues.__getitem__)):
        running = max(running, min(1.0, (len(pvalues) - rank) * pvalues[index]))
        expected[index] = running
    assert statistics.holm(pvalues) == pytest.approx(expected)


@pytest.mark.parametrize("pvalues", [[0.04], [0.01, 0.2, 0.01, 0.03], [0.5, 0.9, 0.0], [0.02, 0.02, 0.02]])
def test_holm_equals_statsmodels(pvalues):
    from statsmodels.stats.multitest import multipletests

    assert statistics.holm(pvalues) == pytest.approx(list(multipletests(pvalues, method="holm")[1]), abs=1e-15)


@pytest.mark.parametrize(("p_a", "p_b"), [(0.8, 0.5), (0.3, 0.35), (0.95, 0.9)])
def test_episodes_needed_reaches_the_power_in_simulation(p_a, p_b):
    """Two-proportion z tests on simulated arms of that size reject in about 80 % of cases."""
    n = statistics.episodes_needed(p_a, p_b)
    rng = np.random.default_rng(0)
    a, b = rng.binomial(n, p_a, 20000) / n, rng.binomial(n, p_b, 20000) / n
    pooled = (a + b) / 2
    z = np.abs(a - b) / np.sqrt(2 * pooled * (1 - pooled) / n)
    assert (z > 1.959964).mean() == pytest.approx(0.8, abs=0.03)
    assert statistics.episodes_needed(p_b, p_a) == n


def test_episodes_needed_refuses_equal_rates():
    with pytest.raises(UserError):
        statistics.episodes_needed(0.5, 0.5)
    assert statistics.episodes_needed(1.0, 0.0) >= 1


def test_verdicts():
    def said(only_a, only_b, agreeing, p=None):
        return statistics.verdict(statistics.paired_test(*pairs(only_a, only_b, agreeing)), "ptr", "vanilla", p)

    assert said(9, 1, 10) == "ptr better (+0.40, p = 0.02, n = 20 pairs)"
    assert said(1, 9, 10) == "vanilla better (+0.40, p = 0.02, n = 20 pairs)"
    assert said(0, 0, 20) == "not distinguishable (p = 1.00, n = 20 pairs)"
    needed = statistics.episodes_needed(0.9, 0.75)
    assert said(5, 2, 13) == (
        f"not distinguishable (p = 0.45, n = 20 pairs); about {needed} episodes per arm would be needed "
        "to see a difference this size"
    )
    assert said(9, 1, 10, p=0.06).startswith("not distinguishable (p = 0.06")
    assert "p < 0.001" in said(20, 0, 0)


@pytest.mark.parametrize(
    ("p", "text"),
    [
        (0.55, "p = 0.55"),
        (0.003, "p = 0.003"),
        (0.0001, "p < 0.001"),
        (0.0496, "p < 0.05"),
        (0.0504, "p ≥ 0.05"),
        (0.0461, "p = 0.046"),
        (0.0537, "p = 0.054"),
    ],
)
def test_p_is_never_rounded_across_the_level(p, text):
    assert statistics.format_p(p) == text


def test_a_single_value_has_no_interval():
    assert statistics.format_interval(1.2, 3.4) == "[1.20, 3.40]"
    assert statistics.format_interval(math.nan, math.nan) == "[no interval]"
