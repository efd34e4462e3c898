"""How many episodes a difference needs before a test can be expected to see it, from numbers as papers print them.

Two-sided tests at 5 %, power 80 %, normal approximation. Unpaired: what the paper's own numbers allow to say. Paired:
with the spread of the differences of episodes that both arms ran, which is usually far smaller.

    arms_needed(4.03, 4.10, chain_sd([.934, .859, .797, .752, .692]), chain_sd([.944, .867, .815, .766, .705]))
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from vla.analysis.statistics import ALPHA
from vla.errors import UserError

POWER = 0.8


def chain_sd(shares: Sequence[float]) -> float:
    """Standard deviation of CALVIN's chain length, which the five success rates SR 1 … 5 (0 … 1) determine.

    E[L²] = Σ (2k − 1) P(L ≥ k).
    """
    second = sum((2 * k - 1) * share for k, share in enumerate(shares, 1))
    return math.sqrt(max(second - sum(shares) ** 2, 0.0))


def rate_sd(rate: float) -> float:
    """Standard deviation of one success at a rate in [0, 1]."""
    return math.sqrt(rate * (1 - rate))


def arms_needed(mean_a: float, mean_b: float, sd_a: float, sd_b: float) -> int:
    """Episodes of each arm for an unpaired test to see means apart whose episodes have these standard deviations."""
    return math.ceil((_reach() / _apart(mean_a - mean_b)) ** 2 * (sd_a**2 + sd_b**2))


def pairs_needed(difference: float, sd: float) -> int:
    """Shared episodes for a paired test to see a mean difference whose episodes' differences have this sd."""
    return math.ceil((_reach() / _apart(difference)) ** 2 * sd**2)


def unpaired(mean_a: float, mean_b: float, sd_a: float, sd_b: float, n: int) -> tuple[float, float, float]:
    """(low, high, p) of mean_a − mean_b from n episodes of each arm: 95 % interval and two-sided z test.

    nan where neither arm varies.
    """
    from scipy.stats import norm

    error = math.sqrt((sd_a**2 + sd_b**2) / n)
    if error == 0:
        return float("nan"), float("nan"), float("nan")
    difference, z = mean_a - mean_b, norm.ppf(1 - ALPHA / 2)
    return difference - z * error, difference + z * error, float(2 * norm.sf(abs(difference) / error))


def _reach() -> float:
    from scipy.stats import norm

    return float(norm.ppf(1 - ALPHA / 2) + norm.ppf(POWER))


def _apart(difference: float) -> float:
    if not np.isfinite(difference) or difference == 0:
        raise UserError(f"no number of episodes shows a difference of {difference}: ask for another")
    return difference
