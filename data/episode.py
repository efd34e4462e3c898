"""What every reader yields and the frame store's converter consumes: one demonstration held in memory."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Window:
    """A stretch of an episode that an instruction describes: steps start … start + length − 1."""

    instruction: str
    task: str
    start: int
    length: int


@dataclass(frozen=True)
class Episode:
    """One demonstration of T steps; index t of every array belongs to the same moment.

    `actions[t]` is the action chosen on seeing `frames[...][t]` and `state[t]`.
    """

    instruction: str
    frames: dict[str, np.ndarray]
    """Camera name -> (T, H, W, 3) uint8 RGB in the policy's orientation."""
    state: np.ndarray
    """(T, S) float32 proprioception, in the data set's units."""
    actions: np.ndarray
    """(T, 7) float32: 6 motion dimensions in the benchmark's units, gripper in {0, 1} with 1 = open."""
    task: str
    source: str
    """Where it came from, e.g. "put_the_bowl_on_the_plate_demo.hdf5:demo_3"."""
    frame_valid: np.ndarray | None = None
    """(T,) bool, False where no frame was rendered (its pixels are then zero); None when all were."""
    windows: tuple[Window, ...] | None = None
    """Where instructions hold, perhaps overlapping, perhaps not everywhere (CALVIN's play data); None: all of it, with
    `instruction` and `task`."""

    def described(self) -> tuple[Window, ...]:
        whole = (Window(self.instruction, self.task, 0, len(self.actions)),)
        return whole if self.windows is None else self.windows
