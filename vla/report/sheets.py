"""The page's tables, as text: the numbers of scripts/tables.py, cell by cell, and what was not measured."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field

import pandas as pd

from vla.analysis import tables
from vla.analysis.chains import CHAIN, chains_table
from vla.analysis.probe_tables import loss_table
from vla.analysis.simpler_tables import protocol_scores
from vla.analysis.statistics import format_interval
from vla.analysis.vqa_tables import ORDER
from vla.report.material import FILES, Material

MISSING = "missing"
PERCENTILES = (50, 90, 99)
"""Of vla/bench/served.py, which brings torch along."""


@dataclass(frozen=True)
class Sheet:
    """A table: every cell is plain text."""

    title: str
    columns: Sequence[str]
    rows: list[Sequence[str]]
    caption: str = ""
    notes: list[str] = field(default_factory=list)


def sheets(material: Material, results: pd.DataFrame, comparisons: pd.DataFrame) -> list[Sheet]:
    """All of them, in the page's order."""
    found = [
        *_rollouts(results, comparisons),
        *_chains(material.episodes, results),
        *_scores(material.episodes, results),
    ]
    found += [*_losses(material.losses), *_alignment(material.analyses)]
    return [*found, *_accuracies(material.accuracies), *_latencies(material)]


def _rollouts(results: pd.DataFrame, comparisons: pd.DataFrame) -> list[Sheet]:
    found = []
    text, compared = tables.printable(results), tables.printable_comparisons(comparisons, results)
    for title in dict.fromkeys(text.benchmark):
        mine = text[text.benchmark == title].drop(columns="benchmark")
        shown = [column for column in mine if column == "arm" or (mine[column] != tables.NONE).any()]
        conditions = json.loads(results.conditions[text.benchmark == title].iloc[0])
        told = "value [95 % interval] (successes/episodes; held-out demonstrations; frame pairs)"
        under = ", ".join(f"{name}={value}" for name, value in conditions.items())
        kind = "Frozen-encoder probes rolled out" if "probe" in conditions.get("evaluation", "") else "Policies"
        found.append(Sheet(f"{kind}: {title}", shown, mine[shown].to_numpy().tolist(), f"{told}. {under}".strip()))
        pairs = compared[compared.benchmark == title]
        if len(pairs):
            columns = [c for c in pairs.columns[1:] if c != "Holm" or (pairs[c] != tables.NONE).any()]
            caption = "paired on shared (task, seed); difference = first − second"
            rows = pairs[columns].to_numpy().tolist()
            found.append(Sheet(f"{kind} compared: {title}", columns, rows, caption, [tables.PAIR_NOTE]))
    return found


def _chains(episodes: pd.DataFrame, results: pd.DataFrame) -> list[Sheet]:
    chains, _ = chains_table(episodes)
    found = []
    for key, rows in chains.groupby(tables.GROUP):
        columns = ["arm", "training seed", "chains", *(f"SR {k}, %" for k in range(1, CHAIN + 1)), "Avg. Len."]
        cells = [
            [row.arm, row.train_seed, str(row.n)]
            + [f"{100 * getattr(row, f'sr{k}'):.1f}" for k in range(1, CHAIN + 1)]
            + [f"{row.avg_len:.2f} {format_interval(row.low, row.high)}"]
            for row in rows.itertuples()
        ]
        caption = "SR k: share of chains with k subtasks done in a row; Avg. Len. with its 95 % interval over chains"
        found.append(Sheet(f"Chains: {tables.titles(results)[key]}", columns, cells, caption))
    return found


def _scores(episodes: pd.DataFrame, results: pd.DataFrame) -> list[Sheet]:
    scores, found = protocol_scores(episodes) if len(episodes) else episodes[:0], []
    for key, rows in scores.groupby(tables.GROUP) if len(scores) else ():
        cells = [
            [row.score, row.arm, row.train_seed, f"{row.value:.3f}", str(row.n)]
            if not row.missing
            else [row.score, row.arm, row.train_seed, tables.NONE, f"{row.n}, {row.missing} {MISSING}"]
            for row in rows.itertuples()
        ]
        columns = ["score", "arm", "training seed", "value", "episodes"]
        caption = "mean over the variants of a task, then over tasks; – where episodes are missing"
        found.append(Sheet(f"SimplerEnv's own scores: {tables.titles(results)[key]}", columns, cells, caption))
    return found


def _losses(losses: pd.DataFrame) -> list[Sheet]:
    def cell(row, measure: str) -> str:
        low, high = getattr(row, f"{measure}_low"), getattr(row, f"{measure}_high")
        return f"{getattr(row, measure):.4f}" + ("" if low != low else f" [{low:.4f}, {high:.4f}]")

    found = []
    for (benchmark, probe), rows in loss_table(losses).groupby(["benchmark", "probe"]) if len(losses) else ():
        columns = ["arm", "training seed", "tap", "tasks", "train", "validation"]
        cells = [
            [row.arm, row.train_seed, row.tap, str(row.n), cell(row, "train"), cell(row, "validation")]
            for row in rows.itertuples()
        ]
        caption = "mean loss, lower is better [95 % interval over tasks]"
        found.append(Sheet(f"{probe.capitalize()} from frozen tokens: {benchmark}", columns, cells, caption))
    return found


