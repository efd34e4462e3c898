"""Files that several programs share: written whole or not at all, held by one process at a time, hashed.

write_atomic(folder / "summary.json", text)
with lock(folder, fcntl.LOCK_EX): ...          # of this process alone until the file is closed
"""

from __future__ import annotations

import fcntl
import hashlib
import io
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, TYPE_CHECKING

from vla.errors import UserError

if TYPE_CHECKING:
    import numpy as np


class Locked(UserError):
    """Another process holds the folder."""


def lock(folder: Path, kind: int = fcntl.LOCK_EX, patience_s: float = 0.0, by: str = "evaluation") -> IO:
    """An flock of `kind` (fcntl.LOCK_EX or LOCK_SH) on the folder, which is created; closing the file releases it.

    The kernel releases it with the process, however that ends. Open for both ways, which NFS asks for.

    Args:
        by: what another holder is called in the error.

    Raises:
        Locked: others hold it, for longer than `patience_s`.
    """
    folder.mkdir(parents=True, exist_ok=True)
    file = (folder / ".lock").open("a+")
    deadline = time.monotonic() + patience_s
    while True:
        try:
            fcntl.flock(file, kind | fcntl.LOCK_NB)
            return file
        except BlockingIOError:
            if time.monotonic() < deadline:
                time.sleep(0.05)
                continue
            file.close()
            raise Locked(f"{folder} is being written by another {by}; wait for it or choose another folder") from None


def write_atomic(path: Path, content: str | bytes) -> None:
    """
    Raises:
        UserError: as `writing`; the file is then as it was.
    """
    temporary = path.with_name(f".{path.name}.tmp")
    with writing(path):
        with temporary.open("wb") as file:
            file.write(content.encode() if isinstance(content, str) else content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)


def write_arrays(path: Path, arrays: dict[str, np.ndarray]) -> None:
    """An .npz of numbers, as `write_atomic`."""
    import numpy as np

    content = io.BytesIO()
    np.savez_compressed(content, **arrays)
    write_atomic(path, content.getvalue())


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """A full disk or a folder without permission as one line; what was written before is whole."""
    try:
        yield
    except OSError as error:
        raise UserError(
            f"{path} cannot be written ({error.strerror}); mend that and run the same command again"
        ) from error


def sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def sync(path: Path) -> None:
    """fsync a file or a folder."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
