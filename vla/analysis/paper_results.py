"""Which of our results stand in a cell of a paper's table, and the values behind them, unit by unit.

A run is found by its header (`identity` of evaluate.py): benchmark, evaluation, baseline, arm, training seed, and size
and simulator arguments, which say whether it is the paper's setting or a rehearsal. A column's measure says what is
taken from the run:

    {chain: k}, chain_length      CALVIN's chains: done k in a row or not, and how many in a row
    {tasks: [...]}, {suite: name}  success in these tasks (null: all), or in a LIBERO suite
    {score: name}                 SimplerEnv's score: variants of a task, and a score's tasks, weigh the same
    {loss: train | validation}    a probe's loss, per task where there are tasks
    {summary: key}, {vqa: set}    one number of a file, with the interval it has there
    mean                          the mean of the columns in mean_of, each weighing the same

    settings = settings_of(load_runs(Path("results")), paper)     # {deviations: runs}
    sample = sample_of(paper, column, runs_of_one_policy)
"""

from __future__ import annotations

import itertools
from collections import Counter
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from envs.records import EPISODES, read_rows
from vla.analysis.chains import length
from vla.analysis.papers import Column, Paper
from vla.analysis.tables import UNKNOWN, read_json
from vla.errors import UserError

FILES = ("bc_probe.json", "state_probe.json", "alignment.json", "cifar10_probe.json", "vqa_probe.json")
PROTOCOL = {
    "start_displacement": (0.0,),
    "success_rule": ("last_step",),
    "action_scale": (1.0,),
    "max_steps": (None, 360),  # each task's own, CALVIN's
    "renderer": ("egl", "gpu"),
    "shader": ("rt",),
    "scene": ("D",),
    "rotation": ("euler",),
}
"""Simulator arguments under which a result may stand beside the papers'; any other value makes it a rehearsal."""


@dataclass(frozen=True)
class Run:
    """A folder of episodes, or one file of an analysis."""

    path: Path
    header: dict[str, Any]

    @property
    def seed(self) -> Any:
        return self.header.get("train_seed")

    @cached_property
    def rows(self) -> list[dict[str, Any]]:
        return read_rows(self.path / EPISODES)

    @cached_property
    def summary(self) -> dict[str, Any]:
        return read_json(self.path / "summary.json") if (self.path / "summary.json").exists() else {}


@dataclass(frozen=True)
class Sample:
    """What was measured of one policy for one cell, in the units it was counted in.

    keys name the units (episodes, tasks), on which two policies are paired; values are rates in [0, 1], chain lengths,
    losses …; weights sum to 1; interval is what a single number brought along.
    """

    keys: list[tuple]
    values: np.ndarray
    weights: np.ndarray
    missing: int = 0
    interval: tuple[float, float] | None = None
    whole_only: bool = False
    """Without its missing episodes the number is another one (SimplerEnv's weights), so it has none."""
    steps: frozenset[int] = frozenset()
    """Optimiser steps that the policy was trained for."""

    @property
    def mean(self) -> float:
        if self.whole_only and self.missing:
            return float("nan")
        return float(np.average(self.values, weights=self.weights))

    @property
    def plain(self) -> bool:
        """Successes that all count alike."""
        return len(self.values) > 1 and np.ptp(self.weights) < 1e-12 and set(np.unique(self.values)) <= {0.0, 1.0}


def load_runs(root: Path) -> list[Run]:
    """Every run below `root`.

    Raises:
        UserError: no such folder, or a header that cannot be read.
    """
    if not root.is_dir():
        raise UserError(f"{root} is not a folder: give the folder that evaluate.py writes its results to")
    episodes = [path.parent for path in sorted(root.rglob("episodes.jsonl"))]
    runs = [Run(folder, read_json(folder / "run.json")) for folder in episodes]
    return runs + [Run(file, read_json(file)) for name in FILES for file in sorted(root.rglob(name))]