def _alignment(analyses: pd.DataFrame) -> list[Sheet]:
    found = []
    for benchmark, rows in analyses[analyses.metric.isin(("cosine", "scale"))].groupby("benchmark"):
        cells = []
        for (arm, seed), mine in rows.groupby(["arm", "train_seed"]):
            by = {row.metric: row for row in mine.itertuples()}
            values = [f"{r.value:.2f} [{r.low:.2f}, {r.high:.2f}]" for r in map(by.get, ("cosine", "scale")) if r]
            cells.append([arm, seed, *values, str(int(mine.n.max()))])
        columns = ["arm", "training seed", "cosine distance", "scale distance", "frame pairs"]
        caption = "partial Spearman correlation of feature and pose distance, −1 to 1 [95 % interval over frame pairs]"
        found.append(Sheet(f"State-feature alignment: {benchmark}", columns, cells, caption))
    return found


def _accuracies(accuracies: pd.DataFrame) -> list[Sheet]:
    place = [ORDER.index(what) if what in ORDER else len(ORDER) for what in accuracies.what]
    rows = accuracies.assign(place=place).sort_values(["place", "baseline", "arm", "train_seed", "what"])
    found = []
    for title, mine in (
        ("Visual question answering", rows[rows.place < len(ORDER)]),
        ("CIFAR-10 linear probe", rows[rows.place == len(ORDER)]),
    ):
        cells = []
        for row in mine.itertuples():
            accuracy, n = f"{row.value:.3f} [{row.low:.3f}, {row.high:.3f}]", f"{row.n}{'*' if row.missing else ''}"
            cells.append([row.what, str(row.baseline), row.arm, row.train_seed, accuracy, n, row.extra])
        if cells:
            columns = ["on", "baseline", "arm", "training seed", "accuracy", "n", "besides"]
            if not mine.extra.any():
                columns, cells = columns[:-1], [row[:-1] for row in cells]
            caption = "accuracy [95 % interval]; n: questions or test images, * not all of them asked"
            found.append(Sheet(title, columns, cells, caption))
    return found


def _latencies(material: Material) -> list[Sheet]:
    cells = []
    for evaluation in material.evaluations:
        result = evaluation.header
        for way in ("predict", "server") if evaluation.kind == "latency" else ():
            if times := result.get(way):
                values = [f"{times[f'p{q}_ms_per_action']:.1f}" for q in PERCENTILES]
                values += [f"{times['p50_ms']:.1f}", str(result.get("chunk")), str(result.get("repeats"))]
                cells.append([evaluation.arm, evaluation.seed, way, *values, str(result.get("device"))])
    of_action = [f"ms per action, p{q}" for q in PERCENTILES]
    columns = ["arm", "training seed", "way", *of_action, "ms per chunk, p50", "chunk", "calls", "device"]
    caption = "predict: the policy alone, batch 1; server: the same call through its socket"
    return [Sheet("Latency", columns, cells, caption)] if cells else []


def coverage(material: Material) -> tuple[Sheet, list[str]]:
    """Which policy has been measured on what, gaps named; and the kinds of measurement of which there is none."""
    counts = Counter((e.arm, e.seed, e.kind, e.benchmark) for e in material.evaluations)
    of_folder = dict(material.episodes.groupby("folder").missing.first()) if len(material.episodes) else {}
    lost: Counter = Counter()
    for e in material.evaluations:
        lost[e.arm, e.seed, e.kind, e.benchmark] += max(0, of_folder.get(str(e.file.parent), 0)) * (
            "rollouts" in e.kind
        )
    columns = list(dict.fromkeys((e.kind, e.benchmark) for e in material.evaluations))
    policies = {(e.arm, e.seed) for e in material.evaluations} | {(run.arm, run.seed) for run in material.runs}
    rows = []
    for arm, seed in sorted(policies, key=lambda policy: (policy[0], len(policy[1]), policy[1])):
        cells = []
        for kind, benchmark in columns:
            key = arm, seed, kind, benchmark
            text = {0: MISSING, 1: "measured"}.get(counts[key], f"{counts[key]} results")
            if not counts[key] and seed == tables.NONE and kind != "rollouts":
                text = tables.NONE  # a replayed demonstration or an expert has no encoder
            cells.append(f"incomplete: {lost[key]} episodes {MISSING}" if lost[key] else text)
        rows.append([arm, seed, *cells])
    names = [kind if kind in ("VQA", "CIFAR-10") else f"{kind}, {benchmark}" for kind, benchmark in columns]
    caption = "every policy of the results and of the training runs; “missing”: not measured of this policy"
    absent = [kind for kind in FILES.values() if kind not in {e.kind for e in material.evaluations}]
    return Sheet("What has been measured", ["arm", "training seed", *names], rows, caption), absent
