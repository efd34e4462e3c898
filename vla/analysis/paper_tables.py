"""A paper's table with ours beside it: value, interval, difference to the baseline's own arm, test, verdict.

    sheet = compare_with_paper(load_paper("idl_table1"), load_runs(Path("results")))
    sheet.cells            # one per setting, row and column that is run here

The paper's setting comes first, whether or not anything was run in it; every other setting found (size=tiny, another
start) is a rehearsal, which the paper's numbers do not stand beside, with the cells that were run.
Differences are a − b with b the reference's arm, on the units both have, within equal training seeds: with one seed the
sign-flip test (on successes McNemar's, mid-p), which speaks of these two networks; with several, a t test over the
seeds' differences, which speaks of the method. p-values are Holm-adjusted over the rows of a column.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from vla.analysis import sequential
from vla.analysis.paper_results import Run, Sample, sample_of, settings_of
from vla.analysis.papers import Column, Finding, Paper, Row, check_paper
from vla.analysis.power import pairs_needed
from vla.analysis.resampling import over_seeds, sign_flip_p, two_level_interval
from vla.analysis.statistics import ALPHA, holm, mean_interval, rate_interval, tango_interval
from vla.analysis.tables import UNKNOWN

NAN = float("nan")


@dataclass(frozen=True)
class Estimated:
    """Mean over training seeds of what was measured; low and high are nan where one number has no interval."""

    value: float
    low: float
    high: float
    n: int
    seeds: int
    missing: int
    steps: frozenset[int] = frozenset()


@dataclass(frozen=True)
class Compared:
    """a − b on n shared units of `seeds` shared training seeds; `p_networks` speaks of these networks only."""

    n: int
    seeds: int
    difference: float
    low: float
    high: float
    p: float
    p_networks: float
    test: str
    sd: float
    """Of the units' differences."""
    told: str = ""
    """The sequential verdict, if asked for."""
    p_holm: float = NAN
    verdict: str = ""


@dataclass(frozen=True)
class Cell:
    setting: tuple[str, ...]
    row: Row
    column: Column
    ours: Estimated | None = None
    compared: Compared | None = None
    pairs_needed: int | None = None
    """To see the paper's difference, with our episodes' spread."""


@dataclass(frozen=True)
class Sheet:
    paper: Paper
    findings: list[Finding]
    cells: list[Cell]

    @property
    def settings(self) -> list[tuple[str, ...]]:
        return list(dict.fromkeys(cell.setting for cell in self.cells))

    def missing(self) -> list[tuple[Row, Column]]:
        """Rows without a result in the paper's setting, with the columns they lack."""
        return [(cell.row, cell.column) for cell in self.cells if not cell.setting and cell.ours is None]


def on_benchmark(paper: Paper, benchmark: str) -> Paper:
    """The table's rows on another benchmark, where the paper has no number: rollouts as one rate of success."""
    if paper.evaluation in ("rollout", "real_robot"):
        columns = [Column("Success", {"tasks": None}, "%", 1)]
    else:
        columns = [replace(column, benchmark=None) for column in paper.columns]
    rows = [replace(row, values=[None] * len(columns), same_as=None) for row in paper.rows if row.arm]
    return replace(paper, benchmark=benchmark, columns=columns, rows=rows, n_from_text=None)


def compare_with_paper(paper: Paper, runs: list[Run], benchmark: str | None = None, in_sequence: bool = False) -> Sheet:
    """
    Args:
        benchmark: another than the paper's, shown as a rehearsal.
        in_sequence: test whether each comparison could have stopped already.

    Raises:
        UserError: results that cannot be read, or lie there twice.
    """
    settings = settings_of(runs, paper)
    cells = [cell for setting, mine in settings.items() for cell in _cells(paper, setting, mine, in_sequence)]
    if benchmark and benchmark != paper.benchmark:
        other = on_benchmark(paper, benchmark)
        for setting, mine in settings_of(runs, other).items():
            if mine:
                cells += _cells(other, (f"benchmark={benchmark}", *setting), mine, in_sequence)
    return Sheet(paper, check_paper(paper), cells)


def _cells(paper: Paper, setting: tuple[str, ...], runs: list[Run], in_sequence: bool) -> list[Cell]:
    of_policy: dict[tuple, dict[Any, list[Run]]] = {}
    for run in runs:
        policy = (run.header.get("baseline"), run.header.get("arm"))
        of_policy.setdefault(policy, {}).setdefault(run.seed, []).append(run)
    rows = [row for row in paper.rows if row.arm]
    cells = []
    for column in paper.columns:
        samples = {
            (row.baseline, row.arm): {
                seed: sample
                for seed, mine in of_policy.get((row.baseline, row.arm), {}).items()
                if (sample := sample_of(paper, column, mine)) is not None
            }
            for row in rows
        }
        compared = {}
        for row in rows:
            reference = paper.against(row)
            if reference is not None:
                a, b = samples[row.baseline, row.arm], samples[reference.baseline, reference.arm]
                compared[row.name] = compare(a, b, _planned(column, in_sequence), (row.name, reference.name))
        verdicts = with_verdicts(compared, paper.better)
        for row in rows:
            result = verdicts.get(row.name)
            needed = _needed(paper, row, column, result) if not setting else None
            found = estimate(samples[row.baseline, row.arm], column.bounds)
            if found is not None or not setting:
                cells.append(Cell(setting, row, column, found, result, needed))
    return sorted(cells, key=lambda cell: rows.index(cell.row))


