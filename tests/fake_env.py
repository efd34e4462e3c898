"""A cheap deterministic environment for tests of the rollout machinery: a point that must be moved to a goal.

An action's first three numbers move the point by 0.1 of them per step. The goal is a function of (task, seed) and lies
too far for some seeds, so that both outcomes occur. The frame shows the position, so that a policy reading stale pixels
would act otherwise. Every reset and end of an episode is a JSON line in `journal`.

`misbehave` maps a seed (as a string: it travels as JSON) to what its first attempt does, "always_..." every attempt:
kill (SIGKILL to itself), segfault, hang (sleep), native_hang (in C, no other thread runs), raise, slow (three seconds
in one step), and broken observations: nan, float, gray, small, state.
"""

from __future__ import annotations

import ctypes
import json
import os
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

STEP = 0.1
TOLERANCE = 0.12


class FakeEnv:
    instruction = "move the point to the goal"

    def __init__(
        self,
        journal: str,
        task: int = 0,
        max_steps: int = 20,
        misbehave: dict[str, str] | None = None,
        step_seconds: float = 0.0,
        size: int = 16,
    ) -> None:
        self.journal = Path(journal)
        self.task = task
        self.max_steps = max_steps
        self.replan = self.failed = False
        self.subtasks: list[dict] = []
        self.misbehave = misbehave or {}
        self.step_seconds = step_seconds
        self.size = size
        self._write(event="built")

    def reset(self, seed: int) -> dict:
        print("chatter on stdout, as simulators do")
        rng = np.random.default_rng([self.task, seed])
        self.seed, self.steps, self.renders = seed, 0, 1
        self.point, self.goal = np.zeros(3), rng.uniform(-2.5, 2.5, 3)
        first = not any(
            e["event"] == "reset" and e["seed"] == seed and e["task"] == self.task for e in read(self.journal)
        )
        self._write(event="reset", seed=seed)
        habit = self.misbehave.get(str(seed), "")
        self.habit = habit.removeprefix("always_") if first or habit.startswith("always_") else ""
        self.broken = ""
        self.fresh = True
        return self.observe()

    def step(self, action: np.ndarray, render: bool = True) -> bool:
        assert action.shape == (7,)
        time.sleep(self.step_seconds)
        if self.steps == 5 and self.habit:
            self._misbehave()
        self.point = self.point + STEP * np.clip(action[:3], -1, 1)
        self.steps += 1
        self.renders += render
        self.fresh = render
        success = bool(np.abs(self.point - self.goal).max() < TOLERANCE)
        if success or self.steps == self.max_steps:
            self._write(event="end", seed=self.seed, steps=self.steps, renders=self.renders)
        return success

    def observe(self) -> dict:
        if not self.fresh:
            raise RuntimeError("the last step was not rendered")
        image = np.zeros((self.size, self.size, 3), np.uint8)
        image[:] = np.round(self.point * 10 + 128).astype(np.uint8)
        state = np.concatenate([self.point, self.goal]).astype(np.float32)
        if self.broken:
            image = {"float": image / 255.0, "gray": image[..., 0], "small": image[::2, ::2]}.get(self.broken, image)
            state = state[:3] if self.broken == "state" else state
        return {"images": {"static": image, "wrist": image[:8]}, "state": state, "instruction": self.instruction}

    def close(self) -> None:
        self._write(event="closed")

    def versions(self) -> dict[str, str]:
        return {"fake": "1.0", "renderer": "none"}

    def _misbehave(self) -> None:
        if self.habit == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        if self.habit == "segfault":
            os.kill(os.getpid(), signal.SIGSEGV)
        if self.habit == "hang":
            time.sleep(3600)
        if self.habit == "native_hang":
            ctypes.PyDLL(None).sleep(3600)
        if self.habit == "slow":
            time.sleep(3)
        if self.habit == "raise":
            raise ArithmeticError("physics diverged")
        if self.habit == "nan":
            self.point = self.point * np.nan
        if self.habit in ("float", "gray", "small", "state"):
            self.broken = self.habit

    def _write(self, **event: object) -> None:
        with self.journal.open("a") as file:
            file.write(json.dumps({"task": self.task, "pid": os.getpid(), **event}) + "\n")


def broken(**_: object) -> FakeEnv:
    """An environment factory whose process dies at once, as with a graphics library that cannot start."""
    print("cannot open display", file=sys.stderr, flush=True)
    os._exit(7)


def read(journal: Path) -> list[dict]:
    """The journal's events so far."""
    return [json.loads(line) for line in journal.read_text().splitlines()] if journal.exists() else []


def alive(pids: set[int]) -> set[int]:
    """Those of the processes that run; an orphan that has exited may stay a zombie until init reaps it."""
    running = set()
    for pid in pids:
        try:
            state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
        except (FileNotFoundError, ProcessLookupError):  # the second where it ends between open and read
            continue
        if state != "Z":
            running.add(pid)
    return running


def wait_for(condition: Callable[[], object], seconds: float = 60.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "gave up waiting"
        time.sleep(0.02)
