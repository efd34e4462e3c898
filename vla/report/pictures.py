"""The page's pictures, each a panel of its own: losses, probe losses, alignment, successes per task, accuracies."""

from __future__ import annotations

import textwrap
from collections.abc import Iterator, Sequence
from itertools import groupby
from typing import NamedTuple

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.ticker import LogLocator, MaxNLocator

from vla.analysis import tables
from vla.analysis.chains import chain_metrics
from vla.analysis.statistics import rate_interval
from vla.analysis.vqa_tables import ORDER
from vla.report.answers import evaluation_of
from vla.report.drawing import INK, PAPER, Look, Looks, Picture, draw, plain
from vla.report.material import Curve, Run

POINTS = 60
"""Of a curve: each the mean over a stretch of steps, which smooths it and keeps the page small."""
MOST_TASKS = 100
NAMES = {"loss": "policy loss", "inverse_loss": "inverse-dynamics loss"}


class Value(NamedTuple):
    """A number of one policy (nan limits: it has no interval)."""

    seed: str
    value: float
    low: float
    high: float


def learning_curves(runs: Sequence[Run], looks: Looks) -> list[Picture]:
    """A picture per loss of each (baseline, size, benchmark): seeds thin, their mean thick."""
    pictures = []

    def group(run: Run) -> tuple[str, str, str]:
        return run.baseline, run.size, run.benchmark

    for (baseline, size, benchmark), found in groupby(sorted(runs, key=group), key=group):
        mine = [run for run in found if run.metrics is not None]
        for loss in dict.fromkeys(column for run in mine for column in run.metrics if "loss" in column):
            curves: dict[str, list[pd.Series]] = {}
            for run in mine:
                if loss in run.metrics and len(known := run.metrics[["step", loss]].dropna()):
                    curves.setdefault(run.arm, []).append(known.set_index("step")[loss] + 0.0)
            if curves:
                name = NAMES.get(loss, loss.replace("_", " "))
                title = f"{name}: {baseline} {size} on {benchmark}"
                label = "training step (optimiser updates)", f"{name} (no unit)"
                pictures.append(_curves(curves, looks, title, *label))
    return pictures


def probe_curves(curves: Sequence[Curve], looks: Looks) -> list[Picture]:
    """IDL's Fig. 1(b): training losses of the frozen-encoder probes."""
    pictures = []

    def group(curve: Curve) -> tuple[str, str]:
        return curve.probe, curve.benchmark

    for (probe, benchmark), found in groupby(sorted(curves, key=group), key=group):
        of_arm: dict[str, list[pd.Series]] = {}
        for curve in found:
            of_arm.setdefault(curve.arm, []).append(pd.Series(curve.losses, np.arange(1, len(curve.losses) + 1)))
        label = "training step of the probe", "training loss (L1, normalised)"
        pictures.append(_curves(of_arm, looks, f"{probe} on frozen tokens: {benchmark}", *label))
    return pictures


def _curves(curves: dict[str, list[pd.Series]], looks: Looks, title: str, x: str, y: str) -> Picture:
    def paint(axes: Axes) -> None:
        for arm, seeds in sorted(curves.items()):
            look = looks[arm]
            for seed in seeds if len(seeds) > 1 else ():
                axes.plot(*_binned(seed), color=look.color, linewidth=0.9, alpha=0.5)
            until = min(seed.index.max() for seed in seeds)  # beyond it the mean would be of fewer seeds
            mean = pd.concat([seed[seed.index <= until] for seed in seeds]).groupby(level=0).mean()
            every = dict(marker=look.marker, markevery=0.15, markersize=5.5)
            label = f"{look.name} ({len(seeds)} seed{'s' * (len(seeds) > 1)})"
            axes.plot(*_binned(mean), color=look.color, linestyle=look.linestyle, linewidth=2.4, label=label, **every)
        if all((seed > 0).all() for seeds in curves.values() for seed in seeds):
            axes.set_yscale("log")
            axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
            axes.yaxis.set_major_formatter("{x:g}")
            axes.yaxis.set_minor_formatter("")
            axes.minorticks_off()
            axes.set_ylabel(y.replace(" (", "\n(log scale, "))
        else:
            axes.set_ylabel(y)
        axes.set_xlabel(x)
        _legend(axes, len(curves))

    ends = ", ".join(f"{arm} ends at {np.mean([s.iloc[-1] for s in seeds]):.3g}" for arm, seeds in curves.items())
    return draw(paint, title, f"{y} over {x}: {ends}.")


