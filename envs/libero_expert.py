"""LIBERO with a scripted expert at hand, so that `evaluate.py policy=expert` can act through the project's evaluator.

An expert needs no frames, and without a camera nothing is rendered:

    env = ExpertLibero("libero_object", 3)
    action = env.reset(seed=0)["state"]
    while not env.step(action):
        action = env.observe()["state"]
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import numpy as np

from envs.experts import check_solved, expert
from envs.libero import HOLD, LiberoEnv


class ExpertLibero(LiberoEnv):
    """With the expert's next action (7,), without noise, where the state would be, for `policy=expert` to pass on.

    It is a function of (task, seed) and the actions executed. A pass that ends without success is followed by
    another, more careful one.
    Arguments and errors are those of `LiberoEnv`, which by default has no camera here; a task without an expert is a
    UserError too.
    """

    def __init__(self, suite: str, task_id: int, cameras: tuple[str, ...] = (), **arguments):
        check_solved(suite, task_id)
        super().__init__(suite, task_id, cameras, **arguments)

    def reset(self, seed: int) -> dict:
        self._passes, self._action = self._act(), None
        return super().reset(seed)

    def step(self, action: np.ndarray, render: bool = True) -> bool:
        self._action = None
        return super().step(action, render)

    def observe(self) -> dict:
        """As `LiberoEnv.observe`, asked twice the same; the expert goes on by one action per observed step."""
        observation = super().observe()
        if self._action is None:
            self._action = next(self._passes)
        return observation | {"state": self._action.astype(np.float32)}

    def _act(self) -> Iterator[np.ndarray]:
        for number in itertools.count():
            for clean, _ in expert(self, careful=number > 0):
                yield clean
            yield HOLD
