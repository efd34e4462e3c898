"""What the papers' tables conclude with: exact paired tests calibrated at 5 %, and intervals over training seeds.

    p = sign_flip_p(successes_of_a - successes_of_b)                 # one pair of networks, on shared episodes
    low, high = two_level_interval([episodes_of_seed_0, episodes_of_seed_1, episodes_of_seed_2])
    result = over_seeds([0.02, 0.05, -0.01])                         # the method: a mean difference per training seed

Which test where. Episodes of one pair of networks: flipping the sign of each paired difference, exactly. On successes
that is McNemar's test; here in its mid-p form, because the exact one is conservative by nature (at 45 discordant pairs
of 150 it calls equal arms different in 3.6 % of cases, with fewer pairs in fewer), while mid-p keeps to about 5 %
(4.8 % there), at the price that a bound of exactly 5 % is not guaranteed (Fagerland, Lydersen and Laake, BMC Med. Res.
Methodol. 13:91, 2013); tests/test_resampling.py measures both. Several training seeds: a t test on the seeds' mean
differences, since a method is judged by how other training runs would do.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from vla.analysis.statistics import ALPHA
from vla.errors import UserError

FLIPS, BATCH = 10_000, 1000
RESAMPLES = 2000


def sign_flip_p(differences: Sequence[float], weights: Sequence[float] | None = None) -> float:
    """Two-sided p of the hypothesis that the arms of each pair could be swapped, in (0, 1].

    Whole differences of equal weight (successes; CALVIN's chain lengths): from the exact distribution over all 2^n
    flips, ties counted half (mid-p). Else from 10,000 random flips, ties counted whole.

    Args:
        differences: (n,) a − b of each pair.
        weights: (n,) what each pair counts.

    Raises:
        UserError: no pairs.
    """
    differences = np.asarray(differences, dtype=np.float64)
    if not len(differences):
        raise UserError("the arms share no episodes: evaluate them on the same tasks and seeds")
    weights = np.ones_like(differences) if weights is None else np.asarray(weights, dtype=np.float64)
    if (differences == np.round(differences)).all() and np.ptp(weights) <= 1e-9 * weights.max():
        steps = np.abs(differences).astype(int)
        chance, reach = flip_distribution(steps), np.abs(np.arange(-steps.sum(), steps.sum() + 1))
        seen = abs(int(differences.sum()))
        return float(chance[reach > seen].sum() + chance[reach == seen].sum() / 2) if seen else 1.0
    moves = (differences * weights)[differences != 0]
    rng, extreme = np.random.default_rng(0), 0
    for _ in range(FLIPS // BATCH):
        signs = 2.0 * rng.integers(2, size=(BATCH, len(moves)), dtype=np.int8) - 1
        extreme += int((np.abs(signs @ moves) >= abs(moves.sum()) * (1 - 1e-9)).sum())
    return (1 + extreme) / (1 + FLIPS)


def flip_distribution(steps: Sequence[int]) -> np.ndarray:
    """Probabilities of the sums −S … S of ±steps under fair independent signs, S = sum(steps): float64 (2 S + 1,)."""
    chance = np.ones(1)
    for step in steps:
        if step:
            chance = flip_one_more(chance, step)
    return chance


def flip_one_more(chance: np.ndarray, step: int) -> np.ndarray:
    """The distribution with one more ±step: two indices longer per unit of it."""
    wider = np.zeros(len(chance) + 2 * step)
    wider[: len(chance)] += chance / 2
    wider[2 * step :] += chance / 2
    return wider


def two_level_interval(
    seeds: Sequence[np.ndarray],
    weights: Sequence[np.ndarray] | None = None,
    bounds: tuple[float, float] = (-np.inf, np.inf),
    confidence: float = 0.95,
) -> tuple[float, float]:
    """Interval of the mean over training seeds: seeds are drawn with replacement, then episodes within each.

    mean ± t · sqrt(S / (S − 1)) · the standard deviation of the 2,000 resampled means, t Student's on S − 1 degrees of
    freedom: resampling S seeds alone shrinks their variance by (S − 1) / S and takes it for known. Percentiles of the
    same resamples covered 76 % at 3 seeds of 300 episodes and 64 % at 2 (seeds' rates 0.50 ± 0.15), this 97 and 100 %.
    Never below 95 %; above it where seeds hardly differ, because chance among episodes then counts twice.

    Args:
        seeds: per training seed its (n_s,) values, S ≥ 2 of them.
        weights: the same shapes; a seed's mean is sum(w v) / sum(w).
        bounds: what the mean cannot leave.

    Raises:
        UserError: fewer than two seeds, or one without values.
    """
    from scipy.stats import t

    if len(seeds) < 2 or not all(map(len, seeds)):
        raise UserError("an interval over training seeds needs episodes of at least 2 seeds: train another seed")
    rng = np.random.default_rng(0)
    weights = [np.ones(len(values)) for values in seeds] if weights is None else weights
    drawn = [_means(np.asarray(v, float), np.asarray(w, float), len(seeds), rng) for v, w in zip(seeds, weights)]  # noqa: B905
    chosen = rng.integers(len(seeds), size=(RESAMPLES, len(seeds)))
    resampled = np.stack(drawn)[chosen, np.arange(RESAMPLES)[:, None], np.arange(len(seeds))].mean(1)
    mean = float(np.mean([np.average(v, weights=w) for v, w in zip(seeds, weights, strict=True)]))
    few = np.sqrt(len(seeds) / (len(seeds) - 1)) * t.ppf((1 + confidence) / 2, len(seeds) - 1)
    reach = float(few * resampled.std())
    return max(mean - reach, bounds[0]), min(mean + reach, bounds[1])


def _means(values: np.ndarray, weights: np.ndarray, slots: int, rng: np.random.Generator) -> np.ndarray:
    """Weighted means of resampled episodes, (RESAMPLES, slots): equal episodes are drawn as counts."""
    kinds, counts = np.unique(np.stack([values, weights]), axis=1, return_counts=True)
    drawn = rng.multinomial(len(values), counts / len(values), size=(RESAMPLES, slots))
    return drawn @ (kinds[0] * kinds[1]) / (drawn @ kinds[1])


def over_seeds(differences: Sequence[float]) -> tuple[float, float, float]:
    """(low, high, p): Student's 95 % interval and two-sided t test of the mean of one difference per training seed.

    nan below two seeds. Seeds that agree exactly leave nothing to estimate a spread from: p = 1 where they are 0,
    else nan.
    """
    from scipy.stats import ttest_1samp

    differences = np.asarray(differences, dtype=np.float64)
    if len(differences) < 2:
        return float("nan"), float("nan"), float("nan")
    if np.ptp(differences) <= 1e-9 * abs(differences).max():
        value = float(differences[0])
        return value, value, 1.0 if value == 0 else float("nan")
    test = ttest_1samp(differences, 0)
    interval = test.confidence_interval(1 - ALPHA)
    return float(interval.low), float(interval.high), float(test.pvalue)
