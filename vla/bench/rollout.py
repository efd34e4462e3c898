"""Environment steps/s and episodes/h with render on demand against rendering every step, on the real simulator."""

from __future__ import annotations

import os
import platform
import statistics
import time

import numpy as np
from rich.progress import track
from rich.table import Table

from envs.base import Environment

CHUNKS = {"libero": (1, 4, 8), "calvin": (1, 10)}
TARGETS = {("libero", 4): 3.0, ("libero", 8): 4.0, ("calvin", 10): 8.0}
"""(benchmark family, chunk) -> times the environment steps/s of rendering every step."""


LABELS = {1: "every step", 0: "no rendering"}


def environment(family: str, suite: str, task: int) -> Environment:
    """One LIBERO task with its static camera, or CALVIN's chains in D with both cameras."""
    if family == "calvin":
        from envs.calvin import CalvinChains
        from envs.calvin_sim import resolve_renderer

        return CalvinChains("D", renderer=resolve_renderer("auto"))
    from envs.libero import LiberoEnv

    return LiberoEnv(suite, task)


def measure(family: str, suite: str, task: int, steps: int, rounds: int) -> dict:
    """Speed of one environment under random actions, the modes interleaved so that noise hits all alike.

    The same actions run in every mode; reported is whether the simulator's states came out bit-identical. An episode
    is a reset and `steps` steps.
    """
    env = environment(family, suite, task)
    rng = np.random.default_rng(0)
    actions = np.concatenate([rng.uniform(-0.5, 0.5, (steps, 6)), np.ones((steps, 1))], axis=1)
    modes = (*CHUNKS[family], 0)
    seconds: dict[int, list[float]] = {chunk: [] for chunk in modes}
    episodes: dict[int, list[float]] = {chunk: [] for chunk in modes}
    states: dict[int, np.ndarray] = {}
    for _ in track(range(rounds), description="measuring", transient=True):
        for chunk in modes:
            begin = time.perf_counter()
            env.reset(seed=0)
            trace = []
            start = time.perf_counter()
            for index, action in enumerate(actions):
                render = chunk > 0 and (index + 1) % chunk == 0
                env.step(action, render=render)
                if render:
                    env.observe()
                trace.append(env.sim_state())
            end = time.perf_counter()
            seconds[chunk].append(end - start)
            episodes[chunk].append(end - begin)
            states[chunk] = np.stack(trace)
    env.close()
    every, episode = statistics.median(seconds[1]), statistics.median(episodes[1])
    rows = {
        LABELS.get(chunk, f"chunk {chunk}"): {
            "steps_per_s": steps / statistics.median(times),
            "slowest": steps / max(times),
            "fastest": steps / min(times),
            "times_every_step": every / statistics.median(times),
            "episodes_per_hour": 3600 / statistics.median(episodes[chunk]),
            "episodes_times": episode / statistics.median(episodes[chunk]),
            "target": TARGETS.get((family, chunk)),
            "states_identical": bool(np.array_equal(states[chunk], states[1])),
        }
        for chunk, times in seconds.items()
    }
    device = f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores, {env.versions()['renderer']}"
    return {
        "bench": "rollout",
        "what": "calvin D, two cameras" if family == "calvin" else f"{suite} {task}, one camera 128 × 128",
        "steps": steps,
        "rounds": rounds,
        "device": device,
        "rows": rows,
    }


def show(result: dict) -> Table:
    title = f"{result['what']}, {result['rounds']} × {result['steps']} steps; {result['device']}"
    table = Table(title=title, title_justify="left")
    for column in (
        "frames rendered",
        "env steps/s (median)",
        "range",
        "× every step",
        "target",
        "episodes/h",
        "×",
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
            f"{row['episodes_per_hour']:.0f}",
            f"{row['episodes_times']:.2f}",
            "yes" if row["states_identical"] else "NO",
        )
    return table
