"""What a simulator must offer so that collection, rollouts and benchmarks can drive it.

One environment is one task in one process. Rendering is asked for per step, because a policy that executes a chunk
of k actions reads one frame in k and rendering is most of a CPU rollout (design: Rollouts). Whether a step is
rendered must not change the simulator's state: a test per simulator proves it bit for bit.
"""

from __future__ import annotations

from typing import Protocol

import numpy as np


class Environment(Protocol):
    """A simulated task. Actions are 7 floats: 6 motion dims in the benchmark's units, gripper in {0, 1}, 1 = open."""

    instruction: str
    max_steps: int
    """Control steps after which an episode has failed (settling and start displacement not counted)."""
    replan: bool
    """After a step: another instruction holds now, so what remains of the chunk is not to be executed. An environment
    that ever sets it can be observed after any step, rendered or not."""
    failed: bool
    """After a step: the episode cannot succeed any more."""
    subtasks: list[dict]
    """What each part of a long-horizon episode took, {"task", "success", "steps"}; [] where there is one task."""

    def reset(self, seed: int) -> dict:
        """Start the episode `seed` and return its first observation, rendered.

        The state after reset is a function of (task, seed) alone, whatever ran before in this process.

        Returns:
            {"images": {camera: uint8 (H, W, 3)}, "state": float32 (S,), "instruction": str}
        """

    def step(self, action: np.ndarray, render: bool = True) -> bool:
        """Execute one control step; True once the task has succeeded. `render=False` leaves the cameras untouched."""

    def observe(self) -> dict:
        """The observation after the last step, which must have been rendered (else RuntimeError)."""

    def close(self) -> None: ...

    def versions(self) -> dict[str, str]:
        """Package versions and the renderer, recorded with every episode: {"mujoco": "3.3.2", "renderer": "osmesa"}."""
