"""Measures of a policy's vision encoder on a frame store: features once, then alignment or a probe on them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict

import numpy as np
import torch
from rich.progress import track

from data.frame_store import FrameStore
from vla.analysis.alignment import alignment
from vla.analysis.probes import ridge_state_probe
from vla.policy import Policy

HELD_OUT = 0.3
"""Share of the demonstrations that the ridge probe is scored on (facts demo §5: 12 of 40)."""


@torch.inference_mode()
def mean_features(policy: Policy, store: FrameStore, device: str, batch_size: int = 64) -> np.ndarray:
    """Tap tokens of the first camera, averaged over positions: float32 (steps, C) (IDL A.8, mean-pooled feature)."""
    camera = policy.cameras[0]
    features = []
    starts = range(0, len(store), batch_size)
    for start in track(starts, description="encoding frames", total=len(starts), transient=True):
        frames = store.frames(camera, np.arange(start, min(start + batch_size, len(store))))
        images = {camera: torch.from_numpy(frames).permute(0, 3, 1, 2).to(device)}
        features.append(policy.encode_images(policy.prepare(images))[camera].tap.float().mean(1).cpu().numpy())
    return np.concatenate(features)


def alignment_of(policy: Policy, store: FrameStore, device: str) -> dict:
    """State-feature alignment; a segment is an episode, since each has one instruction."""
    segments = [(e["start"], e["start"] + e["length"]) for e in store.episodes]
    frames = _Frames(store, policy.cameras[0])
    return asdict(alignment(mean_features(policy, store, device), store.states[:, :6], frames, segments))


def state_probe_of(policy: Policy, store: FrameStore, device: str) -> dict:
    """Ridge probe of the end effector's position, scored on the last 30 % of the demonstrations.

    Held out means held out of the probe: the encoder was trained on all of them.
    """
    held_out = store.episode_of >= round((1 - HELD_OUT) * len(store.episodes))
    features = mean_features(policy, store, device)
    return ridge_state_probe(features, store.states, ~held_out, store.episode_of)


class _Frames:
    """The frames of one camera as a sequence, each read when it is asked for."""

    def __init__(self, store: FrameStore, camera: str):
        self.store, self.camera = store, camera

    def __len__(self) -> int:
        return len(self.store)

    def __getitem__(self, step: int) -> np.ndarray:
        return self.store.frames(self.camera, np.array([step]))[0]

    def __iter__(self) -> Iterator[np.ndarray]:
        return (self[step] for step in range(len(self)))
