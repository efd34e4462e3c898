"""From a policy's action to SimplerEnv's (facts simpler §5, baselines §0a.12, §8.5).

A policy's action is xyz (m), a rotation (rad) and the gripper in [0, 1], 1 = open, as data/oxe.py makes them of
BridgeData and RT-1; the environment's is xyz (m), axis-angle (rad) and a gripper command that the two robots read
differently:

- WidowX: absolute, +1 open, −1 closed.
- Google Robot: relative, +1 closes, −1 opens, and a change is held for 15 steps, since closing takes several seconds at
  3 Hz while a policy asks for it once.

Nothing is clipped on the way. Action chunks and temporal ensembling happen before (envs/benchmark.py, vla/ensemble.py).
"""

from __future__ import annotations

import numpy as np
from scipy.spatial.transform import Rotation

from vla.errors import UserError

ROTATIONS = ("euler", "axis_angle")


def motion(action: np.ndarray, rotation: str = "euler", scale: float = 1.0) -> np.ndarray:
    """(6,) xyz and axis-angle of a policy's action (7,).

    Args:
        rotation: what action[3:6] is: "euler", roll, pitch, yaw about fixed axes (transforms3d's euler2axangle "sxyz",
            what policies trained on BridgeData and RT-1 give), or "axis_angle".
        scale: factor on the translation and on the angle of the rotation (SimplerEnv's action_scale, 1 everywhere).

    Raises:
        UserError: another `rotation`.
        ValueError: not 7 finite numbers.
    """
    if rotation not in ROTATIONS:
        raise UserError(f"benchmark.rotation={rotation} is not known; choose one of {', '.join(ROTATIONS)}")
    action = np.asarray(action, dtype=np.float64)
    if action.shape != (7,) or not np.isfinite(action).all():
        raise ValueError(f"an action is 7 finite numbers, not {action}")
    turn = Rotation.from_euler("xyz", action[3:6]).as_rotvec() if rotation == "euler" else action[3:6]
    return scale * np.concatenate([action[:3], turn])


def controller_angles(axis_angle: np.ndarray) -> np.ndarray:
    """(3,) axis-angle → the angles that ManiSkill3's end-effector controller turns into the same rotation.

    ManiSkill2_real2sim takes axis-angle; ManiSkill3 takes angles about moving axes x, y, z (mani_skill 3.0.1,
    agents/controllers/pd_ee_pose.py). The two agree to first order only.
    """
    return Rotation.from_rotvec(axis_angle).as_euler("XYZ")


def widowx_gripper(opening: float) -> float:
    """+1 (open) above one half, else −1 (closed)."""
    return 1.0 if opening > 0.5 else -1.0


class StickyGripper:
    """The Google Robot's gripper command for one episode.

    The command is how far the policy's opening fell since the step before, 0 on the first step. A fall or rise of more
    than one half is latched and repeated for `repeats` steps, its own included; what the policy asks for meanwhile is
    not looked at.

    Args:
        repeats: 15 in Octo and OpenVLA, 10 in SpatialVLA.
        every_step: compare with the last step's opening, as Octo and OpenVLA do. False: with the opening at the last
            latch, as SpatialVLA does, so that a change that takes several steps still counts.
    """

    def __init__(self, repeats: int = 15, every_step: bool = True):
        self.repeats, self.every_step = repeats, every_step
        self._before: float | None = None
        self._latched, self._left = 0.0, 0

    def __call__(self, opening: float) -> float:
        """The command for this step, in [−1, 1]; +1 closes."""
        change = 0.0 if self._before is None else self._before - float(opening)
        latches = abs(change) > 0.5 and self._left == 0
        if self._before is None or self.every_step or latches:
            self._before = float(opening)
        if latches:
            self._latched, self._left = change, self.repeats
        if self._left == 0:
            return change
        self._left -= 1
        return self._latched
