"""Intervals, paired tests and plain-English verdicts for every number the tables print.

Success rates of 20 episodes differ by chance; so every rate comes with an interval, and two arms are compared on the
episodes they share. The mathematics is scipy's and statsmodels'; ours are Tango's interval, which neither has, and
Holm's rule.

    low, high = rate_interval(successes=14, n=20)
    result = paired_test(successes_of_a, successes_of_b)      # aligned on (benchmark, task, seed)
    print(verdict(result, "ptr", "vanilla"))                  # "not distinguishable (p = 0.55, n = 20 pairs)"

statsmodels takes a second to import, hence the imports inside the functions.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from vla.errors import UserError

ALPHA = 0.05


@dataclass(frozen=True)
class Estimate:
    """A value with its confidence interval and the number of independent units (pairs, demonstrations) behind it."""

    value: float
    low: float
    high: float
    n: int


@dataclass(frozen=True)
class PairedResult:
    """Two arms on the same n episodes; `difference` and `interval` are rate_a - rate_b, in [-1, 1]."""

    n: int
    wins_a: int
    """Episodes in which only a succeeded."""
    wins_b: int
    difference: float
    interval: tuple[float, float]
    p: float
    test: str
    rate_a: float
    rate_b: float


def rate_interval(successes: int, n: int, confidence: float = 0.95) -> tuple[float, float]:
    """Wilson score interval of a success rate, two numbers in [0, 1].

    Raises:
        UserError: no episodes, or more successes than episodes.
    """
    from statsmodels.stats.proportion import proportion_confint

    if n <= 0:
        raise UserError("a success rate of 0 episodes has no interval: run at least one episode")
    if not 0 <= successes <= n:
        raise UserError(f"{successes} successes in {n} episodes cannot be: check the episode records")
    low, high = proportion_confint(successes, n, alpha=1 - confidence, method="wilson")
    # Exactly at 0 and n the formula's limits are 0 and 1; rounding leaves about 1e-17.
    return (0.0 if successes == 0 else float(low)), (1.0 if successes == n else float(high))


def mean_interval(
    values: Sequence[float], confidence: float = 0.95, seed: int = 0, weights: Sequence[float] | None = None
) -> tuple[float, float]:
    """Bootstrap interval of the (weighted) mean: BCa, or percentile where BCa is undefined (e.g. all values equal).

    Args:
        values: (n,), at least two. For clustered data the mean of each cluster, with its size as weight: resampling
            then draws whole clusters.
        weights: (n,) positive; the statistic is sum(w v) / sum(w).
    Raises:
        UserError: fewer than two values, or a value that is not finite.
    """
    from scipy.stats import bootstrap

    values = np.asarray(values, dtype=np.float64)
    weights = np.ones_like(values) if weights is None else np.asarray(weights, dtype=np.float64)
    if values.ndim != 1 or len(values) < 2:
        raise UserError(f"an interval of a mean needs at least 2 values, got {values.size}: measure more units")
    if not (np.isfinite(values).all() and np.isfinite(weights).all() and (weights > 0).all()):
        raise UserError("an interval of a mean needs finite values and positive weights: look for nan among them")

    def mean(v, w, axis):
        return (v * w).sum(axis=axis) / w.sum(axis=axis)

    for method in ("BCa", "percentile"):
        with warnings.catch_warnings(), np.errstate(divide="ignore", invalid="ignore"):
            warnings.simplefilter("ignore")  # DegenerateDataWarning: answered by the percentile interval
            interval = bootstrap(
                (values, weights),
                mean,
                paired=True,
                vectorized=True,
                n_resamples=9999,
                batch=1000,
                confidence_level=confidence,
                method=method,
                rng=np.random.default_rng(seed),
            ).confidence_interval
        if np.isfinite(interval).all():
            break
    # The rounding of sum and division may leave the values by a unit in the last place.
    low, high = np.clip([interval.low, interval.high], values.min(), values.max())
    return float(low), float(high)


def paired_test(a: Sequence[bool], b: Sequence[bool], confidence: float = 0.95) -> PairedResult:
    """Exact McNemar test of two arms on the same episodes, with Tango's score interval for the difference of rates.

    The p-value is exact (binomial on the discordant pairs), the interval asymptotic: with few discordant pairs the
    interval may exclude 0 although p is above 0.05. Verdicts follow p.

    Args:
        a, b: (n,) success per episode, aligned.
    Raises:
        UserError: no pairs, or arrays of different length.
    """
    from statsmodels.stats.contingency_tables import mcnemar

    a, b = np.asarray(a, dtype=bool), np.asarray(b, dtype=bool)
    if a.shape != b.shape or a.ndim != 1:
        raise UserError(f"a paired test needs two lists of equal length, got {a.shape} and {b.shape}: align them")
    if len(a) == 0:
        raise UserError("the arms share no episodes: evaluate them on the same tasks and seeds")
    wins_a, wins_b = int((a & ~b).sum()), int((b & ~a).sum())
    table = [[int((a & b).sum()), wins_a], [wins_b, int((~a & ~b).sum())]]
    return PairedResult(
        n=len(a),
        wins_a=wins_a,
        wins_b=wins_b,
        difference=(wins_a - wins_b) / len(a),
        interval=tango_interval(wins_a, wins_b, len(a), confidence),
        p=float(mcnemar(table, exact=True).pvalue),
        test="exact McNemar, Tango score interval",
        rate_a=float(a.mean()),
        rate_b=float(b.mean()),
    )


def tango_interval(wins_a: int, wins_b: int, n: int, confidence: float = 0.95) -> tuple[float, float]:
    """Score interval of a paired difference of proportions: the differences that the score test does not reject.

    Tango, Statistics in Medicine 17:891-908 (1998), eq. 5-6; well behaved for small n and empty cells, where Wald's
    interval collapses to a point.

    Args:
        wins_a, wins_b: discordant pairs in favour of a and of b, out of n pairs.
    """
    from scipy.optimize import brentq
    from scipy.stats import norm

    z = norm.ppf((1 + confidence) / 2)
    estimate = (wins_a - wins_b) / n

    def excess(delta: float) -> float:
        """How far `delta` lies from the estimate, beyond z of its standard errors: negative inside the interval."""
        linear = -wins_a - wins_b + (2 * n - wins_a + wins_b) * delta
        constant = -wins_b * delta * (1 - delta)
        only_b = (math.sqrt(max(linear**2 - 8 * n * constant, 0.0)) - linear) / (4 * n)  # restricted estimate
        error = math.sqrt(max(n * (2 * only_b + delta * (1 - delta)), 0.0))
        return abs(n * (estimate - delta)) - z * error

    # The estimate itself is a root where its standard error is 0 (no discordant pairs), hence the tiny step away.
    low = -1.0 if estimate == -1 else brentq(excess, -1.0, estimate - 1e-9)
    high = 1.0 if estimate == 1 else brentq(excess, estimate + 1e-9, 1.0)
    return low, high


def holm(pvalues: Sequence[float]) -> list[float]:
    """Holm's step-down adjustment for comparing several pairs of arms at once; same order as given.

    Equal to statsmodels' (a test), which collects the garbage of the whole process in every call: most of the seconds
    that a table took.
    """
    values = np.asarray(pvalues, dtype=np.float64)
    order = np.argsort(values, kind="stable")
    adjusted = np.empty_like(values)
    adjusted[order] = np.minimum(np.maximum.accumulate(values[order] * np.arange(len(values), 0, -1)), 1)
    return adjusted.tolist()


def episodes_needed(p_a: float, p_b: float, power: float = 0.8) -> int:
    """Episodes per arm for an unpaired two-sided test (alpha 0.05) to see success rates p_a and p_b apart.

    Normal approximation on Cohen's h (arcsine). Pairing on shared seeds usually needs fewer.

    Raises:
        UserError: equal rates, which no number of episodes tells apart.
    """
    from statsmodels.stats.power import normal_sample_size_one_tail
    from statsmodels.stats.proportion import proportion_effectsize

    if p_a == p_b:
        raise UserError(f"no number of episodes tells equal success rates ({p_a:.2f}) apart: ask for a difference")
    effect = abs(proportion_effectsize(p_a, p_b))
    return math.ceil(normal_sample_size_one_tail(effect, power, ALPHA / 2, std_null=math.sqrt(2)))


def format_interval(low: float, high: float) -> str:
    """ "[1.20, 3.40]"; of a single value there is none."""
    return "[no interval]" if math.isnan(low) else f"[{low:.2f}, {high:.2f}]"


def format_p(p: float) -> str:
    """ "p = 0.55", "p = 0.003", "p < 0.001"; never rounded across 0.05."""
    if p < 0.001:
        return "p < 0.001"
    text = f"{p:.2f}" if p >= 0.01 and f"{p:.2f}" != f"{ALPHA:.2f}" else f"{p:.3f}"
    if text == f"{ALPHA:.3f}":
        return f"p {'<' if p < ALPHA else '≥'} {ALPHA}"
    return f"p = {text}"


def verdict(result: PairedResult, name_a: str, name_b: str, p: float | None = None) -> str:
    """One sentence on two arms: "ptr better (+0.30, p = 0.01, n = 20 pairs)" or "not distinguishable (...)".

    Args:
        p: the adjusted p-value where several pairs of arms are compared; by default the test's own.
    """
    p = result.p if p is None else p
    tail = f"{format_p(p)}, n = {result.n} pairs"
    if p < ALPHA:
        winner = name_a if result.difference > 0 else name_b
        return f"{winner} better (+{abs(result.difference):.2f}, {tail})"
    sentence = f"not distinguishable ({tail})"
    episodes = 0 if result.difference == 0 else episodes_needed(result.rate_a, result.rate_b)
    if episodes > result.n:
        sentence += f"; about {episodes:,} episodes per arm would be needed to see a difference this size"
    return sentence
