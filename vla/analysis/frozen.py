"""The frozen-encoder evaluations of IDL §4.4 as evaluate.py runs them: trained where not yet trained, then summed up.

Written into the results folder: probes/ (a head per task) and bc_probe.json, or state_probe.json. `train` is the mean
loss over all training steps, `validation` the mean of the validations every 100 steps (tables 11 and 12).
"""

from __future__ import annotations

import json
from dataclasses import asdict, fields
from pathlib import Path

from data.frame_store import FrameStore
from vla.analysis.bc_probe import CloningSettings, ProbedPolicy, load_losses, probed_policy, train_heads
from vla.analysis.features import TaskFeatures
from vla.analysis.mlp_probe import ProbeSettings
from vla.analysis.state_probe import fit_state_probe
from vla.analysis.statistics import Estimate, mean_interval
from vla.config import EvaluateConfig
from vla.errors import UserError
from vla.files import write_atomic
from vla.policy import Policy


def cloning_probes(
    cfg: EvaluateConfig, policy: Policy, weights: str, store: FrameStore, header: dict, out: Path
) -> tuple[dict, ProbedPolicy]:
    """A behaviour cloning head for every task with demonstrations.

    Returns:
        ({"train", "validation": mean and 95 % bootstrap interval over tasks, "tasks": each one's}, the policy).
    """
    settings = settings_of(CloningSettings, cfg)
    features = task_features(cfg, policy, weights, store)
    tasks = list(dict.fromkeys(window["task"] for window in store.windows))
    train_heads(features, tasks, out, settings, cfg.evaluation.workers, cfg.evaluation.features != "off")
    losses = load_losses(out)
    result = header | {"tasks": [{k: task[k] for k in ("task", "train", "validation")} for task in losses]}
    for name in ("train", "validation"):
        values = [task[name] for task in losses]
        low, high = mean_interval(values) if len(values) > 1 else (values[0], values[0])
        result[name] = asdict(Estimate(sum(values) / len(values), low, high, n=len(values)))
    write_atomic(out / "bc_probe.json", json.dumps(result, indent=2))
    return result, probed_policy(policy, out, settings, cfg.device)


def proprioception_probe(
    cfg: EvaluateConfig, policy: Policy, weights: str, store: FrameStore, header: dict, out: Path
) -> dict:
    """The state probe's losses; read back where they were measured before."""
    file = out / "state_probe.json"
    if file.exists():
        return json.loads(file.read_text())
    settings = settings_of(ProbeSettings, cfg)
    probe = cfg.evaluation.probe
    features = task_features(cfg, policy, weights, store)
    fit = fit_state_probe(features, settings, probe.epochs, probe.validation, cfg.evaluation.features != "off")
    curve = [round(value, 6) for value in fit.train_curve]
    result = header | {"train": fit.train, "validation": fit.validation}
    result |= {"train_curve": curve, "validation_curve": fit.validation_curve}
    out.mkdir(parents=True, exist_ok=True)
    write_atomic(file, json.dumps(result, indent=2))
    return result


def task_features(cfg: EvaluateConfig, policy: Policy, weights: str, store: FrameStore) -> TaskFeatures:
    mode = cfg.evaluation.features
    if mode not in ("keep", "drop", "off"):
        raise UserError(f"evaluation.features={mode} is not known; choose keep, drop or off")
    return TaskFeatures(policy, weights, store, policy.cameras[0], cfg.device, keep=mode == "keep")


def settings_of(kind: type, cfg: EvaluateConfig):
    """The probe's configuration as the settings it takes."""
    values = asdict(cfg.evaluation.probe)
    return kind(**{field.name: values[field.name] for field in fields(kind)})
