"""RLDS folders: TFDS' own bytes are read, shards keep their order, and damage is named.

pytest tests/test_rlds.py
"""

from __future__ import annotations

import json
import os
import pickle
import shutil

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data.frame_store import FrameStore
from data.rlds import features_of, is_rlds, rlds_parts, step_values
from data.store_writer import convert
from data.tfrecord import parse_example, read_records
from tests.rlds_files import BRIDGE, FRACTAL, IMAGE, LIBERO, TEXT, made_steps, numbers, png, read_all, write_rlds
from vla.errors import UserError

# What tensorflow_datasets 4.9.10 writes for two steps of {"o": {"v": Sequence(Tensor(2)), "w": Sequence(Sequence(
# int32))}, "t": Text, "s": string, "d": Tensor(1, 2)}: v = [[t, .5], [1, 2], [3, 4]], w = [[t, 7], [8, 9], [10, 11]].
TFDS = bytes.fromhex(
    "5a01000000000000153f24e70ad7020a130a0773746570732f7312080a060a01780a01780a1f0a0773746570732f64121412120a100000000000"
    "00803f0000803e0000803f0a540a1c73746570732f6f2f762f7261676765645f666c61745f76616c756573123412320a30000000000000003f00"
    "00803f0000004000004040000080400000803f0000003f0000803f0000004000004040000080400a2c0a1e73746570732f6f2f772f7261676765"
    "645f726f775f6c656e677468735f31120a1a080a060202020202020a300a1c73746570732f6f2f772f7261676765645f666c61745f76616c7565"
    "7312101a0e0a0c000708090a0b010708090a0b0a150a0773746570732f74120a0a080a0273300a0273310a280a1e73746570732f6f2f772f7261"
    "676765645f726f775f6c656e677468735f3012061a040a0203030a280a1e73746570732f6f2f762f7261676765645f726f775f6c656e67746873"
    "5f3012061a040a020303bf084370"
)


def sequence(feature: dict) -> dict:
    return {"sequence": {"feature": feature, "length": "-1"}}


def test_lists_within_steps_as_tfds_writes_them(tmp_path):
    inner = {"v": sequence(numbers(2)), "w": sequence(sequence(numbers(dtype="int32")))}
    step = {"o": {"featuresDict": {"features": inner}}, "t": TEXT}
    step |= {"s": numbers(dtype="string"), "d": numbers(1, 2, dtype="float64")}
    features = {"steps": sequence({"featuresDict": {"features": step}}), "id": numbers(dtype="int64")}
    (tmp_path / "features.json").write_text(json.dumps({"featuresDict": {"features": features}}))
    (tmp_path / "shard").write_bytes(TFDS)
    ((_, record),) = read_records(tmp_path / "shard")
    values, found = parse_example(record, "record 0"), features_of(tmp_path / "features.json")
    assert set(found) == {"steps/o/v", "steps/o/w", "steps/t", "steps/s", "steps/d", "id"}
    read = {key: step_values(values, key, found[key], "record 0") for key in found if key != "id"}
    for t in range(2):
        assert read["steps/o/v"][t].tolist() == [[t, 0.5], [1, 2], [3, 4]]
        assert read["steps/o/w"][t].tolist() == [[t, 7], [8, 9], [10, 11]]
        assert read["steps/d"][t].tolist() == [[t / 4, 1]]
        assert (read["steps/t"][t], read["steps/s"][t]) == (f"s{t}".encode(), b"x")
    values["steps/o/v/ragged_row_lengths_0"] = np.array([2, 4])
    with pytest.raises(UserError, match=r"record 0: steps/o/v holds lists of differing lengths, \[2, 4\]"):
        step_values(values, "steps/o/v", found["steps/o/v"], "record 0")


@given(lengths=st.lists(st.integers(1, 4), min_size=1, max_size=7), shards=st.integers(1, 4))
@settings(max_examples=25)
def test_shards_keep_number_and_order(tmp_path_factory, lengths, shards):
    rng = np.random.default_rng(0)
    raw = [made_steps(FRACTAL, length, rng) for length in lengths]
    folder = tmp_path_factory.mktemp("data") / "fractal20220817_data"
    write_rlds(folder, "fractal20220817_data", FRACTAL, raw, shards, split="test")
    parts = rlds_parts(folder, ("static",), split="test")
    assert [part.name for part in parts] == sorted(file.name for file in folder.glob("*tfrecord*"))
    episodes = [episode for part in parts for episode in pickle.loads(pickle.dumps(part)).read(None)]
    assert len(episodes) == len(raw)
    for episode, steps in zip(episodes, raw, strict=True):
        np.testing.assert_array_equal(episode.state[:, :7], steps["observation/base_pose_tool_reached"])


