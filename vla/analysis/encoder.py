"""Measures of a policy's vision encoder on a frame store: features once, then alignment or a probe on them."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import asdict

import numpy as np
import torch
from rich.progress import track

from data.frame_store import FrameStore
from vla.analysis.alignment import alignment
from vla.analysis.probes import ridge_probe
from vla.policy import Policy

HELD_OUT = 0.3
"""Share of the demonstrations that the ridge probe is scored on (facts demo §5: 12 of 40)."""


@torch.inference_mode()
def mean_features(policy: Policy, store: FrameStore, device: str, batch_size: int = 64) -> np.ndarray:
    """Tap tokens of the first camera, averaged over positions: float32 (frames, C) (IDL A.8, mean-pooled feature)."""
    camera = policy.cameras[0]
    features = []
    starts = range(0, len(store.samples), batch_size)
    for start in track(starts, description="encoding frames", total=len(starts), transient=True):
        frames = store.frames(camera, store.samples[start : start + batch_size])
        images = {camera: torch.from_numpy(frames).permute(0, 3, 1, 2).to(device)}
        features.append(policy.encode_images(policy.prepare(images))[camera].tap.float().mean(1).cpu().numpy())
    return np.concatenate(features)


def alignment_of(policy: Policy, store: FrameStore, device: str) -> tuple[dict, dict[str, np.ndarray]]:
    """State-feature alignment; a segment is a window, where one instruction holds; gaps count stored frames.

    Returns:
        the scores, and the distances of each pair of frames.
    """
    bounds = np.searchsorted(store.sample_window, np.arange(len(store.windows) + 1))
    segments = [(int(start), int(end)) for start, end in itertools.pairwise(bounds)]
    poses = store.states[store.samples, :6]
    frames = _Frames(store, policy.cameras[0])
    result = alignment(mean_features(policy, store, device), poses, frames, segments)
    scores = {"cosine": asdict(result.cosine), "scale": asdict(result.scale), "pairs_per_gap": result.pairs_per_gap}
    return scores, result.distances


def ridge_probe_of(policy: Policy, store: FrameStore, device: str) -> tuple[dict, dict[str, np.ndarray]]:
    """Ridge probe of the end effector's position, scored on the last 30 % of the demonstrations.

    Held out means held out of the probe: the encoder was trained on all of them.
    """
    episodes = store.episode_of[store.samples]
    held_out = episodes >= round((1 - HELD_OUT) * len(store.episodes))
    return ridge_probe(mean_features(policy, store, device), store.states[store.samples], ~held_out, episodes), {}


class _Frames:
    """The frames of one camera as a sequence, each read when it is asked for."""

    def __init__(self, store: FrameStore, camera: str):
        self.store, self.camera = store, camera

    def __len__(self) -> int:
        return len(self.store.samples)

    def __getitem__(self, index: int) -> np.ndarray:
        return self.store.frames(self.camera, self.store.samples[[index]])[0]

    def __iter__(self) -> Iterator[np.ndarray]:
        return (self[index] for index in range(len(self)))
