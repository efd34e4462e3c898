"""Scripted experts for LIBERO that see the simulator's state, so that no demonstrations need be downloaded.

A task is done as its scene file states the goal: predicate by predicate, with motions for objects and for fixtures.
Noise on the free-space part shows the learner states off the expert's path; the action stored for them is the clean
one, which leads back (fact sheet demo §1).

    for clean, executed in expert(env, noise=0.4, rng=np.random.default_rng(0)):
        env.step(executed)
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from envs.libero import LiberoEnv
from envs.libero_fixtures import Fixtures
from envs.libero_motions import Hand, Motion
from envs.libero_objects import Objects
from envs.libero_scene import Scene
from vla.errors import UserError

SOLVED: dict[str, tuple[int, ...]] = {
    "libero_spatial": tuple(range(10)),
    "libero_object": tuple(range(10)),
    "libero_goal": tuple(range(10)),
    "libero_10": (0, 2, 4, 5, 6, 7),
    "libero_90": (0, 1, 2),
}
"""Suite -> ids of the tasks that the experts were measured to solve."""

_FAR = 0.04  # metres to the target beyond which noise is harmless; nearer, it breaks grasps (demo §1)
_HELD = 4  # control steps a push of the noise lasts: drawn anew every step, it averages out before it leads anywhere
_UNDER_DRAWER = 0.08  # metres an object is drawn from under a drawer that was just opened over it
_ORDER = {"open": 0, "turnon": 0, "turnoff": 0, "on": 1, "in": 1, "close": 2}


def check_solved(suite: str, task_id: int) -> None:
    """Raises UserError unless there is an expert for the task."""
    if task_id not in SOLVED.get(suite, ()):
        known = "; ".join(f"{name} {', '.join(map(str, tasks))}" for name, tasks in SOLVED.items())
        raise UserError(f"no scripted expert for {suite} task {task_id}: choose from {known}")


def expert(
    env: LiberoEnv, noise: float = 0.0, rng: np.random.Generator | None = None, careful: bool = False
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Actions from the environment's present state to the goal. The caller steps `env` between two of them.

    One pass over the goal: grasps are retried in it; when it ends without success, another may be begun.

    Args:
        noise: standard deviation, in action units, added to the executed motion while the target is over 4 cm away.
        rng: source of the noise; required when noise > 0.
        careful: grip longer, for a pass that follows one that failed.

    Yields:
        (clean, executed): two (7,) float64 actions, motion in [-1, 1], gripper in {0, 1} with 1 = open.

    Raises:
        UserError: there is no expert for the task.
    """
    check_solved(env.suite, env.task_id)
    for step, (clean, distance) in enumerate(_pass(env, careful)):
        executed = clean.copy()
        if noise > 0 and step % _HELD == 0:
            push = rng.normal(0, noise, 3)
        if noise > 0 and distance > _FAR:
            executed[:3] = np.clip(executed[:3] + push, -1, 1)
        yield clean, executed


def _pass(env: LiberoEnv, careful: bool) -> Motion:
    scene = Scene(env)
    for predicate in sorted(scene.goal, key=lambda predicate: _ORDER[predicate[0]]):
        if not scene.holds(predicate):
            yield from _achieve(predicate, Hand(env), scene, careful)


def _achieve(predicate: list[str], hand: Hand, scene: Scene, careful: bool) -> Motion:
    objects, fixtures = Objects(hand, scene, careful), Fixtures(hand, scene)
    match predicate:
        case ["open", drawer]:
            yield from fixtures.open_drawer(drawer)
        case ["close", drawer]:
            yield from fixtures.close_drawer(drawer)
        case ["turnon" | "turnoff" as verb, stove]:
            yield from fixtures.turn_knob(stove, +1 if verb == "turnon" else -1)
        case ["in", item, drawer] if "cabinet" in drawer and not fixtures.is_open(drawer):
            yield from fixtures.open_drawer(drawer)
            yield from objects.place(item, drawer, from_under=_UNDER_DRAWER)
        case ["on", item, target] if item.startswith("plate"):
            yield from objects.push(item, target)
        case ["on" | "in", item, target]:
            yield from objects.place(item, target)