def test_conversion_to_a_store(tmp_path):
    rng = np.random.default_rng(0)
    raw = [made_steps(BRIDGE, length, rng, "" if length == 5 else "lift") for length in (4, 5, 6)]
    folder = write_rlds(tmp_path / "bridge_orig/1.0.0", "bridge_dataset", BRIDGE, raw, shards=2)
    convert(rlds_parts(folder, ("static",)), tmp_path / "store", reader={"family": "rlds"}, workers=1)
    store, episodes = FrameStore(tmp_path / "store"), read_all(folder)
    np.testing.assert_array_equal(store.actions, np.concatenate([episode.actions for episode in episodes]))
    assert store.samples.tolist() == [0, 1, 5, 6, 7, 8]  # three steps of the five lie between and have no instruction
    assert {window["instruction"] for window in store.windows} == {"lift"}
    frames = store.frames("static", np.arange(9))
    np.testing.assert_array_equal(frames, np.concatenate([episode.frames["static"] for episode in episodes]))


def test_episodes_are_chosen_by_instruction(tmp_path):
    rng = np.random.default_rng(0)
    raw = [made_steps(LIBERO, 3, rng, text) for text in ("push it", "lift it", "push it", "open it", "push")]
    raw[0]["observation/image"] = [b"no image"] * 3  # not looked at
    folder = write_rlds(tmp_path / "libero_goal", "libero_goal", LIBERO, raw)
    episodes = read_all(folder, instructions=("open it", "lift it", "never said"))
    assert [episode.source[-1] for episode in episodes] == ["1", "3"]
    assert [episode.instruction for episode in episodes] == ["lift it", "open it"]


def test_noops_can_be_left_out(tmp_path):
    raw = made_steps(LIBERO, 5, np.random.default_rng(0))
    raw["action"][:, 6] = -1
    raw["action"][[1, 3], :6] = 1e-6
    folder = write_rlds(tmp_path / "libero_goal", "libero_goal", LIBERO, [raw])
    (whole,), (short,) = read_all(folder), read_all(folder, drop_noops=True)
    np.testing.assert_array_equal(short.actions, whole.actions[[0, 2, 4]])
    np.testing.assert_array_equal(short.frames["static"], whole.frames["static"][[0, 2, 4]])


@pytest.fixture
def folder(tmp_path):
    """A LIBERO data set of four episodes in two shards."""
    rng = np.random.default_rng(0)
    raw = [made_steps(LIBERO, 3, rng) for _ in range(4)]
    return write_rlds(tmp_path / "libero_goal_no_noops/1.0.0", "libero_goal", LIBERO, raw, shards=2)


def test_a_shard_cut_at_every_byte(tmp_path):
    rng = np.random.default_rng(0)
    raw = [made_steps(FRACTAL, 1, rng) for _ in range(2)]
    (part,) = rlds_parts(write_rlds(tmp_path / "data", "fractal20220817_data", FRACTAL, raw), ())
    assert len(list(part.read(None))) == 2
    for size in reversed(range(part.path.stat().st_size)):
        os.truncate(part.path, size)
        with pytest.raises(UserError, match=r"00000-of-00001(: record \d is cut short| ends after \d of 2 episodes)"):
            list(part.read(None))


def test_what_is_damaged_can_be_left_out(folder):
    path = sorted(folder.glob("*tfrecord*"))[0]
    content = bytearray(path.read_bytes())
    content[40] ^= 1
    path.write_bytes(content)
    skipped: list[str] = []
    episodes = [episode for part in rlds_parts(folder, ("static",)) for episode in part.read(skipped)]
    assert [episode.source.rpartition("-")[2] for episode in episodes] == ["00002:1", "00002:0", "00002:1"]
    assert len(skipped) == 1 and "00000-of-00002: record 0 has a wrong checksum" in skipped[0]


def rewrite(folder, change, episodes=4):
    """The data set of `folder` again, its second episode changed."""
    shutil.rmtree(folder)
    rng = np.random.default_rng(0)
    raw = [made_steps(LIBERO, 3, rng) for _ in range(episodes)]
    change(raw[1])
    write_rlds(folder, "libero_goal", LIBERO, raw, shards=2)


def edit(path, change):
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


def set_key(key, value):
    return lambda folder: rewrite(folder, lambda steps: steps.__setitem__(key, value))


def feature(folder, change):
    def inside(content):
        change(content["featuresDict"]["features"]["steps"]["sequence"]["feature"]["featuresDict"]["features"])

    edit(folder / "features.json", inside)


def info(change):
    return lambda folder: edit(folder / "dataset_info.json", change)


