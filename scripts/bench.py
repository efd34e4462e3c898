"""Measure speed, each figure beside the plain way of doing the same thing on the same machine in the same run.

python scripts/bench.py rollout            environment steps/s: rendering every step, one in 4, one in 8, never
python scripts/bench.py rollout --suite libero_object --task 0 --steps 96 --json rollout.json
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from vla.errors import UserError

CHUNKS = {"every step": 1, "chunk 4": 4, "chunk 8": 8}
TARGETS = {"chunk 4": 2.8, "chunk 8": 4.0}


def main() -> None:
    parser = argparse.ArgumentParser(prog="python scripts/bench.py", description=__doc__.split("\n")[0])
    commands = parser.add_subparsers(dest="command", required=True)
    rollout = commands.add_parser(
        "rollout", help="environment steps/s with render on demand against rendering every step"
    )
    rollout.add_argument("--suite", default="libero_goal")
    rollout.add_argument("--task", type=int, default=8)
    rollout.add_argument("--steps", type=int, default=48, help="control steps per measurement")
    rollout.add_argument("--rounds", type=int, default=5, help="interleaved measurements of each mode")
    rollout.add_argument("--json", type=Path, help="also write the figures here")
    options = parser.parse_args()
    # As in the workers: one core a simulator. Set before the simulator is imported, which reads it then.
    os.environ.update(LP_NUM_THREADS="1", OMP_NUM_THREADS="1")
    try:
        result = bench_rollout(options.suite, options.task, options.steps, options.rounds)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    show(result)
    if options.json:
        options.json.write_text(json.dumps(result, indent=2))


def bench_rollout(suite: str, task: int, steps: int, rounds: int) -> dict:
    """Steps/s of one environment under random actions, the modes interleaved so that noise hits all alike.

    Also replays the same actions in every mode and reports whether the simulator's states came out bit-identical.
    """
    import numpy as np
    from rich.progress import track

    from envs.libero import LiberoEnv

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


def show(result: dict) -> None:
    from rich.console import Console
    from rich.table import Table

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
    Console(width=None if sys.stdout.isatty() else 140).print(table)


if __name__ == "__main__":
    main()
