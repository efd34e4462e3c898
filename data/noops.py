"""Leaving out the steps of a demonstration in which the robot is told to do nothing.

A step is a no-op where its six motion dims have a norm below 1e-4 and its gripper command is that of the last step
kept; until one has been kept, the motion alone decides (openvla, experiments/robot/libero/
regenerate_libero_dataset.py). The reference replays what is left in the simulator and records anew; here observation
and action are left out together, so the frames are those of the original recording.

    episodes = (without_noops(episode) for episode in read_libero(path, ("static",)))
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from data.episode import Episode, Window
from vla.errors import UserError

THRESHOLD = 1e-4
"""In the units of the actions; the reference's, for LIBERO's, where 1 is 5 cm or 0.5 rad."""


def kept_steps(actions: np.ndarray) -> np.ndarray:
    """(T,) bool: True where an action (T, 7) is not a no-op."""
    moving = np.linalg.norm(actions[:, :-1], axis=1) >= THRESHOLD
    kept, gripper = moving.copy(), None
    for step in range(len(actions)):
        kept[step] |= gripper is not None and actions[step, -1] != gripper
        if kept[step]:
            gripper = actions[step, -1]
    return kept


def without_noops(episode: Episode) -> Episode:
    """The episode without its no-ops; windows shrink with them, and one that held nothing else is left out.

    Raises:
        UserError: the episode holds nothing but no-ops.
    """
    kept = kept_steps(episode.actions)
    if not kept.any():
        raise UserError(f"{episode.source}: every action is a no-op; leave it out, or read it without drop_noops")
    before = np.concatenate([[0], np.cumsum(kept)])

    def shrunk(window: Window) -> Window:
        start, end = before[window.start], before[window.start + window.length]
        return replace(window, start=int(start), length=int(end - start))

    windows = None if episode.windows is None else [shrunk(window) for window in episode.windows]
    return replace(
        episode,
        frames={camera: frames[kept] for camera, frames in episode.frames.items()},
        state=episode.state[kept],
        actions=episode.actions[kept],
        frame_valid=None if episode.frame_valid is None else episode.frame_valid[kept],
        windows=None if windows is None else tuple(window for window in windows if window.length),
    )
