"""LeRobot v3: what is written is read back, others' data sets are read as they are, damage is a one-line error.

pytest tests/test_lerobot.py
"""

from __future__ import annotations

import json
import pickle
import subprocess
import sys
import tempfile
from dataclasses import replace
from pathlib import Path

import h5py
import numpy as np
import pandas as pd
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data import lerobot_writer
from data.episode import Window
from data.lerobot import Reading, lerobot_parts, read_lerobot
from data.lerobot_writer import write_lerobot
from data.libero import read_libero
from data.source import open_source
from tests.lerobot_files import episode, hub_like, parts_of
from tests.test_libero_data import write_demos
from tests.test_video import numbered, numbers_in
from vla.cli import compose_config
from vla.errors import UserError

SIZES = {"static": (6, 8), "wrist": (5, 3)}
LIBERO = Reading(gripper="libero", orientation="rotate180")


def same(read, written, window=None) -> None:
    """Everything of an episode that LeRobot holds, to the last bit."""
    assert (read.instruction, read.task, read.windows) == (written.instruction, written.task, None)
    part = "" if window is None else f":{window.start}-{window.start + window.length}"
    assert read.source == written.source + part
    assert (read.state.dtype, read.actions.dtype) == (np.float32, np.float32)
    np.testing.assert_array_equal(read.state, written.state)
    np.testing.assert_array_equal(read.actions, written.actions)
    assert list(read.frames) == list(written.frames)
    for camera, pixels in written.frames.items():
        np.testing.assert_array_equal(read.frames[camera], pixels)


@st.composite
def many_episodes(draw):
    cameras = draw(st.sampled_from([("static",), ("wrist",), ("static", "wrist")]))
    sizes = {camera: (draw(st.integers(1, 7)), draw(st.integers(1, 7))) for camera in cameras}
    made = []
    for seed, steps in enumerate(draw(st.lists(st.integers(1, 9), min_size=1, max_size=4))):
        windows = None
        if draw(st.booleans()):  # CALVIN: windows overlap, and leave steps out
            starts = draw(st.lists(st.integers(0, steps - 1), min_size=1, max_size=3))
            lengths = [draw(st.integers(1, steps - start)) for start in starts]
            bounds = enumerate(zip(starts, lengths, strict=True))
            windows = tuple(Window(f"do {i}", f"t{i}", start, length) for i, (start, length) in bounds)
        made.append(episode(seed, steps, sizes, windows))
    return made


@settings(max_examples=25)
@given(made=many_episodes(), gripper=st.sampled_from(["libero", "open1", "closed1"]), files=st.booleans())
def test_round_trip_of_images_is_exact(made, gripper, files):
    with tempfile.TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as patch:
        if files:
            patch.setattr(lerobot_writer, "DATA_MEGABYTES", 0)  # a new file for each episode
            patch.setattr(lerobot_writer, "FILES_OF_CHUNK", 2)
        out = Path(folder) / "out"
        write_lerobot(made, out, 20, video=False, gripper=gripper)
        read = list(read_lerobot(out, tuple(made[0].frames)))
        wanted = [(e, w, part) for e in made for w, part in parts_of(e)]
        assert len(read) == len(wanted) == json.loads((out / "meta/info.json").read_text())["total_episodes"]
        for found, (whole, window, part) in zip(read, wanted, strict=True):
            same(found, part, None if whole.windows is None else window)
        if files:
            assert sorted(f.name for f in out.glob("data/*/*"))[-1] in ("file-000.parquet", "file-001.parquet")
            assert len(list(out.glob("data/*/*"))) == len(read)


