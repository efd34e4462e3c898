"""Shards of an evaluation: merged, they leave what one job leaves; apart, killed or repeated, nothing is lost."""

import fcntl
import os
import re
import shutil

import pytest
from evaluating import PATHS, files, pids, roll, seeds_reset, start
from fake_env import alive, wait_for

import envs.episodes
import envs.shards
from envs.records import Records
from envs.shards import Shard, shard_of
from evaluate import evaluate
from vla.cli import CONF, compose_config
from vla.errors import UserError
from vla.experiment import expand
from vla.files import lock
from vla.plan import jobs

pytestmark = pytest.mark.xdist_group("evaluating")


@pytest.fixture(autouse=True)
def import_path(monkeypatch):
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(PATHS))
    monkeypatch.setattr(envs.shards, "PATIENCE_S", 0.3)


@pytest.fixture(scope="module")
def calm(tmp_path_factory):
    """Seven episodes in one job."""
    folder = tmp_path_factory.mktemp("calm")
    before = os.environ.get("PYTHONPATH", "")
    os.environ["PYTHONPATH"] = os.pathsep.join(PATHS)
    roll(folder, 7, workers=2)
    os.environ["PYTHONPATH"] = before
    return folder / "out"


def same(one, other) -> None:
    """Equal but for the place of the journal, which the header holds."""
    one, other = files(one), files(other)
    journal = rb'"journal": "[^"]*"'
    assert (one.rows, one.summary) == (other.rows, other.summary)
    assert re.sub(journal, b"", one.header) == re.sub(journal, b"", other.header)


def test_the_last_shard_leaves_what_one_job_leaves(tmp_path, calm):
    results = [roll(tmp_path, 7, shard=Shard(index, 3)) for index in (2, 0, 1)]
    assert [result.whole for result in results] == [False, False, True]
    assert [result.finished for result in results] == [2, 3, 2]
    same(tmp_path / "out", calm)
    assert not (tmp_path / "out/shards").exists()
    assert len(seeds_reset(tmp_path)) == 7, "each episode was run once"
    again = roll(tmp_path, 7, shard=Shard(0, 3))
    assert again.finished == 0 and roll(tmp_path, 7).finished == 0
    same(tmp_path / "out", calm)


@pytest.mark.slow
def test_shards_that_end_together_are_merged_once(tmp_path, calm):
    processes = [start(tmp_path, 7, shard=Shard(index, 2)) for index in range(2)]
    for process in processes:
        process.join(60)
    assert [process.exitcode for process in processes] == [0, 0]
    same(tmp_path / "out", calm)
    assert not (tmp_path / "out/shards").exists() and len(seeds_reset(tmp_path)) == 7


def test_what_an_incomplete_array_has_left_is_taken_up(tmp_path, calm):
    roll(tmp_path, 7, shard=Shard(1, 4))
    killed = start(tmp_path, 7, shard=Shard(0, 4))
    rows = tmp_path / "out/shards/0-of-4/shard.jsonl"
    wait_for(rows.exists)
    killed.kill()
    killed.join()
    wait_for(lambda: not alive(pids(tmp_path)), 30)
    left = 7 - 2 - rows.read_text().count("\n")
    first = roll(tmp_path, 7, shard=Shard(0, 2))
    assert first.finished == (left + 1) // 2 and not first.whole
    last = roll(tmp_path, 7)
    assert last.finished == left // 2 and last.summary["complete"]
    same(tmp_path / "out", calm)
    assert not (tmp_path / "out/shards").exists()


def test_an_episode_that_cannot_be_run_is_missing_in_the_whole_too(tmp_path):
    habits = {"env_kwargs": {"misbehave": {"3": "always_kill"}}, "retries": 0}
    roll(tmp_path, 7, out="one", **habits)
    results = [roll(tmp_path, 7, out="two", shard=Shard(index, 2), **habits) for index in range(2)]
    assert [result.whole for result in results] == [False, True] and results[1].summary["missing"] == 1
    same(tmp_path / "two", tmp_path / "one")


