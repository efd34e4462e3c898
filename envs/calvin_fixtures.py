"""How CALVIN's scripted experts work the drawer, the door, the switch and the button, with closed fingers.

Contact points are relative to link frames, which lie alike in scenes A to D (measured; fact sheet calvin §6).
"""

from __future__ import annotations

import numpy as np

from envs.calvin_motions import CLOSED, FORWARD, Actions, Arm, pointing
from envs.calvin_table import UP, Table, by

_SLOPE = by(y=0.5, z=0.866)  # the switch's way up, along the cabinet's front


class Fixtures:
    """Motions on the table's joints, from wherever they are.

    Args:
        aside: metres that the fingers keep from the middle of a handle.
    """

    def __init__(self, arm: Arm, table: Table, aside: float = 0.0):
        self._arm, self._table, self._aside = arm, table, aside

    def move_drawer(self, sign: int) -> Actions:
        """Fingers into the gap behind the handle, then pull (-1) or push (1) as far as it goes."""
        arm, drawer = self._arm, self._table.link("drawer")
        arm.gripper = CLOSED
        gap = np.array([drawer[0] + self._aside, drawer[1] - 0.21, 0.365])
        yield from arm.travel(gap + 0.15 * UP)
        yield from arm.reach(gap, settle=2)
        way = self._table.joint("drawer") if sign > 0 else self._table.joint_left("drawer")
        yield from arm.reach(gap + by(y=sign * (way + 0.02)), speed=0.7)
        yield from arm.hold(3)

    def move_slider(self, sign: int) -> Actions:
        """Fingers beside the door's handle, then push it right (1) or left (-1) as far as it goes."""
        arm, door = self._arm, self._table.link("slide")
        arm.gripper = CLOSED
        beside = np.array([door[0] + 0.14 - sign * 0.06, 0.0, 0.53])
        yield from arm.travel(beside + by(y=-0.1, z=0.04))
        yield from arm.reach(beside, settle=2)
        way = self._table.joint("slide") if sign > 0 else self._table.joint_left("slide")
        yield from arm.reach(beside + by(x=sign * (way + 0.03)), speed=0.9)
        yield from arm.hold(3)

    def switch_up(self) -> Actions:
        """Tilted fingers under the bar, then along the slope."""
        arm, bar = self._arm, self._bar()
        arm.gripper = CLOSED
        # On the left the arm cannot fold far enough to come straight in.
        pitch, yaw = -1.1, FORWARD + (0.6 if bar[0] < 0 else 0.0)
        under = bar + by(self._aside, -0.01, -0.05)
        yield from arm.travel(under - 0.1 * pointing(pitch, yaw) - by(z=0.02), pitch, yaw)
        yield from arm.reach(under, pitch, yaw, settle=3)
        yield from arm.reach(under + 0.13 * _SLOPE, speed=0.7)
        yield from arm.hold(3)

    def switch_down(self) -> Actions:
        """Fingers on top of the bar, then down the slope."""
        arm, pitch = self._arm, -0.5
        arm.gripper = CLOSED
        above = self._bar() + by(self._aside, z=0.045)
        yield from arm.travel(above + by(y=-0.03, z=0.04), pitch, height=0.66)
        yield from arm.reach(above, pitch, settle=2)
        yield from arm.reach(above - 0.12 * _SLOPE, speed=0.7)
        yield from arm.hold(3)

    def press_button(self) -> Actions:
        """Down on the button until the light changes, and up."""
        arm, light = self._arm, self._table.light("led")
        arm.gripper = CLOSED
        top = self._table.link("button") + by(0.2 * self._aside, z=0.027)
        yield from arm.travel(top + 0.08 * UP)
        yield from arm.reach(top + 0.03 * UP, settle=1)
        for action in arm.reach(top - 0.03 * UP, speed=0.5):
            yield action
            if self._table.light("led") != light:
                break
        yield from arm.hold(2)
        yield from arm.reach(top + 0.05 * UP)

    def _bar(self) -> np.ndarray:
        """Centre of the switch's bar."""
        return self._table.link("switch") + by(y=-0.038, z=0.034)
