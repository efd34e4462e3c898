"""How CALVIN's scripted experts move: smooth waypoint following by relative actions.

The robot adds every action to a target pose of its own (fact sheet calvin §3.5), which the hand follows about one step
and up to 4 cm behind. So paths are planned from the target, and the measured pose only corrects the last millimetres.

Lengths are metres, angles radians, the world's axes: x to the right and y away from the robot's side of the table, z
up. The hand's orientation is (pitch, yaw) with roll π: pitch 0 points the fingers straight down, pitch -1 tilts them
towards +y; at yaw π/2 they open along x.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np

from envs.calvin_sim import CalvinSim

ACTION_POSITION, ACTION_ANGLE = 0.02, 0.05
"""What an action of 1 moves the target by (fact sheet calvin §5)."""
OPEN, CLOSED = 1.0, 0.0
FORWARD = np.pi / 2
"""Yaw at which the fingers open along x and a tilt leans towards the cabinet."""

CRUISE, CARRY = 0.57, 0.60
"""Heights of travel, with empty hands and with a block: over stacked blocks, below the cabinet's upper edge."""

_FRONT = -0.12  # y at which the hand passes in front of the cabinet, its handle and the switch
_SPEED, _PUSH = 0.017, 0.0045  # metres per step, and by how much that may change in a step
_SPIN, _TWIST = 0.05, 0.015  # radians
_MIDDLE = FORWARD + 0.35  # middle of the wrist's range: a turn never passes through the yaw opposite to it
_LEAD = 0.07  # how far the target may be ahead of the hand; from 60 % of that on it slows down
_PATIENCE = 12  # steps at a stop after which a motion counts as blocked

Actions = Iterator[np.ndarray]


class BlockedError(Exception):
    """The hand cannot follow: something is in its way."""


def wrap(angle):
    """Into [-π, π)."""
    return (angle + np.pi) % (2 * np.pi) - np.pi


def reachable_yaw(yaw: float) -> float:
    """The same yaw, less than half a turn from the middle of the wrist's range."""
    return float(_MIDDLE + wrap(yaw - _MIDDLE))


def pointing(pitch: float, yaw: float) -> np.ndarray:
    """Unit vector along which the fingers point."""
    return np.array([-np.sin(pitch) * np.cos(yaw), -np.sin(pitch) * np.sin(yaw), -np.cos(pitch)])


def rotation(pitch: float, yaw: float) -> np.ndarray:
    """(3, 3) of the hand at (roll π, pitch, yaw)."""
    z = pointing(pitch, yaw)
    y = np.array([np.sin(yaw), -np.cos(yaw), 0.0])
    return np.stack([np.cross(y, z), y, z], axis=1)


