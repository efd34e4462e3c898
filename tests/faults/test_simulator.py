"""A simulator that dies, hangs or lies costs an attempt, never the success rate (others: tests/test_rollout.py)."""

import json
import os
import signal
import time

import pytest
from evaluating import PATHS, missing, pids, roll, seeds_reset, slow, start
from fake_env import alive, read, wait_for
from test_rollout import outcome

pytestmark = pytest.mark.xdist_group("evaluating")


@pytest.fixture(autouse=True)
def import_path(monkeypatch):
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(PATHS))


@pytest.mark.parametrize("habit", ["segfault", "small", *slow("native_hang", "float", "gray", "state")])
def test_retried_on_a_fresh_worker_with_the_same_seed(tmp_path, habit):
    roll(tmp_path, 3, out="calm")
    (tmp_path / "journal").unlink()
    timeout = {"episode_timeout_s": 6} if habit == "native_hang" else {}
    result = roll(tmp_path, 3, env_kwargs={"misbehave": {"1": habit}}, **timeout)
    assert outcome(tmp_path / "out") == outcome(tmp_path / "calm")
    assert result.failures == 1 and result.summary["complete"]
    resets = [event for event in read(tmp_path / "journal") if event["event"] == "reset"]
    assert [event["seed"] for event in resets] == [0, 1, 1, 0]
    assert resets[1]["pid"] != resets[2]["pid"] and not alive(pids(tmp_path))


@pytest.mark.parametrize(
    ("habit", "told"), [("segfault", "SIGSEGV"), *slow(("small", "has the shapes"), ("gray", "uint8"))]
)
def test_after_the_retries_an_episode_is_missing_not_failed(tmp_path, habit, told):
    roll(tmp_path, 8, out="calm")
    summary = roll(tmp_path, 8, env_kwargs={"misbehave": {"3": f"always_{habit}"}}, retries=1).summary
    assert (summary["n"], summary["missing"], summary["complete"]) == (6, 2, False)
    kept = [row for row in outcome(tmp_path / "calm") if row[2] != 3]
    assert outcome(tmp_path / "out") == kept and {row[3] for row in kept} == {True, False}
    assert summary["rate"] == sum(row[3] for row in kept) / 6
    assert [episode["seed"] for episode in missing(tmp_path / "out")] == [3, 3]
    assert all(told in episode["reason"] for episode in missing(tmp_path / "out"))
    again = roll(tmp_path, 8, env_kwargs={"misbehave": {"3": f"always_{habit}"}}, retries=0)
    assert again.finished == 0 and again.failures == 2, "asked again, it tries what is missing and nothing else"


def test_a_slow_step_below_the_watchdog_passes(tmp_path):
    result = roll(tmp_path, 1, env_kwargs={"misbehave": {"0": "slow"}}, episode_timeout_s=20)
    row = json.loads((tmp_path / "out/episodes.jsonl").read_text())
    assert result.failures == 0 and row["attempts"] == 1 and row["seconds"] > 3


@pytest.mark.parametrize("blow", [signal.SIGKILL, *slow(signal.SIGTERM)])
def test_no_simulator_outlives_its_evaluation_not_even_one_that_hangs_in_c(tmp_path, blow):
    process = start(tmp_path, 8, workers=2, env_kwargs={"misbehave": {"1": "native_hang"}})
    records = tmp_path / "out/episodes.jsonl"
    wait_for(lambda: records.exists() and len(seeds_reset(tmp_path)) == 4)
    time.sleep(0.5)  # both are in their sleep by now
    simulators = pids(tmp_path)
    assert len(alive(simulators)) == 2
    os.kill(process.pid, blow)
    process.join(20)
    assert process.exitcode == (75 if blow == signal.SIGTERM else -signal.SIGKILL)
    wait_for(lambda: not alive(simulators), 30)
    assert records.read_text().count("\n") >= 1
