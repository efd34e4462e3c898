"""Which sample comes when: a pure function of (seed, position), so that resume is exact whatever the worker count.

Position p is in epoch p // N, and an epoch is a permutation of the N steps drawn from (seed, epoch). Nothing is
remembered between batches; a run that goes on at optimiser step s starts its sampler at position s · batch.

An optimiser step's batch is cut into world · accumulate parts of consecutive positions, part m · world + r for rank r's
m-th backward pass: whatever the number of processes, a step sees the same samples.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset, Sampler

from data.frame_store import FrameStore


@lru_cache(maxsize=16)  # two epochs of each of the streams that a batch is drawn from
def _permutation(length: int, seed: int, epoch: int) -> np.ndarray:
    return np.random.default_rng([seed, epoch]).permutation(length)


def sample_at(positions: np.ndarray, length: int, seed: int) -> np.ndarray:
    """The steps at `positions` (int64, ascending) of the endless sequence of epochs over `length` steps."""
    epochs, within = np.divmod(positions, length)
    return np.concatenate([_permutation(length, seed, e)[within[epochs == e]] for e in np.unique(epochs)])


@dataclass(frozen=True)
class Share:
    """Which parts of every optimiser step's batch are one process's: `rank` of `world`, in `accumulate` passes."""

    rank: int = 0
    world: int = 1
    accumulate: int = 1

    @property
    def parts(self) -> int:
        return self.world * self.accumulate

    def positions(self, first_step: int, batch_size: int) -> Iterator[np.ndarray]:
        """The positions of each part in turn, endlessly; `batch_size`, of all parts, is a multiple of their number."""
        size = batch_size // self.parts
        for step in itertools.count(first_step):
            for part in range(self.rank, self.parts, self.world):
                start = step * batch_size + part * size
                yield np.arange(start, start + size)


class StatelessBatches(Sampler[np.ndarray]):
    """Endless batches of sample indices for one process, from optimiser step `first_step` on.

    Args:
        batch_size: samples of an optimiser step, over all its parts.
    """

    def __init__(self, length: int, batch_size: int, seed: int, first_step: int = 0, share: Share = Share()):
        self.length, self.batch_size, self.seed = length, batch_size, seed
        self.first_step, self.share = first_step, share

    def __iter__(self) -> Iterator[np.ndarray]:
        for positions in self.share.positions(self.first_step, self.batch_size):
            yield sample_at(positions, self.length, self.seed)

    def whole(self, step: int) -> np.ndarray:
        """The sample indices of all parts of a step."""
        start = step * self.batch_size
        return sample_at(np.arange(start, start + self.batch_size), self.length, self.seed)


class PairDataset(Dataset):
    """(o_t, o_{t+H}, a_{t:t+H}, instruction) from a frame store, gathered a batch at a time.

    A batch of N steps is a dict:
        images          {camera: uint8 (N, 3, H, W)}, o_t
        future_images   {camera: uint8 (N, 3, H, W)}, o_{t+H}; absent when `pairs` is None. Where t+H runs past the
                        episode or has no frame, the latest frame stands in and future_valid is False
        future_valid    bool (N,)
        actions         float32 (B, H, 7) physical units, gripper {0, 1}; past the episode's end the last is repeated
        action_valid    bool (B, H), False past the episode's end
        state           float32 (B, S)
        instruction     list of B str

    Where play data has windows (CALVIN), a step is sampled once per window it lies in, the chunk ends with the window
    and the future frame with the recording: o_{t+H} may lie beyond the instruction's end (fact sheet §4.6).

    With pairs="separate" B = N: the future frame is extra, as in IDL §3.3. With "shared" B = 2N: both frames of a pair
    are policy samples, o_t's first and then o_{t+H}'s, so that inverse dynamics costs no further encoding.
    """

    def __init__(self, store: FrameStore, chunk: int, cameras: list[str], pairs: str | None, tail: str = "pad"):
        """`tail` is what happens where fewer than H steps of a window are left: "pad" (action_valid is False past its
        end) or "whole" (no sample starts there), as each baseline's reference has it."""
        self.store, self.chunk, self.cameras, self.pairs = store, chunk, cameras, pairs
        self.steps, self.windows = store.samples, store.sample_window
        if tail == "whole":
            inside = self.steps + chunk - 1 <= store.window_last[self.windows]
            self.steps, self.windows = self.steps[inside], self.windows[inside]

    def __len__(self) -> int:
        return len(self.steps)

    def __getitems__(self, indices: np.ndarray) -> dict:
        indices = np.asarray(indices)
        steps, windows = self.steps[indices], self.windows[indices]
        batch = {"images": {camera: self._images(camera, steps) for camera in self.cameras}}
        if self.pairs is not None:
            future, valid = self._future(steps)
            batch["future_images"] = {camera: self._images(camera, future) for camera in self.cameras}
            batch["future_valid"] = torch.from_numpy(valid)
        if self.pairs == "shared":
            steps, windows = np.concatenate([steps, future]), np.concatenate([windows, windows])
        return batch | self._targets(steps, windows)

    def targets(self, indices: np.ndarray) -> dict:
        """A batch without its images."""
        return self._targets(self.steps[indices], self.windows[indices])

    def valid(self, indices: np.ndarray) -> tuple[int, int]:
        """(action steps, pairs) that are valid in a batch of `indices`: what its losses are means over."""
        steps, windows, pairs = self.steps[indices], self.windows[indices], 0
        if self.pairs is not None:
            future, valid = self._future(steps)
            pairs = int(valid.sum())
        if self.pairs == "shared":
            steps, windows = np.concatenate([steps, future]), np.concatenate([windows, windows])
        left = self.store.window_last[windows] - steps + 1
        return int(left.clip(0, self.chunk).sum()), pairs

    def _future(self, steps: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The step of o_{t+H}, or of the latest frame before it, and which of them are o_{t+H}."""
        wanted = steps + self.chunk
        future = self.store.last_frame[np.minimum(wanted, self.store.last_step[steps])]
        return future, future == wanted

    def _targets(self, steps: np.ndarray, windows: np.ndarray) -> dict:
        store = self.store
        chunk = steps[:, None] + np.arange(self.chunk)
        last = store.window_last[windows][:, None]
        return {
            "actions": torch.from_numpy(store.actions[np.minimum(chunk, last)]),
            "action_valid": torch.from_numpy(chunk <= last),
            "state": torch.from_numpy(store.states[steps]),
            "instruction": [store.windows[w]["instruction"] for w in windows],
        }

    def _images(self, camera: str, steps: np.ndarray) -> torch.Tensor:
        return torch.from_numpy(self.store.frames(camera, steps)).permute(0, 3, 1, 2)


def training_loader(dataset: PairDataset, batches: StatelessBatches, num_workers: int, pin: bool) -> DataLoader:
    return DataLoader(
        dataset,
        batch_sampler=batches,
        collate_fn=_identity,
        num_workers=num_workers,
        persistent_workers=num_workers > 0,
        pin_memory=pin,
    )


def _identity(batch: dict) -> dict:
    return batch
