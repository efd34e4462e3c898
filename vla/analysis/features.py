"""Visual tokens of a frozen encoder, computed once per frame and kept on disk for every probe that follows.

Tokens lie in $VLA_DATA/features/<weights>-<tap>-<camera>-<data>/<task>.npy, float32 (samples, P, C), one row per sample
of the task in the store's order. Forty probes and a second kind of probe then encode nothing again. Full size is large:
196 tokens of width 4096 take 3.2 MB a frame, a LIBERO task 24 GB; `keep=False` holds one task at a time.

    features = TaskFeatures(policy, weights, store, camera="static")
    tokens = features.load("put_the_bowl_on_the_plate")      # encodes where no file is, then maps it
"""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import numpy as np
import torch
from rich.progress import track

from data.frame_store import FrameStore
from vla.errors import UserError
from vla.policy import Policy

BATCH = 64


class TaskFeatures:
    """Frozen tap tokens of a policy on a store, task by task.

    Args:
        weights: the checkpoint's hash; with tap, camera and the data's hash it names the files.
        keep: leave the files for later; otherwise `forget` removes a task's.
    """

    def __init__(
        self, policy: Policy, weights: str, store: FrameStore, camera: str, device: str = "cpu", keep: bool = True
    ):
        self.policy, self.store, self.camera, self.device, self.keep = policy, store, camera, device, keep
        self.shape = policy.tap_shape()
        tap = policy.tap.replace(":", "")
        root = Path(os.environ.get("VLA_DATA", "datasets")) / "features"
        self.folder = root / f"{weights[:12]}-{tap}-{camera}-{store.meta.content_hash[:10]}"
        tasks = np.array([window["task"] for window in store.windows])
        self._task_of_sample = tasks[store.sample_window]

    def samples(self, task: str) -> np.ndarray:
        """int64: the indices into `store.samples` that belong to the task, ascending."""
        return np.flatnonzero(self._task_of_sample == task)

    def path(self, task: str) -> Path:
        return self.folder / f"{task}.npy"

    def load(self, task: str) -> np.ndarray:
        """float32 (samples, P, C), memory-mapped; encoded and written first where it is not there yet.

        Raises:
            UserError: the disk has no room for it.
        """
        if not self.path(task).exists():
            self._write(task)
        return np.load(self.path(task), mmap_mode="r")

    def forget(self, task: str) -> None:
        if not self.keep:
            self.path(task).unlink(missing_ok=True)

    @torch.inference_mode()
    def encode(self, samples: np.ndarray) -> torch.Tensor:
        """float32 (n, P, C) of these samples, whatever is on disk."""
        frames = self.store.frames(self.camera, self.store.samples[samples])
        images = {self.camera: torch.from_numpy(frames).permute(0, 3, 1, 2).to(self.device)}
        return self.policy.encode_images(self.policy.prepare(images))[self.camera].tap.float()

    def _write(self, task: str) -> None:
        samples = self.samples(task)
        if not len(samples):
            raise UserError(f"{self.store.path} holds no demonstration of {task}; collect some, or leave the task out")
        size = 4 * len(samples) * int(np.prod(self.shape))
        self.folder.mkdir(parents=True, exist_ok=True)
        if (free := shutil.disk_usage(self.folder).free) < size + 2**30:
            raise UserError(
                f"the features of {task} take {size / 1e9:.1f} GB, {self.folder} has {free / 1e9:.1f} GB left; "
                "set VLA_DATA to a larger disk, or evaluation.features=drop or off"
            )
        partial = self.folder / f".{task}.{os.getpid()}.partial.npy"
        try:
            out = np.lib.format.open_memmap(partial, mode="w+", dtype=np.float32, shape=(len(samples), *self.shape))
            starts = range(0, len(samples), BATCH)
            for start in track(starts, description=f"encoding {task}"[:60], transient=True):
                rows = slice(start, start + BATCH)
                out[rows] = self.encode(samples[rows]).cpu().numpy()
            out.flush()
            os.replace(partial, self.path(task))
        finally:
            partial.unlink(missing_ok=True)
