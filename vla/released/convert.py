"""From an author's checkpoint to a policy directory: convert, compare with the model weight by weight, write."""

from __future__ import annotations

import importlib.metadata
import re
from importlib import import_module
from pathlib import Path

import torch
from torch import Tensor

from data.normalization import ActionStatistics
from vla.build import BASELINES, build_policy
from vla.checkpoint import FORMAT, write_policy
from vla.cli import compose_config
from vla.config import ConvertWeightsConfig
from vla.errors import UserError
from vla.policy import Policy
from vla.released.source import Converted, drop, resolve
from vla.training import PACKAGES, commit, policy_arguments

SHOWN = 6
"""How many of the keys that do not fit an error names."""


def convert_weights(cfg: ConvertWeightsConfig) -> tuple[Path, list[str]]:
    """Write `cfg.out` from `cfg.source`; returns the folder and the converter's notes.

    Raises:
        UserError: an unknown baseline, a source that cannot be read, weights missing, left over or of another shape
            (each named), or `out` in use by something that is no policy directory.
    """
    if cfg.baseline not in BASELINES:
        raise UserError(f"baseline={cfg.baseline} is not known; choose one of {', '.join(BASELINES)}")
    out = Path(cfg.out)
    if out.exists() and not (out / "config.json").exists():
        raise UserError(f"out={out} exists and is not a policy directory; choose another place")
    path = resolve(cfg.source)
    run = compose_config("train", f"baseline={cfg.baseline}", "size=full")
    arguments = policy_arguments(run) | ({"pretrained": cfg.base} if cfg.base else {})
    converted = import_module(f"vla.released.{cfg.baseline}").convert(path, arguments, cfg.dataset)
    arguments |= converted.arguments
    weights = fitted(cfg, converted, arguments)
    about = dict(
        arm="released",
        size="full",
        benchmark=None,
        image_rotation=cfg.image_rotation,
        train_seed=None,
        source=cfg.source,
        dataset=cfg.dataset,
        notes=converted.notes,
        commit=commit(),
        versions={name: importlib.metadata.version(name) for name in PACKAGES},
    )
    write_policy(
        out,
        weights,
        config={"format": FORMAT, "baseline": cfg.baseline, "arguments": arguments, "about": about},
        statistics={"scheme": converted.scheme, **converted.statistics},
        tokenizer=converted.tokenizer,
    )
    return out, converted.notes


def fitted(cfg: ConvertWeightsConfig, converted: Converted, arguments: dict) -> dict[str, Tensor]:
    """The converted weights, exactly those of the model and each of its shape, or a UserError that lists the others."""
    with torch.device("meta"):
        model = _model(cfg.baseline, converted, arguments)
    expected = {key: tuple(value.shape) for key, value in model.state_dict().items()}
    weights = drop({k: v for k, v in converted.weights.items() if k not in expected}, cfg.allow_unexpected)
    weights |= {k: v for k, v in converted.weights.items() if k in expected}
    missing = sorted(set(expected) - set(weights))
    if allowed := [key for key in missing if any(re.search(pattern, key) for pattern in cfg.allow_missing)]:
        torch.manual_seed(0)
        initial = _model(cfg.baseline, converted, arguments).state_dict()
        weights |= {key: initial[key] for key in allowed}
    problems = {
        "missing (allow_missing=[…] takes random values)": sorted(set(expected) - set(weights)),
        "unexpected (allow_unexpected=[…] leaves them out)": sorted(set(weights) - set(expected)),
        "of another shape": [
            f"{key} {tuple(weights[key].shape)} for {shape}"
            for key, shape in sorted(expected.items())
            if key in weights and tuple(weights[key].shape) != shape
        ],
    }
    told = [
        f"{len(keys)} weights {what}: {', '.join(keys[:SHOWN])}{' …' if len(keys) > SHOWN else ''}"
        for what, keys in problems.items()
        if keys
    ]
    if told:
        raise UserError(f"{cfg.source} does not fit {cfg.baseline}: {'; '.join(told)}")
    return {key: weights[key].contiguous() for key in expected}


def _model(baseline: str, converted: Converted, arguments: dict) -> Policy:
    statistics = ActionStatistics(**converted.statistics)
    return build_policy(baseline, statistics, converted.scheme, arguments | {"tokenizer": converted.tokenizer})
