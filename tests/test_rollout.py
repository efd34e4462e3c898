"""Rollouts: every promise of envs/rollout.py held against a fake simulator that dies, hangs and lies on request."""

import json
import math
import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from fake_env import FakeEnv, alive, read, wait_for
from vla_eval.model_servers.base import SessionContext
from vla_eval.specs import check_specs

from envs.benchmark import ChunkBenchmark
from envs.pool import EpisodeSpec
from envs.records import COLUMNS, Records, load_records
from envs.rollout import run_rollouts
from envs.server import PolicyServer, device_of, observation_batch
from vla.errors import UserError

HERE = Path(__file__).parent
HEADER = {"checkpoint": "c" * 64, "config": "abc123", "benchmark": "fake"}
SESSION = SessionContext("session", "episode")


class Seeker:
    """Heads for the goal it reads in the state, position taken from the pixels; `fail_at` raises on that call."""

    chunk = 4

    def __init__(self, fail_at: int | None = None, error: Exception | None = None) -> None:
        self.fail_at, self.error = fail_at, error or ZeroDivisionError("attention went to zero")
        self.batches: list[int] = []
        self.seen: list[tuple[int, int]] = []

    def predict(self, observation: dict) -> torch.Tensor:
        self.batches.append(len(observation["instruction"]))
        self.seen += zip(observation["seed"].tolist(), observation["step"].tolist(), strict=True)
        if self.fail_at is not None and len(self.batches) >= self.fail_at:
            raise self.error
        image, state = observation["images"]["static"], observation["state"]
        assert image.dtype == torch.uint8 and image.shape[1:] == (3, 16, 16) and state.shape[1:] == (6,)
        gap = state[:, 3:] - (image[:, :, 0, 0].float() - 128) / 10
        actions = torch.zeros(len(state), self.chunk, 7)
        for i in range(self.chunk):
            actions[:, i, :3] = (gap / 0.1).clamp(-1, 1)
            gap = gap - 0.1 * actions[:, i, :3]
        return actions