def _binned(curve: pd.Series) -> tuple[np.ndarray, np.ndarray]:
    steps, values = curve.index.to_numpy(float), curve.to_numpy(float)
    parts = min(POINTS, len(values))
    edges = np.linspace(0, len(values), parts + 1).astype(int)[:-1]
    size = np.diff(np.append(edges, len(values)))
    return np.add.reduceat(steps, edges) / size, np.add.reduceat(values, edges) / size


def differences(comparisons: pd.DataFrame, results: pd.DataFrame) -> list[Picture]:
    """The paired differences of success rates with their intervals, a row per pair of arms."""
    pictures = []
    known = comparisons[comparisons.n > 0]
    for key, rows in known.groupby(tables.GROUP):
        title, found = tables.titles(results)[key], list(rows.itertuples())[:30]

        def paint(axes: Axes, found: list = found) -> None:
            for place, row in enumerate(found):
                error = [[row.difference - row.low], [row.high - row.difference]]
                axes.errorbar(row.difference, place, xerr=error, fmt="o", color=INK, capsize=4, markersize=7)
                axes.annotate(
                    f"{plain(row.arm_a)} − {plain(row.arm_b)}  ({row.n} pairs)", (0.01, place),
                    (0, 11), xycoords=("axes fraction", "data"), textcoords="offset points",
                )  # fmt: skip
            _rows(axes, len(found))
            axes.axvline(0, color=INK, linewidth=1)
            widest = max(0.1, *(abs(limit) for row in found for limit in (row.low, row.high)))
            axes.set_xlim(-1.1 * widest, 1.1 * widest)
            axes.set_xlabel("difference of success rates, first − second, 95 % interval")

        told = "; ".join(f"{r.arm_a} minus {r.arm_b}: {r.difference:+.2f} [{r.low:+.2f}, {r.high:+.2f}]" for r in found)
        pictures.append(draw(paint, f"Differences in success: {title}", told, _height(len(found))))
    return pictures


def successes(episodes: pd.DataFrame, results: pd.DataFrame, looks: Looks) -> list[Picture]:
    """Success rate of every task with its Wilson interval, episodes of all training seeds together."""
    pictures = []
    for key, rows in episodes.groupby(tables.GROUP) if len(episodes) else ():
        title = tables.titles(results)[key] + (" (frozen-encoder probes)" if "probe" in evaluation_of(key[1]) else "")
        is_chain = rows.subtasks.map(bool).all()
        of_arm: dict[str, dict[str, tuple[int, int]]] = {}
        for arm, mine in rows.groupby("arm"):
            if is_chain:
                tried = chain_metrics(mine.to_dict("records"))["per_task"]
                of_arm[arm] = {task: (rate["successes"], rate["n"]) for task, rate in tried.items()}
            else:
                of_arm[arm] = {task: (int(s.sum()), len(s)) for task, s in mine.groupby("task").success}
        tasks = sorted({task for rates in of_arm.values() for task in rates})
        if len(tasks) > MOST_TASKS:
            title += f", the first {MOST_TASKS} of {len(tasks)} tasks"
        pictures.append(_successes(f"Success per task: {title}", tasks[:MOST_TASKS], of_arm, looks))
    return pictures


