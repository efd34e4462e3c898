"""The frame store: the one format that training reads, whatever format the data came in.

A store is a folder:
    meta.json             version, cameras, statistics, source, reader options, hashes of the content and of each file
    episodes.parquet      one row per recording: source, start, length
    windows.parquet       one row per stretch that an instruction describes: instruction, task, start, length, episode
    shard-*.arrow         Arrow IPC files, one record batch each: per camera one frame per row (raw bytes of fixed size,
                          or JPEG), and `action` and `state` as fixed-size lists

Where every recording has one instruction (LIBERO) windows and episodes are the same; in play data (CALVIN) windows
overlap and leave gaps. Frames are stored once.

Arrow IPC because it is memory-mapped without a copy, shared by all workers and ranks through the page cache, holds raw
and encoded frames alike, and is a documented format with readers in every language. Actions and states are read into
RAM when a store is opened; frames never are.

Written by data/store_writer.py, through scripts/convert.py or train.py when it meets a folder of a real format.
"""

from __future__ import annotations

import io
import json
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from vla.errors import UserError

VERSION = 3


@dataclass(frozen=True)
class StoreMeta:
    version: int
    encoding: str
    cameras: dict[str, list[int]]  # camera -> [H, W, 3]
    frames: int  # steps that have one
    steps: int
    episodes: int
    windows: int
    state_dim: int
    statistics: dict
    reader: dict
    skipped: list[str]  # what could not be read, where that was allowed
    content_hash: str  # of what was read, whatever the encoding and the number of processes
    files: dict[str, str] = field(default_factory=dict)  # name -> sha256; scripts/check_data.py compares them


class FrameStore:
    """Random access to a store by global step index 0 … steps-1.

    Attributes:
        actions: float32 (steps, 7), gripper in {0, 1}, 1 = open, everything else in the benchmark's units.
        states: float32 (steps, S) proprioception.
        episodes: list of dict(source, start, length).
        windows: list of dict(instruction, task, start, length, episode).
        samples: int64 (n,), the steps that have a frame and an instruction, window by window.
        sample_window: int32 (n,), the window each sample belongs to.
        window_last: int64 (windows,), the last step of each window.
        last_frame: int64 (steps,), the latest step with a frame, up to this one and in the same episode.
        episode_of: int32 (steps,), the episode a step belongs to.
        last_step: int64 (steps,), the last step of that episode.
    """

    def __init__(self, path: Path):
        """Raises UserError when `path` is not a complete frame store of this version."""
        self.path = Path(path)
        self.meta = read_meta(self.path)
        self._chunks: dict[str, list] = {camera: [] for camera in self.meta.cameras}
        actions, states, valid, self._starts = [], [], [], [0]
        self._maps = []  # keeps the memory maps alive as long as the views into them
        for shard in sorted(self.path.glob("shard-*.arrow")):
            source = pa.memory_map(str(shard))
            try:
                table = pa.ipc.open_file(source).read_all()
            except pa.ArrowInvalid as error:
                raise UserError(f"{shard} is damaged ({error}); delete the store and convert again") from error
            self._maps.append(source)
            batches = table.to_batches()
            for batch in batches:
                actions.append(_list_column(batch.column("action")))
                states.append(_list_column(batch.column("state")))
                valid.append(batch.column("frame_valid").to_numpy(zero_copy_only=False))
                for camera, shape in self.meta.cameras.items():
                    column = batch.column(f"frame_{camera}")
                    self._chunks[camera].append(_raw_view(column, shape) if self.meta.encoding == "raw" else column)
                self._starts.append(self._starts[-1] + batch.num_rows)
        self.actions, self.states = np.concatenate(actions), np.concatenate(states)
        if len(self.actions) != self.meta.steps:
            raise UserError(
                f"{self.path} holds {len(self.actions)} steps, meta.json says {self.meta.steps}; convert again"
            )
        self.episodes = pq.read_table(self.path / "episodes.parquet").to_pylist()
        lengths = [episode["length"] for episode in self.episodes]
        self.episode_of = np.repeat(np.arange(len(lengths), dtype=np.int32), lengths)
        self.last_step = np.repeat(np.cumsum(lengths) - 1, lengths)
        self._starts = np.asarray(self._starts)
        valid = np.concatenate(valid)
        framed = np.flatnonzero(valid)
        # An episode's first step has a frame, so the latest one is never in the episode before.
        self.last_frame = framed[np.searchsorted(framed, np.arange(len(self)), side="right") - 1]
        self.windows = pq.read_table(self.path / "windows.parquet").to_pylist()
        starts = np.array([window["start"] for window in self.windows], dtype=np.int64)
        lengths = np.array([window["length"] for window in self.windows], dtype=np.int64)
        self.window_last = starts + lengths - 1
        within = np.arange(lengths.sum()) - np.repeat(np.cumsum(lengths) - lengths, lengths)
        steps = np.repeat(starts, lengths) + within
        self.samples = steps[valid[steps]]
        self.sample_window = np.repeat(np.arange(len(starts), dtype=np.int32), lengths)[valid[steps]]

    def __len__(self) -> int:
        return self.meta.steps

    def frames(self, camera: str, steps: np.ndarray) -> np.ndarray:
        """Frames at `steps` (any order, repeats allowed): uint8 (len(steps), H, W, 3)."""
        steps = np.asarray(steps)
        if self.meta.encoding == "raw" and len(self._chunks[camera]) == 1:
            return self._chunks[camera][0].take(steps, axis=0)
        chunk_of = np.searchsorted(self._starts, steps, side="right") - 1
        if self.meta.encoding == "raw" and len(steps) and (chunk_of == chunk_of[0]).all():  # in one call
            return self._chunks[camera][chunk_of[0]].take(steps - self._starts[chunk_of[0]], axis=0)
        out = np.empty((len(steps), *self.meta.cameras[camera]), dtype=np.uint8)
        for row, (chunk, step) in enumerate(zip(chunk_of, steps, strict=True)):
            frame = self._chunks[camera][chunk][step - self._starts[chunk]]
            out[row] = frame if self.meta.encoding == "raw" else Image.open(io.BytesIO(frame.as_py()))
        return out


def read_meta(path: Path) -> StoreMeta:
    file = path / "meta.json"
    if not file.exists():
        raise UserError(f"{path} is not a frame store (no meta.json); make one with scripts/convert.py")
    try:
        fields = json.loads(file.read_text())
        meta = StoreMeta(**fields)
    except (json.JSONDecodeError, TypeError) as error:
        raise UserError(f"{file} cannot be read ({error}); delete the store and convert again") from error
    if meta.version != VERSION:
        raise UserError(f"{path} is a frame store of version {meta.version}, this code reads {VERSION}; convert again")
    return meta


def _raw_view(column: pa.FixedSizeBinaryArray, shape: list[int]) -> np.ndarray:
    size = int(np.prod(shape))
    flat = np.frombuffer(column.buffers()[1], dtype=np.uint8)[column.offset * size :][: len(column) * size]
    return flat.reshape(len(column), *shape)


def _list_column(column: pa.FixedSizeListArray) -> np.ndarray:
    return column.flatten().to_numpy(zero_copy_only=True).reshape(len(column), -1).copy()