class Arm:
    """Follows waypoints. Its motions are generators of (7,) actions, one per control step.

    Args:
        haste: factor on all speeds.
        extra: added to the heights of travel.
    """

    def __init__(self, sim: CalvinSim, haste: float = 1.0, extra: float = 0.0):
        self._robot, self._p, self._client = sim.env.robot, sim.env.p, sim.env.cid
        self._haste, self._extra = haste, extra
        self._velocity, self._spin = np.zeros(3), np.zeros(3)
        self.gripper = OPEN if self._robot.gripper_action == 1 else CLOSED

    @property
    def target(self) -> np.ndarray:
        return np.array(self._robot.target_pos)

    @property
    def angles(self) -> tuple[float, float]:
        """Target (pitch, yaw)."""
        return float(wrap(self._robot.target_orn[1])), reachable_yaw(self._robot.target_orn[2])

    def measured(self) -> tuple[np.ndarray, np.ndarray]:
        """Position (3,) and rotation (3, 3) of the point between the finger tips."""
        state = self._p.getLinkState(self._robot.robot_uid, self._robot.tcp_link_id, physicsClientId=self._client)
        return np.array(state[0]), np.array(self._p.getMatrixFromQuaternion(state[1])).reshape(3, 3)

    def reach(
        self,
        position: np.ndarray | Callable[[], np.ndarray],
        pitch: float | None = None,
        yaw: float | None = None,
        tolerance: float = 0.003,
        wait: int = 0,
        settle: int = 0,
        speed: float = 1.0,
        turn: float = 0.02,
        lead: float = _LEAD,
    ) -> Actions:
        """Move the target to a pose; angles left out stay as they are.

        Args:
            position: (3,), or where that is by now.
            tolerance, turn: metres and radians left over; generous ones round a corner instead of stopping at it.
            wait: steps spent at most until the hand itself is within 1 cm.
            settle: steps spent at most on correcting it, to 2 mm.
            speed: of the fastest.
            lead: how far the target may be ahead of a hand that is in contact, which sets how hard it presses.

        Raises:
            BlockedError: the hand stays behind.
        """
        where = position if callable(position) else lambda: position
        pitch, yaw = self.angles[0] if pitch is None else pitch, self.angles[1] if yaw is None else yaw
        stuck = 0
        while True:
            offset, angle = where() - self.target, self._angle_to(pitch, yaw)
            if np.linalg.norm(offset) < tolerance and np.abs(angle).max() < turn:
                break
            ahead = self._ahead(offset)
            stuck = stuck + 1 if ahead > 0.95 * lead else 0
            if stuck > _PATIENCE:
                raise BlockedError
            yield self._step(offset, angle, speed * float(np.clip(2.5 * (1 - ahead / lead), 0.0, 1.0)))
        for _ in range(wait):
            if np.linalg.norm(where() - self.measured()[0]) < 0.01:
                break
            yield self._step(where() - self.target, self._angle_to(pitch, yaw), speed)
        for _ in range(settle):
            missing = where() - self.measured()[0]
            if np.linalg.norm(missing) < 0.002 or self._ahead(missing) > 0.4 * lead:
                break
            yield self._step(0.35 * missing, self._angle_to(pitch, yaw), speed)

    def travel(self, position: np.ndarray, pitch: float = 0.0, yaw: float = FORWARD, height: float = CRUISE) -> Actions:
        """Over everything to a pose, which is reached but not stopped at."""
        height += self._extra
        start = self.target
        if start[2] < height - 0.03 and np.linalg.norm(start[:2] - position[:2]) > 0.03:
            yield from self.reach(np.array([start[0], min(start[1], _FRONT), height]), tolerance=0.04, turn=np.inf)
        yield from self.reach(position, pitch, yaw, tolerance=0.015, turn=0.1)

    def retreat(self, distance: float, rise: float = 0.0) -> Actions:
        """Back along the fingers; never blocked, because it is the way out of that."""
        away = -distance * pointing(*self.angles)
        yield from self.reach(self.measured()[0] + away + [0, 0, rise], tolerance=0.02, lead=np.inf)

    def hold(self, steps: int, gripper: float | None = None) -> Actions:
        """Come to rest where it is, with the gripper set."""
        self.gripper = self.gripper if gripper is None else gripper
        for _ in range(steps):
            yield self._step(np.zeros(3), np.zeros(3), 1.0)

    def _ahead(self, offset: np.ndarray) -> float:
        """How far the target is from the hand, where moving on by `offset` would take it further."""
        lead = self.target - self.measured()[0]
        return float(np.linalg.norm(lead)) if lead @ offset > 0 else 0.0

    def _angle_to(self, pitch: float, yaw: float) -> np.ndarray:
        roll = wrap(np.pi - self._robot.target_orn[0])
        return np.array([roll, pitch - self.angles[0], reachable_yaw(yaw) - self.angles[1]])

    def _step(self, offset: np.ndarray, angle: np.ndarray, speed: float) -> np.ndarray:
        self._velocity = _smooth(self._velocity, offset, speed * self._haste * _SPEED, _PUSH)
        self._spin = _smooth(self._spin, angle, _SPIN, _TWIST)
        motion = np.concatenate([self._velocity / ACTION_POSITION, self._spin / ACTION_ANGLE])
        return np.append(motion.clip(-1, 1), self.gripper)


def _smooth(velocity: np.ndarray, error: np.ndarray, fastest: float, change: float) -> np.ndarray:
    """Next velocity per step: towards the goal, braking in time, changed by no more than `change`."""
    distance = float(np.linalg.norm(error))
    wanted = min(fastest, np.sqrt(2 * change * distance)) / max(distance, 1e-9)
    difference = min(wanted, 1.0) * error - velocity
    return velocity + difference * min(1.0, change / max(float(np.linalg.norm(difference)), 1e-9))