@pytest.fixture(autouse=True)
def import_path(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", str(HERE))


def episodes(seeds, tasks=(0,)) -> list[EpisodeSpec]:
    return [EpisodeSpec("fake", f"task{task}", seed, {"task": task}) for task in tasks for seed in seeds]


def roll(tmp_path: Path, specs: list[EpisodeSpec], policy=None, out: str = "out", header=HEADER, **kwargs):
    env_kwargs = {"journal": str(tmp_path / f"{out}.journal"), **kwargs.pop("env_kwargs", {})}
    options = {"workers": 1, "execute_steps": 4, "episode_timeout_s": 30, "progress": False, **kwargs}
    return run_rollouts(
        policy or Seeker(),
        specs,
        tmp_path / out,
        env="fake_env:FakeEnv",
        env_kwargs=env_kwargs,
        header=header,
        **options,
    )


def outcome(folder: Path) -> list[tuple]:
    return list(
        load_records(folder)[["benchmark", "task", "seed", "success", "steps"]].itertuples(index=False, name=None)
    )


def direct(tmp_path: Path, spec: EpisodeSpec) -> tuple[bool, int]:
    """The independent source: the episode in this process, every step rendered, no harness."""
    env, policy = FakeEnv(str(tmp_path / "direct.journal"), **spec.kwargs), Seeker()
    observation, steps = env.reset(spec.seed), 0
    while True:
        image = {"static": torch.from_numpy(observation["images"]["static"]).permute(2, 0, 1)[None]}
        state = torch.from_numpy(observation["state"])[None]
        batch = {"images": image, "state": state, "instruction": [""], "seed": torch.zeros(1), "step": torch.zeros(1)}
        for action in policy.predict(batch)[0].numpy():
            success, steps = env.step(action), steps + 1
            if success or steps == env.max_steps:
                return success, steps
        observation = env.observe()


def test_records_equal_a_plain_loop(tmp_path):
    specs = episodes(range(6), tasks=(0, 1))
    result = roll(tmp_path, specs, workers=2)
    expected = [(s.benchmark, s.task, s.seed, *direct(tmp_path, s)) for s in specs]
    assert outcome(tmp_path / "out") == expected
    assert {row[3] for row in expected} == {True, False}
    successes = sum(row[3] for row in expected)
    summary = json.loads((tmp_path / "out/summary.json").read_text())
    assert summary == result.summary
    assert (summary["n"], summary["successes"], summary["missing"], summary["complete"]) == (12, successes, 0, True)
    assert summary["rate"] == successes / 12 and summary["interval"][0] < summary["rate"] < summary["interval"][1]
    assert [task["n"] for task in summary["per_task"]] == [6, 6]
    assert result.env_steps == sum(row[4] for row in expected) and result.failures == 0
    frame = load_records(tmp_path / "out")
    assert list(frame.columns) == list(COLUMNS)
    assert set(frame.renderer) == {"none"} and frame.versions[0] == {"fake": "1.0"} and set(frame.attempts) == {1}
    built = [e["task"] for e in read(tmp_path / "out.journal") if e["event"] == "built"]
    assert set(built) == {0, 1} and len(built) <= 3  # whoever is done first may take over the rest of the other's task

    roll(tmp_path, specs, out="alone", workers=1)
    assert outcome(tmp_path / "alone") == expected
    built = [e["task"] for e in read(tmp_path / "alone.journal") if e["event"] == "built"]
    assert sorted(built) == [0, 1], "a worker keeps its environment while the task stays"


@pytest.mark.parametrize("k", [1, 3, 4])
def test_frames_are_rendered_once_a_chunk(tmp_path, k):
    policy = Seeker()
    roll(tmp_path, episodes(range(4)), policy, execute_steps=k)
    ends = [e for e in read(tmp_path / "out.journal") if e["event"] == "end"]
    for row, end in zip(load_records(tmp_path / "out").itertuples(), ends, strict=True):
        asked = math.ceil(row.steps / k)
        # the first frame, one after each full chunk; the last chunk's only if success could still not be foreseen
        assert end["renders"] == asked + (row.success and row.steps % k == 0 and row.steps < 20)
        assert [step for seed, step in policy.seen if seed == row.seed] == [k * i for i in range(asked)]


def test_resume_runs_only_what_is_missing(tmp_path):
    journal = tmp_path / "out.journal"
    roll(tmp_path, episodes(range(3)))
    roll(tmp_path, episodes(range(5)), workers=2)
    assert sorted(e["seed"] for e in read(journal) if e["event"] == "reset") == [0, 1, 2, 3, 4]
    before = (tmp_path / "out/episodes.jsonl").read_bytes()
    result = roll(tmp_path, episodes(range(5)))
    assert result.finished == 0 and result.summary["n"] == 5
    assert (tmp_path / "out/episodes.jsonl").read_bytes() == before
    assert len(read(journal)) == sum(1 for e in read(journal) if e["event"] != "closed")


def test_torn_last_line_is_run_again(tmp_path):
    roll(tmp_path, episodes(range(3)))
    path = tmp_path / "out/episodes.jsonl"
    whole = outcome(tmp_path / "out")
    path.write_bytes(path.read_bytes()[:-20])
    assert len(load_records(tmp_path / "out")) == 2
    assert roll(tmp_path, episodes(range(3))).finished == 1
    assert outcome(tmp_path / "out") == whole

    path.write_text(path.read_text().replace('"success"', '"sucess"', 1))
    with pytest.raises(UserError, match=r"line 1: column 'success'"):
        load_records(tmp_path / "out")
    path.write_text("\0\0\n")
    with pytest.raises(UserError, match="line 1 is not JSON"):
        roll(tmp_path, episodes(range(3)))


@pytest.mark.parametrize("habit", ["kill", "hang", "raise", "nan"])
def test_a_failing_simulator_is_retried_with_the_same_seed(tmp_path, habit):
    roll(tmp_path, episodes(range(2, 5)), out="calm")
    env_kwargs = {"misbehave": {"3": habit}}
    result = roll(
        tmp_path, episodes(range(2, 5)), env_kwargs=env_kwargs, episode_timeout_s=6 if habit == "hang" else 30
    )
    assert outcome(tmp_path / "out") == outcome(tmp_path / "calm")
    assert list(load_records(tmp_path / "out").attempts) == [1, 2, 1] and result.failures == 1
    resets = [e for e in read(tmp_path / "out.journal") if e["event"] == "reset"]
    assert [e["seed"] for e in resets] == [2, 3, 3, 4]
    assert resets[1]["pid"] != resets[2]["pid"], "retried on a fresh worker"
    assert not alive({e["pid"] for e in resets})


def test_a_hopeless_episode_is_missing_not_failed(tmp_path):
    roll(tmp_path, episodes([0, 1, 2, 4]), out="calm")
    summary = roll(tmp_path, episodes(range(5)), env_kwargs={"misbehave": {"3": "always_kill"}}, retries=1).summary
    assert (summary["n"], summary["missing"], summary["complete"]) == (4, 1, False)
    assert outcome(tmp_path / "out") == outcome(tmp_path / "calm")
    calm = json.loads((tmp_path / "calm/summary.json").read_text())
    assert (summary["rate"], summary["interval"]) == (calm["rate"], calm["interval"])
    (episode,) = summary["missing_episodes"]
    assert episode["seed"] == 3 and "SIGKILL" in episode["reason"]
    assert sum(e["event"] == "reset" and e["seed"] == 3 for e in read(tmp_path / "out.journal")) == 2


def test_a_simulator_that_never_works_is_given_up(tmp_path):
    with pytest.raises(UserError, match=r"no episode finishes.*status 7.*cannot open display.*logs"):
        run_rollouts(
            Seeker(), episodes(range(9)), tmp_path, env="fake_env:broken", env_kwargs={}, workers=1, execute_steps=4,
            episode_timeout_s=30, header=HEADER, retries=0, progress=False,
        )  # fmt: skip
    with pytest.raises(UserError, match=r"cannot load the environment fake_env:Nope: AttributeError"):
        run_rollouts(
            Seeker(), episodes(range(9)), tmp_path, env="fake_env:Nope", env_kwargs={}, workers=1, execute_steps=4,
            episode_timeout_s=30, header=HEADER, progress=False,
        )  # fmt: skip
    assert not (tmp_path / "run.json").exists() and not (tmp_path / "episodes.jsonl").exists()


def test_a_policy_error_ends_the_run_and_keeps_the_records(tmp_path):
    with pytest.raises(RuntimeError, match="attention went to zero") as caught:
        roll(tmp_path, episodes(range(9)), Seeker(fail_at=8))
    assert isinstance(caught.value.__cause__, ZeroDivisionError)
    done = len(load_records(tmp_path / "out"))
    assert 0 < done < 9
    assert json.loads((tmp_path / "out/summary.json").read_text())["missing"] == 9 - done
    assert roll(tmp_path, episodes(range(9))).finished == 9 - done
    with pytest.raises(UserError, match=r"^no tokeniser$"):
        roll(tmp_path, episodes(range(9)), Seeker(fail_at=1, error=UserError("no tokeniser")), out="other")


@pytest.mark.parametrize("actions", [torch.full((1, 4, 7), torch.nan), torch.zeros(1, 3, 7)])
def test_a_policy_must_return_finite_chunks(actions):
    policy = Seeker()
    policy.predict = lambda observation: actions
    server = PolicyServer(policy, execute_steps=2)
    with pytest.raises(ValueError, match=r"finite actions of shape \(1, 4, 7\)"):
        server.predict(_wire(0), SESSION)
    assert isinstance(server.error, ValueError)


def test_bad_requests_are_refused_before_anything_is_written(tmp_path):
    for message, specs, kwargs in [
        ("no episodes", [], {}),
        (r"asked for twice", episodes([1, 1]), {}),
        (r"execute_steps=5 is not in 1\.\.4", episodes([0]), {"execute_steps": 5}),
        ("workers=0", episodes([0]), {"workers": 0}),
    ]:
        with pytest.raises(UserError, match=message):
            roll(tmp_path, specs, **kwargs)
    assert not (tmp_path / "out").exists()
    with pytest.raises(UserError, match=r"execute_steps=4 is longer than an episode of 'task0' \(3 control steps\)"):
        roll(tmp_path, episodes([0]), env_kwargs={"max_steps": 3})
    assert roll(tmp_path, episodes([0])).summary["n"] == 1, "a mistake does not spoil the folder"


def test_a_folder_holds_one_run(tmp_path):
    roll(tmp_path, episodes([0]))
    with pytest.raises(UserError, match=r"another run: checkpoint was \"ccc.*now \"ddd.*choose another"):
        roll(tmp_path, episodes([0, 1]), header={**HEADER, "checkpoint": "d" * 64})
    with pytest.raises(UserError, match="execute_steps was 4, now 2"):
        roll(tmp_path, episodes([0, 1]), execute_steps=2)
    (tmp_path / "out/run.json").unlink()
    with pytest.raises(UserError, match="nobody knows whose"):
        roll(tmp_path, episodes([0, 1]))
    assert len(load_records(tmp_path / "out")) == 1
    with pytest.raises(UserError, match="holds no episode records"):
        load_records(tmp_path)


def test_rows_of_two_renderers_are_not_mixed(tmp_path):
    roll(tmp_path, episodes([0]))
    row = json.loads((tmp_path / "out/episodes.jsonl").read_text())
    header = json.loads((tmp_path / "out/run.json").read_text())
    with Records(tmp_path / "out", header) as records, pytest.raises(UserError, match="renderer none, now it is egl"):
        records.append({**row, "seed": 1, "renderer": "egl"})


def test_two_evaluators_on_one_folder(tmp_path):
    with Records(tmp_path / "out", HEADER), pytest.raises(UserError, match="being written by another evaluation"):
        roll(tmp_path, episodes([0]))
    assert roll(tmp_path, episodes([0])).summary["complete"]


def test_exact_asks_the_policy_row_by_row_and_batches_otherwise(tmp_path):
    policy = Seeker()
    roll(tmp_path, episodes(range(4)), policy, workers=2)
    assert set(policy.batches) == {1}

    policy = Seeker()
    server = PolicyServer(policy, execute_steps=3, max_batch=8, exact=False)
    alone = [server.predict(_wire(seed), SESSION)["actions"] for seed in range(3)]
    together = server.predict_batch([_wire(seed) for seed in range(3)], [SESSION] * 3)
    assert policy.batches == [1, 1, 1, 3] and server.max_batch_size == 8
    for one, row in zip(alone, together, strict=True):
        assert one.shape == (3, 7)
        np.testing.assert_allclose(row["actions"], one, atol=1e-6)
    roll(tmp_path, episodes(range(4)), out="stacked", workers=2, exact=False)
    assert outcome(tmp_path / "stacked") == outcome(tmp_path / "out")


def test_videos_show_every_step_and_change_nothing(tmp_path):
    av = pytest.importorskip("av")
    roll(tmp_path, episodes(range(2)), out="plain")
    roll(tmp_path, episodes(range(2)), videos=1)
    assert outcome(tmp_path / "out") == outcome(tmp_path / "plain")
    row = load_records(tmp_path / "out").iloc[0]
    (film,) = (tmp_path / "out/videos").iterdir()
    assert film.name == f"task0_seed0_{'success' if row.success else 'failure'}.mp4"
    with av.open(str(film)) as container:
        stream = container.streams.video[0]
        assert (stream.codec_context.name, stream.average_rate) == ("h264", 20)
        assert sum(1 for _ in container.decode(stream)) == row.steps + 1


def test_a_filmed_environment_is_asked_once_a_step(tmp_path):
    """A scripted expert's environment goes on each time that it is asked."""
    env, asked = FakeEnv(str(tmp_path / "journal")), []
    benchmark, observe = ChunkBenchmark(env, film=True), env.observe
    env.observe = lambda: asked.append(env.steps) or observe()
    first = benchmark.reset({"seed": 0})
    seen = [benchmark.step({"actions": np.zeros((2, 7))}) for _ in range(2)]
    assert asked == [0, 1, 2, 3, 4] and len(benchmark.frames) == 5
    np.testing.assert_array_equal(seen[-1].obs["images"]["static"], first["images"]["static"])


def test_the_worker_needs_no_torch():
    code = "import sys, envs.worker; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=HERE.parent, check=False).returncode == 0


def test_specs_of_server_and_benchmark_agree(tmp_path):
    server, benchmark = PolicyServer(Seeker(), 4), ChunkBenchmark(FakeEnv(str(tmp_path / "journal")))
    specs = [side.get_action_spec() for side in (server, benchmark)]
    assert check_specs(*specs, server.get_observation_spec(), benchmark.get_observation_spec()) == []


@pytest.mark.parametrize("blow", [signal.SIGKILL, signal.SIGINT])
def test_an_ended_parent_leaves_no_workers_and_its_records(tmp_path, blow):
    script = (
        "from test_rollout import *\n"
        "signal.signal(signal.SIGINT, signal.default_int_handler)\n"  # a background shell has it ignored
        f"roll(Path({str(tmp_path)!r}), episodes(range(15)), workers=2, env_kwargs={{'step_seconds': 0.03}})"
    )
    environment = {**os.environ, "PYTHONPATH": f"{HERE.parent}{os.pathsep}{HERE}"}
    parent = subprocess.Popen([sys.executable, "-c", script], env=environment, stderr=subprocess.DEVNULL)
    records = tmp_path / "out/episodes.jsonl"
    wait_for(lambda: records.exists() and records.read_text().count("\n") >= 2 and len(_pids(tmp_path)) == 2, 120)
    parent.send_signal(blow)
    parent.wait(20)
    wait_for(lambda: not alive(_pids(tmp_path)))
    kept = len(load_records(tmp_path / "out"))
    assert 2 <= kept < 15
    assert not json.loads((tmp_path / "out/summary.json").read_text())["complete"]
    result = roll(tmp_path, episodes(range(15)), workers=2, env_kwargs={"step_seconds": 0.03})
    assert (result.finished, result.summary["complete"]) == (15 - kept, True)


def _wire(seed: int) -> dict:
    image = np.full((16, 16, 3), 100 + seed, np.uint8)
    state = np.random.default_rng(seed).normal(size=6).astype(np.float32)
    return {"images": {"static": image}, "state": state, "task_description": "go", "seed": seed, "step": 0}


def _pids(tmp_path: Path) -> set[int]:
    return {event["pid"] for event in read(tmp_path / "out.journal")}


def test_observations_go_where_the_weights_are():
    """A policy on a GPU is asked with tensors there; "meta" stands in for one."""
    policy = torch.nn.Linear(2, 2, device="meta")
    observation = {"images": {"static": np.zeros((4, 4, 3), np.uint8)}, "state": np.zeros(3), "task_description": "x"}
    batch = observation_batch([observation], [0], device_of(policy))
    assert batch["images"]["static"].device.type == batch["state"].device.type == "meta"
    assert batch["images"]["static"].shape == (1, 3, 4, 4) and batch["seed"].device.type == "cpu"
    assert device_of(object()).type == "cpu"