def estimate(samples: dict[Any, Sample], bounds: tuple[float, float] = (-np.inf, np.inf)) -> Estimated | None:
    """The mean over training seeds: Wilson or bootstrap interval of one seed, two-level bootstrap of several.

    None without a sample. An interval of one number alone (a loss without tasks) is what its file says, or nan. No
    interval of several seeds leaves `bounds`.
    """
    if not samples:
        return None
    each = list(samples.values())
    n, seeds = sum(len(sample.values) for sample in each), len(each)
    missing = UNKNOWN if any(s.missing == UNKNOWN for s in each) else sum(s.missing for s in each)
    steps = frozenset().union(*(sample.steps for sample in each))
    mean = float(np.mean([sample.mean for sample in each]))
    low, high = NAN, NAN
    if np.isnan(mean):
        return Estimated(NAN, NAN, NAN, n, seeds, missing, steps)
    if seeds > 1:
        low, high = two_level_interval([s.values for s in each], [s.weights for s in each], bounds)
    elif each[0].plain:
        low, high = rate_interval(round(each[0].values.sum()), n)
    elif n > 1:
        equal = np.ptp(each[0].weights) < 1e-12
        low, high = mean_interval(each[0].values, weights=None if equal else each[0].weights)
    elif each[0].interval:
        low, high = each[0].interval
    return Estimated(mean, low, high, n, seeds, missing, steps)


def compare(
    a: dict[Any, Sample], b: dict[Any, Sample], planned: int | None = None, names: tuple[str, str] = ("a", "b")
) -> Compared | None:
    """a − b on shared units of shared training seeds; None where there are none.

    Args:
        planned: pairs per training seed at which a sequential comparison ends; None: no such verdict.
    """
    shared = [_pair(a[s], b[s]) for s in a if s in b and not np.isnan(a[s].mean + b[s].mean)]
    shared = [pairs for pairs in shared if pairs[0]]
    if not shared:
        return None
    differences, weights = (np.concatenate([pairs[i] for pairs in shared]) for i in (1, 2))
    means = [float(np.average(d, weights=w)) for _, d, w in shared]
    n = len(differences)
    p_networks = sign_flip_p(differences, weights) if n > len(shared) else NAN
    plain = np.ptp(weights) < 1e-12 and all(arm[seed].plain for arm in (a, b) for seed in a.keys() & b.keys())
    if len(shared) > 1:
        test, (low, high, p) = "t over seeds", over_seeds(means)
    else:
        test, p = "McNemar mid-p" if plain else "sign flips", p_networks
        low, high = _interval(differences, weights, plain)
    told = ""
    if planned and np.ptp(weights) < 1e-12 and n > 1 and (differences == np.round(differences)).all():
        keys = [(key[-1], *key, place) for place, pairs in enumerate(shared) for key in pairs[0]]  # by episode's seed
        order = sorted(range(n), key=keys.__getitem__)
        planned *= len(shared)
        decision = sequential.decide(differences[order][:planned], planned)
        told = sequential.told(decision, *names)
    sd = float(np.sqrt(np.average((differences - np.average(differences, weights=weights)) ** 2, weights=weights)))
    return Compared(n, len(shared), float(np.mean(means)), low, high, p, p_networks, test, sd, told)


def _pair(a: Sample, b: Sample) -> tuple[list[tuple], np.ndarray, np.ndarray]:
    at = {key: index for index, key in enumerate(b.keys)}
    keys = [key for key in a.keys if key in at]
    first = {key: index for index, key in enumerate(a.keys)}
    rows_a, rows_b = [first[key] for key in keys], [at[key] for key in keys]
    weights = a.weights[rows_a]
    return keys, a.values[rows_a] - b.values[rows_b], weights / weights.sum() if len(keys) else weights


def _interval(differences: np.ndarray, weights: np.ndarray, plain: bool) -> tuple[float, float]:
    if len(differences) < 2:
        return NAN, NAN
    if plain:
        return tango_interval(int((differences > 0).sum()), int((differences < 0).sum()), len(differences))
    return mean_interval(differences, weights=None if np.ptp(weights) < 1e-12 else weights)


def with_verdicts(compared: dict[str, Compared | None], better: str) -> dict[str, Compared]:
    """The comparisons of one column with p adjusted for their number, and a plain verdict on each."""
    tested = [name for name, result in compared.items() if result is not None and not np.isnan(result.p)]
    adjusted = dict(zip(tested, holm([compared[name].p for name in tested]), strict=True))
    return {
        name: replace(result, p_holm=adjusted.get(name, NAN), verdict=_verdict(result, adjusted.get(name, NAN), better))
        for name, result in compared.items()
        if result is not None
    }


def _verdict(result: Compared, p: float, better: str) -> str:
    scope = f"{result.seeds} seed{'s' if result.seeds > 1 else ''}"
    if np.isnan(p):
        why = "one number each" if result.seeds == 1 else "the seeds agree exactly"
        return f"{why}, nothing to test with ({scope})"
    if p >= ALPHA:
        return f"not distinguishable ({scope})"
    return ("better" if (result.difference > 0) == (better == "higher") else "worse") + f" ({scope})"


def _planned(column: Column, in_sequence: bool) -> int | None:
    return column.n if in_sequence else None


def _needed(paper: Paper, row: Row, column: Column, result: Compared | None) -> int | None:
    """Pairs to see the paper's difference with the spread of ours; None where there is no spread or no difference."""
    reference = paper.against(row)
    if result is None or reference is None or result.n < 2 or result.sd == 0:
        return None
    a, b = paper.value(row, column), paper.value(reference, column)
    if a is None or b is None or a == b or column.unit not in ("%", "subtasks"):
        return None
    return pairs_needed((a - b) / column.scale, result.sd)
