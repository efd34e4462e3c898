"""A scheduler's signals to the real command line: a checkpoint, exit code 75, and a resume that leaves no trace."""

from __future__ import annotations

import itertools
import os
import random
import signal
import time

import pytest

from data.sampler import PairDataset
from tests.conftest import train_config
from tests.faults.training import SMALL, command, finish, launch, metrics, under_way, wait_for, weights
from vla import interruption, saving
from vla.interruption import AGAIN
from vla.run_identity import run_dir
from vla.saving import SLOW_WRITER, newest_whole, saved, step_of

SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2)


def hang_after(batches: int) -> None:
    """Let the data of the next batches never come."""
    real, given = PairDataset.__getitems__, itertools.count()

    def hanging(self, indices):
        if next(given) >= batches:
            time.sleep(1000)
        return real(self, indices)

    PairDataset.__getitems__ = hanging


def words(cfg, *overrides: str) -> list[str]:
    """The command line of `train_config(…, *SMALL, *overrides)`."""
    small = ("max_steps=400", "optim.warmup_steps=2", "trainer.log_every=1", "trainer.precision=32-true")
    return [f"data.path={cfg.data.path}", f"run_root={cfg.run_root}", *small, *SMALL, *overrides]


@pytest.mark.parametrize("number", SIGNALS)
def test_a_signal_while_training_saves_the_step_under_way(number, store, tmp_path):
    """Checkpoints are due every 1000 steps only: what is there was made because of the signal."""
    cfg = train_config(store.path, tmp_path / "run", *SMALL, "max_steps=400", "trainer.checkpoint_every=1000")
    process = launch(cfg, tmp_path / "log")
    wait_for(lambda: under_way(run_dir(cfg)), process)
    os.kill(process.pid, number)
    process.join(30)
    assert process.exitcode == AGAIN, (tmp_path / "log").read_text()
    said = (tmp_path / "log").read_text().splitlines()
    assert said[-1] == f"stopped by {signal.Signals(number).name}; what was saved is kept, and resume=auto goes on"
    newest, wrong = newest_whole(run_dir(cfg))
    assert wrong == {} and step_of(newest) == len(metrics(run_dir(cfg))) > 0


@pytest.mark.slow
def test_the_command_line_ends_with_75_and_goes_on_bit_equal(store, tmp_path):
    """The process group gets the signal, as from Slurm: loader workers too. A second one during the save is no harm."""
    options = ("max_steps=12", "trainer.checkpoint_every=1000", "trainer.num_workers=1")
    cfg = train_config(store.path, tmp_path / "run", *SMALL, *options)
    process = command(*words(cfg, *options), **{SLOW_WRITER: "0.3"})
    wait_for(lambda: under_way(run_dir(cfg)), process)
    os.killpg(process.pid, signal.SIGTERM)
    wait_for(lambda: list((run_dir(cfg) / "checkpoints").glob(".step=*.partial")), process)
    os.killpg(process.pid, signal.SIGUSR1)
    _, said = process.communicate(timeout=60)
    assert process.returncode == AGAIN, said
    assert "stopped by SIGTERM, SIGUSR1;" in said and "Traceback" not in said
    assert len(saved(run_dir(cfg))) == 1
    policy = finish(cfg, tmp_path / "log")
    whole = finish(train_config(store.path, tmp_path / "whole", *SMALL, *options), tmp_path / "log")
    assert weights(policy) == weights(whole) and metrics(policy.parent) == metrics(whole.parent)


def test_before_the_first_step_nothing_is_saved(store, tmp_path):
    """While the command imports and builds; the loader's first batch, which never comes, cannot hold it up."""
    cfg = train_config(store.path, tmp_path / "run", *SMALL)
    process = launch(cfg, tmp_path / "log", lambda: hang_after(0))
    wait_for((run_dir(cfg) / "config.yaml").exists, process)
    time.sleep(0.5)
    os.kill(process.pid, signal.SIGUSR1)
    process.join(30)
    assert process.exitcode == AGAIN and not (run_dir(cfg) / "checkpoints").exists()