def settings_of(runs: list[Run], paper: Paper) -> dict[tuple[str, ...], list[Run]]:
    """Runs that belong to the table's rows, by what sets them apart from the paper's setting; () is the paper's."""
    found: dict[tuple[str, ...], list[Run]] = {(): []}
    benchmarks = {column.benchmark or paper.benchmark for column in paper.columns}
    evaluations = {column.evaluation or paper.evaluation for column in paper.columns}
    for run in runs:
        about = run.header
        of_row = paper.row(about.get("baseline"), about.get("arm")) is not None
        if of_row and about.get("benchmark") in benchmarks and evaluation(about) in evaluations:
            found.setdefault(tuple(deviations(about, paper.tap)), []).append(run)
    return found


def evaluation(header: dict[str, Any]) -> str:
    return header.get("evaluation", "rollout")


def deviations(header: dict[str, Any], tap: str | None = None) -> list[str]:
    """ "size=tiny", "start_displacement=0.05": what makes a run a rehearsal of the paper's, which reads `tap`."""
    size = (header.get("policy") or {}).get("size")
    found = [] if size == "full" else [f"size={size or 'not recorded'}"]
    if "maniskill3" in header.get("env", ""):
        found.append("simulator=maniskill3")
    if tap and header.get("tap") != tap:
        found.append(f"tap={header.get('tap')}")
    arguments, masked = header.get("env_kwargs", {}), header.get("benchmark") == "simpler_google_masked"
    expected = PROTOCOL | {"background": ("masked",) if masked else ("overlay",)}
    unusual = [key for key, usual in expected.items() if key in arguments and arguments[key] not in usual]
    return found + [f"{key}={arguments[key]}" for key in unusual]


def sample_of(paper: Paper, column: Column, runs: list[Run]) -> Sample | None:
    """The cell's sample from the runs of one policy (baseline, arm, training seed); None where nothing was run.

    Raises:
        UserError: the same unit in two folders.
    """
    if column.mean_of:
        parts = [sample_of(paper, paper.column(part), runs) for part in column.mean_of]
        return None if None in parts else _together(parts)
    benchmark, wanted = column.benchmark or paper.benchmark, column.evaluation or paper.evaluation
    mine = [run for run in runs if (run.header.get("benchmark"), evaluation(run.header)) == (benchmark, wanted)]
    kind, what = next(iter(column.measure.items())) if isinstance(column.measure, dict) else (column.measure, None)
    if kind in ("loss", "summary", "vqa"):
        files = [run for run in mine if run.path.suffix == ".json" and (kind != "vqa" or run.header.get("set") == what)]
        _refuse_two(files)
        return None if not files else _losses(files[0], what) if kind == "loss" else _summary(files[0], kind, what)
    folders = [run for run in mine if run.path.is_dir()]
    if kind == "score":
        return _score(folders, what)
    return _episodes(folders, kind, what)


def _episodes(folders: list[Run], kind: str, what: Any) -> Sample | None:
    def counts(row: dict[str, Any]) -> bool:
        if kind == "suite":
            return row["benchmark"] == what
        return kind != "tasks" or what is None or row["task"] in what

    def value(row: dict[str, Any]) -> float:
        if kind == "chain":
            return float(length(row["subtasks"]) >= what)
        return float(length(row["subtasks"]) if kind == "chain_length" else row["success"])

    taken = [(run, row) for run in folders for row in run.rows if counts(row)]
    if not taken:
        return None
    keys = [(row["benchmark"], row["task"], row["seed"]) for _, row in taken]
    if (twice := Counter(keys).most_common(1)[0])[1] > 1:
        _refuse_two([run for (run, _), key in zip(taken, keys, strict=True) if key == twice[0]])
    lost = [_missing(run, counts) for run in folders]
    missing = UNKNOWN if UNKNOWN in lost else sum(lost)
    values = np.array([value(row) for _, row in taken])
    return Sample(keys, values, np.full(len(values), 1 / len(values)), missing, steps=_steps(folders))


