"""Which run a configuration is: its hash and its directory, the same for every launch of it.

Two launches are one run where nothing differs that could change its result; a run goes on with other devices, another
logger or other intervals between checkpoints.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict
from pathlib import Path

from vla.config import TrainConfig
from vla.policy_configs import IdeasConfig

_NOT_IDENTITY = ("resume", "run_root", "logger", "time_limit_minutes", "cell")
_NOT_IDENTITY_OF_DATA = ("workers",)
_IDENTITY_OF_BENCHMARK = ("name", "family", "suite", "tasks", "cameras", "resolution")  # the rest is about rollouts
_NOT_IDENTITY_OF_TRAINER = (
    *("num_workers", "checkpoint_every", "keep_checkpoints", "async_checkpoints", "log_every", "on_nan", "max_skipped"),
    # How the same batches are shared out (vla/parallel.py): a run may go on with other devices.
    *("strategy", "num_nodes", "accumulate", "activation_checkpointing", "check_memory"),
)


def run_hash(cfg: TrainConfig) -> str:
    """Eight hex digits that are a function of the resolved configuration alone, never of the clock or the machine."""
    identity = {k: v for k, v in asdict(cfg).items() if k not in _NOT_IDENTITY}
    identity["data"] = {k: v for k, v in identity["data"].items() if k not in _NOT_IDENTITY_OF_DATA}
    # What came later and is off leaves no trace, so that runs made before it are found.
    if not cfg.cotrain.enabled:
        del identity["cotrain"]
    if cfg.data.rewordings is None:
        del identity["data"]["rewordings"]
    off = asdict(IdeasConfig())
    identity["policy"] = {k: v for k, v in identity["policy"].items() if k not in off or v != off[k]}
    identity["benchmark"] = {k: v for k, v in identity["benchmark"].items() if k in _IDENTITY_OF_BENCHMARK}
    identity["trainer"] = {k: v for k, v in identity["trainer"].items() if k not in _NOT_IDENTITY_OF_TRAINER}
    identity["trainer"]["devices"] = 1
    return hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:8]


def run_dir(cfg: TrainConfig) -> Path:
    """runs/<what it is>-<hash>: the same for every launch of the same configuration."""
    name = f"{cfg.policy.name}-{cfg.size}-{cfg.arm}-{cfg.benchmark.name}-s{cfg.seed}-{run_hash(cfg)}"
    return Path(cfg.run_root) / name