def test_a_loader_that_hangs_is_not_waited_for_without_end(store, tmp_path):
    cfg = train_config(store.path, tmp_path / "run", *SMALL, "max_steps=400", "trainer.checkpoint_every=2")

    def fault() -> None:
        interruption.PATIENCE_S = 1.0
        hang_after(5)

    process = launch(cfg, tmp_path / "log", fault)
    wait_for(lambda: newest_whole(run_dir(cfg))[0] is not None and step_of(saved(run_dir(cfg))[-1]) == 4, process)
    time.sleep(0.5)
    os.kill(process.pid, signal.SIGTERM)
    process.join(30)
    assert process.exitcode == AGAIN
    assert step_of(newest_whole(run_dir(cfg))[0]) == 4


def test_a_handler_that_was_there_before_has_the_last_word(store, tmp_path):
    """submitit's requeues the job and exits; it runs after the save, with what Python gives to a handler."""
    cfg = train_config(store.path, tmp_path / "run", *SMALL, "max_steps=400", "trainer.checkpoint_every=1000")

    def requeue(number, frame) -> None:
        told = f"{number} {frame.f_code.co_name} {[path.name for path in saved(run_dir(cfg))]}"
        (tmp_path / "requeued").write_text(told)
        os._exit(33)

    before = signal.signal(signal.SIGUSR2, requeue)
    try:
        process = launch(cfg, tmp_path / "log")  # forked: it inherits the handler
    finally:
        signal.signal(signal.SIGUSR2, before)
    wait_for(lambda: under_way(run_dir(cfg)), process)
    os.kill(process.pid, signal.SIGUSR2)
    process.join(30)
    steps = len(metrics(run_dir(cfg)))
    assert process.exitcode == 33
    assert (tmp_path / "requeued").read_text() == f"{int(signal.SIGUSR2)} __exit__ ['step={steps}']"


@pytest.mark.slow
@pytest.mark.parametrize("asynchronous", ["false", "true"])
def test_signals_at_random_moments(asynchronous, store, tmp_path):
    """Up to ten, anywhere in the first half of what an undisturbed run takes, so that each life may be cut short."""
    options = (*SMALL, "max_steps=30", f"trainer.async_checkpoints={asynchronous}")
    cfg = train_config(store.path, tmp_path / "run", *options)
    undisturbed = train_config(store.path, tmp_path / "whole", *options)
    started = time.monotonic()
    launch(undisturbed, tmp_path / "log", **{SLOW_WRITER: "0.05"}).join()
    whole, half = run_dir(undisturbed) / "policy", (time.monotonic() - started) / 2
    draw, sent, codes = random.Random(0), 0, []
    while sent < 10:
        process = launch(cfg, tmp_path / "log", **{SLOW_WRITER: "0.05"})
        time.sleep(draw.uniform(0.3, max(half, 0.6)))
        if process.is_alive():
            os.kill(process.pid, draw.choice(SIGNALS))
            sent += 1
        process.join(60)
        codes.append(process.exitcode)
        assert newest_whole(run_dir(cfg))[1] == {} and not list((run_dir(cfg) / "checkpoints").glob(".step=*.partial"))
        assert codes[-1] in (0, AGAIN), (tmp_path / "log").read_text()
        if codes[-1] == 0:
            break
    policy = finish(cfg, tmp_path / "log")
    print(f"{sent} signals, codes {codes}")
    assert AGAIN in codes
    assert weights(policy) == weights(whole) and metrics(policy.parent) == metrics(whole.parent)


@pytest.mark.slow
def test_two_processes_stop_at_the_same_step_when_one_gets_the_signal(store, tmp_path):
    """The first of them alone, as from a shell; the other one hears of it after the step and leaves nothing behind."""
    options = ("trainer=ddp", "trainer.accelerator=cpu", "trainer.devices=2", "trainer.num_workers=0")
    options = (*options, "trainer.checkpoint_every=1000", "batch_size=4", "max_steps=400", "resume=auto")
    cfg = train_config(store.path, tmp_path / "run", *SMALL)
    process = command(*words(cfg), *options)
    runs = tmp_path / "run"
    wait_for(lambda: any(under_way(run) for run in runs.glob("*")), process)
    process.send_signal(signal.SIGUSR1)
    _, said = process.communicate(timeout=120)  # which ends when both have closed their end of the pipe
    assert process.returncode == AGAIN, said
    (run,) = runs.iterdir()
    newest, wrong = newest_whole(run)
    assert wrong == {} and step_of(newest) == len(metrics(run))
    assert saving.read_manifest(newest)["world_size"] == 2 and said.count("stopped by SIGUSR1;") == 1