@settings(max_examples=10)
@given(lengths=st.lists(st.integers(1, 25), min_size=1, max_size=5), split=st.booleans())
def test_films_keep_every_frame_in_its_place(lengths, split):
    """Frames carry their number; several episodes lie in one film, or (split) each begins another."""
    starts = np.cumsum([0, *lengths])
    made = []
    for index, (start, steps) in enumerate(zip(starts, lengths, strict=False)):
        numbers = range(start, start + steps)
        frames = {"static": numbered(numbers), "wrist": numbered([200 - n for n in numbers])}
        made.append(replace(episode(index, steps, SIZES), frames=frames))
    with tempfile.TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as patch:
        if split:
            patch.setattr(lerobot_writer, "VIDEO_MEGABYTES", -1)
        out = Path(folder) / "out"
        write_lerobot(made, out, 20)
        assert len(list(out.glob("videos/*/*/*.mp4"))) == 2 * (len(lengths) if split else 1)
        for found, wanted in zip(read_lerobot(out, ("static", "wrist")), made, strict=True):
            assert numbers_in(found.frames["static"]) == numbers_in(wanted.frames["static"])
            assert numbers_in(found.frames["wrist"]) == [200 - n for n in numbers_in(wanted.frames["static"])]
            for camera, pixels in wanted.frames.items():
                assert np.abs(found.frames[camera].astype(int) - pixels).mean() < 1.5
            same(replace(found, frames={}), replace(wanted, frames={}))


def test_files_are_as_lerobot_describes_them(tmp_path):
    """Against pandas and numpy: what stands in which file under which name, and the statistics."""
    made = [episode(seed, steps, SIZES) for seed, steps in enumerate((5, 3, 130))]
    write_lerobot(made, tmp_path / "out", 20, video=False, gripper="libero", orientation="rotate180")
    info = json.loads((tmp_path / "out/meta/info.json").read_text())
    assert (info["codebase_version"], info["fps"], info["splits"]) == ("v3.0", 20, {"train": "0:3"})
    assert (info["total_frames"], info["total_tasks"], info["video_path"]) == (138, 2, None)
    assert info["features"]["observation.images.wrist"]["shape"] == [5, 3, 3]
    tasks = pd.read_parquet(tmp_path / "out/meta/tasks.parquet")
    assert tasks["task_index"].to_dict() == {"put it on plate 0": 0, "put it on plate 1": 1}
    data = pd.read_parquet(tmp_path / "out" / info["data_path"].format(chunk_index=0, file_index=0))
    assert set(data.columns) == set(info["features"]) and data["index"].tolist() == list(range(138))
    assert data["episode_index"].tolist() == [0] * 5 + [1] * 3 + [2] * 130
    assert data["task_index"].tolist() == [0] * 5 + [1] * 3 + [0] * 130
    np.testing.assert_allclose(data["timestamp"], np.concatenate([np.arange(n) / 20 for n in (5, 3, 130)]), rtol=1e-6)
    actions = np.concatenate([e.actions for e in made])
    np.testing.assert_array_equal(np.stack(data["action"])[:, 6], 1 - 2 * actions[:, 6])  # -1 open, +1 closed
    assert pq.ParquetFile(tmp_path / "out/data/chunk-000/file-000.parquet").num_row_groups == 3
    rows = pd.read_parquet(tmp_path / "out/meta/episodes/chunk-000/file-000.parquet")
    assert rows["dataset_from_index"].tolist() == [0, 5, 8] and rows["dataset_to_index"].tolist() == [5, 8, 138]
    assert rows["tasks"].map(list).tolist() == [[made[i].instruction] for i in range(3)]
    stats = json.loads((tmp_path / "out/meta/stats.json").read_text())
    states = np.concatenate([e.state for e in made]).astype(np.float64)
    np.testing.assert_allclose(stats["observation.state"]["q10"], np.quantile(states, 0.1, axis=0))
    np.testing.assert_allclose(stats["observation.state"]["std"], states.std(0))
    np.testing.assert_allclose(rows["stats/observation.state/mean"][1], made[1].state.mean(0), rtol=1e-6)
    pixels = made[1].frames["wrist"] / 255
    of_pixels = {"mean": pixels.mean((0, 1, 2)), "std": pixels.std((0, 1, 2)), "max": pixels.max((0, 1, 2))}
    for name, value in of_pixels.items():
        found = np.array([channel[0][0] for channel in rows[f"stats/observation.images.wrist/{name}"][1]])
        np.testing.assert_allclose(found, value)
    assert stats["observation.images.static"]["count"] == [5 + 3 + 100] and stats["index"]["max"] == [137.0]


