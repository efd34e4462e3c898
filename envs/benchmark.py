"""One environment as a vla-eval benchmark whose step is a whole action chunk.

vla-eval steps a benchmark once per server reply and renders every step. A policy that executes k actions of a chunk
reads one frame in k, and rendering is up to 98 % of a CPU rollout; hence `step` here runs the k actions of one reply
and renders the last one only (anchors fact sheet §A, point 6). Runs in the worker's interpreter (the simulator's own,
Python >= 3.8): imports neither torch nor policy code.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from vla_eval.benchmarks.base import StepBenchmark, StepResult
from vla_eval.specs import IMAGE_RGB, LANGUAGE, POSITION_DELTA, ROTATION_AA, STATE_EEF_POS_AA_GRIP, DimSpec

from envs.base import Environment

ACTION_SPEC = {
    "position": POSITION_DELTA,
    "rotation": ROTATION_AA,
    "gripper": DimSpec("gripper", 1, "binary_open_01", (0, 1), description="1 = open (OXE convention)"),
}
OBSERVATION_SPEC = {"static": IMAGE_RGB, "language": LANGUAGE, "state": STATE_EEF_POS_AA_GRIP}


class ChunkBenchmark(StepBenchmark):
    """vla-eval's view of an `Environment`: reset(seed), then chunks until success or `env.max_steps`.

    Args:
        env: the simulated task.
        film: render every step and keep the first camera's frames in `frames` (uint8 (H, W, 3) each), for a video.
    """

    def __init__(self, env: Environment, film: bool = False) -> None:
        super().__init__()
        self.env = env
        self.film = film
        self.frames: list[np.ndarray] = []
        self.steps = 0
        self._seed = 0
        self._shapes: dict[str, tuple[int, ...]] | None = None

    def get_tasks(self) -> list[dict[str, Any]]:
        return [{"name": self.env.instruction}]

    def reset(self, task: dict[str, Any]) -> dict[str, Any]:
        """Start episode `task["seed"]`; returns the environment's first observation."""
        self.steps, self._seed = 0, task["seed"]
        observation = self.env.reset(task["seed"])
        self.frames = [_first_image(observation)] if self.film else []
        return observation

    def step(self, action: dict[str, Any]) -> StepResult:
        """Execute `action["actions"]`, float (k, 7) (or (7,)), as far as the episode goes.

        Only the last action of a chunk is rendered, and not even that one where the episode's length is used up:
        nobody would read the frame.
        """
        chunk = np.atleast_2d(action["actions"])
        success, seen = False, None
        for index, command in enumerate(chunk):
            self.steps += 1
            timeout = self.steps >= self.env.max_steps
            success = self.env.step(command, render=self.film or (index == len(chunk) - 1 and not timeout))
            if self.film:
                seen = self.env.observe()  # once a step: a scripted expert goes on each time that it is asked
                self.frames.append(_first_image(seen))
            if success or timeout or self.env.failed:
                return StepResult(obs=None, reward=float(success), done=True, info={"success": bool(success)})
            if self.env.replan:
                break
        seen = self.env.observe() if seen is None else seen
        return StepResult(obs=seen, reward=0.0, done=False, info={"success": False})

    def make_obs(self, raw_obs: dict[str, Any], task: dict[str, Any]) -> dict[str, Any]:
        """The wire observation: vla-eval's keys, and (seed, step) so that a sampling policy can seed its noise.

        Raises:
            ValueError: the simulator returned something no policy should see: NaN in the state, a float image, or
                arrays of other shapes than the ones before.
        """
        check_observation(raw_obs)
        shapes = {camera: image.shape for camera, image in raw_obs["images"].items()}
        shapes["state"] = np.shape(raw_obs["state"])
        if shapes != (self._shapes or shapes):
            raise ValueError(f"the observation has the shapes {shapes}, before it had {self._shapes}")
        self._shapes = shapes
        return {
            "images": {camera: np.ascontiguousarray(image) for camera, image in raw_obs["images"].items()},
            "state": np.asarray(raw_obs["state"], dtype=np.float32),
            "task_description": raw_obs["instruction"],
            "seed": self._seed,
            "step": self.steps,
        }

    def get_step_result(self, step_result: StepResult) -> dict[str, Any]:
        return {"success": step_result.info["success"], "steps": self.steps}

    def get_action_spec(self) -> dict[str, DimSpec]:
        return ACTION_SPEC

    def get_observation_spec(self) -> dict[str, DimSpec]:
        return OBSERVATION_SPEC

    def cleanup(self) -> None:
        self.env.close()


def check_observation(observation: dict[str, Any]) -> None:
    """ValueError unless images are uint8 (H, W, 3) and the state is a finite vector (a broken renderer or physics)."""
    for camera, image in observation["images"].items():
        if image.dtype != np.uint8 or image.ndim != 3 or image.shape[-1] != 3:
            raise ValueError(f"camera {camera!r} gave {image.dtype} {image.shape}, not uint8 (H, W, 3)")
    state = np.asarray(observation["state"])
    if state.ndim != 1 or not np.isfinite(state).all():
        raise ValueError(f"the state is not a finite vector: {state}")


def _first_image(observation: dict[str, Any]) -> np.ndarray:
    return np.array(next(iter(observation["images"].values())))
