"""The frame store: the one format that training reads, whatever format the data came in.

A store is a folder:
    meta.json             version, cameras, statistics, source, reader options, a hash of the content
    episodes.parquet      one row per episode: instruction, task, source, start, length
    shard-00000.arrow …   Arrow IPC files, one record batch each: per camera one frame per row (raw bytes of fixed size,
                          or JPEG), and `action` and `state` as fixed-size lists

Arrow IPC because it is memory-mapped without a copy, shared by all workers and ranks through the page cache, holds raw
and encoded frames alike, and is a documented format with readers in every language. Actions and states are read into
RAM when a store is opened; frames never are.

Written by `scripts/convert.py`, or by train.py when it meets a folder of a real format.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import shutil
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from data.episode import Episode
from data.normalization import ActionStatistics
from vla.errors import UserError

VERSION = 2
SHARD_BYTES = 256 * 2**20


@dataclass(frozen=True)
class StoreMeta:
    version: int
    encoding: str
    cameras: dict[str, list[int]]  # camera -> [H, W, 3]
    frames: int  # steps that have one
    steps: int
    episodes: int
    state_dim: int
    statistics: dict
    reader: dict
    content_hash: str


def write_store(episodes: Iterable[Episode], out: Path, reader: dict, encoding: str = "raw") -> StoreMeta:
    """Write `episodes` to the folder `out`, which appears complete or not at all.

    Args:
        episodes: non-empty; all with the same cameras, frame sizes and state width.
        reader: how the episodes were read (JSON-able), kept so that another reading is another store.
        encoding: "raw" (49 kB for 128 × 128) or "jpeg" (quality 95, about a tenth of it, lossy).

    Raises:
        UserError: no episodes, differing cameras or sizes, an unknown encoding, or a folder that is not a store.
    """
    if encoding not in ("raw", "jpeg"):
        raise UserError(f"data.encoding={encoding} is not known; choose raw or jpeg")
    if out.exists() and not (out / "meta.json").exists():
        raise UserError(f"{out} exists and is not a frame store; choose another place with out=DIR")
    partial = out.with_name(f".{out.name}.partial-{os.getpid()}")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        meta = _write(episodes, partial, reader, encoding)
        if out.exists():
            shutil.rmtree(out)
        os.replace(partial, out)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return meta


def _write(episodes: Iterable[Episode], folder: Path, reader: dict, encoding: str) -> StoreMeta:
    rows: list[dict] = []
    actions, states, digest, start = [], [], hashlib.sha256(), 0
    pending, pending_bytes, shard = [], 0, 0
    shapes: dict[str, list[int]] | None = None
    state_dim = frames = 0

    for episode in episodes:
        found = {camera: list(frames.shape[1:]) for camera, frames in episode.frames.items()}
        if shapes is None:
            shapes, state_dim = found, episode.state.shape[1]
        if found != shapes or episode.state.shape[1] != state_dim:
            raise UserError(
                f"{episode.source} has cameras {found}, the episodes before it {shapes}; convert them apart"
            )
        if episode.frame_valid is not None and not episode.frame_valid[0]:
            raise UserError(f"{episode.source} has no frame at its first step; collect it again")
        table = _episode_table(episode, encoding)
        for array in (episode.actions, episode.state, *episode.frames.values()):
            digest.update(np.ascontiguousarray(array).tobytes())
        digest.update(episode.instruction.encode())
        length = len(episode.actions)
        frames += length if episode.frame_valid is None else int(episode.frame_valid.sum())
        rows.append(
            dict(instruction=episode.instruction, task=episode.task, source=episode.source, start=start, length=length)
        )
        start += length
        actions.append(episode.actions)
        states.append(episode.state)
        pending.append(table)
        pending_bytes += table.nbytes
        if pending_bytes >= SHARD_BYTES:
            _write_shard(folder / f"shard-{shard:05d}.arrow", pending)
            pending, pending_bytes, shard = [], 0, shard + 1
    if shapes is None:
        raise UserError("no episodes to convert; collect some first: python scripts/collect.py benchmark=libero_goal")
    if pending:
        _write_shard(folder / f"shard-{shard:05d}.arrow", pending)

    pq.write_table(pa.Table.from_pylist(rows), folder / "episodes.parquet")
    meta = StoreMeta(
        version=VERSION,
        encoding=encoding,
        cameras=shapes,
        frames=frames,
        steps=start,
        episodes=len(rows),
        state_dim=state_dim,
        statistics=ActionStatistics.of(np.concatenate(actions), np.concatenate(states)).to_dict(),
        reader=reader,
        content_hash=digest.hexdigest(),
    )
    with open(folder / "meta.json", "w") as file:
        json.dump(asdict(meta), file, indent=2)
        file.flush()
        os.fsync(file.fileno())
    return meta


def _episode_table(episode: Episode, encoding: str) -> pa.Table:
    valid = np.ones(len(episode.actions), bool) if episode.frame_valid is None else episode.frame_valid
    columns = {"frame_valid": pa.array(valid)}
    for camera, frames in episode.frames.items():
        if encoding == "raw":
            flat = np.ascontiguousarray(frames).reshape(len(frames), -1)
            columns[f"frame_{camera}"] = pa.FixedSizeBinaryArray.from_buffers(
                pa.binary(flat.shape[1]), len(flat), [None, pa.py_buffer(flat)]
            )
        else:
            columns[f"frame_{camera}"] = pa.array([_encode_jpeg(frame) for frame in frames], pa.large_binary())
    for name, values in (("action", episode.actions), ("state", episode.state)):
        flat = pa.array(np.ascontiguousarray(values, dtype=np.float32).reshape(-1))
        columns[name] = pa.FixedSizeListArray.from_arrays(flat, values.shape[1])
    return pa.table(columns)


def _write_shard(path: Path, tables: list[pa.Table]) -> None:
    table = pa.concat_tables(tables).combine_chunks()
    with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_file(sink, table.schema) as writer:
        writer.write_table(table)


def _encode_jpeg(frame: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(frame).save(buffer, format="JPEG", quality=95, subsampling=0)
    return buffer.getvalue()


class FrameStore:
    """Random access to a store by global step index 0 … steps-1.

    Attributes:
        actions: float32 (steps, 7), gripper in {0, 1}, 1 = open, everything else in the benchmark's units.
        states: float32 (steps, S) proprioception.
        episodes: list of dict(instruction, task, source, start, length).
        samples: int64 (n,), the steps that have a frame; all of them unless the data says otherwise.
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
        self.samples = np.flatnonzero(np.concatenate(valid))
        # An episode's first step has a frame, so the latest one is never in the episode before.
        self.last_frame = self.samples[np.searchsorted(self.samples, np.arange(len(self)), side="right") - 1]

    def __len__(self) -> int:
        return self.meta.steps

    def frames(self, camera: str, steps: np.ndarray) -> np.ndarray:
        """Frames at `steps` (any order, repeats allowed): uint8 (len(steps), H, W, 3)."""
        steps = np.asarray(steps)
        out = np.empty((len(steps), *self.meta.cameras[camera]), dtype=np.uint8)
        chunk_of = np.searchsorted(self._starts, steps, side="right") - 1
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