def _missing(run: Run, counts) -> int:
    """How many of the run's episodes that count have no row yet; its rows may be newer than its summary."""
    if "missing_episodes" not in run.summary:
        return run.summary.get("missing", UNKNOWN)
    there = {(row["benchmark"], row["task"], row["seed"]) for row in run.rows}
    lost = [episode for episode in run.summary["missing_episodes"] if counts(episode)]
    return sum((episode["benchmark"], episode["task"], episode["seed"]) not in there for episode in lost)


def _score(folders: list[Run], name: str) -> Sample | None:
    found = _episodes(folders, "tasks", None)
    protocols = {run.header.get("protocol") for run in folders}
    if found is None or None in protocols or len(protocols) > 1:
        return None
    weights = score_weights(protocols.pop(), name)
    at = {key[1:]: index for index, key in enumerate(found.keys)}
    there = [key for key in weights if key in at]
    if not there:
        return None
    rows = [at[key] for key in there]
    weight = np.array([weights[key] for key in there])
    keys, missing = [found.keys[row] for row in rows], len(weights) - len(there)
    return Sample(keys, found.values[rows], weight / weight.sum(), missing, None, True, found.steps)


def score_weights(protocol: str, name: str) -> dict[tuple[str, int], float]:
    """(task, seed) → what the episode counts in a score or task, as SimplerEnv averages (facts simpler §4d)."""
    from envs.simpler.protocol import FILES as PROTOCOLS
    from envs.simpler.protocol import cells

    scores = yaml.safe_load(PROTOCOLS[protocol].read_text())["scores"]
    if name in scores:
        parts = [score_weights(protocol, part) for part in scores[name]]
        weights: dict[tuple[str, int], float] = {}
        for key, weight in itertools.chain.from_iterable(part.items() for part in parts):
            weights[key] = weights.get(key, 0.0) + weight / len(parts)
        return weights
    episodes = cells(protocol, [name])
    of_variant = Counter(cell.variant for cell in episodes)
    return {(cell.task, cell.seed): 1 / (len(of_variant) * of_variant[cell.variant]) for cell in episodes}


def _losses(run: Run, measure: str) -> Sample:
    tasks = run.header.get("tasks") or [{"task": "", measure: run.header[measure]}]
    values = np.array([task[measure] for task in tasks], dtype=np.float64)
    weights = np.full(len(values), 1 / len(values))
    return Sample([(task["task"],) for task in tasks], values, weights, steps=_steps([run]))


def _summary(run: Run, kind: str, what: str) -> Sample:
    number = run.header.get("accuracy" if kind == "vqa" else what)
    if not isinstance(number, dict) or not {"value", "low", "high"} <= number.keys():
        raise UserError(f"{run.path} holds no {what!r} with an interval: run that evaluation again")
    interval = (number["low"], number["high"])
    missing = run.header.get("missing", 0)
    return Sample([()], np.array([number["value"]]), np.ones(1), missing, interval, steps=_steps([run]))


def _together(parts: list[Sample]) -> Sample:
    missing = UNKNOWN if any(part.missing == UNKNOWN for part in parts) else sum(part.missing for part in parts)
    return Sample(
        [key for part in parts for key in part.keys],
        np.concatenate([part.values for part in parts]),
        np.concatenate([part.weights / len(parts) for part in parts]),
        missing,
        None,
        any(part.whole_only for part in parts),
        frozenset().union(*(part.steps for part in parts)),
    )


def _refuse_two(runs: list[Run]) -> None:
    if len(runs) > 1:
        about = runs[0].header
        who = f"{about.get('baseline')} {about.get('arm')}, training seed {about.get('train_seed')}"
        raise UserError(f"{who}: the same results lie in {runs[0].path} and in {runs[1].path}: move one away")


def _steps(runs: list[Run]) -> frozenset[int]:
    return frozenset((run.header.get("policy") or {}).get("steps") for run in runs) - {None}
