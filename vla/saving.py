"""Checkpoints on disk: folders that are whole or not there, and how the newest whole one is found.

    checkpoints/step=N/state.ckpt      what Lightning's trainer writes: a file, or the folder of a sharded run
                       manifest.json   step, world size, batch size, and the size and sha256 of every file
    checkpoints/.step=N.partial/       one being written; removed at the next start

A checkpoint is written aside, each file and folder is fsynced, the manifest comes last, then the folder gets its name.
So a process that is killed, or a machine that loses power, at any instant leaves every older checkpoint as it was.
Nothing here imports torch: whether a run can go on is known before anything heavy is loaded.
"""

from __future__ import annotations

import fcntl
import hashlib
import itertools
import json
import os
import shutil
import sys
import time
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path

from vla.errors import UserError
from vla.files import Locked, lock, sha256, sync

FORMAT = 1
STATE, MANIFEST = "state.ckpt", "manifest.json"
PATIENCE_S = 10.0
"""For a run that was just killed: its loader's workers hold the folder until they notice."""
SLOW_WRITER = "VLA_SLOW_WRITER"
"""Seconds to wait after each file of a checkpoint: for the tests that kill a run inside a save."""


@dataclass(frozen=True)
class About:
    """What a checkpoint says of itself. `batch_size` is of an optimiser step, over all processes."""

    step: int
    world_size: int
    batch_size: int


def step_of(folder: Path) -> int:
    return int(folder.name.removeprefix("step="))


def saved(run: Path) -> list[Path]:
    """The checkpoint folders of a run, whole or damaged, by step."""
    found = (run / "checkpoints").glob("step=*")
    return sorted((path for path in found if path.name.removeprefix("step=").isdigit()), key=step_of)


def aside(checkpoints: Path, step: int) -> Path:
    """A new empty folder to write a checkpoint into."""
    partial = checkpoints / f".step={step}.partial"
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    return partial


def seal(partial: Path, about: About) -> Path:
    """Make what is written in `partial` the checkpoint of its step; a damaged one of that step is moved aside, kept.

    Raises:
        OSError: the disk is full, or the folder cannot be written.
    """
    folder = partial.with_name(f"step={about.step}")
    files = {}
    for path in files_of(partial):
        sync(path)
        files[path.relative_to(partial).as_posix()] = {"bytes": path.stat().st_size, "sha256": sha256(path)}
        time.sleep(float(os.environ.get(SLOW_WRITER, 0)))
    text = manifest_text(asdict(about) | {"files": files})
    with open(partial / MANIFEST, "w") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    for path in [partial, *(path for path in partial.rglob("*") if path.is_dir())]:
        sync(path)
    time.sleep(float(os.environ.get(SLOW_WRITER, 0)))
    if folder.exists():
        others = (folder.with_name(f"{folder.name}.damaged{number}") for number in itertools.count(1))
        folder.rename(next(other for other in others if not other.exists()))
    partial.rename(folder)
    sync(folder.parent)
    return folder


def drop_older(run: Path, keep: int, damaged: set[str]) -> None:
    """Delete all but the newest `keep` (-1: all are kept); those named in `damaged` do not count and stay."""
    whole = [path for path in saved(run) if path.name not in damaged]
    for path in whole[: -max(1, keep)] if keep >= 0 else ():
        doomed = path.with_name(f".{path.name}.partial")  # killed halfway, it has no checkpoint's name
        path.rename(doomed)
        shutil.rmtree(doomed)


def newest_whole(run: Path) -> tuple[Path | None, dict[str, str]]:
    """(the newest checkpoint whose files are what its manifest says, {name: what is wrong} of those after it)."""
    wrong = {}
    for folder in reversed(saved(run)):
        if (fault := damage(folder)) is None:
            return folder, wrong
        wrong[folder.name] = fault
    return None, wrong


def damage(folder: Path) -> str | None:
    """What is wrong with a checkpoint, naming the file; None where sizes and hashes agree with the manifest."""
    try:
        content = read_manifest(folder)
        for name, of in content["files"].items():
            path = folder / name
            if not path.is_file():
                return f"{name} is missing"
            if (size := path.stat().st_size) != of["bytes"]:
                return f"{name} has {size} bytes instead of {of['bytes']}"
            if sha256(path) != of["sha256"]:
                return f"{name} has other content than was written (its sha256 differs)"
    except UserError as error:
        return str(error)
    except OSError as error:
        return f"{Path(error.filename or MANIFEST).name} cannot be read ({error.strerror})"
    return None


