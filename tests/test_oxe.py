"""Conversions of the RLDS data sets: grippers as the reference gives them, episodes against their definitions.

pytest tests/test_oxe.py
"""

from __future__ import annotations

import io
from dataclasses import fields

import h5py
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from data.episode import Window
from data.libero import read_libero
from data.normalization import ActionNormalizer
from data.oxe import absolute_gripper, binarize_gripper
from data.rlds import rlds_parts
from data.statistics import ActionStatistics
from tests.rlds_files import BRIDGE, FRACTAL, LIBERO, made_steps, png, read_all, write_rlds
from tests.test_libero_data import write_demos


@pytest.mark.parametrize(
    ("raw", "expected"),
    [
        ([1, 0.5, 0.5, 0, 0.3, 1, 0.96], [1, 0, 0, 0, 1, 1, 1]),
        ([0, 0.5, 1, 0.5, 0.4], [0, 1, 1, 0.4, 0.4]),
        ([0.5, 0.6, 0.7], [0.7, 0.7, 0.7]),
        ([0.95, 0.05, 0.951, 0.049], [1, 1, 1, 0]),
    ],
)
def test_binarized_as_the_reference_does(raw, expected):
    """Expected: what openvla's binarize_gripper_actions returns."""
    np.testing.assert_array_equal(binarize_gripper(np.array(raw, np.float32)), np.array(expected, np.float32))


@pytest.mark.parametrize(
    ("raw", "expected"),
    [
        ([0, 0, 1, 0, -1, 0], [1, 1, 0, 0, 1, 1]),
        ([0, 0, -1, 0, 1], [0, 0, 1, 1, 0]),
        ([0, 0, 0], [1, 1, 1]),
        ([0.1, -0.1, 0.05, 0.11], [1, 1, 1, 0]),
        ([1, 1, 0, -0.2, 0.09], [0, 0, 0, 1, 1]),
        ([-1, 0], [1, 1]),
    ],
)
def test_absolute_as_the_reference_does(raw, expected):
    """Expected: what openvla's rel2abs_gripper_actions returns."""
    np.testing.assert_array_equal(absolute_gripper(np.array(raw, np.float32)), np.array(expected, np.float32))


def next_settled(opening: list[float], step: int) -> float:
    return next((float(o > 0.95) for o in opening[step:] if o > 0.95 or o < 0.05), opening[-1])


def last_command(commands: list[float], step: int) -> float:
    given = [float(c < 0) for c in commands[: step + 1] if abs(c) > 0.1]
    first = [float(c > 0) for c in commands if abs(c) > 0.1]
    return given[-1] if given else (first[0] if first else 1.0)


@given(st.lists(st.sampled_from([0.0, 0.02, 0.3, 0.5, 0.98, 1.0]), min_size=1, max_size=12))
def test_binarized_by_looking_ahead(opening):
    expected = np.array([next_settled(opening, step) for step in range(len(opening))], np.float32)
    np.testing.assert_array_equal(binarize_gripper(np.array(opening, np.float32)), expected)


@given(st.lists(st.sampled_from([0.0, 0.05, -0.05, 0.5, 1.0, -0.5, -1.0]), min_size=1, max_size=12))
def test_absolute_is_the_last_command(commands):
    expected = np.array([last_command(commands, step) for step in range(len(commands))], np.float32)
    np.testing.assert_array_equal(absolute_gripper(np.array(commands, np.float32)), expected)


def frames_of(encoded: list[bytes]) -> np.ndarray:
    images = []
    for content in encoded:
        with Image.open(io.BytesIO(content)) as image:
            images.append(np.asarray(image))
    return np.stack(images)