FRAME, WIDE_FRAME = (png(np.random.default_rng(0).integers(0, 256, (8, width, 3), np.uint8)) for width in (8, 9))
BREAKAGES = {
    "missing shard": (lambda f: sorted(f.glob("*tfrecord*"))[1].unlink(), "00001-of-00002: record 0 cannot be read"),
    "missing info": (lambda f: (f / "dataset_info.json").unlink(), "is no RLDS data set"),
    "broken info": (lambda f: (f / "dataset_info.json").write_text("{"), r"dataset_info\.json cannot be read"),
    "info is a list": (lambda f: (f / "dataset_info.json").write_text("[]"), "holds no JSON object"),
    "no splits": (info(lambda i: i.pop("splits")), "lacks name or splits"),
    "another split": (
        info(lambda i: i["splits"][0].update(name="test")),
        "has no split 'train' with shards; it has test",
    ),
    "no shards": (info(lambda i: i["splits"][0].update(shardLengths=[])), "has no split 'train' with shards"),
    "another format": (info(lambda i: i.update(fileFormat="array_record")), "holds array_record files"),
    "other shards": (
        info(lambda i: i["splits"][0].update(shardLengths=["2", "3"])),
        "00001-of-00002 ends after 2 of 3 episodes",
    ),
    "broken features": (lambda f: (f / "features.json").write_text('{"featuresDict": []}'), "not in TFDS' form"),
    "no features": (lambda f: (f / "features.json").write_text("{}"), "describes no features"),
    "no action": (lambda f: feature(f, lambda s: s.pop("action")), "steps/action is missing"),
    "wide action": (lambda f: feature(f, lambda s: s.update(action=numbers(8))), "steps/action is .*8"),
    "image is a text": (
        lambda f: feature(f, lambda s: s["observation"]["featuresDict"]["features"].update(image=TEXT)),
        "steps/observation/image is .*text",
    ),
    "key not stored": (lambda f: rewrite(f, lambda s: s.pop("action")), "record 1 has no 'steps/action'"),
    "lengths differ": (
        set_key("action", np.zeros((2, 7), np.float32)),
        "00000-of-00002: record 1: lengths differ, .*'steps/action': 2",
    ),
    "not whole steps": (set_key("action", np.zeros(20, np.float32)), "record 1: steps/action has 20 values"),
    "another type": (set_key("action", [b"a"] * 3), "record 1: steps/action is not stored as float32"),
    "not finite": (set_key("action", np.full((3, 7), np.nan, np.float32)), "record 1: action is not finite"),
    "no steps": (
        lambda f: rewrite(f, lambda s: s.update(made_steps(LIBERO, 0, np.random.default_rng(0)))),
        "record 1 has 0 steps, too few",
    ),
    "cut image": (
        set_key("observation/image", [FRAME, FRAME, FRAME[:-50]]),
        "steps/observation/image: the image at step 2 cannot be",
    ),
    "no image": (set_key("observation/image", [b""] * 3), "record 1: steps/.*image: the image at step 0 cannot"),
    "another size": (
        set_key("observation/image", [FRAME, FRAME, WIDE_FRAME]),
        r"the image at step 2 is \(8, 9, 3\), those before",
    ),
}


@pytest.mark.parametrize("kind", BREAKAGES)
def test_damage_is_a_one_line_error(folder, kind):
    damage, message = BREAKAGES[kind]
    damage(folder)
    with pytest.raises(UserError, match=message) as caught:
        read_all(folder)
    assert "\n" not in str(caught.value)
    assert str(folder) in str(caught.value)


@pytest.mark.parametrize("kind", ["lengths differ", "not finite", "cut image", "no steps"])
def test_a_bad_episode_costs_only_itself(folder, kind):
    damage, message = BREAKAGES[kind]
    damage(folder)
    skipped: list[str] = []
    episodes = [episode for part in rlds_parts(folder, ("static",)) for episode in part.read(skipped)]
    assert len(episodes) == 3
    assert len(skipped) == 1
    with pytest.raises(UserError, match=message):
        read_all(folder)


def test_folders(folder, tmp_path):
    assert is_rlds(folder) and is_rlds(folder.parent)
    assert not is_rlds(tmp_path) and not is_rlds(folder / "features.json") and not is_rlds(tmp_path / "absent")
    (folder / "features.json").unlink()  # what a HuggingFace data set looks like
    assert not is_rlds(folder)
    for path in (folder, tmp_path / "absent"):
        with pytest.raises(UserError, match=r"is no RLDS data set.*set data\.path"):
            rlds_parts(path, ("static",))


def test_which_data_set(folder, tmp_path):
    with pytest.raises(UserError, match="has no camera front: choose from static, wrist"):
        rlds_parts(folder, ("front",))
    shutil.copytree(folder, folder.parent / "2.0.0")
    with pytest.raises(UserError, match=r"several versions: set data\.path to one of 1\.0\.0, 2\.0\.0"):
        rlds_parts(folder.parent, ("static",))
    other = write_rlds(tmp_path / "kuka/0.1.0", "kuka", {"image": IMAGE}, [])
    with pytest.raises(UserError, match="no conversion is known for kuka or kuka; known: libero_"):
        rlds_parts(other, ("static",))