def manifest_text(content: dict) -> str:
    """The manifest's text; it holds its own hash, so that no flipped bit in it goes unseen."""
    content = {"format": FORMAT} | content
    told = json.dumps(content, indent=2, sort_keys=True)
    return json.dumps(content | {"sha256": hashlib.sha256(told.encode()).hexdigest()}, indent=2, sort_keys=True) + "\n"


def read_manifest(folder: Path) -> dict:
    """The manifest's content.

    Raises:
        UserError: it is missing, of another format, or not what was written.
    """
    if not folder.is_dir():
        raise UserError(f"{folder.name} is not a folder")
    if not (folder / MANIFEST).is_file():
        raise UserError(f"{MANIFEST} is missing")
    written = (folder / MANIFEST).read_bytes()
    try:
        content = json.loads(written)
        content = {key: value for key, value in content.items() if key not in ("format", "sha256")}
        whole = manifest_text(content).encode() == written and content["step"] == step_of(folder)
        whole = whole and STATE in {name.split("/")[0] for name in content["files"]}
    except (ValueError, AttributeError, KeyError, TypeError):
        whole = False
    if not whole:
        raise UserError(f"{MANIFEST} has other content than was written, or is of another version of this code")
    return content


def files_of(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file())


def rank() -> int:
    """This process's number among those of the run, before there is a trainer to ask; 0 where there is one process."""
    return next((int(os.environ[name]) for name in ("RANK", "LOCAL_RANK", "SLURM_PROCID") if name in os.environ), 0)


def newest_checkpoint(resume: str | None, run: Path) -> tuple[Path | None, set[str]]:
    """(the checkpoint to go on from, the names of damaged ones). What a killed save left is removed.

    A run with checkpoints is neither resumed nor overwritten unless told which. Each damaged checkpoint is named on
    stderr, skipped and kept.

    Raises:
        UserError: `resume` is None and there are some, or it is "auto" and none of them is whole.
    """
    first = rank() == 0
    if first:
        for partial in (run / "checkpoints").glob(".step=*.partial"):
            shutil.rmtree(partial, ignore_errors=True)
    if resume == "never":
        if first:
            shutil.rmtree(run / "checkpoints", ignore_errors=True)  # or a later resume=auto would take up the old run
        return None, set()
    found = saved(run)
    older = sorted(path.name for path in (run / "checkpoints").glob("step=*.ckpt"))
    if not found and not older:
        return None, set()
    if resume is None:
        raise UserError(
            f"{run} holds an unfinished run (at {found[-1].name if found else older[-1]}); add resume=auto to go on, "
            "resume=never to start over"
        )
    newest, wrong = newest_whole(run)
    for name, fault in wrong.items() if first else ():
        print(f"warning: {run / 'checkpoints' / name} is damaged: {fault}; skipped and kept", file=sys.stderr)
    if newest is None:
        what = f"none of the {len(found)} checkpoints is whole" if found else f"{older[-1]} is of an older version"
        raise UserError(f"{run / 'checkpoints'}: {what}; resume=never starts over and deletes them")
    return newest, set(wrong)


def hold(run: Path) -> AbstractContextManager:
    """This run's folder for this process alone, inside the context; of several processes the first one holds it.

    Raises:
        UserError: another process trains into it.
    """
    if rank() != 0:
        return nullcontext()
    try:
        return lock(run, fcntl.LOCK_EX, patience_s=PATIENCE_S)
    except Locked:
        raise UserError(f"{run} is being trained by another process; wait for it, or stop it first") from None


def remove_partial(checkpoints: Path, step: int) -> None:
    """Where that can be done: a full disk lets one, a read-only one does not."""
    shutil.rmtree(checkpoints / f".step={step}.partial", ignore_errors=True)


def unwritable(folder: Path, step: int, error: BaseException) -> UserError:
    """One line for a save that failed."""
    why = getattr(error, "strerror", None) or " ".join(str(error).split())
    return UserError(
        f"the checkpoint at step {step} cannot be written to {folder} ({why}); free space or mend its permissions, "
        "then resume=auto goes on from the one before"
    )
