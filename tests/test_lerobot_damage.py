"""LeRobot v3 data sets that are wrong, damaged or cannot be written: one line that names the place and the remedy.

pytest tests/test_lerobot_damage.py
"""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data.lerobot import Reading, lerobot_parts, read_lerobot
from data.lerobot_writer import write_lerobot
from data.source import require_source
from tests.lerobot_files import episode, hub_like
from vla.cli import compose_config
from vla.errors import UserError

SIZES = {"static": (6, 8), "wrist": (5, 3)}
DATA = "data/chunk-000/file-000.parquet"
FILM = "videos/observation.images.wrist/chunk-000/file-000.mp4"


@pytest.fixture(scope="module")
def films(tmp_path_factory):
    out = tmp_path_factory.mktemp("lerobot") / "films"
    write_lerobot([episode(seed, 6, SIZES) for seed in range(3)], out, 20)
    return out


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    out = tmp_path_factory.mktemp("lerobot") / "images"
    write_lerobot([episode(seed, 6, SIZES) for seed in range(3)], out, 20, video=False)
    return out


def cut(file: Path) -> None:
    content = file.read_bytes()
    file.write_bytes(content[: len(content) // 2])


def change_info(root: Path, **fields) -> None:
    info = json.loads((root / "meta/info.json").read_text())
    (root / "meta/info.json").write_text(json.dumps(info | fields))


def change_data(root: Path, change) -> None:
    table = pd.read_parquet(root / DATA)
    change(table).to_parquet(root / DATA)


def put(table: pd.DataFrame, name: str, step: int, value) -> pd.DataFrame:
    table.at[step, name] = value
    return table


BREAKAGES = {
    "no info.json": (lambda r: (r / "meta/info.json").unlink(), r"info\.json is missing: not a LeRobot data set"),
    "info.json not JSON": (lambda r: (r / "meta/info.json").write_text("{"), r"info\.json cannot be read"),
    "v2.1": (lambda r: change_info(r, codebase_version="v2.1"), "v2.1 data set.*convert_dataset_v21_to_v30"),
    "v2.0": (lambda r: change_info(r, codebase_version="v2.0"), "v2.0 data set.*first to v2.1.*convert_dataset_v21"),
    "v4": (lambda r: change_info(r, codebase_version="v4.0"), "codebase_version v4.0.*v3.0 is read"),
    "no tasks": (lambda r: (r / "meta/tasks.parquet").unlink(), r"tasks\.parquet cannot be read"),
    "no episodes": (lambda r: shutil.rmtree(r / "meta/episodes"), "describes 0 episodes, .*promises 3"),
    "episodes cut": (lambda r: cut(r / "meta/episodes/chunk-000/file-000.parquet"), "episodes.*cannot be read"),
    "more promised": (lambda r: change_info(r, total_episodes=4), "describes 3 episodes, .*promises 4"),
    "no data file": (lambda r: (r / DATA).unlink(), r"file-000\.parquet is missing"),
    "data cut": (lambda r: cut(r / DATA), r"file-000\.parquet cannot be read"),
    "no film": (lambda r: (r / FILM).unlink(), r"wrist/chunk-000/file-000\.mp4 is missing"),
    "film cut": (lambda r: cut(r / FILM), r"wrist/chunk-000/file-000\.mp4"),
    "another film": (lambda r: short_film(r / FILM), r"file-000\.mp4 has no frame at 0\.100 s"),
    "step missing": (lambda r: change_data(r, lambda t: t.drop(index=8)), "episode 1 has 5 steps"),
    "steps swapped": (lambda r: change_data(r, lambda t: t.iloc[::-1]), "episode 0 has 6 steps, not 0 ... 5"),
    "column missing": (lambda r: change_data(r, lambda t: t.drop(columns="action")), "has no column action"),
    "unknown task": (lambda r: change_data(r, lambda t: t.assign(task_index=7)), "episode 0 has task 7, unknown"),
    "not finite": (
        lambda r: change_data(r, lambda t: put(t, "action", 7, np.full(7, np.nan, np.float32))),
        "episode 1: action at step 1 is not finite",
    ),
    "ragged": (
        lambda r: change_data(r, lambda t: put(t, "observation.state", 2, np.zeros(3, np.float32))),
        "episode 0: observation.state is not the same number of numbers",
    ),
    "wide actions": (
        lambda r: change_data(r, lambda t: t.assign(action=[np.zeros(8, np.float32)] * 18)),
        "action has 8 numbers a step",
    ),
    "other clock": (lambda r: change_data(r, lambda t: t.assign(timestamp=t.timestamp / 10)), "timestamps are not 20"),
}


def short_film(path: Path) -> None:
    from data.video import VideoWriter

    with VideoWriter(path, 20) as writer:
        writer.add(np.zeros((2, 5, 3, 3), np.uint8))


@pytest.mark.parametrize("kind", BREAKAGES)
def test_damage_is_a_one_line_error(films, tmp_path, kind):
    damage, message = BREAKAGES[kind]
    root = Path(shutil.copytree(films, tmp_path / "set"))
    damage(root)
    with pytest.raises(UserError, match=message) as caught:
        list(read_lerobot(root, ("static", "wrist")))
    assert "\n" not in str(caught.value) and str(root) in str(caught.value)


@settings(max_examples=60)
@given(where=st.floats(0, 0.9999), value=st.integers(1, 255))
def test_a_changed_byte_of_a_data_file_changes_nothing_unnoticed(images, tmp_path_factory, where, value):
    """Our files carry checksums of their pages: a changed byte is an error, or lies where nothing is read."""
    root = Path(shutil.copytree(images, tmp_path_factory.mktemp("damaged") / "set"))
    content = bytearray((root / DATA).read_bytes())
    content[int(where * len(content))] ^= value
    (root / DATA).write_bytes(content)
    try:
        read = list(read_lerobot(root, ("static", "wrist")))
    except UserError as error:
        assert "file-000.parquet" in str(error)
        return
    for found, wanted in zip(read, read_lerobot(images, ("static", "wrist")), strict=True):
        np.testing.assert_array_equal(found.actions, wanted.actions)
        np.testing.assert_array_equal(found.frames["wrist"], wanted.frames["wrist"])


def test_what_cannot_be_read_is_skipped_and_named(films, tmp_path):
    root = Path(shutil.copytree(films, tmp_path / "set"))
    change_data(root, lambda t: put(t, "action", 7, np.full(7, np.nan, np.float32)))
    (unit,) = lerobot_parts(root, ("static",))
    skipped: list[str] = []
    assert [e.source for e in unit.read(skipped)] == ["made.hdf5:demo_0", "made.hdf5:demo_2"]
    assert len(skipped) == 1 and "episode 1: action at step 1 is not finite" in skipped[0]


def test_cameras_that_are_not_there_or_could_be_two(films, tmp_path):
    there = r"has the image features observation\.images\.static, observation\.images\.wrist"
    with pytest.raises(UserError, match=rf"{there}, and none is known to be the camera front; .*keys\.front=FEATURE"):
        lerobot_parts(films, ("front",))
    with pytest.raises(UserError, match=rf"{there}, and no observation.images.top for the camera static"):
        lerobot_parts(films, ("static",), Reading(keys={"static": "observation.images.top"}))
    hub_like(tmp_path)
    features = json.loads((tmp_path / "meta/info.json").read_text())["features"]
    change_info(tmp_path, features=features | {"observation.images.agentview": features["observation.images.image"]})
    with pytest.raises(UserError, match=r"image and observation\.images\.agentview could each be the camera static"):
        lerobot_parts(tmp_path, ("static",), Reading("libero", "raw"))


def test_a_damaged_image_is_named(tmp_path):
    hub_like(tmp_path)
    table = pd.read_parquet(tmp_path / DATA)
    for broken in ({"bytes": b"no picture", "path": None}, {"bytes": None, "path": "absent.png"}):
        table.at[2, "observation.images.image2"] = broken
        table.to_parquet(tmp_path / DATA)
        with pytest.raises(UserError, match=r"episode 0, observation\.images\.image2 2 cannot be decoded"):
            list(read_lerobot(tmp_path, ("static", "wrist"), Reading("libero")))


def test_a_run_asks_for_the_version_before_it_starts(films, tmp_path):
    root = Path(shutil.copytree(films, tmp_path / "set"))
    change_info(root, codebase_version="v2.1")
    cfg = compose_config("convert", f"data.path={root}")
    with pytest.raises(UserError, match="convert_dataset_v21_to_v30"):
        require_source(cfg.benchmark, cfg.data)


def failing():
    yield episode(0, 5, SIZES)
    raise UserError("the reader met damage")


REFUSED = {
    "no episodes": (lambda: [], {}, "no episodes to write"),
    "reader fails": (failing, {}, "the reader met damage"),
    "other size": (lambda: [episode(0, 3, SIZES), episode(1, 3, {"static": (6, 8)})], {}, "demo_1 has .*convert them"),
    "no frame": (
        lambda: [replace(episode(0, 3, SIZES), frame_valid=np.array([True, False, True]))],
        {},
        "demo_0 has steps without a frame.*frame_every=1",
    ),
    "gripper": (lambda: [episode(0, 3, SIZES)], {"gripper": "up"}, "unknown gripper 'up'"),
    "fps": (lambda: [episode(0, 3, SIZES)], {"fps": 29.97}, "whole number"),
}


@pytest.mark.parametrize("kind", REFUSED)
@pytest.mark.parametrize("video", [True, False])
def test_what_cannot_be_written_leaves_nothing(tmp_path, kind, video):
    made, options, message = REFUSED[kind]
    with pytest.raises(UserError, match=message):
        write_lerobot(made(), tmp_path / "out", **{"fps": 20, "video": video} | options)
    assert not list(tmp_path.iterdir())


def test_nothing_is_overwritten(films):
    before = sorted((file, file.stat().st_mtime_ns) for file in films.rglob("*"))
    with pytest.raises(UserError, match="films exists; remove it or choose another place with out=DIR"):
        write_lerobot([episode(0, 3, SIZES)], films, 20)
    assert sorted((file, file.stat().st_mtime_ns) for file in films.rglob("*")) == before
