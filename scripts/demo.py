"""The whole loop on real LIBERO: collect, convert, train two arms, roll both out, probe them, print the table.

    make demo            (or .venv/bin/python scripts/demo.py)

Every step is a command that is printed before it runs and that you can type yourself. The task is libero_goal 8, "put
the bowl on the plate": demonstrations from initial states 0-29, evaluation on 30-49 with the gripper displaced by 5 cm
first, and a control that replays a demonstration blindly (facts demo §6). Finished steps are not run again.
"""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from rich.console import Console
from rich.table import Table

TASK = "benchmark=libero_goal benchmark.tasks=[8]"
CAMERAS = "benchmark.cameras=[static]"  # all that the VLM4VLA baseline reads
STARTS = "benchmark.start_displacement=0.05"
EPISODES = f"{STARTS} benchmark.max_steps=220 first_seed=30 episodes=20"
RUNS, RESULTS, OUT = "runs/demo", "results/demo", "results/demo"
ARMS = ("vanilla", "ptr")
DEMOS = "demos=40 frame_every=2"  # rendering is the cost: half the frames of twice the demonstrations teach more
console = Console()


class Clock:
    """Minutes of each stage, shown at the end."""

    def __init__(self) -> None:
        self.start, self.stages = time.monotonic(), []

    def stage(self, title: str) -> None:
        self.stages.append([title, time.monotonic()])
        minutes = (time.monotonic() - self.start) / 60
        console.rule(f"[bold]{len(self.stages)}. {title}[/bold]  [dim]({minutes:.1f} min so far)[/dim]")

    def table(self) -> Table:
        table = Table(title="Where the time went", title_justify="left")
        table.add_column("stage")
        table.add_column("minutes", justify="right")
        ends = [begin for _, begin in self.stages[1:]] + [time.monotonic()]
        for (title, begin), end in zip(self.stages, ends, strict=True):
            table.add_row(title, f"{(end - begin) / 60:.1f}")
        table.add_row("[bold]all[/bold]", f"[bold]{(time.monotonic() - self.start) / 60:.1f}[/bold]")
        return table


def command(line: str) -> list[str]:
    """Print `line` as a user would type it and return it as arguments for this interpreter."""
    console.print(f"[bold cyan]$ python {line}[/bold cyan]", highlight=False, soft_wrap=True)
    return [sys.executable, *shlex.split(line)]


def run(*lines: str) -> None:
    """Run the commands side by side; stop the demo with the first that fails."""
    processes = [subprocess.Popen(command(line), cwd=ROOT) for line in lines]
    codes = [process.wait() for process in processes]
    if any(codes):
        console.print("[red]That step failed (its message is above). Run `make demo` again to go on from here.[/red]")
        sys.exit(max(codes))


def policy_of(arm: str) -> Path:
    """The exported policy of an arm, by the run directory that train.py names after its configuration."""
    found = sorted((ROOT / RUNS).glob(f"vlm4vla-tiny-{arm}-libero_goal-s0-*/policy"), key=lambda p: p.stat().st_mtime)
    return found[-1].relative_to(ROOT)


def main() -> None:
    clock = Clock()
    clock.stage("Collect demonstrations with a scripted expert in the real simulator")
    run(f"scripts/collect.py {TASK} {CAMERAS} {STARTS} {DEMOS}")

    clock.stage("Convert them to the frame store that training reads")
    run(f"scripts/convert.py {TASK} {CAMERAS}")

    clock.stage("Train both arms, one thread each, side by side")
    run(*(f"train.py ablation={arm} {TASK} run_root={RUNS} resume=auto" for arm in ARMS))

    clock.stage("Roll both out on the same displaced starts, and the replay control")
    for arm in ARMS:
        film = " evaluation.videos=1" if arm == ARMS[-1] else ""
        run(f"evaluate.py policy={policy_of(arm)} {TASK} {EPISODES} results_root={RESULTS}{film}")
    demonstration = Path(os.environ.get("VLA_DATA", "datasets")) / "libero_goal/put_the_bowl_on_the_plate_demo.hdf5"
    run(f"evaluate.py policy=replay:{demonstration} {TASK} {EPISODES} results_root={RESULTS}")

    clock.stage("Probe the two vision encoders")
    probes = "evaluation=ridge_probe,alignment threads=1"
    run(*(f"evaluate.py -m policy={policy_of(arm)} {probes} {TASK} results_root={RESULTS}" for arm in ARMS))

    clock.stage("Compare")
    plot = training_curves()
    run(f"scripts/tables.py {RESULTS} --csv {OUT}/table.csv --latex {OUT}/table.tex")
    console.print(clock.table())
    film = next((ROOT / RESULTS).rglob("*.mp4"), None)
    console.print(f"training curves: {plot}")
    if film is not None:
        console.print(f"a rollout to watch: {film.relative_to(ROOT)}")
    console.print(f"the same table: {OUT}/table.csv, {OUT}/table.tex; every episode: {RESULTS}/**/episodes.jsonl")


def training_curves() -> Path:
    from vla.analysis.plots import plot_training, read_metrics

    out = ROOT / OUT / "training.png"
    plot_training({arm: read_metrics((ROOT / policy_of(arm)).parent) for arm in ARMS}, out)
    return out.relative_to(ROOT)


if __name__ == "__main__":
    main()
