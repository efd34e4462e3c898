"""The papers' printed tables as data (data/papers/*.yaml), and whether their numbers can be right.

A file is a table: title, source, benchmark and evaluation whose results stand beside it, columns and rows, and perhaps
    notes         sentences to print below it
    better        lower, for losses
    experiment    conf/experiment, where it is not the file's own name
    reference     baseline → the arm its rows are compared with, where that is not vanilla
    n_from_text   where n comes from, if not from the table
    tap           the visual tokens that were measured
A column has a name, measure (vla/analysis/paper_results.py), unit, decimals as printed, and perhaps n (episodes behind
a cell), sum_of or mean_of (columns it is made from), same_as (a column of another table), and benchmark, evaluation,
experiment of its own. A row has a name and values, and, where this project can run it, baseline and arm; same_as names
a table that prints the same measurement.

    paper = load_paper("idl_table1")
    for finding in check_paper(paper): print(finding.row, finding.column, finding.told)
"""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass, field, fields
from functools import cache
from pathlib import Path
from typing import Any

import yaml

from vla.errors import UserError

FOLDER = Path(__file__).resolve().parents[2] / "data" / "papers"
REFERENCE = "vanilla"
RANGES = {"%": (0.0, 100.0), "subtasks": (0.0, 5.0), "correlation": (-1.0, 1.0), "loss": (0.0, math.inf)}


@dataclass(frozen=True)
class Column:
    name: str
    measure: Any
    unit: str
    decimals: int
    n: int | None = None
    sum_of: list[str] = field(default_factory=list)
    mean_of: list[str] = field(default_factory=list)
    same_as: str | None = None
    benchmark: str | None = None
    evaluation: str | None = None
    experiment: str | None = None

    @property
    def scale(self) -> float:
        """What our numbers (rates in [0, 1]) are multiplied by to have the column's unit."""
        return 100.0 if self.unit == "%" else 1.0

    @property
    def bounds(self) -> tuple[float, float]:
        """What our numbers cannot leave."""
        low, high = RANGES[self.unit]
        return low / self.scale, high / self.scale

    @property
    def parts(self) -> list[str]:
        return self.sum_of or self.mean_of


@dataclass(frozen=True)
class Row:
    name: str
    values: list[float | None]
    baseline: str | None = None
    arm: str | None = None
    same_as: str | None = None


@dataclass(frozen=True)
class Paper:
    name: str
    title: str
    source: str
    benchmark: str
    evaluation: str
    columns: list[Column]
    rows: list[Row]
    better: str = "higher"
    experiment: str | None = None
    reference: dict[str, str] = field(default_factory=dict)
    n_from_text: str | None = None
    tap: str | None = None
    notes: list[str] = field(default_factory=list)

    def column(self, name: str) -> Column | None:
        return next((column for column in self.columns if column.name == name), None)

    def row(self, baseline: str | None, arm: str | None) -> Row | None:
        return next((row for row in self.rows if arm and (row.baseline, row.arm) == (baseline, arm)), None)

    def printed(self, row: Row, column: Column) -> float | None:
        return row.values[self.columns.index(column)]

    def value(self, row: Row, column: Column) -> float | None:
        """The number to calculate with: computed from its columns where there are any, else as printed."""
        if not column.parts:
            return self.printed(row, column)
        parts = [self.printed(row, self.column(part)) for part in column.parts]
        if None in parts:
            return self.printed(row, column)
        return sum(parts) / (100 if column.sum_of else len(parts))  # per cent into subtasks

    def against(self, row: Row) -> Row | None:
        """The row that `row` is compared with; None for the reference itself and for what is not run here."""
        reference = self.row(row.baseline, self.reference.get(row.baseline, REFERENCE))
        return None if reference is row or row.arm is None else reference


@dataclass(frozen=True)
class Finding:
    """A printed number that cannot be right; row and column are "" where it is not about a single cell."""

    row: str
    column: str
    printed: str
    told: str


def papers() -> list[str]:
    return sorted(path.stem for path in FOLDER.glob("*.yaml"))


@cache
def load_paper(name: str) -> Paper:
    """
    Raises:
        UserError: no such table, or a file that is none.
    """
    path = FOLDER / f"{name}.yaml"
    if not path.exists():
        raise UserError(f"table={name} does not exist; choose one of: {', '.join(papers())}")
    return read_paper(name, yaml.safe_load(path.read_text()))


def read_paper(name: str, content: dict[str, Any]) -> Paper:
    try:
        columns = [Column(**column) for column in content["columns"]]
        rows = [Row(**row) for row in content["rows"]]
        paper = Paper(name=name, **content | {"columns": columns, "rows": rows})
    except (TypeError, KeyError) as error:
        known = ", ".join(part.name for part in fields(Paper))
        raise UserError(f"data/papers/{name}.yaml is no table ({error}); its keys are {known}") from None
    for row in rows:
        if len(row.values) != len(columns):
            raise UserError(f"data/papers/{name}.yaml: {row.name} has {len(row.values)} values, {len(columns)} columns")
    for column in columns:
        if unknown := [part for part in column.parts if paper.column(part) is None]:
            raise UserError(f"data/papers/{name}.yaml: {column.name} is made from {unknown[0]!r}, which is no column")
    return paper


