"""Writing a frame store: episodes from any reader, in one process or in several, all of it or nothing.

A conversion is cut into units (a file of demonstrations, a stretch of frame files). Each writes its own shards and then
a small JSON file that says it is done; a conversion that was stopped goes on with the units that are missing. The
result does not depend on how many processes worked at it.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import shutil
from collections.abc import Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict
from multiprocessing import get_context
from pathlib import Path
from typing import Protocol

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from data.episode import Episode
from data.frame_store import VERSION, StoreMeta
from data.statistics import ActionStatistics
from vla.errors import UserError
from vla.files import lock, sha256

SHARD_BYTES = 256 * 2**20
ENCODINGS = ("raw", "jpeg")
FEW = 16
"""Units that one process is done with before others have started."""


class Unit(Protocol):
    """A part of a conversion that one process does; picklable."""

    name: str

    def read(self, skipped: list[str] | None) -> Iterator[Episode]:
        """Its episodes. What cannot be read raises UserError; where `skipped` is given it is named there instead."""


def write_store(episodes: Iterable[Episode], out: Path, reader: dict, encoding: str = "raw") -> StoreMeta:
    """Write `episodes` to the folder `out`, in this process.

    Args:
        episodes: non-empty; all with the same cameras, frame sizes and state width.
        reader: how the episodes were read (JSON-able), kept so that another reading is another store.
        encoding: "raw" (49 kB for 128 × 128) or "jpeg" (quality 95, about a tenth of it, lossy).

    Raises:
        UserError: no episodes, differing cameras or sizes, an unknown encoding, or a folder that is not a store.
    """
    _check(out, encoding)
    partial = out.with_name(f".{out.name}.partial-{os.getpid()}")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        _write_unit(partial, 0, episodes, encoding, None)
        return _finish(partial, out, 1, reader, encoding)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def convert(
    units: list[Unit], out: Path, reader: dict, encoding: str = "raw", workers: int | None = None, skip: bool = False
) -> StoreMeta:
    """Write the episodes of `units`, in their order, to the folder `out`, with a progress bar.

    What is done stays in a hidden folder beside `out` until all is, and is taken up by the next call.

    Args:
        workers: processes; by default as many as there are cores, or one where there is little to do.
        skip: leave out what cannot be read and name it in the store's meta, instead of raising.

    Raises:
        UserError: as `write_store`; a unit that cannot be read; another process at the same conversion.
    """
    _check(out, encoding)
    workers = workers or (len(os.sched_getaffinity(0)) if len(units) > FEW else 1)
    partial = out.with_name(f".{out.name}.partial")
    partial.mkdir(parents=True, exist_ok=True)
    with lock(partial, by="process"):
        plan = {"units": [u.name for u in units], "reader": reader, "encoding": encoding, "skip": skip, "hashed": True}
        plan = json.dumps(plan)
        if not (partial / "plan.json").exists() or (partial / "plan.json").read_text() != plan:
            _clear(partial)
            (partial / "plan.json").write_text(plan)
        waiting = [index for index in range(len(units)) if not (partial / _unit_file(index)).exists()]
        columns = (TextColumn("converting"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
        try:
            with Progress(*columns, TimeRemainingColumn()) as bar:
                task = bar.add_task("", total=len(units), completed=len(units) - len(waiting))
                for _ in _run(units, waiting, partial, encoding, skip, workers):
                    bar.advance(task)
            meta = _finish(partial, out, len(units), reader, encoding)
        except BaseException:
            if not any(partial.glob("unit-*.json")):
                shutil.rmtree(partial)  # nothing to go on with
            raise
    return meta


def _run(
    units: list[Unit], waiting: list[int], partial: Path, encoding: str, skip: bool, workers: int
) -> Iterator[None]:
    if workers < 2 or len(waiting) < 2:
        for index in waiting:
            _convert_unit(partial, index, units[index], encoding, skip)
            yield
        return
    with ProcessPoolExecutor(min(workers, len(waiting)), mp_context=get_context("spawn")) as pool:
        futures = [pool.submit(_convert_unit, partial, index, units[index], encoding, skip) for index in waiting]
        try:
            for future in as_completed(futures):
                future.result()
                yield
        finally:
            for future in futures:
                future.cancel()


def _convert_unit(partial: Path, index: int, unit: Unit, encoding: str, skip: bool) -> None:
    skipped: list[str] | None = [] if skip else None
    try:
        _write_unit(partial, index, unit.read(skipped), encoding, skipped)
    except UserError as error:
        if skipped is None:
            raise
        _write_unit(partial, index, (), encoding, [str(error)])


def _write_unit(
    folder: Path, index: int, episodes: Iterable[Episode], encoding: str, skipped: list[str] | None
) -> None:
    """The shards of one unit, and last its JSON: rows with starts counted from the unit's own beginning."""
    rows, windows, digest, start, frames = [], [], hashlib.sha256(), 0, 0
    files: dict[str, str] = {}
    pending: list[pa.Table] = []
    pending_bytes, shard = 0, 0
    shapes: dict[str, list[int]] | None = None
    state_dim = 0
    for old in folder.glob(f"shard-{index:05d}-*.arrow"):
        old.unlink()
    for episode in episodes:
        found = {camera: list(frames.shape[1:]) for camera, frames in episode.frames.items()}
        if shapes is None:
            shapes, state_dim = found, episode.state.shape[1]
        _same_shapes(episode.source, (found, episode.state.shape[1]), (shapes, state_dim))
        if episode.frame_valid is not None and not episode.frame_valid[0]:
            raise UserError(f"{episode.source} has no frame at its first step; collect it again")
        table = _episode_table(episode, encoding)
        add_content(digest, episode, start)
        for window in episode.described():
            windows.append(asdict(window) | {"start": start + window.start, "episode": len(rows)})
        length = len(episode.actions)
        frames += length if episode.frame_valid is None else int(episode.frame_valid.sum())
        rows.append(dict(source=episode.source, start=start, length=length))
        start += length
        pending.append(table)
        pending_bytes += table.nbytes
        if pending_bytes >= SHARD_BYTES:
            files |= _write_shard(folder / f"shard-{index:05d}-{shard:03d}.arrow", pending)
            pending, pending_bytes, shard = [], 0, shard + 1
    if pending:
        files |= _write_shard(folder / f"shard-{index:05d}-{shard:03d}.arrow", pending)
    done = dict(
        episodes=rows, windows=windows, steps=start, frames=frames, cameras=shapes, state_dim=state_dim,
        digest=digest.hexdigest(), files=files, skipped=skipped or [],
    )  # fmt: skip
    _write_json(folder / _unit_file(index), done)


