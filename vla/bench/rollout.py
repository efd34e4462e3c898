"""Environment steps/s with render on demand against rendering every step, on the real simulator."""

from __future__ import annotations

import os
import platform
import statistics
import time

import numpy as np
from rich.progress import track
from rich.table import Table

from envs.libero import LiberoEnv

CHUNKS = {"every step": 1, "chunk 4": 4, "chunk 8": 8}
TARGETS = {"chunk 4": 2.8, "chunk 8": 4.0}


def measure(suite: str, task: int, steps: int, rounds: int) -> dict:
    """Steps/s of one environment under random actions, the modes interleaved so that noise hits all alike.

    Also replays the same actions in every mode and reports whether the simulator's states came out bit-identical.
    """
    env = LiberoEnv(suite, task)
    rng = np.random.default_rng(0)
    actions = np.concatenate([rng.uniform(-0.5, 0.5, (steps, 6)), np.ones((steps, 1))], axis=1)
    modes = CHUNKS | {"no rendering": 0}
    seconds: dict[str, list[float]] = {mode: [] for mode in modes}
    states: dict[str, np.ndarray] = {}
    for _ in track(range(rounds), description="measuring", transient=True):
        for mode, chunk in modes.items():
            env.reset(seed=0)
            trace = []
            start = time.perf_counter()
            for index, action in enumerate(actions):
                env.step(action, render=chunk > 0 and (index + 1) % chunk == 0)
                trace.append(env.sim_state())
            seconds[mode].append(time.perf_counter() - start)
            states[mode] = np.stack(trace)
    env.close()
    every = statistics.median(seconds["every step"])
    rows = {
        mode: {
            "steps_per_s": steps / statistics.median(times),
            "slowest": steps / max(times),
            "fastest": steps / min(times),
            "times_every_step": every / statistics.median(times),
            "target": TARGETS.get(mode),
            "states_identical": bool(np.array_equal(states[mode], states["every step"])),
        }
        for mode, times in seconds.items()
    }
    device = f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores, {env.versions()['renderer']}"
    return {
        "bench": "rollout",
        "suite": suite,
        "task": task,
        "steps": steps,
        "rounds": rounds,
        "device": device,
        "rows": rows,
    }


def show(result: dict) -> Table:
    size = f"one camera 128 × 128, {result['rounds']} × {result['steps']} steps"
    title = f"{result['suite']} {result['task']}, {size}; {result['device']}"
    table = Table(title=title, title_justify="left")
    for column in (
        "frames rendered",
        "env steps/s (median)",
        "range",
        "× every step",
        "target",
        "states bit-identical",
    ):
        table.add_column(column, justify="left" if column == "frames rendered" else "right")
    for mode, row in result["rows"].items():
        target = "" if row["target"] is None else f"≥ {row['target']}"
        table.add_row(
            mode,
            f"{row['steps_per_s']:.1f}",
            f"{row['slowest']:.1f}–{row['fastest']:.1f}",
            f"{row['times_every_step']:.2f}",
            target,
            "yes" if row["states_identical"] else "NO",
        )
    return table
