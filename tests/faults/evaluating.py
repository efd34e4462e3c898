"""Evaluations on the fake simulator in processes of their own, to be killed; torch is imported once for all of them."""

from __future__ import annotations

import json
import multiprocessing
import os
import re
import signal
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from fake_env import read
from test_rollout import HEADER, Seeker, episodes

import vla.analysis.statistics  # noqa: F401 - seconds of scipy, which every first summary would pay
from envs.rollout import run_rollouts
from envs.shards import Shard
from envs.stopping import stop_on_signals

HERE = Path(__file__).resolve().parent
PATHS = [str(HERE), str(HERE.parent), str(HERE.parents[1])]
CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(["evaluating"])


def roll(folder: Path, count: int, out: str = "out", shard: Shard | None = None, **kwargs):
    """The episodes 0 … count - 1 of two tasks, with one journal and one header whatever `out` is."""
    env_kwargs = {"journal": str(folder / "journal"), **kwargs.pop("env_kwargs", {})}
    options = {"workers": 1, "execute_steps": 4, "episode_timeout_s": 30, "progress": False, **kwargs}
    specs = episodes(range((count + 1) // 2), (0,)) + episodes(range(count // 2), (1,))
    return run_rollouts(
        Seeker(), specs, folder / out, env="fake_env:FakeEnv", env_kwargs=env_kwargs, header=HEADER, shard=shard,
        **options,
    )  # fmt: skip


def start(folder: Path, count: int, handlers: dict[int, int] | None = None, **kwargs) -> multiprocessing.Process:
    """`roll` in another process; `handlers`: {signal: exit code of a handler that is there before}."""
    os.environ["PYTHONPATH"] = os.pathsep.join(PATHS)  # of the fork server, of its forks and of their workers
    process = CONTEXT.Process(target=_evaluate, args=(folder, count, handlers or {}), kwargs=kwargs)
    process.start()
    return process


def _evaluate(folder: Path, count: int, handlers: dict[int, int], **kwargs) -> None:
    os.environ["PYTHONPATH"] = os.pathsep.join(PATHS)
    for number, code in handlers.items():
        signal.signal(number, lambda *_, code=code: sys.exit(code))
    stop_on_signals()
    roll(folder, count, **kwargs)


def files(folder: Path) -> SimpleNamespace:
    """What an evaluation leaves, byte for byte apart from the wall clock."""
    rows = (folder / "episodes.jsonl").read_text()
    return SimpleNamespace(
        rows=re.sub(r'"seconds": [\d.e+-]+', '"seconds": 0', rows),
        header=(folder / "run.json").read_bytes(),
        summary=(folder / "summary.json").read_bytes(),
    )


def pids(folder: Path) -> set[int]:
    return {event["pid"] for event in read(folder / "journal")}


def ended(folder: Path) -> int:
    return sum(event["event"] == "end" for event in read(folder / "journal"))


def seeds_reset(folder: Path) -> list[tuple[int, int]]:
    return [(e["task"], e["seed"]) for e in read(folder / "journal") if e["event"] == "reset"]


def slow(*values) -> list:
    """Parameters of the slow tier only."""
    return [pytest.param(*(v if isinstance(v, tuple) else (v,)), marks=pytest.mark.slow) for v in values]


def missing(folder: Path) -> list[dict]:
    return json.loads((folder / "summary.json").read_text())["missing_episodes"]
