"""A scripted WidowX for SimplerEnv: knowing every pose, it grasps the source from above and drops it on the target.

A control of simulator, action conventions and success test, not a demonstrator.

`ExpertWidowX` gives its next action where the state would be, so that `policy=expert` passes it on (vla/replay.py).

    env = ExpertWidowX("carrot_on_plate", cameras=())
    observation = env.reset(seed=0)
    done = env.step(observation["state"])
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from scipy.spatial.transform import Rotation

from envs.simpler.maniskill3 import WidowXEnv

OPEN, CLOSED = 1.0, 0.0
_STRIDE, _TURN = 0.04, 0.35  # metres and radians per control step; faster, the arm swings
_GRIP = 4  # control steps the fingers need
_OVER = np.array([0, 0, 0.12])  # metres over an object on the way to and from it; a spoon hangs down

Motion = Iterator[np.ndarray]


class WidowXExpert:
    """For one episode, from its start: `act()` before every step."""

    def __init__(self, env: WidowXEnv):
        self._simulator = env.maniskill
        self._plan = self._pick_and_place()

    def act(self) -> np.ndarray:
        """(7,) xyz (m), roll, pitch, yaw (rad), gripper: the protocol's action."""
        return next(self._plan)

    def _pick_and_place(self) -> Motion:
        source, turn = self._object(self._simulator.source_obj_name)
        yield from self._go(source + _OVER, OPEN, yaw=self._turn_across(turn))
        yield from self._go(source, OPEN)
        yield from self._hold(CLOSED)
        held = self._object(self._simulator.source_obj_name)[0] - self._hand()
        yield from self._go(source + _OVER, CLOSED)
        target, _ = self._object(self._simulator.target_obj_name)
        yield from self._go(target - held + _OVER, CLOSED)
        yield from self._go(target - held + [0, 0, self._drop_height()], CLOSED)
        yield from self._hold(OPEN)
        yield from self._go(target - held + _OVER, OPEN)
        while True:
            yield _action(np.zeros(3), 0, OPEN)

    def _go(self, goal: np.ndarray, gripper: float, yaw: float = 0.0) -> Motion:
        """Straight to `goal`, turning by `yaw` (rad) on the way, and one step more for the arm to catch up."""
        while True:
            left = goal - self._hand()
            stride = left * min(1.0, _STRIDE / max(np.linalg.norm(left), 1e-9))
            turn = float(np.clip(yaw, -_TURN, _TURN))
            yield _action(stride, turn, gripper)
            yaw -= turn
            if np.linalg.norm(left) <= _STRIDE and yaw == 0:
                yield _action(np.zeros(3), 0, gripper)
                return

    def _hold(self, gripper: float) -> Motion:
        for _ in range(_GRIP):
            yield _action(np.zeros(3), 0, gripper)

    def _hand(self) -> np.ndarray:
        """(3,) the hand's target position (m), which actions move, in the axes of the robot's base, like all here."""
        return self._simulator.agent.controller.controllers["arm"]._target_pose.p[0].numpy().astype(np.float64)

    def _object(self, name: str) -> tuple[np.ndarray, Rotation]:
        pose = self._simulator.agent.robot.pose.inv() * self._simulator.objs[name].pose
        return pose.p[0].numpy().astype(np.float64), Rotation.from_quat(pose.q[0].numpy(), scalar_first=True)

    def _turn_across(self, turn: Rotation) -> float:
        """Yaw that puts the fingers, which open along y at the start, across the object's long axis, its x."""
        along = turn.apply([1, 0, 0])
        return float((np.arctan2(along[1], along[0]) + np.pi / 2) % np.pi - np.pi / 2)

    def _drop_height(self) -> float:
        """Metres between the source's centre and the target's when the fingers open."""
        boxes = self._simulator.episode_model_bbox_sizes
        return sum(float(boxes[name][2]) / 2 for name in self._simulator.obj_names) + 0.02


def _action(stride: np.ndarray, yaw: float, gripper: float) -> np.ndarray:
    return np.array([*stride, 0.0, 0.0, yaw, gripper])


class ExpertWidowX(WidowXEnv):
    """With the scripted expert's next action (7,) where the state would be, for `policy=expert` to pass on."""

    def reset(self, seed: int) -> dict:
        self._expert = None
        super().reset(seed)
        self._expert = WidowXExpert(self)
        return self.observe()

    def observe(self) -> dict:
        observation = super().observe()
        return observation if self._expert is None else observation | {"state": self._expert.act()}
