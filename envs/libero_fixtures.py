"""How LIBERO's scripted experts work a cabinet's drawers and a stove's knob."""

from __future__ import annotations

import numpy as np

from envs.libero_motions import CLOSED, OPEN, Hand, Motion, downward
from envs.libero_scene import Joint, Scene

_UP = np.array([0.0, 0.0, 1.0])
_PULL = 0.19  # metres: a drawer's whole way (0.16), and what the grip gives
_PULL_TILT = np.radians(15)  # a hand that points a little down grips a handle without meeting the one above it
_PUSH_TILT = np.radians(45)
_OPEN_DRAWER = 0.1  # metres that a drawer must be out to take something
_GRIP_STEPS = 14
_BLADE = 0.025  # metres down from a knob's top that are its blade; gripped at
_KNOB_GRIP = 0.02
_TWIST = 1.0  # radians
_WRIST = 1.9  # furthest yaw of the hand


class Fixtures:
    """Motions that open, close and switch; each is one attempt, which may fail."""

    def __init__(self, hand: Hand, scene: Scene):
        self._hand, self._scene = hand, scene

    def is_open(self, drawer: str) -> bool:
        """Whether something can be put into a drawer, named by its region."""
        return abs(self._scene.joint(drawer).value) > _OPEN_DRAWER

    def open_drawer(self, drawer: str) -> Motion:
        """Grip the handle from the front, pull, let go, back off and rise."""
        hand, (handle, out) = self._hand, _handle(self._scene.joint(drawer))
        approach = -np.cos(_PULL_TILT) * out - np.sin(_PULL_TILT) * _UP
        towards = hand.facing(approach, _UP)
        yield from hand.reach(handle - 0.12 * approach, OPEN, tolerance=0.03, limit=80, towards=towards)
        yield from hand.reach(handle - 0.06 * approach, OPEN, tolerance=0.01, limit=80, towards=towards)
        yield from hand.reach(handle, OPEN, tolerance=0.008, limit=40, towards=towards, contact=True)
        yield from hand.stay(_GRIP_STEPS, CLOSED)
        pulled = hand.position + _PULL * out
        yield from hand.reach(pulled, CLOSED, tolerance=0.02, limit=60, towards=towards, contact=True)
        yield from hand.stay(8, OPEN)
        yield from hand.reach(hand.position - 0.06 * approach, OPEN, tolerance=0.02, limit=30)
        above = hand.position + 0.04 * out + 0.15 * _UP
        yield from hand.reach(above, OPEN, tolerance=0.04, limit=40, towards=downward(0.0))

    def close_drawer(self, drawer: str) -> Motion:
        """Push the handle with closed fingers until the drawer is in."""
        hand, joint = self._hand, self._scene.joint(drawer)
        handle, out = _handle(joint)
        approach = -np.cos(_PUSH_TILT) * out - np.sin(_PUSH_TILT) * _UP
        towards = hand.facing(approach, np.cross(out, _UP))
        start = handle + 0.06 * out
        yield from hand.reach(start + 0.12 * _UP, CLOSED, tolerance=0.03, limit=80, towards=towards)
        yield from hand.reach(start, CLOSED, tolerance=0.015, limit=40, towards=towards)
        inside = handle - (abs(joint.value) + 0.03) * out
        yield from hand.reach(inside, CLOSED, tolerance=0.008, limit=80, towards=towards, contact=True)
        yield from hand.reach(hand.position - 0.10 * approach, CLOSED, tolerance=0.02, limit=30)

    def turn_knob(self, fixture: str, sign: int) -> Motion:
        """Grip the knob from above and twist it up (+1) or down (-1) its range."""
        hand, joint = self._hand, self._scene.joint(fixture)
        points = np.concatenate(joint.pieces)
        top = points[:, 2].max()
        blade = points[points[:, 2] > top - _BLADE][:, :2]
        along = np.linalg.svd(blade - blade.mean(axis=0))[2][0]
        yaw = (np.arctan2(along[1], along[0]) + np.pi / 2) % np.pi - np.pi / 2
        grip = np.array([*joint.anchor[:2], top - _KNOB_GRIP])
        yield from hand.reach(grip + 0.08 * _UP, OPEN, tolerance=0.012, limit=80, towards=downward(yaw))
        yield from hand.reach(grip, OPEN, tolerance=0.008, limit=40, towards=downward(yaw))
        yield from hand.stay(_GRIP_STEPS, CLOSED)
        twisted = downward(np.clip(yaw + sign * _TWIST, -_WRIST, _WRIST))
        yield from hand.reach(hand.position.copy(), CLOSED, tolerance=0.02, limit=40, towards=twisted, contact=True)
        yield from hand.stay(8, OPEN)
        yield from hand.reach(hand.position + 0.08 * _UP, OPEN, tolerance=0.02, limit=30)


def _handle(drawer: Joint) -> tuple[np.ndarray, np.ndarray]:
    """(middle of a drawer's handle, unit vector along which the drawer comes out)."""
    out = -drawer.axis  # the cabinets' joints count backwards
    bar = max(drawer.pieces, key=lambda corners: float((corners @ out).max()))
    return (bar.min(axis=0) + bar.max(axis=0)) / 2, out
