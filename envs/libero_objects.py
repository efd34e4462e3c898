"""How LIBERO's scripted experts pick an object up, put it down and push it (fact sheets libero §5, demo §1).

Of the ways to grasp an object the first is taken that leaves room for the hand between the things around it.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from envs.libero_motions import CLOSED, OPEN, Hand, Motion
from envs.libero_scene import Scene

_ATTEMPTS = 3
_HOVER = np.array([0.0, 0.0, 0.08])
_UP = np.array([0.0, 0.0, 1.0])
_SPREAD = 0.07  # metres: widest that the fingers close over
_PATIENCE = 6  # further control steps for the fingers to close
_TILTED = 0.01  # metres a turned hand stays higher over a rim: the turn tilts it, and its palm meets the far side
_BEHIND = 0.078  # metres from a plate's middle to finger tips that are about to push it
_LEAN = 0.5  # radians: a pushing hand leans over what it pushes, clear of what stands behind

_SIDES = np.radians([0, 180, 90, -90, 45, -45, 135, -135])
_SKEWS = np.radians([25, -25, 40, -40])  # a rim may be pinched a little aslant
_SHIFTS = (0.0, 0.02, -0.02)  # metres along an object that is grasped across

# Parts of the open hand: where they are from the point between the finger tips, along the line on which the fingers
# close and across it, and the height of their underside.
_OUTER_FINGER = ((0.045, 0.06), (-0.015, 0.0, 0.015), -0.015)
_INNER_FINGER = ((-0.06, -0.045), (-0.015, 0.0, 0.015), -0.015)
_PALM = ((-0.1, -0.065, -0.03, 0.0, 0.03, 0.065, 0.1), (-0.03, 0.0, 0.03), 0.04)


@dataclass(frozen=True)
class Grasp:
    """How to pick one kind of object up and put it down. Lengths in metres, durations in control steps."""

    close_steps: int
    lift: float
    """How far above the grasp the object is carried."""
    drop: float
    """Height of the object's origin above the target's origin at which the fingers open."""
    rim: float | None = None
    """Distance of the pinched rim from the object's origin; None: across the object's narrow way."""
    height: float = 0.0
    """Where the fingers close, above the object's origin."""
    depth: float = 0.03
    """How far the fingers reach down from an object's top at most: it touches the palm then."""


_ACROSS = Grasp(close_steps=12, lift=0.25, drop=0.10)
_MUG = Grasp(close_steps=12, lift=0.12, drop=0.03, rim=0.04, height=0.08)
GRASPS = {
    "akita_black_bowl": Grasp(close_steps=8, lift=0.12, drop=0.03, rim=0.045, height=0.02),
    "white_bowl": Grasp(close_steps=8, lift=0.12, drop=0.03, rim=0.035, height=0.02),
    "porcelain_mug": _MUG,
    "red_coffee_mug": _MUG,
    "white_yellow_mug": _MUG,
    "wine_bottle": Grasp(close_steps=12, lift=0.15, drop=0.01),
    "moka_pot": Grasp(close_steps=12, lift=0.12, drop=0.09),
    "chefmate_8_frypan": Grasp(close_steps=12, lift=0.12, drop=0.03),
}
"""Kind of object -> how to grasp it; _ACROSS for all others."""


