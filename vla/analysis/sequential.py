"""Stop a paired comparison as soon as it is decided, without paying for the early look: exact group-sequential flips.

Under the hypothesis of no difference each pair's two outcomes may be swapped, so that, given how large the differences
|a − b| are, their signs are fair coins and the running sum of differences is a random walk of known steps. Its chance
to cross a boundary is computed exactly, pair by pair, and the boundary is set so that the total chance up to pair i of
N never exceeds α(i / N), Lan and DeMets' spending function of O'Brien and Fleming's shape (Biometrika 70:659, 1983);
what a look could not spend, because sums are whole numbers, is left to the next.

Why this and not an e-process or a confidence sequence: those hold at any stopping time with no plan, and pay for it by
calling equal arms different in far fewer than 5 % of cases and needing more episodes. A table's comparison has a plan
(the paper's number of episodes), with which all of α can be spent and the last look is nearly the ordinary test. Exact
for any n, whatever the pattern of differences, and however often one looks; the price is that N is fixed before the
first look and episodes come in an order that does not depend on their outcome (here: by seed).

    decision = decide(differences, planned=1000)
    decision.decided_at      # 412, or None
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from vla.analysis.resampling import flip_one_more
from vla.analysis.statistics import ALPHA
from vla.errors import UserError


@dataclass(frozen=True)
class Decision:
    """Where a sequential comparison stands after `n` of `planned` pairs."""

    n: int
    planned: int
    decided_at: int | None
    """The pair at which the running sum left the boundary; None while it has not."""
    difference: float
    """Mean of a − b up to where it was decided (or so far): after an early stop it exaggerates."""
    spent: float
    """Chance, were the arms equal, of a decision up to there: never above alpha."""
    more: int
    """Pairs to go on for, a forecast: until a difference as it stands reaches the boundary; at most the plan's rest."""


def decide(differences: Sequence[float], planned: int, alpha: float = ALPHA) -> Decision:
    """Test after every pair whether the arms differ, two-sided, with error at most `alpha` over all looks together.

    Args:
        differences: (n,) whole numbers a − b in the order of the episodes: −1, 0, 1 of successes, −5 … 5 of chains.
        planned: N, the pairs after which the comparison ends anyway; n ≤ N.

    Raises:
        UserError: no pairs, more than planned, or differences that are not whole.
    """
    values = np.asarray(differences, dtype=np.float64)
    if not 0 < len(values) <= planned:
        raise UserError(f"a sequential comparison of {planned} planned pairs cannot have {len(values)}: plan for more")
    if not (values == np.round(values)).all():
        raise UserError("a sequential comparison needs whole differences: successes or lengths of chains")
    alive, total, spent, decided, boundary = np.ones(1), 0, 0.0, None, None
    for pair, difference in enumerate(values.astype(int), 1):
        if difference:
            alive, total = flip_one_more(alive, abs(difference)), total + difference
        elif pair < planned:
            continue  # the walk stands still: its next look spends what this one may
        boundary, cost = _boundary(alive, spending(pair / planned, alpha) - spent)
        spent += cost
        middle = len(alive) // 2
        if abs(total) >= boundary:
            decided = pair
            break
        alive[: max(middle - boundary + 1, 0)] = 0
        alive[middle + boundary :] = 0
    seen = values[: decided or len(values)]
    more = 0 if decided else _forecast(values, planned, boundary if boundary and boundary <= len(alive) // 2 else None)
    return Decision(len(values), planned, decided, float(seen.mean()), spent, more)


def spending(share: float, alpha: float = ALPHA) -> float:
    """Error that may be spent up to a share (0, 1] of the plan: 2 − 2 Φ(z / √share), all of `alpha` at the end."""
    from scipy.special import ndtr, ndtri

    return float(2 - 2 * ndtr(ndtri(1 - alpha / 2) / math.sqrt(share)))


def _boundary(alive: np.ndarray, allowed: float) -> tuple[int, float]:
    """(smallest |sum| whose tails together have at most the chance `allowed`, that chance)."""
    middle = len(alive) // 2
    tails = np.cumsum(alive[::-1])[: middle + 1][::-1] * 2  # of |sum| ≥ 0, 1, …; the walk is symmetric
    reachable = np.flatnonzero(tails[1:] <= allowed + 1e-15)
    if not len(reachable):
        return middle + 1, 0.0
    return int(reachable[0]) + 1, float(tails[reachable[0] + 1])


def _forecast(differences: np.ndarray, planned: int, boundary: int | None) -> int:
    """Pairs until the sum, growing as it has, meets the boundary: in O'Brien and Fleming's shape it hardly moves.

    Args:
        boundary: the last one; None while no sum could have reached it, then its limit 1.96 sd √N.
    """
    total, rest = abs(float(differences.sum())), planned - len(differences)
    if not total:
        return rest
    barrier = 1.96 * float(differences.std()) * math.sqrt(planned) if boundary is None else boundary
    return min(rest, max(1, math.ceil((barrier - total) * len(differences) / total)))


def told(decision: Decision, name_a: str, name_b: str) -> str:
    """ "decided after 412 of 1,000 pairs: ptr better", "go on: after 300 of 1,000 pairs, about 120 more"."""
    if decision.decided_at is not None:
        winner = name_a if decision.difference > 0 else name_b
        return f"decided after {decision.decided_at:,} of {decision.planned:,} pairs: {winner} better"
    if decision.n == decision.planned:
        return f"all {decision.planned:,} planned pairs used: not distinguishable"
    done = f"after {decision.n:,} of {decision.planned:,} pairs"
    if decision.more == decision.planned - decision.n:
        return f"go on: {done}, the {decision.more:,} left may not be enough"
    return f"go on: {done}, about {decision.more:,} more"
