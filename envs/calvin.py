"""CALVIN's long-horizon evaluation as an `envs.base.Environment`: an episode is one of the 1,000 chains of five tasks.

The public protocol (fact sheet calvin §3): the scene is put into the chain's start state; a subtask has 360 steps and
is done when the oracle says so after a step; the next one goes on from there, without a reset; the chain ends with the
first subtask that fails. Success means all five; from `subtasks`, what each took, SR 1-5 and Avg. Len. are made.

Before each chain the physics world is rebuilt from a seed, so that a chain's outcome does not depend on which chains
ran before it in this process.

    env = CalvinChains("D")
    observation = env.reset(seed=0)          # chain 0 of sequences()
    done = env.step(action)                  # observation() renders when it is asked for
"""

from __future__ import annotations

import functools
import os
from pathlib import Path

import numpy as np
import yaml

from envs.calvin_sequences import CHAIN, STEPS, TOTAL, initial_state, sequences
from envs.calvin_sim import INSTALL, CalvinSim, package_root
from vla.errors import UserError

ANNOTATIONS = Path("calvin_models/conf/annotations")


@functools.lru_cache
def annotations(kind: str) -> dict[str, list[str]]:
    """Task → the public sentences for it.

    Args:
        kind: "evaluation" (one each, the only ones a policy is evaluated with) or "training" (389 in all).

    Raises:
        UserError: the `calvin` repository is neither at $CALVIN_ROOT nor beside calvin_env.
    """
    root = Path(os.environ.get("CALVIN_ROOT") or package_root().parent / "calvin")
    file = root / ANNOTATIONS / {"evaluation": "new_playtable_validation.yaml", "training": "new_playtable.yaml"}[kind]
    if not file.exists():
        raise UserError(f"no CALVIN sentences at {file}; {INSTALL}, or set CALVIN_ROOT to a checkout of mees/calvin")
    return yaml.safe_load(file.read_text())


class CalvinChains:
    """See the module's docstring and `envs.base.Environment`.

    Args:
        scene: A, B, C or D. The chains' start states are written in scene D's coordinates: the other scenes have their
            slider and shelf elsewhere, and are for collecting data.
        cameras: static (200 × 200), wrist (84 × 84); only these are rendered.
        renderer: auto, tiny or egl (envs/calvin_sim.py); in every record.
        max_steps: control steps per subtask.
    """

    def __init__(
        self, scene: str = "D", cameras: tuple[str, ...] = ("static", "wrist"), renderer: str = "tiny",
        max_steps: int | None = None,
    ):  # fmt: skip
        self.sim = CalvinSim(scene, tuple(cameras), renderer)
        self.cameras = tuple(cameras)
        self.subtask_steps = STEPS if max_steps is None else max_steps
        self.max_steps = CHAIN * self.subtask_steps
        self.subtasks: list[dict] = []
        self.replan = self.failed = False
        self._chain = sequences()[0][1]

    @property
    def instruction(self) -> str:
        """What the policy is told now; changes when a subtask is done."""
        task = self._chain[min(len(self.subtasks), CHAIN - 1)]
        return annotations("evaluation")[task][0]

    def reset(self, seed: int) -> dict:
        """Start chain `seed`, 0 to 999."""
        if not 0 <= seed < TOTAL:
            raise UserError(f"chain {seed} is not one of CALVIN's {TOTAL}; seeds are 0 to {TOTAL - 1}")
        scene, self._chain = sequences()[seed]
        self.subtasks, self.replan, self.failed = [], False, False
        self.sim.reload()
        self.sim.reset(*initial_state(scene))
        self._begin()
        return self.observe()

    def step(self, action: np.ndarray, render: bool = True) -> bool:
        """One control step; True when the fifth subtask is done. `replan` and `failed` say what else it brought."""
        if self.failed or len(self.subtasks) == CHAIN:
            raise RuntimeError("the chain has ended; reset before the next step")
        self.sim.step(action)
        self._steps += 1
        task = self._chain[len(self.subtasks)]
        done = self.sim.achieved(task, self._before)
        self.replan = done
        if done or self._steps == self.subtask_steps:
            self.subtasks.append({"task": task, "success": done, "steps": self._steps})
            self.failed = not done
            if done and len(self.subtasks) < CHAIN:
                self._begin()
        return done and len(self.subtasks) == CHAIN

    def observe(self) -> dict:
        """Renders the current state; the state is robot_obs (15,) (fact sheet calvin §5)."""
        images = {camera: self.sim.frame(camera) for camera in self.cameras}
        robot, _ = self.sim.state()
        return {"images": images, "state": robot.astype(np.float32), "instruction": self.instruction}

    def sim_state(self) -> np.ndarray:
        """(39,) float64: robot_obs and scene_obs."""
        return np.concatenate(self.sim.state())

    def versions(self) -> dict[str, str]:
        return self.sim.versions()

    def close(self) -> None:
        self.sim.close()

    def _begin(self) -> None:
        self._before, self._steps = self.sim.info(), 0


class ExpertChains(CalvinChains):
    """With the scripted expert's next action (7,) where the state would be, for `policy=expert` to pass on."""

    def reset(self, seed: int) -> dict:
        self._random = np.random.default_rng(seed)
        return super().reset(seed)

    def observe(self) -> dict:
        images = {camera: self.sim.frame(camera) for camera in self.cameras}
        return {"images": images, "state": self._expert.act(), "instruction": self.instruction}

    def _begin(self) -> None:
        from envs.calvin_experts import CalvinExpert

        super()._begin()
        self._expert = CalvinExpert(self.sim, self._chain[len(self.subtasks)], self._random)
