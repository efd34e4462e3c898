"""Simulators started before the policy is read: the same records, sooner, and nothing left behind."""

from __future__ import annotations

import time
from pathlib import Path
from types import SimpleNamespace

import pytest
from fake_env import alive, read, wait_for
from test_rollout import episodes, outcome, roll

from envs import early
from vla.errors import UserError

CONFIG = {"about": {"image_rotation": "upright"}, "arguments": {"cameras": ["static"]}}
SPECS = episodes(range(3), tasks=(0, 1))


@pytest.fixture(autouse=True)
def import_path(monkeypatch):
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parent))


@pytest.fixture
def started(monkeypatch, tmp_path):
    """early_workers(two workers) of the fake simulator, whose arguments or factory a test may change."""

    def start(config=CONFIG, factory="fake_env:FakeEnv", **kwargs):
        known = []

        def simulator(cfg, policy, about):
            known.append((policy.cameras, about))
            return factory, {"journal": str(tmp_path / "out.journal"), **kwargs}, SPECS

        monkeypatch.setattr(early, "simulator", simulator)
        monkeypatch.setattr(early, "interpreter", lambda cfg: None)
        cfg = SimpleNamespace(evaluation=SimpleNamespace(workers=2))
        start.known = known
        return early.early_workers(cfg, config)

    return start


def built(tmp_path) -> list[dict]:
    return [event for event in read(tmp_path / "out.journal") if event["event"] == "built"]


def test_environments_are_built_before_there_is_a_policy_and_used(tmp_path, started):
    with started() as workers:
        wait_for(lambda: len(built(tmp_path)) == 2, 60)
        assert started.known == [(["static"], {"image_rotation": "upright"})]
        result = roll(tmp_path, SPECS, workers=2, early=workers)
    assert {event["task"] for event in built(tmp_path)} == {0, 1}  # a task each
    assert {event["pid"] for event in read(tmp_path / "out.journal")} == {w.process.pid for w in workers}
    assert result.finished == 6 and result.failures == 0
    roll(tmp_path, SPECS, workers=2, out="late")
    assert outcome(tmp_path / "out") == outcome(tmp_path / "late")
    assert "chatter on stdout" in (tmp_path / "out/logs/worker_0.log").read_text()


def test_a_wrong_guess_costs_time_and_nothing_else(tmp_path, started):
    with started(max_steps=7) as workers:
        wait_for(lambda: len(built(tmp_path)) == 2, 60)
        guessed = built(tmp_path)
        roll(tmp_path, SPECS, workers=2, early=workers)
    # Built again by whoever got an episode; a worker that was quick took over what the other had not begun.
    assert len(guessed) == 2 and built(tmp_path)[:2] == guessed and len(built(tmp_path)) > 2
    roll(tmp_path, SPECS, workers=2, out="late")
    assert outcome(tmp_path / "out") == outcome(tmp_path / "late")


def test_what_nobody_asked_for_is_ended(tmp_path, started):
    with pytest.raises(UserError, match="no such weights"), started() as workers:
        wait_for(lambda: len(built(tmp_path)) == 2, 60)
        raise UserError("no such weights")
    wait_for(lambda: not alive({worker.process.pid for worker in workers}))
    assert not (tmp_path / "out").exists()


def test_an_environment_that_does_not_build_is_told_as_ever(tmp_path, started):
    with started(colour="blue") as workers, pytest.raises(UserError) as told:
        time.sleep(0.1)
        roll(tmp_path, SPECS, workers=2, early=workers, env_kwargs={"colour": "blue"})
    with pytest.raises(UserError) as plain:
        roll(tmp_path, SPECS, workers=2, out="late", env_kwargs={"colour": "blue"})
    assert "colour" in str(told.value) and str(told.value) == str(plain.value).replace("late", "out")
    assert "colour" in (tmp_path / "out/logs/worker_0.log").read_text()


def test_a_simulator_that_dies_while_it_is_built_is_replaced(tmp_path, started):
    with started(factory="fake_env:broken") as workers:
        for worker in workers:
            worker.process.wait(60)
        result = roll(tmp_path, SPECS, workers=2, early=workers)
        assert "cannot open display" in (tmp_path / "out/logs/worker_0.log").read_text()
    assert result.finished == 6 and result.failures == 2


@pytest.mark.parametrize(
    "config", [None, {"format": 1, "baseline": "vlm4vla", "arguments": {}}, {"arguments": {"cameras": []}}]
)
def test_without_a_description_nothing_starts(config, started):
    with started(config) as workers:
        assert workers == []
    assert started.known == []