class Objects:
    """Motions that move objects; each is one attempt, which may fail.

    Args:
        careful: let the fingers close longer. After a turn of the hand, which leaves it unsteady, they always do.
    """

    def __init__(self, hand: Hand, scene: Scene, careful: bool = False):
        self._hand, self._scene, self._careful = hand, scene, careful

    def place(self, item: str, target: str, from_under: float = 0.0) -> Motion:
        """Pick `item` up, carry it over `target`, lower it and let go. A failed grasp is tried again.

        Args:
            from_under: metres that the item is drawn away from the target before it is lifted, and approached from
                straight above, because the target (an open drawer) may stick out over it.
        """
        hand, scene = self._hand, self._scene
        grasp = GRASPS.get(item.rsplit("_", 1)[0], _ACROSS)
        for _ in range(_ATTEMPTS):
            point, yaw = self._way_to(item, grasp)
            towards = hand.pointing_down(yaw)
            if from_under:
                above = np.array([*point[:2], max(hand.position[2], point[2] + grasp.lift)])
                yield from hand.reach(above, OPEN, tolerance=0.04, limit=60, towards=towards)
            yield from hand.reach(point + _HOVER, OPEN, tolerance=0.03, limit=60, towards=towards)
            yield from hand.reach(point, OPEN, tolerance=0.008, limit=30, towards=towards)
            patience = _PATIENCE if self._careful or from_under or towards is not None else 0
            yield from hand.stay(grasp.close_steps + patience, CLOSED)
            before = scene.position(item)[2]
            clearing = scene.position(target)[2] + grasp.drop + _HOVER[2] + point[2] - before
            carry_height = max(point[2] + grasp.lift, clearing)
            if from_under:
                away = (point - scene.position(target)) * [1, 1, 0]
                point = point + from_under * away / np.linalg.norm(away)
                yield from hand.reach(point + _HOVER / 2, CLOSED, tolerance=0.02, limit=30)
            yield from hand.reach(np.array([*point[:2], carry_height]), CLOSED, tolerance=0.04, limit=40)
            if scene.position(item)[2] - before > grasp.lift / 3:
                break
        else:
            return
        above = scene.position(target) + self._hand_over(item)
        above[2] = carry_height
        yield from hand.reach(above, CLOSED, tolerance=0.02, limit=80)
        release = scene.position(target) + self._hand_over(item) + [0, 0, grasp.drop]
        yield from hand.reach(release, CLOSED, tolerance=0.02, limit=40)
        yield from hand.stay(15, OPEN)
        yield from hand.reach(release + _HOVER, OPEN, tolerance=0.02, limit=30)

    def push(self, item: str, target: str) -> Motion:
        """Push a flat object towards `target` with both finger tips: along x or y, whichever is further to go."""
        hand, scene = self._hand, self._scene
        start = scene.position(item)
        way = (scene.position(target) - start) * [1, 1, 0]
        way[np.abs(way[:2]).argmin()] = 0.0
        ahead = way / np.linalg.norm(way)
        towards = hand.facing(-np.sin(_LEAN) * ahead - np.cos(_LEAN) * _UP, np.cross(ahead, _UP))
        behind = start - _BEHIND * ahead + 0.012 * _UP
        yield from hand.reach(start + 0.03 * ahead + 0.25 * _UP, OPEN, tolerance=0.03, limit=60, towards=towards)
        yield from hand.reach(behind + 0.07 * _UP, OPEN, tolerance=0.02, limit=40, towards=towards)
        yield from hand.reach(behind, OPEN, tolerance=0.01, limit=40, towards=towards)
        yield from hand.reach(behind + way, OPEN, tolerance=0.01, limit=70, towards=towards, contact=True)
        # The finger tips may be under the object's edge.
        yield from hand.reach(hand.position - 0.04 * ahead, OPEN, tolerance=0.01, limit=20, towards=towards)
        yield from hand.reach(hand.position + 0.1 * _UP, OPEN, tolerance=0.02, limit=30)

    def _way_to(self, item: str, grasp: Grasp) -> tuple[np.ndarray, float]:
        """(point between the finger tips, yaw): the first way with room for the hand, or the one that lacks least."""
        best = None
        for point, yaw, parts in self._at_rim(item, grasp) if grasp.rim else self._across(item, grasp):
            lacking = max(self._lacking(item, point, yaw, *part) for part in parts)
            if lacking <= 0:
                return point, yaw
            if best is None or lacking < best[0]:
                best = lacking, point, yaw
        return best[1:]

    def _at_rim(self, item: str, grasp: Grasp) -> Iterator[tuple[np.ndarray, float, tuple]]:
        origin = self._scene.position(item)
        for yaw, skew in [(yaw, 0.0) for yaw in _SIDES] + [(yaw, skew) for yaw in _SIDES for skew in _SKEWS]:
            out = np.array([-np.sin(yaw + skew), np.cos(yaw + skew), 0.0])
            height = grasp.height + (_TILTED if yaw % np.pi > 0 else 0.0)
            yield origin + grasp.rim * out + [0.0, 0.0, height], yaw, (_OUTER_FINGER, _PALM)

    def _across(self, item: str, grasp: Grasp) -> Iterator[tuple[np.ndarray, float, tuple]]:
        origin, points = self._scene.position(item), self._scene.points(item)
        height = max(grasp.height, points[:, 2].max() - origin[2] - grasp.depth)
        widths = {yaw: np.ptp(points @ [-np.sin(yaw), np.cos(yaw), 0.0]) for yaw in _SIDES if abs(yaw) <= np.pi / 2}
        for yaw in [yaw for yaw in widths if widths[yaw] < _SPREAD] or [min(widths, key=widths.get)]:
            for shift in _SHIFTS:
                along = np.array([np.cos(yaw), np.sin(yaw), 0.0])
                point = origin + shift * along + [0.0, 0.0, height]
                yield point, yaw, (_OUTER_FINGER, _INNER_FINGER, _PALM)

    def _lacking(self, item: str, at: np.ndarray, yaw: float, alongs, asides, underside: float) -> float:
        """By how much (metres) things other than the item stick up into a part of the hand."""
        along, aside = np.array([-np.sin(yaw), np.cos(yaw)]), np.array([np.cos(yaw), np.sin(yaw)])
        spots = [at[:2] + a * along + b * aside for a in alongs for b in asides]
        return max(self._scene.surface(*spot, at[2] + 0.3, item) for spot in spots) - (at[2] + underside)

    def _hand_over(self, item: str) -> np.ndarray:
        return self._hand.position - self._scene.position(item)
