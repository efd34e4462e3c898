"""Reading everything of a data set, or of a frame store, to say whether it is whole.

    for count in audit_source(units, workers, audit := Audit()): ...      # count of units that are done
    for count in audit_store(path, audit := Audit()): ...                 # count of files that are done

A data set is read as a conversion reads it (checksums where the format has them, every picture decoded, shapes, lengths
and finite numbers), nothing is written, and its content hash is that of the store that would come out. A store's files
are compared with the hashes that it was written with; one from before there were any is opened, its pictures decoded.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from itertools import starmap
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import pyarrow as pa

from data.frame_store import FrameStore, StoreMeta, read_meta
from data.store_writer import FEW, Unit, add_content, joint_hash
from vla.errors import UserError
from vla.files import sha256


@dataclass
class Audit:
    """What was found; `bad` has a line per thing that cannot be read, which names file and episode or frame."""

    episodes: int = 0
    windows: int = 0
    steps: int = 0
    frames: int = 0  # steps that have one
    content: str = ""
    bad: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


def audit_source(units: list[Unit], workers: int | None, audit: Audit) -> Iterator[int]:
    """Read every unit of a conversion; fills `audit` and yields how many are done. workers: as in `convert`."""
    digests: list[str] = []

    def take(found: tuple[Audit, tuple]) -> None:
        part, shapes = found
        if shapes and shapes != first.setdefault("shapes", shapes):
            audit.bad.append(f"{part.notes[0]} has cameras and state {shapes}, files before it {first['shapes']}")
        for name in ("episodes", "windows", "steps", "frames", "bad"):
            setattr(audit, name, getattr(audit, name) + getattr(part, name))
        digests.extend([part.content] if part.steps else [])

    first: dict[str, tuple] = {}
    if workers == 1 or (workers is None and len(units) <= FEW):
        for done, unit in enumerate(units, 1):
            take(_audit_unit(unit))
            yield done
    else:
        with ProcessPoolExecutor(workers, mp_context=get_context("spawn")) as pool:
            for done, found in enumerate(pool.map(_audit_unit, units), 1):
                take(found)
                yield done
    audit.content = joint_hash(digests)


def _audit_unit(unit: Unit) -> tuple[Audit, tuple]:
    """(what is in it, the shapes of its first episode); `notes` holds the unit's name."""
    audit, digest, shapes = Audit(notes=[unit.name]), hashlib.sha256(), ()
    try:
        for episode in unit.read(audit.bad):
            found = tuple((camera, frames.shape[1:]) for camera, frames in episode.frames.items())
            found = (*found, episode.state.shape[1:])
            shapes = shapes or found
            if found != shapes:
                audit.bad.append(f"{episode.source} has cameras and state {found}, episodes before it {shapes}")
                continue
            add_content(digest, episode, audit.steps)
            audit.episodes += 1
            audit.windows += len(episode.described())
            audit.steps += len(episode.actions)
            valid = episode.frame_valid
            audit.frames += len(episode.actions) if valid is None else int(np.sum(valid))
    except UserError as error:
        audit.bad.append(f"{error} (the rest of {unit.name} was not read)")
    audit.content = digest.hexdigest()
    return audit, shapes


def store_files(path: Path) -> list[str]:
    """What `audit_store` looks at, one by one."""
    meta = read_meta(path)
    found = {file.name for pattern in ("*.arrow", "*.parquet") for file in path.glob(pattern)}
    return sorted(found | set(meta.files))


def audit_store(path: Path, audit: Audit) -> Iterator[int]:
    """Compare every file of a store with its hash; fills `audit` and yields how many are done."""
    meta = read_meta(path)
    audit.episodes, audit.windows, audit.steps, audit.frames = meta.episodes, meta.windows, meta.steps, meta.frames
    audit.content = meta.content_hash
    audit.notes += [f"left out when it was converted: {message}" for message in meta.skipped]
    if not meta.files:
        audit.notes.append("made before stores kept hashes of their files: a changed number or pixel cannot be seen")
    for done, name in enumerate(store_files(path), 1):
        if not (path / name).exists():
            audit.bad.append(f"{path / name} is missing; delete the store and convert again")
        elif meta.files and name not in meta.files:
            audit.bad.append(f"{path / name} is none of the store's files; remove it")
        elif meta.files and sha256(path / name) != meta.files[name]:
            audit.bad.append(f"{path / name} is not as it was written (sha256); delete the store and convert again")
        yield done
    if not audit.bad:
        audit.bad += _opened(path, meta)


def _opened(path: Path, meta: StoreMeta) -> list[str]:
    """What does not fit together in a store whose files are whole, as far as that is known."""
    try:
        store = FrameStore(path)
    except (UserError, pa.ArrowException, OSError, ValueError, KeyError) as error:
        return [f"{path} cannot be opened ({error}); delete the store and convert again"]
    found = {"episodes": len(store.episodes), "windows": len(store.windows), "steps": len(store)}
    bad = [f"{path} holds {n} {what}, meta.json says {getattr(meta, what)}" for what, n in found.items()]
    bad = [line for line, (what, n) in zip(bad, found.items(), strict=True) if n != getattr(meta, what)]
    if not meta.files and meta.encoding != "raw":
        steps = np.unique(store.last_frame)
        bad += [line for line in starmap(_decoded, ((store, c, int(s)) for c in meta.cameras for s in steps)) if line]
    return bad


def _decoded(store: FrameStore, camera: str, step: int) -> str | None:
    try:
        store.frames(camera, np.array([step]))
    except (OSError, ValueError, SyntaxError) as error:
        return f"{store.path}: {camera} at step {step} cannot be decoded ({error}); convert again"
    return None
