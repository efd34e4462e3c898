"""Environment steps/s of the whole evaluator with one, two, … workers, on real LIBERO with a policy that costs nothing.

Worker processes, server and records are those of evaluate.py. The policy reads the static camera once a chunk of 8 and
holds still, so what is measured is what the simulator and the plumbing cost. Starting the simulators counts.
"""

from __future__ import annotations

import os
import platform
import statistics
import tempfile
from pathlib import Path

from rich.progress import track
from rich.table import Table

from envs.rollout import run_rollouts
from vla.cli import compose_config
from vla.replay import NothingPolicy

TARGET = 1.7
"""Two workers over one, on two cores."""


class Watching(NothingPolicy):
    chunk = 8
    cameras = ("static",)


def measure(workers: list[int], episodes: int, steps: int, rounds: int) -> dict:
    """Medians over `rounds` of `episodes` episodes of `steps` steps, the numbers of workers in turns."""
    from envs.episodes import simulator

    words = ["benchmark=libero_goal", "benchmark.tasks=[8]", f"benchmark.max_steps={steps}", f"episodes={episodes}"]
    policy = Watching()
    env, arguments, specs = simulator(compose_config("evaluate", "policy=nothing", *words), policy, {})
    header = {"checkpoint": "nothing", "config": "none"}
    rates: dict[int, list[float]] = {count: [] for count in workers}
    for _ in track(range(rounds), description="rolling out", transient=True):
        for count in workers:
            with tempfile.TemporaryDirectory() as folder:
                result = run_rollouts(
                    policy,
                    specs,
                    Path(folder) / "results",
                    env=env,
                    env_kwargs=arguments,
                    workers=count,
                    execute_steps=policy.chunk,
                    episode_timeout_s=600,
                    header=header,
                    progress=False,
                )
            rates[count].append(result.env_steps / result.seconds)
    one = statistics.median(rates[workers[0]])
    rows = {
        count: {
            "steps_per_s": statistics.median(found),
            "slowest": min(found),
            "fastest": max(found),
            "times": statistics.median(found) / one,
            "target": TARGET if (workers[0], count) == (1, 2) else None,
        }
        for count, found in rates.items()
    }
    device = f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores"
    return {"bench": "workers", "device": device, "episodes": episodes, "steps": steps, "rounds": rounds, "rows": rows}


def show(result: dict) -> Table:
    what = f"{result['rounds']} × {result['episodes']} episodes of {result['steps']} steps"
    table = Table(title=f"libero_goal 8, chunk 8, {what}; {result['device']}", title_justify="left")
    for column in ("workers", "env steps/s (median)", "range", "×", "target"):
        table.add_column(column, justify="right")
    for count, row in result["rows"].items():
        target = "" if row["target"] is None else f"≥ {row['target']}"
        spread = f"{row['slowest']:.1f}–{row['fastest']:.1f}"
        table.add_row(str(count), f"{row['steps_per_s']:.1f}", spread, f"{row['times']:.2f}", target)
    return table
