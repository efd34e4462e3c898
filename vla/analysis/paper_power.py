"""What a paper's own numbers allow to say: each gain with its unpaired interval, and the episodes it would take.

    for gain in gains(load_paper("idl_table1")): print(gain)

Rates and chain lengths only: of losses and correlations the papers print neither spread nor training seeds.
"""

from __future__ import annotations

from dataclasses import dataclass

from vla.analysis.papers import Column, Paper, Row
from vla.analysis.power import arms_needed, chain_sd, rate_sd, unpaired


@dataclass(frozen=True)
class Gain:
    """row − reference in the column's unit, with its interval and p where n is known; `needed`: episodes per arm."""

    row: Row
    reference: Row
    column: Column
    difference: float
    low: float | None
    high: float | None
    p: float | None
    needed: int | None


def gains(paper: Paper) -> list[Gain]:
    """Every row against its reference, per column with a spread.

    Means are calculated from the columns, not from the printed average; a mean of tasks counts as one rate of all its
    episodes, which is a little too cautious.
    """
    found = []
    for row in paper.rows:
        reference = paper.against(row)
        for column in paper.columns if reference is not None else ():
            a, b = paper.value(row, column), paper.value(reference, column)
            if a is not None and b is not None and column.unit in ("%", "subtasks"):
                found.append(_gain(paper, row, reference, column, a, b))
    return found


def _gain(paper: Paper, row: Row, reference: Row, column: Column, a: float, b: float) -> Gain:
    sds = [_sd(paper, each, column) for each in (row, reference)]
    a, b = a / column.scale, b / column.scale
    low = high = p = None
    if column.n is not None and any(sds):
        low, high, p = unpaired(a, b, *sds, column.n)
        low, high = column.scale * low, column.scale * high
    needed = arms_needed(a, b, *sds) if a != b and any(sds) else None
    return Gain(row, reference, column, column.scale * (a - b), low, high, p, needed)


def _sd(paper: Paper, row: Row, column: Column) -> float:
    if column.sum_of:
        return chain_sd([paper.printed(row, paper.column(part)) / 100 for part in column.sum_of])
    return rate_sd(min(max(paper.value(row, column) / 100, 0.0), 1.0))