def test_two_jobs_with_one_number_and_jobs_without_one_exclude_each_other(tmp_path):
    roll(tmp_path, 4, shard=Shard(0, 2))
    header = (tmp_path / "out/shards/0-of-2/run.json").read_text()
    with lock(tmp_path / "out", fcntl.LOCK_SH), lock(tmp_path / "out/shards/0-of-2", fcntl.LOCK_EX):  # as at work
        with pytest.raises(UserError, match=r"shards/0-of-2 is being written by another evaluation; wait"):
            roll(tmp_path, 4, shard=Shard(0, 2))
        with pytest.raises(UserError, match="out is being written by another evaluation; wait"):
            roll(tmp_path, 4)
        with pytest.raises(UserError, match="shards/0-of-2 is being written by an array of another length"):
            roll(tmp_path, 4, shard=Shard(0, 3))
    with Records(tmp_path / "out", {}), pytest.raises(UserError, match="out is being written by another"):
        roll(tmp_path, 4, shard=Shard(1, 2))
    assert (tmp_path / "out/shards/0-of-2/run.json").read_text() == header
    assert roll(tmp_path, 4, shard=Shard(1, 2)).summary["complete"]


def test_killed_within_the_merge(tmp_path, calm, monkeypatch):
    """The rows are in the run's file and still in the shards' folders, of which one is half removed."""
    roll(tmp_path, 7, shard=Shard(0, 2))
    real = shutil.rmtree

    def dies(folder):
        (folder / "run.json").unlink()
        raise KeyboardInterrupt

    monkeypatch.setattr(shutil, "rmtree", dies)
    with pytest.raises(KeyboardInterrupt):
        roll(tmp_path, 7, shard=Shard(1, 2))
    monkeypatch.setattr(shutil, "rmtree", real)
    assert (tmp_path / "out/shards/0-of-2").exists()
    assert roll(tmp_path, 7).finished == 0
    same(tmp_path / "out", calm)
    assert not (tmp_path / "out/shards").exists()


def test_shares_that_cannot_be():
    assert shard_of(None, None) is None and str(shard_of(1, 2)) == "1-of-2"
    for index, count in ((0, None), (None, 4), (4, 4), (-1, 4), (0, 0)):
        with pytest.raises(UserError, match=r"is no share; give both, shard from 0 to shards - 1"):
            shard_of(index, count)


def test_evaluate_shards_into_the_folder_of_the_whole(tmp_path, monkeypatch, capsys):
    arguments = {"journal": str(tmp_path / "journal")}
    specs = [envs.episodes.EpisodeSpec("fake", "task0", seed, {"task": 0}) for seed in range(3)]
    monkeypatch.setattr(envs.episodes, "simulator", lambda *_: ("fake_env:FakeEnv", arguments, specs))
    common = ("policy=nothing", f"results_root={tmp_path}/results", "evaluation.workers=1")
    evaluate(compose_config("evaluate", *common, "shard=0", "shards=2"))
    assert "nothing, shard 0 of 2, others to come: " in capsys.readouterr().out
    summary = evaluate(compose_config("evaluate", *common, "shard=1", "shards=2"))
    assert summary["n"] == 3 and "nothing: 0/3 = 0.00" in capsys.readouterr().out
    assert evaluate(compose_config("evaluate", *common)) == summary
    (folder,) = (tmp_path / "results/libero_goal").iterdir()
    assert (folder / "episodes.jsonl").read_text().count("\n") == 3
    with pytest.raises(UserError, match="evaluation=latency cannot be cut"):
        evaluate(compose_config("evaluate", "policy=x", "evaluation=latency", "shard=0", "shards=2"))
    with pytest.raises(UserError, match="shard=2 shards=2 is no share"):
        evaluate(compose_config("evaluate", *common, "shard=2", "shards=2"))


def test_an_experiment_is_sharded_row_by_row():
    whole = jobs(expand("evaluate", ["-m", "experiment=idl_table6"], CONF))
    sharded = jobs(expand("evaluate", ["-m", "experiment=idl_table6", "shard=0,1", "shards=2"], CONF))
    assert len(sharded) == 2 * len(whole) > 2
    found = {tuple(sorted(word for word in job if not word.startswith("shard"))) for job in sharded}
    assert found == {tuple(sorted(job)) for job in whole}
    assert all("shards=2" in job for job in sharded)
    assert {word for job in sharded for word in job if word.startswith("shard=")} == {"shard=0", "shard=1"}
