"""A scripted expert for LIBERO that sees object poses, so that demonstrations can be made without downloading any.

It solves pick-and-place tasks with proportional control of the hand's position and no rotation (fact sheets libero §5,
demo §1): hover, descend, close, lift, carry, lower, open; a failed grasp is tried again. Noise on the free-space part
shows the learner states off the expert's path; the action stored for them is the clean one, which leads back.

    for clean, executed in expert(env, noise=0.4, rng=np.random.default_rng(0)):
        env.step(executed)
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from envs.libero import LiberoEnv
from vla.errors import UserError

_GAIN = 20.0  # action units (0.05 m) per metre of error
_SLOWEST = 0.5  # shortest motion while underway: a learner that copies a creeping approach comes to rest in it
_FAR = 0.04  # metres to the target beyond which noise is harmless; nearer, it breaks grasps (demo §1)
_HELD = 4  # control steps a push of the noise lasts: drawn anew every step, it averages out before it leads anywhere
_HOVER = np.array([0.0, 0.0, 0.08])
_ATTEMPTS = 3
_OPEN, _CLOSED = 1.0, 0.0


@dataclass(frozen=True)
class Recipe:
    """How to grasp one kind of object and put it down. Lengths in metres, durations in control steps."""

    grasp: tuple[float, float, float]
    """Where the fingers close, relative to the object's origin."""
    close_steps: int
    lift: float
    """How far above the grasp the object is carried."""
    drop: float
    """Height of the object's origin above the target's origin at which the fingers open."""


_BOWL = Recipe(grasp=(0.0, 0.045, 0.02), close_steps=8, lift=0.12, drop=0.03)  # by its rim
_GROCERY = Recipe(grasp=(0.0, 0.0, 0.0), close_steps=12, lift=0.25, drop=0.10)

RECIPES: dict[str, dict[int, Recipe]] = {
    "libero_goal": {1: _BOWL, 4: _BOWL, 6: _GROCERY, 8: _BOWL},
    "libero_object": dict.fromkeys(range(10), _GROCERY),
}
"""Suite -> task id -> recipe, for every task the expert solves."""


def recipe_for(suite: str, task_id: int) -> Recipe:
    """The recipe of a task.

    Raises:
        UserError: the expert does not know the task.
    """
    try:
        return RECIPES[suite][task_id]
    except KeyError:
        known = "; ".join(f"{name} {', '.join(map(str, tasks))}" for name, tasks in RECIPES.items())
        raise UserError(f"no scripted expert for {suite} task {task_id}: choose from {known}") from None


def expert(
    env: LiberoEnv, noise: float = 0.0, rng: np.random.Generator | None = None
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Actions from the environment's present state to the goal. The caller steps `env` between two of them.

    Args:
        noise: standard deviation, in action units, added to the executed motion while the target is over 4 cm away.
        rng: source of the noise; required when noise > 0.

    Yields:
        (clean, executed): two (7,) float64 actions, motion in [-1, 1], gripper in {0, 1} with 1 = open.

    Raises:
        UserError: the expert does not know the task.
    """
    recipe = recipe_for(env.suite, env.task_id)
    for step, (clean, distance) in enumerate(_pick_and_place(env, recipe)):
        executed = clean.copy()
        if noise > 0 and step % _HELD == 0:
            push = rng.normal(0, noise, 3)
        if noise > 0 and distance > _FAR:
            executed[:3] = np.clip(executed[:3] + push, -1, 1)
        yield clean, executed


def _pick_and_place(env: LiberoEnv, recipe: Recipe) -> Iterator[tuple[np.ndarray, float]]:
    _, item, target = env.goal()[0]
    for _ in range(_ATTEMPTS):
        grasp = env.position(item) + recipe.grasp
        yield from _reach(env, grasp + _HOVER, _OPEN, tolerance=0.03, limit=60)
        yield from _reach(env, grasp, _OPEN, tolerance=0.008, limit=30)
        yield from _stay(recipe.close_steps, _CLOSED)
        before = env.position(item)[2]
        carry_height = max(grasp[2] + recipe.lift, env.position(target)[2] + recipe.drop + _HOVER[2])
        yield from _reach(env, np.array([*grasp[:2], carry_height]), _CLOSED, tolerance=0.04, limit=40)
        if env.position(item)[2] - before > recipe.lift / 3:
            break
    above = env.position(target) + _hand_over(env, item)
    above[2] = carry_height
    yield from _reach(env, above, _CLOSED, tolerance=0.02, limit=80)
    release = env.position(target) + _hand_over(env, item) + [0, 0, recipe.drop]
    yield from _reach(env, release, _CLOSED, tolerance=0.02, limit=40)
    yield from _stay(10, _OPEN)
    yield from _reach(env, release + _HOVER, _OPEN, tolerance=0.02, limit=30)


def _reach(env: LiberoEnv, target: np.ndarray, gripper: float, tolerance: float, limit: int):
    for _ in range(limit):
        error = target - env.raw_obs["robot0_eef_pos"]
        distance = float(np.linalg.norm(error))
        if distance < tolerance:
            return
        speed = max(_GAIN, _SLOWEST / distance)
        yield np.array([*np.clip(speed * error, -1, 1), 0, 0, 0, gripper]), distance


def _stay(steps: int, gripper: float):
    for _ in range(steps):
        yield np.array([0, 0, 0, 0, 0, 0, gripper]), 0.0


def _hand_over(env: LiberoEnv, item: str) -> np.ndarray:
    return env.raw_obs["robot0_eef_pos"] - env.position(item)
