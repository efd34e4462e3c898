"""The sequential comparison against enumeration of every path, simulation, and itself with more data."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vla.analysis.resampling import sign_flip_p
from vla.analysis.sequential import Decision, decide, spending, told
from vla.errors import UserError


@settings(max_examples=25)
@given(st.lists(st.integers(0, 3), min_size=1, max_size=9), st.integers(0, 4), st.sampled_from([0.05, 0.3, 0.6]))
def test_error_over_all_sign_patterns_is_within_what_was_spent(sizes, later, alpha):
    """Every assignment of signs, each equally likely under no difference: the share that is ever decided."""
    planned = len(sizes) + later
    runs = [
        decide(np.multiply(sizes, signs), planned, alpha) for signs in itertools.product((-1, 1), repeat=len(sizes))
    ]
    decided = np.mean([run.decided_at is not None for run in runs])
    never = [run.spent for run in runs if run.decided_at is None]
    assert decided <= alpha + 1e-12
    assert decided <= spending(len(sizes) / planned, alpha) + 1e-12
    if never:  # a path that went on to the end has seen every boundary, so its cost is the whole error
        assert decided == pytest.approx(never[0], abs=1e-12)


@settings(max_examples=40)
@given(st.integers(0, 10**6), st.sampled_from([0.0, 0.1, 0.3]))
def test_its_boundary_is_never_inside_the_exact_tests(seed, gain):
    """Where it decides, McNemar's exact test of the pairs so far would too."""
    from scipy.stats import binomtest

    differences = np.random.default_rng(seed).choice([-1, 0, 1], size=100, p=[0.2, 0.6 - gain, 0.2 + gain])
    decided = decide(differences, 100).decided_at
    seen = differences[:decided] if decided else differences
    if decided:
        assert binomtest(int((seen > 0).sum()), int((seen != 0).sum())).pvalue <= 0.05


@pytest.mark.parametrize(
    ("draw", "n"),
    [
        (lambda rng, n: rng.choice([-1, 0, 1], size=n, p=[0.15, 0.7, 0.15]), 150),
        (lambda rng, n: rng.binomial(5, 0.7, n) - rng.binomial(5, 0.7, n), 80),
    ],
    ids=["successes", "chains"],
)
def test_equal_arms_are_called_different_in_3_to_7_percent(draw, n):
    rng = np.random.default_rng(0)
    runs = [decide(draw(rng, n), n) for _ in range(2000)]
    assert 0.03 <= np.mean([run.decided_at is not None for run in runs]) <= 0.07
    assert max(run.spent for run in runs) <= 0.05 + 1e-12


def test_it_costs_fewer_pairs_and_hardly_any_power():
    """A difference of 10 points at 30 % discordant pairs: one look at the end decides 9 in 10 comparisons of 300."""
    rng = np.random.default_rng(0)
    draws = [rng.choice([-1, 0, 1], size=300, p=[0.1, 0.7, 0.2]) for _ in range(300)]
    runs = [decide(draw, 300) for draw in draws]
    fixed = np.mean([sign_flip_p(draw) < 0.05 for draw in draws])
    assert np.mean([run.decided_at is not None for run in runs]) > fixed - 0.05
    assert np.mean([run.decided_at or 300 for run in runs]) < 0.75 * 300


@settings(max_examples=20)
@given(st.integers(0, 10**6))
def test_more_data_never_changes_a_decision(seed):
    rng = np.random.default_rng(seed)
    differences = rng.choice([-1, 0, 1], size=120, p=[0.1, 0.6, 0.3])
    whole = decide(differences, 150)
    for n in (20, 60, 100):
        part = decide(differences[:n], 150)
        assert part.decided_at == (whole.decided_at if whole.decided_at and whole.decided_at <= n else None)


def test_the_forecast_is_roughly_when_it_is_decided():
    rng = np.random.default_rng(0)
    errors = []
    for _ in range(60):
        differences = rng.choice([-1, 0, 1], size=400, p=[0.1, 0.7, 0.2])
        now, end = decide(differences[:120], 400), decide(differences, 400)
        if now.decided_at is None and end.decided_at:
            errors.append((120 + now.more) / end.decided_at)
    assert len(errors) > 30 and 0.8 < np.median(errors) < 1.25


def test_spending_has_its_published_values():
    """O'Brien and Fleming's shape at 5 %, halfway: z = 1.96 √2, two-sided 0.0056; everything at the end."""
    assert spending(0.5) == pytest.approx(0.005575, abs=1e-5)
    assert spending(1.0) == pytest.approx(0.05)


def test_sentences_and_mistakes():
    ones = np.ones(100)
    decision = decide(ones, 100)
    assert told(decision, "ptr", "vanilla") == f"decided after {decision.decided_at} of 100 pairs: ptr better"
    assert told(decide(-ones, 100), "ptr", "vanilla").endswith("vanilla better")
    assert told(decide(np.zeros(100), 100), "a", "b") == "all 100 planned pairs used: not distinguishable"
    assert told(decide(np.zeros(10), 100), "a", "b") == "go on: after 10 of 100 pairs, the 90 left may not be enough"
    going = Decision(n=300, planned=1000, decided_at=None, difference=0.1, spent=0.0, more=120)
    assert told(going, "a", "b") == "go on: after 300 of 1,000 pairs, about 120 more"
    for differences, planned in (([], 10), ([1] * 11, 10), ([0.5], 10)):
        with pytest.raises(UserError):
            decide(differences, planned)
