"""Everything the page is about, read once: what evaluate.py and train.py left below two folders.

    material = load(Path("results"), Path("runs"))

A policy is (arm, training seed). Where the results are of several baselines, an arm is called by both names, "flower
ptr", in every table and picture, so that one name is one colour.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import yaml

from vla.analysis import tables
from vla.analysis.plots import read_metrics
from vla.analysis.probe_tables import load_losses
from vla.analysis.vqa_tables import load_probes
from vla.errors import UserError

FILES = {
    "episodes.jsonl": "rollouts",
    "bc_probe.json": "behaviour-cloning probe",
    "state_probe.json": "state probe",
    "ridge_probe.json": "position probe",
    "alignment.json": "alignment",
    "vqa_probe.json": "VQA",
    "cifar10_probe.json": "CIFAR-10",
    "latency.json": "latency",
}
"""What evaluate.py leaves → what it is called on the page."""


@dataclass(frozen=True)
class Run:
    """A run directory of train.py; `about` is empty until it has exported its policy, `metrics` None without steps."""

    folder: Path
    arm: str
    seed: str
    baseline: str
    size: str
    benchmark: str
    config: dict[str, Any]
    config_text: str
    about: dict[str, Any]
    metrics: pd.DataFrame | None


@dataclass(frozen=True)
class Evaluation:
    """One result: its file, the header with which evaluate.py wrote it, and the policy it is of."""

    file: Path
    kind: str
    header: dict[str, Any]
    arm: str
    seed: str

    @property
    def benchmark(self) -> str:
        return str(self.header.get("benchmark", tables.NONE))


@dataclass(frozen=True)
class Curve:
    """A frozen-encoder probe's training loss, one value per step (the mean over tasks)."""

    probe: str
    benchmark: str
    arm: str
    seed: str
    losses: np.ndarray


@dataclass(frozen=True)
class Material:
    """episodes and analyses: vla.analysis.tables.load; losses: probe_tables.load_losses; accuracies: vqa_tables."""

    results: Path
    runs_root: Path
    episodes: pd.DataFrame
    analyses: pd.DataFrame
    losses: pd.DataFrame
    accuracies: pd.DataFrame
    evaluations: list[Evaluation]
    curves: list[Curve]
    runs: list[Run] = field(default_factory=list)

    @property
    def arms(self) -> list[str]:
        """Every name there is, sorted: the order of the colours."""
        frames = (self.episodes, self.analyses, self.losses, self.accuracies)
        names = {name for frame in frames for name in frame.arm} | {run.arm for run in self.runs}
        return sorted(names | {evaluation.arm for evaluation in self.evaluations})


def load(results: Path, runs: Path) -> Material:
    """
    Raises:
        UserError: no results, or a file that cannot be read. A missing folder of runs is an empty one.
    """
    episodes, analyses = tables.load(results)
    losses, accuracies = load_losses(results), load_probes(results)
    trained = [_run(path.parent) for path in sorted(runs.rglob("config.yaml"))]
    found = [_evaluation(path, kind) for name, kind in FILES.items() for path in sorted(results.rglob(name))]
    mine = {name for frame in (episodes, analyses) for name in frame.get("baseline", pd.Series()).dropna()}
    others = {name for frame in (losses, accuracies) for name in frame.baseline.dropna()}
    others |= {run.baseline for run in trained} | {e.header.get("baseline") for e in found}
    if len((mine | others) - {None}) > 1:
        frames = [losses, accuracies] if len(mine) > 1 else [losses, accuracies, episodes, analyses]
        for frame in frames:  # tables.load has named its own where they are of several baselines
            frame["arm"] = [_named(b, a) for b, a in zip(frame.get("baseline", []), frame.arm, strict=True)]
        trained = [_with_arm(run, _named(run.baseline, run.arm)) for run in trained]
        found = [_with_arm(e, _named(e.header.get("baseline"), e.arm)) for e in found]
    curves = [curve for evaluation in found if (curve := _curve(evaluation)) is not None]
    return Material(results, runs, episodes, analyses, losses, accuracies, found, curves, trained)


def _named(baseline: Any, arm: str) -> str:
    return f"{baseline} {arm}" if isinstance(baseline, str) else arm


def _with_arm(thing: Any, arm: str) -> Any:
    return type(thing)(**(thing.__dict__ | {"arm": arm}))


def _run(folder: Path) -> Run:
    try:
        text = (folder / "config.yaml").read_text()
        config = yaml.safe_load(text)
        names = {"baseline": config["policy"]["name"], "benchmark": config["benchmark"]["name"]}
        names |= {"arm": config["arm"], "seed": config["seed"], "size": config["size"]}
    except (OSError, ValueError, yaml.YAMLError, KeyError, TypeError) as error:
        told = " ".join(str(error).split())
        raise UserError(f"{folder / 'config.yaml'} is no run's ({told}): restore it, or move its folder away") from None
    policy, metrics = folder / "policy" / "config.json", folder / "metrics.csv"
    about = tables.read_json(policy).get("about", {}) if policy.exists() else {}
    rows = read_metrics(folder) if metrics.exists() else None
    names = {key: str(value) for key, value in names.items()}
    return Run(folder=folder, config=config, config_text=text, about=about, metrics=rows, **names)


def _evaluation(path: Path, kind: str) -> Evaluation:
    header = tables.read_json(path.with_name("run.json") if path.name == "episodes.jsonl" else path)
    if kind == "rollouts" and (of := header.get("evaluation", "rollout")) != "rollout":
        kind = {"bc_probe": "probe rollouts", "real_robot": "real robot"}.get(of, of)
    seed = header.get("train_seed")
    arm = str(header.get("arm") or header.get("policy_name"))
    return Evaluation(path, kind, header, arm, tables.NONE if seed is None else str(seed))


def _curve(evaluation: Evaluation) -> Curve | None:
    if evaluation.kind == "behaviour-cloning probe":
        files = sorted(evaluation.file.parent.glob("probes/*.json"))
        curves = [tables.read_json(file).get("train_curve", []) for file in files]
    elif evaluation.kind == "state probe":
        curves = [evaluation.header.get("train_curve", [])]
    else:
        return None
    steps = min((len(curve) for curve in curves), default=0)
    if not steps:
        return None
    mean = np.mean([curve[:steps] for curve in curves], axis=0)
    return Curve(evaluation.kind, evaluation.benchmark, evaluation.arm, evaluation.seed, mean)
