"""The state that a policy reads in SimplerEnv, as the data set of its robot records it (data/oxe.py)."""

from __future__ import annotations

import numpy as np
from scipy.spatial.transform import Rotation

_TOP_DOWN = Rotation.from_matrix([[0, 0, 1], [0, 1, 0], [-1, 0, 0]])
"""The hand's pose that BridgeData's rotations count from (bridge_data_robot, widowx_controller.py)."""
_FINGERS = (0.015, 0.037)


def bridge_state(position: np.ndarray, quaternion: np.ndarray, fingers: np.ndarray) -> np.ndarray:
    """(7,) float32 as BridgeData's: x, y, z (m), roll, pitch, yaw (rad), opening of the gripper in [0, 1].

    Args:
        position, quaternion (w, x, y, z): of WidowX's hand in the axes of the robot's base.
        fingers: (2,) positions of the fingers, m.
    """
    turn = Rotation.from_quat(quaternion, scalar_first=True) * _TOP_DOWN.inv()
    opening = (np.mean(fingers) - _FINGERS[0]) / (_FINGERS[1] - _FINGERS[0])
    return np.concatenate([position, turn.as_euler("xyz"), [np.clip(opening, 0, 1)]]).astype(np.float32)


def fractal_state(position: np.ndarray, quaternion: np.ndarray, closedness: float) -> np.ndarray:
    """(8,) float32 as RT-1's: x, y, z (m), quaternion (x, y, z, w), closedness of the gripper in [0, 1].

    Args:
        position, quaternion (w, x, y, z): of the Google Robot's hand in the axes of the robot's base.
    """
    return np.concatenate([position, np.roll(quaternion, -1), [np.clip(closedness, 0, 1)]]).astype(np.float32)
