"""Seconds until a command answers: --help, a misspelt key, evaluate.py's first action beside the simulator's own start.

Every figure is of fresh processes, started as a user starts them. The simulator's own start is a process that imports
it, makes the environment, resets it and renders one frame; evaluate.py is timed over one episode of one step, so the
difference is imports, configuration, the policy, its worker and its first action. The two take turns.
"""

from __future__ import annotations

import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from rich.progress import Progress
from rich.table import Table

from vla.bench.latency import describe, random_policy
from vla.checkpoint import export_policy
from vla.errors import UserError
from vla.training import policy_arguments

ROOT = Path(__file__).resolve().parents[2]
HELP, MISSPELT, BARE, FIRST = "train.py --help", "train.py, a misspelt key", "simulator alone", "evaluate.py, one step"
LIMITS = {HELP: 3.0}
LIMIT_BEYOND = 10.0
ALONE = """
import sys
sys.path.insert(0, {root!r})
from envs.libero import LiberoEnv
env = LiberoEnv("libero_goal", 8)
env.reset(seed=0)
env.step([0.0] * 6 + [1.0], render=True)
env.observe()
env.close()
"""


def measure(rounds: int) -> dict:
    """Median and range over `rounds` of each command.

    Raises:
        UserError: a command that fails, with its last line.
    """
    with tempfile.TemporaryDirectory() as folder:
        policy = tiny_policy(Path(folder) / "policy")
        words = f"policy={policy} benchmark=libero_goal benchmark.tasks=[8] benchmark.max_steps=1 episodes=1"
        words = [*words.split(), "evaluation.workers=1", "evaluation.execute_steps=1"]
        commands = {
            HELP: ([str(ROOT / "train.py"), "--help"], 0),
            MISSPELT: ([str(ROOT / "train.py"), "optim.learning_rate=1"], 2),
            BARE: (["-c", ALONE.format(root=str(ROOT))], 0),
            FIRST: ([str(ROOT / "evaluate.py"), *words], 0),
        }
        seconds: dict[str, list[float]] = {name: [] for name in commands}
        with Progress(transient=True) as progress:
            task = progress.add_task("starting", total=rounds * len(commands))
            for turn in range(rounds):
                for name, (arguments, code) in commands.items():
                    more = [f"results_root={folder}/results{turn}"] if name == FIRST else []
                    seconds[name].append(run([*arguments, *more], code))
                    progress.advance(task)
    rows = {
        name: {"seconds": statistics.median(s), "fastest": min(s), "slowest": max(s), "limit": LIMITS.get(name)}
        for name, s in seconds.items()
    }
    beyond = statistics.median(a - b for a, b in zip(seconds[FIRST], seconds[BARE], strict=True))
    about = {"bench": "startup", "device": describe("cpu"), "rounds": rounds}
    return about | {"rows": rows, "beyond": {"seconds": beyond, "limit": LIMIT_BEYOND}}


def tiny_policy(out: Path) -> Path:
    policy, cfg = random_policy("vlm4vla", "tiny")
    about = {"arm": "random", "train_seed": 0, "image_rotation": "rotate180", "benchmark": "libero_goal"}
    export_policy(policy, out, name="vlm4vla", arguments=policy_arguments(cfg), about=about)
    return out


def run(arguments: list[str], expected: int) -> float:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "LP_NUM_THREADS": "1"}
    start = time.perf_counter()
    done = subprocess.run([sys.executable, *arguments], cwd=ROOT, env=environment, capture_output=True, text=True)
    took = time.perf_counter() - start
    if done.returncode != expected:
        told = (done.stderr.strip() or done.stdout.strip() or "nothing was printed").splitlines()[-1]
        raise UserError(f"{' '.join(arguments[:2])} ended with {done.returncode}: {told}")
    return took


def show(result: dict) -> Table:
    beyond = result["beyond"]
    table = Table(
        title=f"seconds of fresh processes, {result['rounds']} rounds in turns; {result['device']}",
        caption=f"first action beyond the simulator's start: {beyond['seconds']:.1f} s (limit {beyond['limit']:.0f})",
        title_justify="left",
        caption_justify="left",
    )
    table.add_column("command")
    for column in ("seconds (median)", "range", "limit"):
        table.add_column(column, justify="right")
    for name, r in result["rows"].items():
        limit = "" if r["limit"] is None else f"≤ {r['limit']:.0f}"
        table.add_row(name, f"{r['seconds']:.2f}", f"{r['fastest']:.2f}–{r['slowest']:.2f}", limit)
    return table
