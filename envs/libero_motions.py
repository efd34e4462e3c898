"""How LIBERO's scripted experts move: proportional control of the hand's pose, by the relative actions a policy has.

Every motion is a generator of one (action, distance) per control step; the caller steps the environment between two of
them. `action` is (7,) float64, motion in [-1, 1], gripper 1 = open; `distance` is metres to go, 0 where the hand is not
in free space, so that noise can be kept away from grasps (fact sheet demo §1).

Lengths are metres, angles radians, the axes the world's: x away from the robot, y to its left, z up.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from scipy.spatial.transform import Rotation

from envs.libero import LiberoEnv

OPEN, CLOSED = 1.0, 0.0
Motion = Iterator[tuple[np.ndarray, float]]

_GAIN = 20.0  # action units (0.05 m) per metre of error
_FIRM = 40.0  # the same while the hand's orientation is controlled too, which pulls it off its way
_TURN_GAIN = 2.0  # action units (0.5 rad) per radian of error
_SLOWEST = 0.5  # shortest motion while underway: a learner that copies a creeping approach comes to rest in it
_STEADY = 0.8  # longest motion while something is pulled, pushed or turned
_ALIGNED = 0.08  # radians within which a turn is complete
_UPRIGHT = 0.3  # radians from an orientation within which the hand can do without a turn


def downward(yaw: float) -> Rotation:
    """The hand pointing down, its fingers closing along the line at `yaw` from the y axis (0: as episodes start)."""
    return Rotation.from_euler("z", yaw) * Rotation.from_euler("x", np.pi)


class Hand:
    """The hand of one environment: where it is, and motions of it."""

    def __init__(self, env: LiberoEnv):
        self._env = env

    @property
    def position(self) -> np.ndarray:
        """(3,) the point between the finger tips."""
        return self._env.raw_obs["robot0_eef_pos"]

    @property
    def rotation(self) -> Rotation:
        """Columns: across the fingers' line, that line, and where the fingers point."""
        return Rotation.from_quat(self._env.raw_obs["robot0_eef_quat"])

    def angle_to(self, other: Rotation) -> float:
        """Radians."""
        return float((other * self.rotation.inv()).magnitude())

    def facing(self, approach: np.ndarray, line: np.ndarray) -> Rotation:
        """Fingers pointing along `approach` and closing along `line`: of the two such orientations the nearer one."""
        z = approach / np.linalg.norm(approach)
        y = line - z * (z @ line)
        y = y / np.linalg.norm(y)
        both = [Rotation.from_matrix(np.stack([np.cross(side, z), side, z], axis=1)) for side in (y, -y)]
        return min(both, key=self.angle_to)

    def pointing_down(self, yaw: float) -> Rotation | None:
        """`downward` along the line at `yaw`, a line having two yaws; None where the hand points that way already."""
        target = downward((yaw + np.pi / 2) % np.pi - np.pi / 2)
        return target if self.angle_to(target) > _UPRIGHT else None

    def reach(
        self,
        target: np.ndarray,
        gripper: float,
        tolerance: float,
        limit: int,
        towards: Rotation | None = None,
        contact: bool = False,
    ) -> Motion:
        """Go to `target` and, if `towards` is given, turn there; ends early once within `tolerance`.

        Args:
            limit: control steps after which it is left at that.
            towards: orientation of the hand; left out, it is kept as it is.
            contact: something is pulled, pushed or turned: straight on, at half speed, and no place for noise.
        """
        for _ in range(limit):
            error = target - self.position
            distance = float(np.linalg.norm(error))
            turn = np.zeros(3) if towards is None else (towards * self.rotation.inv()).as_rotvec()
            if distance < tolerance and np.linalg.norm(turn) < _ALIGNED:
                return
            gain = _GAIN if towards is None else _FIRM
            motion = error * (gain if distance < tolerance else max(gain, _SLOWEST / distance))
            if contact:
                motion *= min(1.0, _STEADY / max(np.abs(motion).max(), 1e-9))
            action = np.array([*np.clip(motion, -1, 1), *np.clip(_TURN_GAIN * turn, -1, 1), gripper])
            yield action, 0.0 if contact else distance

    def stay(self, steps: int, gripper: float) -> Motion:
        """Hold still, for the fingers to open or close."""
        for _ in range(steps):
            yield np.array([0, 0, 0, 0, 0, 0, gripper]), 0.0
