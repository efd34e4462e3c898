"""data.path: a folder of real files becomes a frame store once; what is in it is what is in the files."""

from __future__ import annotations

import time

import h5py
import numpy as np
import pytest

from data.source import open_source
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
