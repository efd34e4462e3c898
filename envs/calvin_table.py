"""What CALVIN's scripted experts see of a scene: blocks, links, joints and contacts (privileged state).

Lengths are metres in the world's axes: x to the right and y away from the robot's side of the table, z up. What is a
constant here is the same in scenes A to D; what differs, and what moves, is read from the simulator.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from envs.calvin_sim import CalvinSim

TOP = 0.44
"""Height of the table and of the cabinet's floor."""
EDGE = -0.18
"""y of the table's front edge, under which the drawer runs."""
DRAWER_FLOOR = 0.342
UP = np.array([0.0, 0.0, 1.0])

_DOOR = 0.285  # width of the sliding door, from its frame's origin on
_CABINET = 0.264  # half the cabinet's inner width, on both sides of the plank's origin
_HAND = range(8, 16)  # links of the robot from the hand on
_LEFT_FINGER, _FINGERS = (9, 10), (9, 11)  # links; joints
_BETWEEN = 0.01  # opening of a closed gripper above which it has something between its fingers


def by(x: float = 0.0, y: float = 0.0, z: float = 0.0) -> np.ndarray:
    return np.array([x, y, z])


@dataclass(frozen=True)
class Block:
    """A block as it lies: position (3,), rotation (3, 3), size (3,) along its own axes."""

    color: str
    position: np.ndarray
    rotation: np.ndarray
    size: np.ndarray

    def half(self, direction: np.ndarray) -> float:
        """How far it reaches from its centre along a unit vector."""
        return float(np.abs(self.rotation.T @ direction) @ self.size / 2)

    def covers(self, point: np.ndarray, margin: float) -> bool:
        """Whether a point is inside it, or closer to it than `margin`."""
        return bool(np.all(np.abs(self.rotation.T @ (point - self.position)) < self.size / 2 + margin))


class Table:
    """The present state of a simulator's scene."""

    def __init__(self, sim: CalvinSim):
        self._p, self._client = sim.env.p, sim.env.cid
        self._table = sim.env.scene.fixed_objects[0].uid
        self._robot = sim.env.robot.robot_uid
        self._blocks = {body.name.removeprefix("block_"): body.uid for body in sim.env.scene.movable_objects}
        count = self._p.getNumJoints(self._table, physicsClientId=self._client)
        infos = [self._p.getJointInfo(self._table, i, physicsClientId=self._client) for i in range(count)]
        self._links = {info[12].decode().removesuffix("_link"): i for i, info in enumerate(infos)}
        self._upper = {name: infos[i][9] for name, i in self._links.items()}
        self._lights = {light.name: light for light in sim.env.scene.lights}

    def block(self, color: str) -> Block:
        body = self._blocks[color]
        position, quaternion = self._p.getBasePositionAndOrientation(body, physicsClientId=self._client)
        matrix = np.array(self._p.getMatrixFromQuaternion(quaternion)).reshape(3, 3)
        size = self._p.getCollisionShapeData(body, -1, physicsClientId=self._client)[0][3]
        return Block(color, np.array(position), matrix, np.array(size))

    def blocks(self, but: str | None = None) -> list[Block]:
        """All blocks, but one of them."""
        return [self.block(color) for color in self._blocks if color != but]

    def link(self, name: str) -> np.ndarray:
        """Position (3,) of the frame of a link: button, switch, slide, drawer or plank."""
        return np.array(self._p.getLinkState(self._table, self._links[name], physicsClientId=self._client)[4])

    def joint(self, name: str) -> float:
        return self._p.getJointState(self._table, self._links[name], physicsClientId=self._client)[0]

    def joint_left(self, name: str) -> float:
        """How far a joint can still open."""
        return self._upper[name] - self.joint(name)

    def light(self, name: str) -> bool:
        return bool(self._lights[name].get_state())

    def touching(self, color: str) -> set[str]:
        """What a block touches: robot, colours of other blocks, links of the table (base is its body)."""
        names = {body: other for other, body in self._blocks.items()} | {self._robot: "robot"}
        links = {i: name for name, i in self._links.items()} | {-1: "base"}
        contacts = self._p.getContactPoints(bodyA=self._blocks[color], physicsClientId=self._client)
        return {links[c[4]] if c[2] == self._table else names.get(c[2], "floor") for c in contacts}

    def held(self) -> str | None:
        """Colour of the block that both fingers touch and nothing else carries."""
        for color, body in self._blocks.items():
            contacts = self._p.getContactPoints(bodyA=body, physicsClientId=self._client)
            fingers = {c[4] in _LEFT_FINGER for c in contacts if c[2] == self._robot}
            if len(fingers) == 2 and all(c[2] == self._robot for c in contacts):
                return color
        return None

    def pinched(self) -> bool:
        """Whether anything keeps the fingers apart."""
        states = [self._p.getJointState(self._robot, joint, physicsClientId=self._client) for joint in _FINGERS]
        return sum(state[0] for state in states) > _BETWEEN

    def near_hand(self, distance: float) -> bool:
        """Whether the table or a block that is not held is within `distance` of the hand."""
        held = self.held()
        bodies = [self._table, *(body for color, body in self._blocks.items() if color != held)]
        return any(
            point[3] in _HAND
            for body in bodies
            for point in self._p.getClosestPoints(self._robot, body, distance, physicsClientId=self._client)
        )

    def opening(self) -> tuple[float, float]:
        """The wider of the two stretches of x that the cabinet's door leaves open."""
        plank, door = self.link("plank")[0], self.link("slide")[0]
        left, right = (plank - _CABINET, door), (door + _DOOR, plank + _CABINET)
        return max(left, right, key=lambda stretch: stretch[1] - stretch[0])

    def door_in_the_way(self, x: float, margin: float = 0.05) -> int:
        """Which way the door must move before the hand fits in at x: right (1), left (-1), or 0 for neither."""
        door = self.link("slide")[0]
        if not door - margin < x < door + _DOOR + margin:
            return 0
        sign = 1 if x < door + _DOOR / 2 else -1
        return sign if (self.joint("slide") if sign > 0 else self.joint_left("slide")) > 0.01 else 0
