"""Where the numbers come from: runs, versions, hashes, hardware, time, and the commands that make them again."""

from __future__ import annotations

import functools
import json
import shlex
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pandas as pd

from vla.analysis.tables import NONE
from vla.errors import UserError
from vla.experiment import text
from vla.report.material import FILES, Evaluation, Material, Run
from vla.report.sheets import MISSING, Sheet

EVALUATIONS = {name: Path(name).stem for name in FILES if name != "episodes.jsonl"}
EVALUATIONS |= {"vqa_probe.json": "vqa", "cifar10_probe.json": "cifar10"}
NOT_ASKED = {"run_root", "resume", "cell"}
"""Keys of a configuration that are where, not what."""


def policies(material: Material) -> Sheet:
    """A row per training run, and one per evaluated policy whose run is not there."""
    checkpoints = {e.header.get("config"): e.header.get("checkpoint") for e in material.evaluations}
    rows = []
    for run in material.runs:
        about = run.about
        state = f"{about['steps']:,}" if "steps" in about else f"{MISSING}: not trained to its end"
        minutes = f"{about['seconds'] / 60:.1f}" if "seconds" in about else NONE
        trainer = run.config.get("trainer", {})
        used = " × ".join(str(trainer[key]) for key in ("devices", "accelerator") if key in trainer)
        used = f"{about.get('hardware', used)}, {trainer.get('precision', NONE)}"
        hashes = [_short(about.get("commit")), _short(about.get("data_hash")), _short(about.get("config_hash"))]
        hashes.append(_short(checkpoints.get(about.get("config_hash"))) if about else NONE)
        rows.append([run.folder.name, state, minutes, used, *hashes])
    known = {run.about.get("config_hash") for run in material.runs}
    others = {e.header.get("checkpoint"): e for e in material.evaluations if e.header.get("config") not in known}
    for checkpoint, e in others.items():
        of = e.header.get("policy") or {}
        steps = f"{of['steps']:,}" if isinstance(of.get("steps"), int) else NONE
        hashes = [_short(of.get("commit")), _short(of.get("data_hash")), _short(e.header.get("config"))]
        name = f"{e.arm}, training seed {e.seed} (no run below {material.runs_root})"
        rows.append([name, steps, NONE, NONE, *hashes, _short(checkpoint)])
    columns = ["run", "steps", "minutes", "trained on", "commit", "data", "config", "checkpoint (sha256)"]
    caption = "commit: “+” where files differed from it; data, config, checkpoint: the first digits of their hashes"
    return Sheet("Trained policies", columns, rows, caption)


def environment(material: Material) -> Sheet:
    """Versions and devices; where policies or episodes differ, every value with how many have it."""
    trained = [run.about.get("versions") or {} for run in material.runs]
    trained += [(e.header.get("policy") or {}).get("versions") or {} for e in material.evaluations]
    rows = [[f"{name}, trained with", _values(v[name] for v in trained if name in v)] for name in _keys(trained)]
    episodes = material.episodes
    if len(episodes):
        simulators = list(episodes.versions)
        rows += [[f"{name}, rolled out with", _values(v.get(name) for v in simulators)] for name in _keys(simulators)]
        rows += [["renderer of the episodes", _values(episodes.renderer)]]
        rows += [["actions executed per answer", _values(episodes.execute_steps)]]
    devices = [e.header["device"] for e in material.evaluations if "device" in e.header]
    rows.append(["device of the latency measurements", _values(devices) if devices else f"{MISSING}: not measured"])
    if not any("hardware" in run.about for run in material.runs):
        rows.append(["machine that trained", f"{MISSING}: the runs do not record it"])
    return Sheet("Versions and hardware", ["what", "value"], rows)


def times(material: Material) -> Sheet:
    """Hours, summed over runs and episodes (workers side by side count each)."""
    seconds = [run.about["seconds"] for run in material.runs if "seconds" in run.about]
    rows = [["training", f"{len(seconds)} runs", f"{sum(seconds) / 3600:.2f}"]] if seconds else []
    for key, found in material.episodes.groupby("benchmark") if len(material.episodes) else ():
        rows.append([f"rollouts: {key}", f"{len(found):,} episodes", f"{found.seconds.sum() / 3600:.2f}"])
    return Sheet("Time taken", ["what", "how much", "hours"], rows, "added up over processes, probes not included")


