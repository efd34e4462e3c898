"""kill -9 at random instants of a training run, then resume: nothing saved is lost, and nothing shows in the end."""

from __future__ import annotations

import contextlib
import random
import time
from pathlib import Path

import pytest

from tests.conftest import train_config
from tests.faults.training import SMALL, finish, launch, metrics, under_way, wait_for, weights
from vla.run_identity import run_dir
from vla.saving import SLOW_WRITER, newest_whole, saved, step_of


def partials(run: Path) -> set[tuple[str, int]]:
    """Each folder that a save has begun, by name and time."""
    found = set()
    for path in (run / "checkpoints").glob(".step=*.partial"):
        with contextlib.suppress(FileNotFoundError):  # the save may end, and its folder get its name, at any instant
            found.add((path.name, path.stat().st_mtime_ns))
    return found


def newest(run: Path) -> int:
    """The step that a resume would take up; every checkpoint that has a name is whole."""
    folder, wrong = newest_whole(run)
    assert wrong == {} and (folder is None) == (not saved(run))
    return step_of(folder) if folder else 0


def kill(process) -> bool:
    """Whether there still was something to kill."""
    process.kill()
    process.join()
    return process.exitcode == -9


def disturbed(cfg, log: Path, count: int, seed: int, **environment: str) -> tuple[int, int]:
    """Start, kill, start again, until the run ends or was killed `count` times: (kills, of them inside a save).

    Half of the instants are drawn from the first save of a start, three tenths from the time after it, the others from
    the first seconds: imports, building, loading a checkpoint.
    """
    draw, run, kills, inside, before = random.Random(seed), run_dir(cfg), 0, 0, 0
    while kills < count:
        old = partials(run)
        process = launch(cfg, log, **environment)
        where = draw.choices(("save", "training", "start"), (5, 3, 2))[0] if kills else "save"
        if where != "start":
            wait_for(lambda: partials(run) - old or newest_step(run) > before, process)  # noqa: B023
        time.sleep(draw.uniform(0, {"save": 2 * float(environment[SLOW_WRITER]), "training": 1, "start": 3}[where]))
        if not kill(process):
            assert process.exitcode == 0, log.read_text()
            break
        kills, inside = kills + 1, inside + bool(partials(run) - old)
        now = newest(run)
        assert now >= before, "a checkpoint was lost"
        before = now
    return kills, inside


def newest_step(run: Path) -> int:
    return step_of(found[-1]) if (found := saved(run)) else 0


def check_kills(store, tmp_path: Path, kills: int, steps: int, *overrides: str, **environment: str) -> None:
    def config(name: str):
        return train_config(store.path, tmp_path / name, *SMALL, f"max_steps={steps}", *overrides)

    whole, log = finish(config("whole"), tmp_path / "log"), tmp_path / "log"
    done = inside = number = 0
    started = time.monotonic()
    while done < kills:
        cfg = config(f"killed{number}")
        more, of_them = disturbed(cfg, log, kills - done, seed=number, **environment)
        policy = finish(cfg, log)
        assert weights(policy) == weights(whole) and metrics(policy.parent) == metrics(whole.parent)
        done, inside, number = done + more, inside + of_them, number + 1
    print(f"{done} kills, {inside} inside a save, {number} runs, {time.monotonic() - started:.0f} s")
    assert inside > kills // 4, "the kills are meant to hit saves"


def test_three_kills_leave_no_trace(store, tmp_path):
    check_kills(store, tmp_path, 3, 10, **{SLOW_WRITER: "0.1"})


def test_a_second_process_is_refused_and_the_first_goes_on(store, tmp_path, monkeypatch):
    monkeypatch.setattr("vla.saving.PATIENCE_S", 0.2)
    cfg = train_config(store.path, tmp_path, *SMALL, "max_steps=40")
    first = launch(cfg, tmp_path / "first", **{SLOW_WRITER: "0.1"})
    wait_for(lambda: under_way(run_dir(cfg)), first)
    second = launch(cfg, tmp_path / "second")
    second.join(60)
    assert second.exitcode == 2 and "is being trained by another process" in (tmp_path / "second").read_text()
    first.join(120)
    assert first.exitcode == 0, (tmp_path / "first").read_text()


@pytest.mark.slow
def test_fifty_kills_leave_no_trace(store, tmp_path):
    check_kills(store, tmp_path, 50, 60, **{SLOW_WRITER: "0.05"})


@pytest.mark.slow
def test_kills_leave_no_trace_when_a_thread_writes(store, tmp_path):
    check_kills(store, tmp_path, 10, 40, "trainer.async_checkpoints=true", **{SLOW_WRITER: "0.05"})
