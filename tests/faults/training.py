"""Real training processes to kill, stop and starve: forked, so that torch is imported once, or by the command line."""

from __future__ import annotations

import csv
import multiprocessing
import os
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import vla.baselines.vlm4vla
import vla.training  # noqa: F401  children are forked with what took seconds to import
from train import train
from vla.cli import CONF, one_line
from vla.config import TrainConfig
from vla.run_identity import run_dir

TIMING = ("samples_per_s", "data_wait", "mfu")


def launch(cfg: TrainConfig, log: Path, fault: Callable = lambda: None, **environment: str) -> multiprocessing.Process:
    """train(cfg, resume=auto) in a process of its own, which ends as the command would; what it says is in `log`.

    `fault` is called there first.
    """
    process = multiprocessing.get_context("fork").Process(target=_child, args=(cfg, log, fault, environment))
    process.start()
    return process


def _child(cfg: TrainConfig, log: Path, fault: Callable, environment: dict[str, str]) -> None:
    os.environ.update(environment)
    fault()
    sys.stdout = sys.stderr = open(log, "a", buffering=1)  # noqa: SIM115  for as long as the process lives
    os.dup2(sys.stdout.fileno(), 1)
    os.dup2(sys.stdout.fileno(), 2)
    with one_line("train"):
        train(replace(cfg, resume="auto"))


def finish(cfg: TrainConfig, log: Path, fault: Callable = lambda: None) -> Path:
    """Train to the end, in a process of its own; the exported policy."""
    process = launch(cfg, log, fault)
    process.join(200)
    assert process.exitcode == 0, log.read_text()
    return run_dir(cfg) / "policy"


def command(*words: str, **environment: str) -> subprocess.Popen:
    """The real command line."""
    return subprocess.Popen(
        [sys.executable, str(CONF.parent / "train.py"), *words],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | environment,
        start_new_session=True,
    )


def wait_for(what: Callable[[], object], process, seconds: float = 120) -> None:
    """Until `what()` is true, or the process has ended."""
    until = time.monotonic() + seconds
    while not what():
        alive = process.is_alive() if hasattr(process, "is_alive") else process.poll() is None
        if not alive:
            return
        assert time.monotonic() < until, "it did not come to pass"
        time.sleep(0.002)


def metrics(run: Path) -> list[dict]:
    """The rows of metrics.csv, without what the clock makes."""
    with open(run / "metrics.csv", newline="") as file:
        return [{k: v for k, v in row.items() if k not in TIMING} for row in csv.DictReader(file)]


def under_way(run: Path) -> bool:
    """Whether the first step has ended, and another begun."""
    return (run / "metrics.csv").exists() and len(metrics(run)) > 1


def weights(policy: Path) -> bytes:
    return (policy / "model.safetensors").read_bytes()


SMALL = (
    *("ablation=ptr", "batch_size=2", "optim.ema=0.9", "trainer.checkpoint_every=2", "policy.image_size=32"),
    *("policy.head_width=32", "policy.vision_config.width=8", "policy.vision_config.out_hidden_size=32"),
    *("policy.text_config.hidden_size=32", "policy.text_config.intermediate_size=64"),
    *("policy.text_config.num_attention_heads=2", "policy.text_config.num_key_value_heads=2"),
    *("policy.text_config.head_dim=16", "policy.text_config.rope_parameters.mrope_section=[2,3,3]"),
    "inverse_dynamics.dim=16",
)
"""Of VLM4VLA: a step in 30 ms, a checkpoint of 1.6 MB, with PTR's draws and an average of the weights."""
