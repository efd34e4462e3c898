"""Temporal ensembling: execute the mean of all predictions of the current step (SpatialVLA, fact sheet §5.6)."""

from __future__ import annotations

from collections import deque

import numpy as np


class TemporalEnsembler:
    """For one episode of a policy that is queried every step.

    Args:
        chunk: H; the last H chunks hold a prediction of the current step.
        temperature: weights ∝ exp(−temperature · i), i = 0 the oldest; SpatialVLA's −0.8 trusts the newest most.
    """

    def __init__(self, chunk: int, temperature: float):
        self.temperature = temperature
        self.chunks: deque[np.ndarray] = deque(maxlen=chunk)

    def __call__(self, chunk: np.ndarray) -> np.ndarray:
        """The action (7,) to execute now, given the newest chunk (H, 7), gripper in {0, 1}; ties close the gripper."""
        self.chunks.append(chunk)
        age = len(self.chunks)
        current = np.stack([chunk[age - 1 - i] for i, chunk in enumerate(self.chunks)])
        weights = np.exp(-self.temperature * np.arange(age))
        action = (weights / weights.sum()) @ current
        action[6] = action[6] > 0.5
        return action.astype(np.float32)