def commands(material: Material) -> list[str]:
    """Shell lines that repeat training, evaluation and this page, in that order; comments say what they leave open."""
    lines = [_train(run) for run in material.runs]
    of_run = {run.about["config_hash"]: run.folder / "policy" for run in material.runs if "config_hash" in run.about}
    for e in material.evaluations:
        if e.file.name != "bc_probe.json" or not any(e.file.parent.rglob("episodes.jsonl")):  # their line makes both
            lines.append(_evaluate(e, of_run.get(e.header.get("config")), material.episodes))
    lines.append(_python("scripts/tables.py", str(material.results)))
    lines.append(_python("scripts/report.py", str(material.results), f"runs={material.runs_root}"))
    return list(dict.fromkeys(lines))


def _train(run: Run) -> str:
    """Groups by name, then every value in which the run's configuration differs from what they compose to."""
    chosen = [f"baseline={run.baseline}", f"size={run.size}", f"ablation={run.config['arm']}"]
    chosen.append(f"benchmark={run.benchmark}")
    base = _composed("train", *chosen)
    if base is None:
        return f"# {run.folder.name}: its groups are not in conf/; all of its values are in its configuration below"
    differing = [
        f"{key}={text(value)}"
        for key, value in _flat(run.config)
        if key.split(".")[0] not in {*NOT_ASKED, "arm", "size"} and key in base and base[key] != value
    ]
    return _python("train.py", *chosen, *differing)


def _evaluate(evaluation: Evaluation, policy: Path | None, episodes: pd.DataFrame) -> str:
    header = evaluation.header
    name = EVALUATIONS.get(evaluation.file.name) or header.get("evaluation", "rollout")
    if name == "real_robot":
        return f"# {evaluation.file.parent.name}: trials on a real robot, logged with scripts/trial.py"
    path = str(policy) if policy else f"<the policy with checkpoint {_short(header.get('checkpoint'))}>"
    words = [f"policy={path}", f"evaluation={name}"]
    if name not in ("vqa", "cifar10"):
        words.insert(1, f"benchmark={evaluation.benchmark}")
    base = _composed("evaluate", "policy=none", *words[1:]) or {}
    if evaluation.file.name == "episodes.jsonl":
        mine = episodes[episodes.folder == str(evaluation.file.parent)]
        words += [f"episodes={mine.groupby('task').size().max()}", f"first_seed={mine.seed.min()}"]
        remark = f"   # tasks: {mine.task.nunique()}"
    else:
        words += ["episodes=0"] if name == "bc_probe" else []
        remark = ""
    for prefix, key in (("benchmark", "env_kwargs"), ("evaluation.probe", "probe"), ("evaluation.cifar10", "cifar10")):
        for last, value in (header.get(key) or {}).items():
            if last != "cameras" and base.get(f"{prefix}.{last}", value) != value:
                words.append(f"{prefix}.{last}={text(value)}")
    return _python("evaluate.py", *words) + remark


@functools.cache
def _composed(name: str, *overrides: str) -> dict[str, Any] | None:
    """{"a.b": value} of the configuration, None where conf/ has no such group."""
    from hydra.errors import HydraException

    from vla.cli import compose_config

    try:
        return dict(_flat(json.loads(json.dumps(asdict(compose_config(name, *overrides))))))
    except (HydraException, UserError):
        return None


def _flat(tree: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in tree.items():
        if isinstance(value, dict) and value:
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def _python(*words: str) -> str:
    return " ".join(["python", *(shlex.quote(word) for word in words)])


def _keys(dicts: list[dict[str, Any]]) -> list[str]:
    return list(dict.fromkeys(key for each in dicts for key in each))


def _values(values: Any) -> str:
    counts = pd.Series([str(value) for value in values], dtype=object).value_counts()
    return str(counts.index[0]) if len(counts) == 1 else "; ".join(f"{name} ({n}×)" for name, n in counts.items())


def _short(value: Any, most: int = 13) -> str:
    return str(value)[:most] if value else NONE
