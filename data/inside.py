"""Names of files that a data set gives: they may lead nowhere but below its own folder."""

from __future__ import annotations

from pathlib import Path, PurePosixPath

from vla.errors import UserError


def inside(root: Path, name: str, where: str) -> Path:
    """`root / name`. Links below `root` are followed: its owner made them (a hub's cache is full of them).

    Args:
        where: file and entry that give the name, for the error.

    Raises:
        UserError: an absolute name, or one with "..".
    """
    path = PurePosixPath(name)
    if path.is_absolute() or ".." in path.parts or "\0" in name:
        raise UserError(f"{where} names a file outside {root}: {name!r}; whoever made it is not to be trusted")
    return root / name
