"""One LIBERO demonstration in the three forms it comes in, HDF5, LeRobot v3 and RLDS, gives equal arrays."""

from __future__ import annotations

import h5py
import numpy as np

from data.lerobot import read_lerobot
from data.lerobot_writer import write_lerobot
from data.libero import read_libero
from tests.rlds_files import LIBERO, png, read_all, write_rlds
from tests.test_libero_data import write_demos

CAMERAS = ("static", "wrist")
INSTRUCTION = "put the bowl on the plate"


def test_hdf5_lerobot_and_rlds_give_equal_arrays(tmp_path):
    """RLDS is written here from the HDF5 file itself as OpenVLA's builder does: frames turned by 180°, raw gripper, and
    observation and action of a row belonging together, which in the HDF5 file are a row apart."""
    path = write_demos(tmp_path / "put_the_bowl_on_the_plate_demo.hdf5", lengths=(9,))
    (direct,) = read_libero(path, CAMERAS)

    write_lerobot([direct], tmp_path / "lerobot", 20, video=False, gripper="libero", orientation="rotate180")
    (lerobot,) = read_lerobot(tmp_path / "lerobot", CAMERAS, image_rotation="rotate180")

    with h5py.File(path) as file:
        demo = file["data/demo_0"]
        turned = {key: demo[f"obs/{key}"][:-1][:, ::-1, ::-1] for key in ("agentview_rgb", "eye_in_hand_rgb")}
        steps = {
            "action": demo["actions"][1:].astype(np.float32),
            "is_first": np.arange(8) == 0,
            "language_instruction": [INSTRUCTION.encode()] * 8,
            "observation/image": [png(np.ascontiguousarray(frame)) for frame in turned["agentview_rgb"]],
            "observation/wrist_image": [png(np.ascontiguousarray(frame)) for frame in turned["eye_in_hand_rgb"]],
            "observation/state": np.column_stack([demo["obs/ee_states"][:-1], demo["obs/gripper_states"][:-1]]),
        }
        size = turned["agentview_rgb"].shape[1:]
    image = {"image": {"shape": {"dimensions": [str(n) for n in size]}, "dtype": "uint8", "encodingFormat": "png"}}
    features = LIBERO | {"observation/image": image, "observation/wrist_image": image}
    steps["observation/state"] = steps["observation/state"].astype(np.float32)
    folder = write_rlds(tmp_path / "libero_goal_no_noops" / "1.0.0", "libero_goal_no_noops", features, [steps])
    (rlds,) = read_all(folder, CAMERAS)

    for other in (lerobot, rlds):
        assert other.instruction == direct.instruction == INSTRUCTION
        np.testing.assert_array_equal(other.actions, direct.actions)
        np.testing.assert_array_equal(other.state, direct.state)
        for camera in CAMERAS:
            np.testing.assert_array_equal(other.frames[camera], direct.frames[camera])
    assert set(direct.actions[:, 6]) == {0.0, 1.0}, "the gripper does something in this demonstration"