def test_libero(tmp_path):
    rng = np.random.default_rng(0)
    raw = [made_steps(LIBERO, steps, rng, "turn on the stove") for steps in (5, 4, 6)]
    for steps in raw:
        steps["action"][:, 6] = rng.choice([-1, 1], len(steps["action"]))
    files = ["/home/me/libero/KITCHEN_SCENE3_turn_on_the_stove_demo.hdf5"] * 3
    folder = write_rlds(tmp_path / "libero_10_no_noops/1.0.0", "liber_o10", LIBERO, raw, shards=2, files=files)
    for path in (folder, folder.parent):
        episodes = read_all(path, ("static", "wrist"))
        shards = [episode.source.removeprefix("liber_o10-train.tfrecord-") for episode in episodes]
        assert shards == ["00000-of-00002:0", "00000-of-00002:1", "00001-of-00002:0"]
        for episode, steps in zip(episodes, raw, strict=True):
            assert (episode.instruction, episode.windows) == ("turn on the stove", None)
            assert episode.task == "KITCHEN_SCENE3_turn_on_the_stove"
            np.testing.assert_array_equal(episode.actions[:, :6], steps["action"][:, :6])
            np.testing.assert_array_equal(episode.actions[:, 6], (steps["action"][:, 6] == -1))
            np.testing.assert_array_equal(episode.state, steps["observation/state"])
            np.testing.assert_array_equal(episode.frames["static"], frames_of(steps["observation/image"]))
            np.testing.assert_array_equal(episode.frames["wrist"], frames_of(steps["observation/wrist_image"]))


@given(seed=st.integers(0, 10**6), steps=st.integers(3, 9))
@settings(max_examples=25)
def test_bridge(tmp_path_factory, seed, steps):
    rng = np.random.default_rng(seed)
    raw = made_steps(BRIDGE, steps, rng)
    raw["action"][:, 6] = rng.choice([0, 1, 0.4, 0.6], steps)
    folder = tmp_path_factory.mktemp("data") / "bridge_orig/1.0.0"
    write_rlds(folder, "bridge_dataset", BRIDGE, [raw])
    (episode,) = read_all(folder)
    state, opening = raw["observation/state"], raw["action"][1:, 6].tolist()
    assert len(episode.actions) == steps - 2
    for t in range(steps - 2):  # step t is the recording's t + 1
        np.testing.assert_array_equal(episode.actions[t, :6], state[t + 2, :6] - state[t + 1, :6])
        assert episode.actions[t, 6] == (next_settled(opening, t) >= 0.5)
        np.testing.assert_array_equal(episode.state[t], state[t + 1])
    np.testing.assert_array_equal(episode.frames["static"], frames_of(raw["observation/image_0"])[1:-1])
    assert episode.task == episode.instruction == "pick it up"


def test_fractal(tmp_path):
    rng = np.random.default_rng(0)
    raw = made_steps(FRACTAL, 7, rng)
    raw["action/gripper_closedness_action"] = np.array([[0], [0], [1], [0], [0], [-1], [0]], np.float32)
    folder = write_rlds(tmp_path / "fractal20220817_data/0.1.0", "fractal20220817_data", FRACTAL, [raw])
    (episode,) = read_all(folder)
    np.testing.assert_array_equal(episode.actions[:, :3], raw["action/world_vector"])
    np.testing.assert_array_equal(episode.actions[:, 3:6], raw["action/rotation_delta"])
    assert episode.actions[:, 6].tolist() == [1, 1, 0, 0, 0, 1, 1]
    np.testing.assert_array_equal(episode.state[:, :7], raw["observation/base_pose_tool_reached"])
    np.testing.assert_array_equal(episode.state[:, 7:], raw["observation/gripper_closed"])
    np.testing.assert_array_equal(episode.frames["static"], frames_of(raw["observation/image"]))
    assert (episode.actions.dtype, episode.state.dtype, episode.actions.shape) == (np.float32, np.float32, (7, 7))


def test_no_instruction_no_window(tmp_path):
    rng = np.random.default_rng(0)
    raw = [made_steps(BRIDGE, 8, rng, instruction="") for _ in range(2)]
    raw[1]["language_instruction"] = [b"", b"", b"lift", b"lift", b"", b"put", b"put", b""]
    silent, parts = read_all(write_rlds(tmp_path / "bridge_orig", "bridge_dataset", BRIDGE, raw))
    assert (silent.instruction, silent.described(), len(silent.actions)) == ("", (), 6)
    assert parts.described() == (Window("lift", "lift", 1, 2), Window("put", "put", 4, 2))


