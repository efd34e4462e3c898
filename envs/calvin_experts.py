"""Scripted experts for CALVIN's 34 tasks, so that demonstrations can be made without downloading any.

Each sees block poses, links and joints, and moves by relative actions alone (fact sheet calvin §6). A failed attempt is
followed by another from wherever things are by then. Speed, heights and points of contact vary with `rng`.

    expert = CalvinExpert(sim, "open_drawer", rng=np.random.default_rng(0))
    while not sim.achieved("open_drawer", before):
        sim.step(expert.act())
"""

from __future__ import annotations

import numpy as np

from envs.calvin_blocks import Blocks
from envs.calvin_fixtures import Fixtures
from envs.calvin_motions import CLOSED, OPEN, Actions, Arm, BlockedError
from envs.calvin_sequences import TASKS
from envs.calvin_sim import CalvinSim
from envs.calvin_table import Table
from vla.errors import UserError


class CalvinExpert:
    """Actions for one task, a function of the simulator's states since its construction, the task and `rng`.

    Args:
        sim: any scene, at the start of the subtask; the caller steps it between two calls of `act`.
        task: one of the 34.
        rng: source of the variation between demonstrations.

    Raises:
        UserError: unknown task.
    """

    def __init__(self, sim: CalvinSim, task: str, rng: np.random.Generator):
        if task not in TASKS:
            raise UserError(f"no scripted expert for CALVIN task {task!r}: choose from {', '.join(TASKS)}")
        self._sim, self._task, self._before = sim, task, sim.info()
        self._arm = Arm(sim, haste=rng.uniform(0.85, 1.0), extra=rng.uniform(0.0, 0.02))
        self._table = Table(sim)
        self._fixtures = Fixtures(self._arm, self._table, aside=rng.uniform(-0.02, 0.02))
        self._blocks = Blocks(self._arm, self._table, self._fixtures)
        self._cargo = self._nearest() if task.startswith(("place", "stack")) else None
        self._actions = self._forever()

    def act(self) -> np.ndarray:
        """(7,) float64: relative motion in [-1, 1], gripper 1 = open or 0; holds still once the task is done."""
        return next(self._actions)

    def _forever(self) -> Actions:
        while True:
            if self._sim.achieved(self._task, self._before):
                yield from self._arm.hold(1)
                continue
            try:
                yield from self._clear()
                yield from self._attempt()
            except BlockedError:
                yield from self._arm.hold(3, OPEN)
                yield from self._arm.retreat(0.05)

    def _clear(self) -> Actions:
        """Let go of what the task has no use for, and leave whatever the hand is in or at; fetch what it needs."""
        arm, table = self._arm, self._table
        held = table.held()
        if self._cargo and held == self._cargo:
            if arm.measured()[0][1] > -0.06:  # in the cabinet
                yield from arm.retreat(0.12, rise=0.02)
            return
        if arm.gripper == CLOSED and table.pinched():
            yield from arm.hold(4, OPEN)
        if table.near_hand(0.02):
            yield from arm.retreat(0.08)
        if self._cargo:
            yield from self._blocks.lift(self._cargo)

    def _attempt(self) -> Actions:
        blocks, fixtures = self._blocks, self._fixtures
        match self._task.split("_"):
            case ["lift", color, "block", _]:
                return blocks.lift(color, lowest=self._height_before(color))
            case ["rotate", color, "block", side]:
                return blocks.rotate(color, 1 if side == "left" else -1)
            case ["push", color, "block", side]:
                return blocks.push(color, 1 if side == "right" else -1)
            case ["push", "into", "drawer"]:
                return blocks.push_into_drawer()
            case ["place", "in", "drawer"]:
                return blocks.place_in_drawer(self._cargo)
            case ["place", "in", "slider"]:
                return blocks.place_in_slider(self._cargo)
            case ["stack", "block"]:
                return blocks.stack(self._cargo)
            case ["unstack", "block"]:
                return blocks.lift(blocks.top_of_stack())
            case ["move", "slider", side]:
                return fixtures.move_slider(1 if side == "right" else -1)
            case [verb, "drawer"]:
                return fixtures.move_drawer(-1 if verb == "open" else 1)
            case ["turn", word, "lightbulb"]:
                return fixtures.switch_up() if word == "on" else fixtures.switch_down()
            case _:
                return fixtures.press_button()

    def _nearest(self) -> str:
        """Colour of the block in the hand, or else of the one nearest to it."""
        hand, _ = self._arm.measured()
        return min(self._table.blocks(), key=lambda b: float(np.linalg.norm(b.position - hand))).color

    def _height_before(self, color: str) -> float:
        return self._before["scene_info"]["movable_objects"][f"block_{color}"]["current_pos"][2]