def _finish(partial: Path, out: Path, count: int, reader: dict, encoding: str) -> StoreMeta:
    """Join the units' rows, describe the whole, and move it to its place."""
    units = [json.loads((partial / _unit_file(index)).read_text()) for index in range(count)]
    skipped = [message for unit in units for message in unit["skipped"]]
    filled = [unit for unit in units if unit["steps"]]
    if not filled:
        reason = f" ({len(skipped)} skipped, first: {skipped[0]})" if skipped else ""
        raise UserError(f"no episodes to convert{reason}; collect some first: python scripts/collect.py")
    first = filled[0]
    rows, windows, start = [], [], 0
    for unit in filled:
        where = unit["episodes"][0]["source"]
        _same_shapes(where, (unit["cameras"], unit["state_dim"]), (first["cameras"], first["state_dim"]))
        windows += [w | {"start": start + w["start"], "episode": len(rows) + w["episode"]} for w in unit["windows"]]
        rows += [row | {"start": start + row["start"]} for row in unit["episodes"]]
        start += unit["steps"]
    actions, states = _low_dimensional(partial)
    pq.write_table(pa.Table.from_pylist(rows), partial / "episodes.parquet")
    pq.write_table(pa.Table.from_pylist(windows), partial / "windows.parquet")
    files = {name: digest for unit in filled for name, digest in unit["files"].items()}
    meta = StoreMeta(
        version=VERSION,
        encoding=encoding,
        cameras=first["cameras"],
        frames=sum(unit["frames"] for unit in filled),
        steps=start,
        episodes=len(rows),
        windows=len(windows),
        state_dim=first["state_dim"],
        statistics=ActionStatistics.of(actions, states).to_dict(),
        reader=reader,
        skipped=skipped,
        content_hash=joint_hash([unit["digest"] for unit in filled]),
        files=files | {name: sha256(partial / name) for name in ("episodes.parquet", "windows.parquet")},
    )
    for file in (*partial.glob("unit-*.json"), partial / "plan.json", partial / ".lock"):
        file.unlink(missing_ok=True)
    _write_json(partial / "meta.json", asdict(meta))
    if out.exists():
        shutil.rmtree(out)
    os.replace(partial, out)
    return meta


def add_content(digest: hashlib._Hash, episode: Episode, start: int) -> None:
    """Take an episode that begins at step `start` of its unit into the unit's hash."""
    for array in (episode.actions, episode.state, *episode.frames.values()):
        digest.update(np.ascontiguousarray(array).tobytes())
    for window in episode.described():
        digest.update(f"{window.instruction}/{start + window.start}/{window.length}".encode())


def joint_hash(units: list[str]) -> str:
    """A store's content hash, of those of its units that hold a step."""
    return hashlib.sha256("".join(units).encode()).hexdigest()


def _low_dimensional(folder: Path) -> tuple[np.ndarray, np.ndarray]:
    """Actions and states of all shards, float32; the frames are not read."""
    actions, states = [], []
    for shard in sorted(folder.glob("shard-*.arrow")):
        with pa.memory_map(str(shard)) as source:
            for batch in pa.ipc.open_file(source).read_all().to_batches():
                for found, name in ((actions, "action"), (states, "state")):
                    column = batch.column(name)
                    found.append(column.flatten().to_numpy(zero_copy_only=False).reshape(len(column), -1).copy())
    return np.concatenate(actions), np.concatenate(states)


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


def _write_shard(path: Path, tables: list[pa.Table]) -> dict[str, str]:
    """Write the file; {its name: its hash}."""
    table = pa.concat_tables(tables).combine_chunks()
    with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_file(sink, table.schema) as writer:
        writer.write_table(table)
    return {path.name: sha256(path)}


def _encode_jpeg(frame: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(frame).save(buffer, format="JPEG", quality=95, subsampling=0)
    return buffer.getvalue()


def _same_shapes(source: str, found: tuple, expected: tuple) -> None:
    if found != expected:
        raise UserError(f"{source} has cameras {found[0]}, the episodes before it {expected[0]}; convert them apart")


def _check(out: Path, encoding: str) -> None:
    if encoding not in ENCODINGS:
        raise UserError(f"data.encoding={encoding} is not known; choose raw or jpeg")
    if out.exists() and not (out / "meta.json").exists():
        raise UserError(f"{out} exists and is not a frame store; choose another place with out=DIR")


def _unit_file(index: int) -> str:
    return f"unit-{index:05d}.json"


def _write_json(path: Path, content: dict) -> None:
    temporary = path.with_name(f".{path.name}.tmp")
    with open(temporary, "w") as file:
        json.dump(content, file, indent=2)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)


def _clear(folder: Path) -> None:
    for file in folder.iterdir():
        if file.name != ".lock":
            file.unlink()