@pytest.mark.parametrize("bytes_inside", [True, False])
def test_a_data_set_of_the_hub(tmp_path, bytes_inside):
    """Read against the arrays it was made of; image2 is the wrist camera, -1 is open."""
    content = hub_like(tmp_path, bytes_inside=bytes_inside)
    read = list(read_lerobot(tmp_path, ("static", "wrist"), LIBERO, "rotate180"))
    assert [len(e.actions) for e in read] == [4, 3, 5]
    assert [(e.instruction, e.task) for e in read] == [("task 0", "task_0"), ("task 1", "task_1"), ("task 0", "task_0")]
    actions = np.concatenate([e.actions for e in read])
    np.testing.assert_array_equal(actions[:, :6], content["action"][:, :6])
    np.testing.assert_array_equal(actions[:, 6], content["action"][:, 6] == -1)
    np.testing.assert_array_equal(np.concatenate([e.state for e in read]), content["observation.state"])
    for camera, name in (("static", "observation.images.image"), ("wrist", "observation.images.image2")):
        np.testing.assert_array_equal(np.concatenate([e.frames[camera] for e in read]), content[name])
    swapped = Reading("libero", "rotate180", {"static": "observation.images.image2"})
    (first, *_) = read_lerobot(tmp_path, ("static",), swapped, "rotate180")
    np.testing.assert_array_equal(first.frames["static"], content["observation.images.image2"][:4])
    assert [e.source for e in read_lerobot(tmp_path, (), LIBERO, instructions=("task 1",))] == [
        f"{tmp_path.name}:episode_1"
    ]


def test_orientation_against_flips(tmp_path):
    raw = hub_like(tmp_path)["observation.images.image"][:4]
    turned, flipped, mirrored = raw[:, ::-1, ::-1], raw[:, ::-1], raw[:, :, ::-1]
    for stored, wanted, expected in (
        ("raw", "rotate180", turned), ("raw", "upright", flipped), ("raw", None, raw), ("upright", "upright", raw),
        ("rotate180", "upright", mirrored), ("upright", "rotate180", mirrored),
    ):  # fmt: skip
        first = next(read_lerobot(tmp_path, ("static",), Reading("libero", stored), wanted))
        np.testing.assert_array_equal(first.frames["static"], expected)


def test_instructions_that_change_within_an_episode_are_windows(tmp_path):
    hub_like(tmp_path, lengths=(5,))
    file = tmp_path / "data/chunk-000/file-000.parquet"
    pd.read_parquet(file).assign(task_index=[0, 0, 1, 1, 0]).to_parquet(file)
    (read,) = read_lerobot(tmp_path, (), LIBERO)
    assert [(w.instruction, w.start, w.length) for w in read.windows] == [
        ("task 0", 0, 2), ("task 1", 2, 2), ("task 0", 4, 1),
    ]  # fmt: skip


def test_nothing_is_guessed_of_gripper_and_orientation(tmp_path):
    hub_like(tmp_path / "hub")
    with pytest.raises(UserError, match=r"its gripper and orientation .*=libero\|open1\|closed1 orientation=raw"):
        lerobot_parts(tmp_path / "hub", ("static",), None, "rotate180")
    for reading, message in (
        (Reading("open1", "raw"), r"episode 0: the gripper is -1 at step \d.*is it gripper=libero"),
        (Reading("sideways", "raw"), "unknown gripper 'sideways'"),
        (Reading("libero", "tilted"), "unknown orientation 'tilted'"),
    ):
        with pytest.raises(UserError, match=message):
            list(read_lerobot(tmp_path / "hub", ("static",), reading, "rotate180"))
    made = [replace(episode(0, 4, SIZES), actions=np.eye(4, 7, 3, np.float32))]
    write_lerobot(made, tmp_path / "ours", 20, video=False, gripper="open1", orientation="rotate180")
    for reading in (Reading("libero"), Reading(None, "raw")):
        with pytest.raises(UserError, match=r"its info\.json says .* leave .*= out"):
            lerobot_parts(tmp_path / "ours", ("static",), reading, "rotate180")
    info = json.loads((tmp_path / "ours/meta/info.json").read_text())
    del info["features"]["action"]["info"]
    (tmp_path / "ours/meta/info.json").write_text(json.dumps(info))
    with pytest.raises(UserError, match="the gripper is 0 at step 0, gripper=libero means"):
        list(read_lerobot(tmp_path / "ours", (), Reading("libero")))