def _successes(title: str, tasks: list[str], of_arm: dict[str, dict[str, tuple[int, int]]], looks: Looks) -> Picture:
    def paint(axes: Axes) -> None:
        lines = _offsets(len(of_arm), 0.5)
        for (arm, rates), offset in zip(sorted(of_arm.items()), lines, strict=True):
            look, label = looks[arm], looks[arm].name
            for place, task in enumerate(tasks):
                if task in rates:
                    done, n = rates[task]
                    low, high = rate_interval(done, n)
                    error = [[done / n - low], [high - done / n]]
                    axes.errorbar(
                        done / n, place + offset, xerr=error, color=look.color, marker=look.marker, markersize=6,
                        linestyle="none", capsize=2, elinewidth=1.4, label=label, clip_on=False,
                    )  # fmt: skip
                    label = None
        for place, task in enumerate(tasks):
            counts = sorted({rates[task][1] for rates in of_arm.values() if task in rates})
            n = str(counts[0]) if len(counts) == 1 else f"{counts[0]}–{counts[-1]}"
            words = plain(textwrap.shorten(task.replace("_", " "), 56, placeholder="…") or task, 56)
            axes.annotate(
                f"{words} (n = {n})", (0, place - 0.36), xycoords=("axes fraction", "data"), va="bottom", fontsize=9.5
            )
        _rows(axes, len(tasks))
        axes.set_xlim(0, 1)
        axes.set_xlabel("success rate, 95 % Wilson interval; n episodes of each arm")
        _legend(axes)

    told = "; ".join(
        f"{arm}: {sum(s for s, _ in r.values())} of {sum(n for _, n in r.values())}" for arm, r in of_arm.items()
    )
    height = 1.1 + len(tasks) * max(0.55, 0.2 + 0.17 * len(of_arm)) + 0.2 * (len(of_arm) // 3)
    return draw(paint, title, f"Successes, all tasks together: {told}.", height)


def alignment_bars(analyses: pd.DataFrame, looks: Looks) -> list[Picture]:
    """IDL's Fig. 1(c): partial Spearman correlation of feature and pose distances, a picture per baseline."""
    pictures, measured = [], analyses[analyses.metric.isin(("cosine", "scale"))]
    for (benchmark, baseline), rows in measured.groupby(["benchmark", "baseline"], dropna=False):
        values = {
            f"{metric} distance": {arm: [*_values(r)] for arm, r in of_metric.groupby("arm")}
            for metric, of_metric in rows.groupby("metric")
        }
        axis = "state-feature alignment\n(partial Spearman, no unit)"
        name = f", {baseline}" if measured.baseline.nunique() > 1 and isinstance(baseline, str) else ""
        pictures.append(_bars(values, looks, f"State-feature alignment: {benchmark}{name}", axis))
    return pictures


def accuracy_bars(accuracies: pd.DataFrame, looks: Looks) -> list[Picture]:
    """GenVLA's Fig. 5 and the linear probes of its Fig. 4: accuracies, a picture per kind of test and baseline."""
    pictures = []
    is_cifar = accuracies.what.str.startswith("cifar10").astype(bool)
    for name, found in (("Visual question answering", accuracies[~is_cifar]), ("CIFAR-10", accuracies[is_cifar])):
        for baseline, rows in found.groupby("baseline"):
            order = [*ORDER, *sorted(set(rows.what) - set(ORDER))]
            values = {
                what: {arm: [*_values(r)] for arm, r in rows[rows.what == what].groupby("arm")}
                for what in order
                if (rows.what == what).any()
            }
            pictures.append(_bars(values, looks, f"{name}: {baseline}", "accuracy (share right)", share=True))
    return pictures


def alignment_scatter(results: pd.DataFrame, looks: Looks) -> list[Picture]:
    """Each policy's alignment against its success rate, where both were measured on a benchmark; else against scale."""
    pictures = []
    for key, rows in results[results.train_seed != tables.POOLED].groupby(tables.GROUP):
        rows = rows.dropna(subset=["cosine"])
        against = "rate" if rows.rate.notna().any() else "scale"
        rows = rows.dropna(subset=[against])
        if len(rows) < 2:
            continue
        axis = {"rate": "success rate, 95 % interval", "scale": "alignment, scale distance (no unit)"}[against]

        def paint(axes: Axes, rows: pd.DataFrame = rows, against: str = against, axis: str = axis) -> None:
            for arm, mine in rows.groupby("arm"):
                look = looks[arm]
                x, y = mine.cosine.astype(float), mine[against].astype(float)
                low, high = (mine[f"{against}_{side}"].astype(float) for side in ("low", "high"))
                axes.errorbar(
                    x, y, yerr=[y - low, high - y], color=look.color, marker=look.marker, markersize=8,
                    linestyle="none", elinewidth=1.2, capsize=3, label=look.name,
                )  # fmt: skip
            axes.set_xlabel("alignment, cosine distance (partial Spearman, no unit)")
            axes.set_ylabel(axis)
            axes.margins(0.12)
            _legend(axes, rows.arm.nunique())

        name = "success" if against == "rate" else "both distances"
        title = f"Alignment and {name}, a point per trained policy: {tables.titles(results)[key]}"
        told = f"{len(rows)} policies; horizontally alignment, vertically {axis}."
        pictures.append(draw(paint, title, told))
    return pictures


def _values(rows: pd.DataFrame) -> Iterator[Value]:
    for row in rows.itertuples():
        yield Value(row.train_seed, float(row.value), float(row.low), float(row.high))


def _bars(
    values: dict[str, dict[str, list[Value]]], looks: Looks, title: str, axis: str, share: bool = False
) -> Picture:
    """A group of bars per key: an arm's mean over training seeds, on it each seed's value with its own interval."""
    arms = sorted({arm for group in values.values() for arm in group})

    def paint(axes: Axes) -> None:
        width, labelled = 0.84 / len(arms), set()
        for place, group in enumerate(values.values()):
            for arm, offset in zip(arms, _offsets(len(arms), 0.84), strict=True):
                if arm in group:
                    label = None if arm in labelled else looks[arm].name
                    labelled.add(arm)
                    _bar(axes, place + offset, width, group[arm], looks[arm], label)
        axes.set_xticks(range(len(values)), [textwrap.fill(plain(name), 14) for name in values])
        axes.grid(axis="x", visible=False)
        axes.axhline(0, color=INK, linewidth=0.8)
        axes.set_ylabel(axis)
        top, bottom = axes.get_ylim()[1], axes.get_ylim()[0]
        axes.set_ylim(min(bottom, 0), min(top * 1.08, 1.12) if share else top * 1.08)
        _legend(axes)

    told = "; ".join(
        f"{name}, {arm}: {np.mean([v.value for v in group[arm]]):.2f}"
        for name, group in values.items()
        for arm in group
    )
    return draw(paint, title, f"{' '.join(axis.split())}: {told}.", 3.8)


def _bar(axes: Axes, x: float, width: float, values: list[Value], look: Look, label: str | None) -> None:
    mean = float(np.mean([value.value for value in values]))
    axes.bar(x, mean, width * 0.88, color=look.color, hatch=look.hatch, edgecolor=PAPER, linewidth=0, label=label)
    for value, offset in zip(values, _offsets(len(values), width * 0.6), strict=True):
        error = [[max(0.0, value.value - value.low)], [max(0.0, value.high - value.value)]]
        dot = dict(fmt=look.marker, markersize=4) if len(values) > 1 else dict(fmt="none")
        axes.errorbar(x + offset, value.value, yerr=error, color=INK, capsize=2.5, elinewidth=1.1, **dot)
    top = max(value.high if value.high == value.high else value.value for value in values)
    axes.annotate(f"{mean:.2f}", (x, max(top, 0)), (0, 3), textcoords="offset points", ha="center", fontsize=9.5)


def _legend(axes: Axes, names: int | None = None) -> None:
    """Inside the axes where few names leave room for it, else above them."""
    if names is not None and names <= 4:
        axes.legend()
    else:
        long = max(map(len, axes.get_legend_handles_labels()[1]), default=0) > 12  # "vlm4vla vanilla"
        axes.legend(loc="lower left", bbox_to_anchor=(0, 1), ncols=3 if names is None and not long else 2)


def _rows(axes: Axes, count: int) -> None:
    axes.set_ylim(count - 0.4, -0.6)
    axes.set_yticks([])
    axes.spines["left"].set_visible(False)
    axes.xaxis.set_major_locator(MaxNLocator(5))
    for place in range(1, count):
        axes.axhline(place - 0.5, color=INK, linewidth=0.5, alpha=0.15)


def _offsets(count: int, width: float) -> np.ndarray:
    """`count` places side by side within `width`, around 0."""
    return (np.arange(count) - (count - 1) / 2) * width / count


def _height(rows: int) -> float:
    return 0.9 + 0.55 * rows
