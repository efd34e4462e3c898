"""CALVIN's numbers from the records of chains: SR 1-5, Avg. Len. and per-task success, each with its interval.

A chain's length is how many of its five subtasks were done in a row; SR k is the share of chains of length k or more,
Avg. Len. their mean (fact sheet calvin §3). Computed from `subtasks` of every record, never copied.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from vla.analysis.statistics import mean_interval, rate_interval

CHAIN = 5


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
