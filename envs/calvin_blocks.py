"""How CALVIN's scripted experts handle blocks: pick, lift, turn, push, place and stack them (fact sheet calvin §6)."""

from __future__ import annotations

import numpy as np

from envs.calvin_fixtures import Fixtures
from envs.calvin_motions import CARRY, CLOSED, FORWARD, OPEN, Actions, Arm, pointing, reachable_yaw, rotation
from envs.calvin_table import DRAWER_FLOOR, EDGE, TOP, UP, Block, Table, by

_YAW = (FORWARD - 2.0, FORWARD + 2.7)  # what the wrist reaches anywhere over the table
_WIDEST = 0.075  # side of a block that fits between the fingers
_FINGER = 0.046  # from the middle of the open gripper to the middle of a finger
_PLAY = 0.015  # by which a block may be off the middle of the fingers
_INTO = -1.0  # pitch that enters the cabinet square to its sloping front
_TURN = 1.35  # radians; the task asks for 1.05, and a block slips


class Blocks:
    """Motions on blocks. `fixtures` open the cabinet's door where it is in the way."""

    def __init__(self, arm: Arm, table: Table, fixtures: Fixtures):
        self._arm, self._table, self._fixtures = arm, table, fixtures

    def lift(self, color: str, lowest: float = 0.0) -> Actions:
        """Take a block from the table, the drawer or the cabinet and up, by 9 cm from where it is or from `lowest`."""
        arm, table = self._arm, self._table
        block = table.block(color)
        x, y, z = block.position
        if z < TOP - 0.01:
            pitch = -0.3 if y > -0.27 else 0.0  # off the table's edge
            yield from self._pick(color, pitch, self._grasp_yaw(block), 0.15 * UP)
        elif y > 0.02:
            if sign := table.door_in_the_way(x):
                yield from self._fixtures.move_slider(sign)
                return
            # The hand is too wide to go in: the fingers take the front of the block, from the middle of the opening.
            inwards = float(np.clip(3 * (x - np.mean(table.opening())), -0.35, 0.35))
            yaw = self._grasp_yaw(block, FORWARD - inwards, slack=0.4, off=1.2)
            yield from self._pick(color, _INTO, yaw, -0.12 * pointing(_INTO, yaw), short=0.014)
        else:
            yield from self._pick(color, _lean(y), self._grasp_yaw(block), 0.09 * UP)
        top = max(arm.target[2], lowest) + 0.09
        yield from arm.reach(np.array([*arm.target[:2], top]), tolerance=0.01)

    def rotate(self, color: str, sign: int) -> Actions:
        """Turn a block as it lies, left (1) or right (-1)."""
        block, turn = self._table.block(color), sign * _TURN
        yaw = self._grasp_yaw(block, FORWARD - turn / 4, turn=turn)
        yield from self._pick(color, _lean(block.position[1]), yaw, 0.09 * UP)
        yield from self._arm.reach(self._arm.target, yaw=yaw + turn)
        yield from self._arm.hold(3)
        yield from self._arm.hold(4, OPEN)

    def push(self, color: str, sign: int) -> Actions:
        """Push a block right (1) or left (-1) with closed fingers."""
        arm, table, block = self._arm, self._table, self._table.block(color)
        along = by(x=float(sign))
        end = block.position[0] + sign * (0.14 - block.half(along))

        def follow() -> np.ndarray:
            y = table.block(color).position[1]  # a block that swerves is pushed back from where it swerves to
            return np.array([end, y + 0.5 * np.clip(y - block.position[1], -0.02, 0.02), block.position[2]])

        yield from self._behind(block, along, _lean(block.position[1]))
        yield from arm.reach(follow, speed=0.55)
        yield from arm.hold(3)

    def push_into_drawer(self) -> Actions:
        """Push the block on the table that is nearest the drawer over the edge."""
        arm, table, drawer = self._arm, self._table, self._table.link("drawer")
        on_table = [b for b in table.blocks() if table.touching(b.color) == {"base"}] or table.blocks()
        block = min(on_table, key=lambda b: abs(b.position[0] - drawer[0]))
        x, y, z = block.position
        goal = np.array([np.clip(x, drawer[0] - 0.13, drawer[0] + 0.13), EDGE - 0.08, z])
        along = (goal - block.position) / np.linalg.norm(goal - block.position)
        if y + block.half(along) > -0.06:  # no room for fingers between it and the cabinet: pull it to the edge
            yield from self._pick(block.color, _lean(y), self._grasp_yaw(block), 0.09 * UP)
            yield from arm.reach(goal + by(y=0.05), speed=0.8)
            yield from arm.hold(6, OPEN)
            return
        yield from self._behind(block, along, _lean(y))
        yield from arm.reach(goal - block.half(along) * along, speed=0.7)
        yield from arm.hold(3)

    def place_in_drawer(self, color: str) -> Actions:
        drawer = self._table.link("drawer")
        inside = [b.position[0] for b in self._table.blocks(but=color) if b.position[2] < TOP - 0.01]
        options = drawer[0] + np.array([0.0, -0.09, 0.09])
        x = max(options, key=lambda x: min([abs(x - other) for other in inside], default=0.0))
        middle = (EDGE + drawer[1] - 0.165) / 2  # between the table's edge and the drawer's front
        spot = np.array([x, middle, DRAWER_FLOOR + 0.04])
        yield from self._set_down(color, spot, self._flat_pitch(color, -1.1, 0.0), 0.2 * UP)

    def place_in_slider(self, color: str) -> Actions:
        inside = [b.position[0] for b in self._table.blocks(but=color) if b.position[1] > 0.02]
        options = np.linspace(*self._table.opening(), 7)[[3, 2, 4, 1, 5]]  # the middle first
        x = max(options, key=lambda x: min([0.08, *(abs(x - other) for other in inside)]))
        pitch = self._flat_pitch(color, -1.0, -0.4)
        in_front = -0.13 * pointing(pitch, FORWARD) + 0.02 * UP
        yield from self._set_down(color, np.array([x, 0.085, TOP + 0.03]), pitch, in_front)

    def stack(self, color: str) -> Actions:
        """Put the carried block on the nearest one that lies on the table."""
        table, carried = self._table, self._table.block(color)
        others = table.blocks(but=color)
        free = [b for b in others if table.touching(b.color) == {"base"}] or others
        base = min(free, key=lambda b: float(np.linalg.norm(b.position - carried.position)))
        pitch = self._flat_pitch(color, -1.1, 0.0)
        _, turned = self._in_hand(color)
        half = float(np.abs((rotation(pitch, FORWARD) @ turned)[2]) @ carried.size / 2)
        spot = base.position + (base.half(UP) + half + 0.004) * UP
        yield from self._set_down(color, spot, pitch, 0.08 * UP)

    def top_of_stack(self) -> str:
        """The colour of the block that lies on blocks only; of the highest one where there is none."""
        blocks = self._table.blocks()
        colors = {b.color for b in blocks}
        tops = [b for b in blocks if (on := self._table.touching(b.color) - {"robot"}) and on <= colors]
        return max(tops or blocks, key=lambda b: b.position[2]).color

    def _grasp_yaw(
        self, block: Block, wanted: float = FORWARD, slack: float = 0.0, off: float = np.pi, turn: float = 0.0
    ) -> float:
        """The yaw nearest `wanted` at which the fingers close on two faces of a block and land on no other.

        Args:
            slack: radians by which it may miss the faces; the closing fingers turn the block.
            off: largest distance from `wanted`.
            turn: by what the hand is going to turn from there, which the wrist must allow.
        """
        low, high = _YAW[0] - min(turn, 0.0), _YAW[1] - max(turn, 0.0)
        options = []
        for axis in range(3):
            along = block.rotation[:, axis]
            if abs(along[2]) > 0.5 or block.size[axis] > _WIDEST:
                continue
            yaw = reachable_yaw(np.arctan2(along[1], along[0]) + np.pi / 2)
            fingers = [block.position + side * _FINGER * along for side in (-1, 1)]
            crowded = any(b.covers(point, 0.012) for b in self._table.blocks(but=block.color) for point in fingers)
            crowded |= float(np.abs(self._off_walls(block, along)).max()) > _PLAY
            options += [(crowded, abs(yaw + k - wanted), yaw + k) for k in (-np.pi, 0.0, np.pi)]
        options = [option for option in options if low < option[2] < high and option[1] < off]
        if not options:
            return wanted
        _, _, best = min(options)
        return best + float(np.clip(wanted - best, -slack, slack))

    def _pick(self, color: str, pitch: float, yaw: float, before: np.ndarray, short: float = 0.0) -> Actions:
        """Travel to `before` of a block (an offset), close in on it, or up to `short` of its centre, and grasp it."""
        arm, table = self._arm, self._table
        arm.gripper = OPEN

        def at() -> np.ndarray:
            block, along = table.block(color), pointing(pitch, yaw)
            shift = self._off_walls(block, by(np.sin(yaw), -np.cos(yaw))).clip(-_PLAY, _PLAY)
            return block.position + shift + 0.004 * UP - max(0.004, min(block.half(along) - 0.014, short)) * along

        yield from arm.travel(at() + before, pitch, yaw)
        yield from arm.reach(at() + before, pitch, yaw, tolerance=0.01, turn=0.03, wait=10)
        yield from arm.reach(at, pitch, yaw, settle=4, speed=0.8, lead=0.035)
        yield from arm.hold(6, CLOSED)

    def _off_walls(self, block: Block, axis: np.ndarray) -> np.ndarray:
        """Shift (3,) that keeps fingers which close along `axis` off the walls of the drawer that a block lies in."""
        if block.position[2] > TOP - 0.01:
            return np.zeros(3)
        drawer = self._table.link("drawer")
        margin = _FINGER * np.abs(axis) + 0.012
        low, high = drawer + by(-0.205, -0.165) + margin, drawer + by(0.205, np.inf) - margin
        return (block.position.clip(low, high) - block.position) * [1, 1, 0]

    def _behind(self, block: Block, along: np.ndarray, pitch: float) -> Actions:
        """Closed fingers down to the side of a block from which they push it `along`."""
        self._arm.gripper = CLOSED
        behind = block.position - (block.half(along) + 0.03) * along
        yield from self._arm.travel(behind + 0.08 * UP, pitch)
        yield from self._arm.reach(behind, pitch, settle=3)

    def _in_hand(self, color: str) -> tuple[np.ndarray, np.ndarray]:
        """Position (3,) and rotation (3, 3) of a block relative to the hand's."""
        position, turned = self._arm.measured()
        block = self._table.block(color)
        return turned.T @ (block.position - position), turned.T @ block.rotation

    def _flat_pitch(self, color: str, lowest: float, highest: float) -> float:
        """Pitch in a range at which the carried block lies flattest: it was taken at any tilt."""
        _, turned = self._in_hand(color)
        pitches = np.linspace(lowest, highest, 41)
        flatness = [np.abs((rotation(pitch, FORWARD) @ turned)[2]).max() for pitch in pitches]
        return float(pitches[int(np.argmax(np.round(flatness, 3)))])

    def _set_down(self, color: str, spot: np.ndarray, pitch: float, above: np.ndarray) -> Actions:
        """Bring the carried block's centre to `spot` by way of `above` (an offset), open, and leave the way it came."""
        arm = self._arm
        offset, _ = self._in_hand(color)
        place = spot - rotation(pitch, FORWARD) @ offset
        yield from arm.travel(place + above, pitch, height=CARRY)
        yield from arm.reach(place + above, pitch, FORWARD, tolerance=0.01, turn=0.03)
        yield from arm.reach(place, pitch, FORWARD, settle=4, speed=0.7)
        yield from arm.hold(4, OPEN)
        yield from arm.reach(place + above, tolerance=0.02, speed=0.8)


def _lean(y: float) -> float:
    """Pitch that keeps the hand off the cabinet at a block close to it."""
    return float(np.clip(-5 * (y + 0.1), -0.5, 0.0))
