"""Policies that nobody trained: blind replay of one demonstration, and the hand through which a scripted expert acts.

Replay is the control that shows what a rollout score says without looking.

On LIBERO's stored initial states the objects hardly move, so a recorded action sequence alone solves many episodes
(facts demo §1). An arm whose score is not clearly above this control's has not been shown to see anything.
"""

from __future__ import annotations

import hashlib
from pathlib import Path

import numpy as np
import torch

from data.libero import read_libero
from vla.errors import UserError


class ReplayPolicy:
    """Plays the actions of one demonstration by control step, whatever it is shown; holds still after the last.

    Args:
        source: "FILE.hdf5" or "FILE.hdf5:demo_7" (default: the first one).
        chunk: actions per call; long, since a policy that does not look need not be rendered for.
    """

    def __init__(self, source: str, chunk: int = 50):
        file, _, demo = source.partition(":")
        episodes = read_libero(Path(file), ("static",), pairing="official")
        found = next((e for e in episodes if not demo or e.source.endswith(f":{demo}")), None)
        if found is None:
            raise UserError(f"{file} has no {demo}; name another demonstration or leave it out")
        hold = np.array([[0, 0, 0, 0, 0, 0, found.actions[-1, 6]]], dtype=np.float32)
        self.actions, self.chunk = np.concatenate([found.actions, hold]), chunk

    def hash(self) -> str:
        return hashlib.sha256(self.actions.tobytes()).hexdigest()

    def predict(self, observation: dict) -> torch.Tensor:
        """(B, chunk, 7): the actions at each observation's "step"."""
        steps = observation["step"].numpy()[:, None] + np.arange(self.chunk)
        return torch.from_numpy(self.actions[np.minimum(steps, len(self.actions) - 1)])


class NothingPolicy:
    """Holds still, gripper open: what a success test says of a scene that nobody touches."""

    chunk = 10
    cameras: tuple[str, ...] = ()

    def predict(self, observation: dict) -> torch.Tensor:
        """(B, chunk, 7)."""
        hold = torch.tensor([0, 0, 0, 0, 0, 0, 1.0])
        return hold.expand(len(observation["state"]), self.chunk, 7)


class ExpertPolicy:
    """Passes on the action that an environment with a scripted expert gives in place of the state (ExpertChains)."""

    chunk = 1
    cameras: tuple[str, ...] = ()

    def predict(self, observation: dict) -> torch.Tensor:
        """(B, 1, 7)."""
        return observation["state"][:, None]