def test_one_demonstration_as_hdf5_and_as_rlds(tmp_path):
    """HDF5 holds frames upside down and seen AFTER the action; RLDS holds them rotated and seen before it."""
    file = write_demos(tmp_path / "put_the_bowl_on_the_plate_demo.hdf5", lengths=(6, 4))
    raw = []
    with h5py.File(file, "r") as opened:
        for demo in opened["data"].values():
            obs = {key: demo[f"obs/{key}"][:-1] for key in demo["obs"]}
            steps = {
                "action": demo["actions"][1:].astype(np.float32),
                "language_instruction": [b"put the bowl on the plate"] * (len(demo["actions"]) - 1),
                "observation/image": [png(frame[::-1, ::-1]) for frame in obs["agentview_rgb"]],
                "observation/wrist_image": [png(frame[::-1, ::-1]) for frame in obs["eye_in_hand_rgb"]],
                "observation/state": np.hstack([obs["ee_states"], obs["gripper_states"]]).astype(np.float32),
            }
            raw.append(steps | {"is_first": np.arange(len(steps["action"])) == 0})
    folder = write_rlds(tmp_path / "libero_goal/1.0.0", "libero_goal", LIBERO, raw, files=[str(file)] * 2)
    ours = read_all(folder, ("static", "wrist"))
    theirs = list(read_libero(file, ("static", "wrist"), image_rotation="rotate180", pairing="aligned"))
    assert len(ours) == len(theirs) == 2
    for one, other in zip(ours, theirs, strict=True):
        for name in (field.name for field in fields(one) if field.name not in ("source", "frames")):
            np.testing.assert_array_equal(getattr(one, name), getattr(other, name), err_msg=name)
        for camera in ("static", "wrist"):
            np.testing.assert_array_equal(one.frames[camera], other.frames[camera])


def test_too_short_for_bridge(tmp_path):
    raw = [made_steps(BRIDGE, steps, np.random.default_rng(0)) for steps in (2, 3)]
    folder = write_rlds(tmp_path / "bridge_orig", "bridge_dataset", BRIDGE, raw)
    skipped: list[str] = []
    assert len(list(rlds_parts(folder, ("static",))[0].read(skipped))) == 1
    assert len(skipped) == 1 and "record 0 has 2 steps, too few" in skipped[0]


def test_released_statistics_map_to_the_unit_interval():
    """q01 and q99 that openvla-7b was released with (fact sheet baselines §1.1): bridge_orig, fractal20220817_data."""
    released = {
        "bridge_orig": (
            [-0.0287273, -0.0417035, -0.0260939, -0.0809211, -0.0928870, -0.2071828, 0],
            [0.0283097, 0.0408553, 0.0401616, 0.0819205, 0.0779285, 0.2038257, 1],
        ),
        "fractal20220817_data": (
            [-0.2245353, -0.1482001, -0.2315897, -0.3517995, -0.4193011, -0.4364346, 0],
            [0.1782469, 0.1493838, 0.2184235, 0.5892666, 0.3527266, 0.4479668, 1],
        ),
    }
    for low, high in released.values():
        statistics = ActionStatistics(low, high, [0] * 7, [1] * 7, [-1] * 7, [1] * 7, 1)
        normalizer = ActionNormalizer(statistics, "q99")
        found = normalizer.normalize(torch.tensor([low, high, [0] * 7]))
        torch.testing.assert_close(found[0], torch.tensor([-1.0] * 6 + [0]))
        torch.testing.assert_close(found[1], torch.tensor([1.0] * 7), atol=1e-5, rtol=0)
        rest = [(0 - a) / (b - a) * 2 - 1 for a, b in zip(low[:6], high[:6], strict=True)]
        torch.testing.assert_close(found[2, :6], torch.tensor(rest), atol=1e-5, rtol=0)