def check_paper(paper: Paper) -> list[Finding]:
    """Every printed number that contradicts another or its own n.

    Each number may be rounded or cut off in its last place. Sums and means must follow from their columns, rates be
    multiples of 1 / n, all lie in their unit's range, SR 1 … 5 not rise, and two prints of one measurement agree. Where
    n stands in the text only, the cells that no count of n gives are one finding about n.
    """
    found, odd = [], []
    for row in paper.rows:
        for column, value in zip(paper.columns, row.values, strict=True):
            if value is None:
                continue
            if problem := _in_itself(column, value):
                found.append(_finding(row, column, value, problem))
            elif problem := _multiple(column, value):
                odd.append((column, value)) if paper.n_from_text else found.append(
                    _finding(row, column, value, problem)
                )
            if problem := _from_parts(paper, row, column, value) or _elsewhere(row, column, value):
                found.append(_finding(row, column, value, problem))
        found += _rising(paper, row)
    if odd:
        sizes = sorted({column.n for column, _ in odd})
        cells = sum(value is not None for row in paper.rows for value in row.values) - _derived(paper)
        told = f"{len(odd)} of {cells} cells are no multiple of 1/{sizes[0]} ({paper.n_from_text}), so n is in doubt"
        found.append(Finding("", "", "", told))
    return found


def text(value: float, decimals: int) -> str:
    return f"{value:.{decimals}f}"


def standing_for(value: float, decimals: int) -> tuple[float, float]:
    """The numbers [low, high) that are printed as `value`, rounded or cut off."""
    unit = 10.0**-decimals
    return value - unit / 2 - 1e-9, value + unit - 1e-9


def _finding(row: Row, column: Column, value: float, told: str) -> Finding:
    return Finding(row.name, column.name, text(value, column.decimals), told)


def _in_itself(column: Column, value: float) -> str:
    low, high = RANGES[column.unit]
    return "" if low <= value <= high else f"lies outside {low:g} … {high:g}"


def _multiple(column: Column, value: float) -> str:
    if column.n is None or column.unit != "%" or column.parts:
        return ""
    decimals = column.decimals
    while decimals > 1 and round(value * 10**decimals) % 10 == 0:
        decimals -= 1  # 36.70 may be 36.7 with a zero added
    low, high = standing_for(value, decimals)
    k = round(value / 100 * column.n)
    near = [100 * count / column.n for count in (k - 1, k, k + 1)]
    if any(low <= rate < high for rate in near):
        return ""
    return f"is no multiple of 1/{column.n}: the nearest is {k}/{column.n} = {near[1]:.{column.decimals}f}"


def _from_parts(paper: Paper, row: Row, column: Column, value: float) -> str:
    if not column.parts:
        return ""
    of = [paper.column(part) for part in column.parts]
    printed = [paper.printed(row, part) for part in of]
    if None in printed:
        return ""
    ranges = [standing_for(v, part.decimals) for v, part in zip(printed, of, strict=True)]
    divisor = 100 if column.sum_of else len(of)
    lowest, highest = (sum(ends) / divisor for ends in zip(*ranges, strict=True))
    low, high = standing_for(value, column.decimals)
    if low < highest and lowest < high:
        return ""
    given = text(paper.value(row, column), column.decimals + 1).rstrip("0")
    return f"does not follow: its columns give {given}"


def _elsewhere(row: Row, column: Column, value: float) -> str:
    if row.same_as is None:
        return ""
    other = load_paper(row.same_as)
    there, twin = other.row(row.baseline, row.arm), other.column(column.same_as or column.name)
    if there is None or twin is None:
        return ""
    printed = other.printed(there, twin)
    a, b = standing_for(value, column.decimals), standing_for(printed, twin.decimals)
    if a[0] < b[1] and b[0] < a[1]:
        return ""
    return f"is the same measurement as {text(printed, twin.decimals)} in {other.source}"


def _rising(paper: Paper, row: Row) -> list[Finding]:
    """More chains of length k + 1 than of length k."""
    chain = [c for c in paper.columns if isinstance(c.measure, dict) and "chain" in c.measure]
    found = []
    for before, after in itertools.pairwise(chain):
        a, b = paper.printed(row, before), paper.printed(row, after)
        if None not in (a, b) and b > a:
            found.append(_finding(row, after, b, f"exceeds {text(a, before.decimals)} for a shorter chain"))
    return found


def _derived(paper: Paper) -> int:
    """Cells with a number that are made from others."""
    return sum(paper.printed(row, c) is not None for row in paper.rows for c in paper.columns if c.parts)