def test_a_demonstration_through_hdf5_and_through_lerobot(tmp_path):
    """One HDF5 file of LIBERO's, written as LeRobot and read back, equals what its own reader gives."""
    path = write_demos(tmp_path / "put_the_bowl_on_the_plate_demo.hdf5")
    direct = list(read_libero(path, ("static", "wrist")))
    write_lerobot(direct, tmp_path / "out", 20, video=False, gripper="libero", orientation="rotate180")
    for found, wanted in zip(
        read_lerobot(tmp_path / "out", ("static", "wrist"), image_rotation="rotate180"), direct, strict=True
    ):
        same(found, wanted)
    data = pd.read_parquet(tmp_path / "out/data/chunk-000/file-000.parquet")
    with h5py.File(path) as file:  # the gripper as LIBERO has it, obs[t] beside actions[t + 1]
        np.testing.assert_array_equal(np.stack(data["action"])[:4], file["data/demo_0/actions"][1:].astype(np.float32))


def source(folder, *overrides):
    cfg = compose_config("convert", f"data.path={folder}", *overrides)
    return open_source(cfg.benchmark, cfg.data, pairing=cfg.pairing)


def test_a_folder_becomes_a_store_in_one_process_or_two(tmp_path, monkeypatch):
    monkeypatch.setenv("VLA_DATA", str(tmp_path / "one"))
    monkeypatch.setattr(lerobot_writer, "DATA_MEGABYTES", 0)
    made = [episode(seed, 4 + seed, SIZES) for seed in range(3)]
    write_lerobot(made, tmp_path / "set", 20, video=True, gripper="libero", orientation="rotate180")
    units = lerobot_parts(tmp_path / "set", ("static",), image_rotation="rotate180")
    assert len(units) == len({unit.name for unit in units}) == 3 and pickle.loads(pickle.dumps(units)) == units
    store = source(tmp_path / "set")
    np.testing.assert_array_equal(store.actions, np.concatenate([e.actions for e in made]))
    assert store.meta.reader["image_rotation"] == "rotate180" and set(store.meta.cameras) == {"static", "wrist"}
    monkeypatch.setenv("VLA_DATA", str(tmp_path / "two"))
    assert source(tmp_path / "set", "data.workers=2").meta.content_hash == store.meta.content_hash


def test_benchmark_tasks_choose_episodes(tmp_path, monkeypatch):
    monkeypatch.setenv("VLA_DATA", str(tmp_path / "data"))
    made = [episode(seed, 4, SIZES) for seed in range(2)]
    made[1] = replace(made[1], instruction="put the bowl on the plate", task="put_the_bowl_on_the_plate")
    write_lerobot(made, tmp_path / "set", 20, video=False, gripper="libero", orientation="rotate180")
    store = source(tmp_path / "set", "benchmark.tasks=[8]")
    assert {window["task"] for window in store.windows} == {"put_the_bowl_on_the_plate"} and len(store) == 4
    with pytest.raises(UserError, match="no episode of: turn on the stove; its tasks are: put it on plate 0; put the"):
        source(tmp_path / "set", "benchmark.tasks=[7]")


def test_the_command(tmp_path):
    (tmp_path / "goal").mkdir()
    write_demos(tmp_path / "goal/turn_on_the_stove_demo.hdf5", (6, 5))
    options = [f"data.path={tmp_path}/goal", "to=lerobot", f"out={tmp_path}/v3", "video=false"]
    command = [sys.executable, "scripts/convert.py", *options]
    ran = subprocess.run(command, capture_output=True, text=True, check=True)
    assert "2 episodes, 9 steps, 1 instructions" in ran.stdout
    read = list(read_lerobot(tmp_path / "v3", ("static",), image_rotation="rotate180"))
    for found, wanted in zip(read, read_libero(tmp_path / "goal", ("static",)), strict=True):
        same(found, wanted)
    info = json.loads((tmp_path / "v3/meta/info.json").read_text())
    assert info["fps"] == 20 and info["features"]["observation.state"]["names"][:3] == ["x", "y", "z"]
