"""data.path: a folder of real files becomes a frame store once; what is in it is what is in the files."""

from __future__ import annotations

import time

import h5py
import numpy as np
import pytest

from data.source import open_source
from tests.rlds_files import LIBERO, made_steps, write_rlds
from tests.test_libero_data import write_demos
from vla.cli import compose_config
from vla.errors import UserError

PLATE = "put_the_bowl_on_the_plate_demo.hdf5"


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.setenv("VLA_DATA", str(tmp_path / "data"))
    folder = tmp_path / "libero_goal"
    folder.mkdir()
    write_demos(folder / PLATE, lengths=(9, 7))
    write_demos(folder / "turn_on_the_stove_demo.hdf5", lengths=(6,))
    return folder


def source(folder, *overrides):
    cfg = compose_config("convert", f"data.path={folder}", *overrides)
    return open_source(cfg.benchmark, cfg.data, pairing=cfg.pairing)


def test_store_equals_hdf5(folder):
    """Against the files themselves: frames turned by 180°, obs[t] beside actions[t+1], gripper 1 where -1 was."""
    store = source(folder)
    at = 0
    for name in sorted(path.name for path in folder.iterdir()):
        with h5py.File(folder / name) as file:
            for demo in file["data"].values():
                steps = len(demo["actions"]) - 1
                rows = np.arange(at, at + steps)
                frames = demo["obs/agentview_rgb"][:-1][:, ::-1, ::-1]
                np.testing.assert_array_equal(store.frames("static", rows), frames)
                np.testing.assert_array_equal(store.actions[rows, :6], demo["actions"][1:, :6].astype(np.float32))
                np.testing.assert_array_equal(store.actions[rows, 6] == 1, demo["actions"][1:, 6] == -1)
                at += steps
    assert at == len(store)


def test_converted_once_then_cached(folder):
    first = source(folder)
    stamp = (first.path / "meta.json").stat().st_mtime_ns
    assert source(folder).path == first.path and (first.path / "meta.json").stat().st_mtime_ns == stamp
    assert source(first.path).path == first.path  # a store is opened as it is


def test_other_options_or_other_files_are_another_store(folder):
    paths = {source(folder, *o).path for o in ([], ["data.image_rotation=upright"], ["pairing=official"])}
    time.sleep(0.01)
    write_demos(folder / PLATE, lengths=(5, 5))
    assert len({*paths, source(folder).path}) == 4


def test_tasks_choose_files(folder):
    store = source(folder, "benchmark.tasks=[8]")
    assert {window["task"] for window in store.windows} == {"put_the_bowl_on_the_plate"}


def test_nothing_to_read_is_named_and_leaves_nothing(folder, tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match=r"holds no \*\.hdf5.*scripts/collect\.py"):
        source(tmp_path / "empty")
    with pytest.raises(UserError, match=r"no data at .*missing"):
        source(tmp_path / "missing")
    with pytest.raises(UserError, match=r"for benchmark\.tasks=\[1\]"):
        source(folder, "benchmark.tasks=[1]")
    (folder / PLATE).write_bytes((folder / PLATE).read_bytes()[:2000])
    with pytest.raises(UserError, match=PLATE):
        source(folder)
    assert not (tmp_path / "data" / "stores").exists() or not list((tmp_path / "data" / "stores").iterdir())


def test_rlds_is_opened_by_what_lies_there(tmp_path, monkeypatch):
    """Two shards of a LIBERO data set: its steps and frames, one task chosen by its words, and whose robot it is."""
    monkeypatch.setenv("VLA_DATA", str(tmp_path / "data"))
    rng = np.random.default_rng(0)
    told = ["put the bowl on the plate", "turn on the stove", "put the bowl on the plate"]
    episodes = [made_steps(LIBERO, 5 + i, rng, words) for i, words in enumerate(told)]
    folder = write_rlds(tmp_path / "libero_goal_no_noops" / "1.0.0", "libero_goal_no_noops", LIBERO, episodes, shards=2)
    store = source(folder)
    assert [e["length"] for e in store.episodes] == [5, 6, 7] and store.meta.reader["image_rotation"] == "rotate180"
    motion = np.concatenate([episode["action"][:, :6] for episode in episodes])
    np.testing.assert_array_equal(store.actions[:, :6], motion)
    assert source(folder.parent, "benchmark.tasks=[8]").meta.episodes == 2
    with pytest.raises(UserError, match=r"ep_start_end_ids\.npy is missing"):
        source(folder, "benchmark=calvin_abc_d")
    with pytest.raises(UserError, match=r"image_rotation=rotate180"):
        source(folder, "data.image_rotation=upright")


def test_suites_under_one_name_lie_in_their_own_folders(tmp_path, monkeypatch):
    monkeypatch.setenv("VLA_DATA", str(tmp_path))
    for suite, task in (("libero_goal", "turn_on_the_stove"), ("libero_spatial", "pick_it_up")):
        (tmp_path / suite).mkdir()
        write_demos(tmp_path / suite / f"{task}_demo.hdf5", lengths=(6,))
    store = source(tmp_path, "benchmark=libero_four")
    assert [window["task"] for window in store.windows] == ["pick_it_up", "turn_on_the_stove"]


def test_steps_that_do_nothing_can_be_left_out(folder):
    whole, short = source(folder), source(folder, "data.drop_noops=true")
    assert short.path != whole.path and short.meta.steps <= whole.meta.steps
    assert not (np.abs(short.actions[:, :6]).max(1) < 1e-6).any()
