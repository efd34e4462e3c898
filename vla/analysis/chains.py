"""CALVIN's numbers from the records of chains: SR 1-5, Avg. Len. and per-task success, each with its interval.

A chain's length is how many of its five subtasks were done in a row; SR k is the share of chains of length k or more,
Avg. Len. their mean (fact sheet calvin §3). Computed from `subtasks` of every record, never copied.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd

from vla.analysis.statistics import ALPHA, format_p, holm, mean_interval, rate_interval
from vla.analysis.tables import GROUP, families_of_arms

CHAIN = 5
PAIR = [*GROUP, "arm_a", "arm_b", "n", "difference", "low", "high", "p", "p_holm", "verdict"]


def length(subtasks: list[dict[str, Any]]) -> int:
    """Subtasks done in a row."""
    return sum(subtask["success"] for subtask in subtasks)


def chain_metrics(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """What a table prints of the records `rows`, all of them of chains.

    Returns:
        n; sr: five of {"k", "successes", "rate", "interval" (95 % Wilson)}; avg_len: {"value", "interval"} (95 % BCa
        bootstrap over chains, None below two chains); per_task: {task: {"n", "successes", "rate", "interval"}}, n the
        chains that got as far as trying it.
    """
    lengths = np.array([length(row["subtasks"]) for row in rows])
    tried: dict[str, list[bool]] = {}
    for row in rows:
        for subtask in row["subtasks"]:
            tried.setdefault(subtask["task"], []).append(subtask["success"])
    interval = list(mean_interval(lengths)) if len(rows) > 1 else None
    return {
        "n": len(rows),
        "sr": [{"k": k, **_rate(int((lengths >= k).sum()), len(rows))} for k in range(1, CHAIN + 1)],
        "avg_len": {"value": float(lengths.mean()), "interval": interval},
        "per_task": {task: {"n": len(done), **_rate(sum(done), len(done))} for task, done in sorted(tried.items())},
    }


def _rate(successes: int, n: int) -> dict[str, Any]:
    return {"successes": successes, "rate": successes / n, "interval": list(rate_interval(successes, n))}


def chains_table(episodes: pd.DataFrame) -> tuple[pd.DataFrame, pd.DataFrame]:
    """One row per (benchmark, conditions, arm, training seed), and one per pair of arms, of the chains in `episodes`.

    Args:
        episodes: the frame of vla.analysis.tables.load.

    Returns:
        results, numbers: n, sr1 … sr5, avg_len, low, high (95 % BCa bootstrap over chains); comparisons of the pairs of
        tables.families_of_arms, runs of the same training seed paired: n (chains both arms ran), difference of Avg.
        Len. with low and high (bootstrap over the paired differences), p (paired permutation, two-sided), p_holm (over
        the pairs of a family; nan where it has one) and verdict. Both empty where no record is a chain's.
    """
    chains = with_lengths(episodes)
    if not len(chains):
        return pd.DataFrame(columns=GROUP), pd.DataFrame(columns=PAIR)
    results, comparisons = [], []
    for key, rows in chains.groupby([*GROUP, "arm", "train_seed"]):
        low, high = mean_interval(rows.length) if len(rows) > 1 else (np.nan, np.nan)
        shares = {f"sr{k}": float((rows.length >= k).mean()) for k in range(1, CHAIN + 1)}
        numbers = shares | {"avg_len": float(rows.length.mean()), "low": low, "high": high}
        results.append(dict(zip([*GROUP, "arm", "train_seed"], key, strict=True)) | {"n": len(rows)} | numbers)
    for key, group in chains.groupby(GROUP):
        for family in families_of_arms(group):
            rows = []
            for a, b in family:
                pair = group[group.arm == a].merge(group[group.arm == b], on=["seed", "train_seed"])
                if len(pair) > 1:
                    row = dict(zip(GROUP, key, strict=True)) | {"arm_a": a, "arm_b": b}
                    rows.append(row | compare_lengths(pair.length_x.to_numpy(), pair.length_y.to_numpy()))
            for row, p in zip(rows, holm([row["p"] for row in rows]), strict=True):
                several = len(rows) > 1
                comparisons.append(row | {"p_holm": p if several else np.nan, "verdict": _verdict(row, p, several)})
    return pd.DataFrame(results), pd.DataFrame(comparisons, columns=PAIR)


def with_lengths(episodes: pd.DataFrame) -> pd.DataFrame:
    """Those of the episodes that are chains, and the `length` of each."""
    chains = episodes[[bool(subtasks) for subtasks in episodes.subtasks]] if "subtasks" in episodes else episodes[:0]
    return chains.assign(length=[length(subtasks) for subtasks in chains.subtasks] if len(chains) else [])


def _verdict(row: dict[str, Any], p: float, several: bool) -> str:
    how = f"(paired permutation {format_p(p)}{', Holm' if several else ''}, n = {row['n']} chains)"
    if p >= ALPHA:
        return f"not distinguishable {how}"
    return f"{row['arm_a'] if row['difference'] > 0 else row['arm_b']} is better {how}"


def compare_lengths(a: np.ndarray, b: np.ndarray) -> dict[str, float]:
    """Lengths of the same chains under two policies: mean difference a − b, its interval, and a permutation p-value.

    Under the null hypothesis the two lengths of a chain may be swapped; of 2^n swaps 99,999 are drawn (all of them
    where they are fewer).
    """
    from scipy.stats import permutation_test

    difference = a.astype(float) - b
    test = permutation_test(
        (difference,), np.mean, permutation_type="samples", n_resamples=99_999, vectorized=True, batch=1000,
        rng=np.random.default_rng(0),
    )  # fmt: skip
    low, high = mean_interval(difference)
    return {"n": len(a), "difference": float(difference.mean()), "low": low, "high": high, "p": float(test.pvalue)}
