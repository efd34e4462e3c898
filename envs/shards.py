"""An evaluation in several jobs: each runs its share of the episodes, and whoever ends last merges them.

    python evaluate.py -m policy=… shard=0,1,2,3 shards=4          # or a Slurm array with hydra/launcher=slurm

    results/<run>/shards/2-of-4/    shard.jsonl (rows as in episodes.jsonl), run.json, summary.json, .lock, and
                                    ended.json once the shard has nothing left to run

Of the episodes without a row in results/<run>/episodes.jsonl shard k of n runs numbers k, k + n, k + 2n … That file
does not change while shards are at work: they hold its folder's lock together (LOCK_SH), and a merge needs it alone
(LOCK_EX). So they agree on who does what, whenever each is started, killed and started again. A merge leaves what one
job would have left; a job without shard=, or of another number of shards, first merges what earlier shards have done.
"""

from __future__ import annotations

import fcntl
import json
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from envs.records import EPISODES, Key, Records, check_header, key_of, read_rows
from vla.errors import UserError
from vla.files import Locked, lock, write_atomic

ROWS, ENDED = "shard.jsonl", "ended.json"
PATIENCE_S = 10.0
"""Other shards hold the folder alone for as long as it takes to merge; another evaluation for hours."""


@dataclass(frozen=True)
class Shard:
    """Job `index` of `count`, from 0."""

    index: int
    count: int

    def __str__(self) -> str:
        return f"{self.index}-of-{self.count}"


def shard_of(index: int | None, count: int | None) -> Shard | None:
    """What `shard=` and `shards=` ask for; UserError where that cannot be."""
    if index is None and count is None:
        return None
    if index is None or count is None or not 0 <= index < count:
        raise UserError(
            f"shard={index} shards={count} is no share; give both, shard from 0 to shards - 1 (-m shard=0,1 shards=2)"
        )
    return Shard(index, count)


@contextmanager
def joined(out: Path, header: dict[str, Any], shard: Shard) -> Iterator[set[Key]]:
    """Take part in an evaluation; yields the episodes that it has rows of, which stay these inside the context.

    Raises:
        Locked: a job without shard= is at work.
        UserError: another run's folder, or shards of another number are at work.
    """
    try:
        with Records(out, header) as records:  # nobody else: what an earlier number of shards has left can be merged
            absorb(records, [folder for folder in folders(out) if not folder.name.endswith(f"-of-{shard.count}")])
    except Locked:
        pass  # the others of these shards, or a job that the next line finds
    with lock(out, fcntl.LOCK_SH, PATIENCE_S):
        for folder in folders(out):
            if not folder.name.endswith(f"-of-{shard.count}"):
                raise UserError(f"{folder} is being written by an array of another length; wait for it or end it")
        rows = read_rows(out / EPISODES)
        if rows:
            check_header(out, json.loads(json.dumps(header)))
        yield {key_of(row) for row in rows}


def folders(out: Path) -> list[Path]:
    """Of the shards that nobody has merged."""
    return sorted((out / "shards").glob("*-of-*"))


def records_of(out: Path, header: dict[str, Any], shard: Shard) -> Records:
    """The shard's own folder, locked; an end that it came to before does not count any more."""
    records = Records(out / "shards" / str(shard), header, ROWS)
    (records.folder / ENDED).unlink(missing_ok=True)
    return records


def end(records: Records, missing: dict[Key, str]) -> None:
    """Note that the shard has run all it could, and why the `missing` have no row."""
    write_atomic(records.folder / ENDED, json.dumps([[*key, reason] for key, reason in missing.items()]))


def absorb(records: Records, shards: list[Path]) -> dict[Key, str]:
    """Merge the rows of the folders `shards` into the run's, then remove the folders; why what lacks a row does.

    Raises:
        Locked: one of the shards is at work.
        UserError: a row of another run, or one that cannot be read.
    """
    reasons: dict[Key, str] = {}
    for folder in shards:
        with Records(folder, records.header, ROWS) as part:
            records.merge(part.rows.values())
            if (folder / ENDED).exists():
                reasons |= {Key(*key): reason for *key, reason in json.loads((folder / ENDED).read_text())}
            part.file.unlink(missing_ok=True)  # first: without rows it is nobody's, should the rest stay behind
            shutil.rmtree(folder)
    if shards and not folders(records.folder):
        (records.folder / "shards").rmdir()
    return {key: reason for key, reason in reasons.items() if key not in records.rows}


def merge_when_last(out: Path, header: dict[str, Any], shard: Shard, episodes: list[Key]) -> dict[str, Any] | None:
    """The whole run's summary once every shard has ended, None while some have not. Called with no lock held.

    Of two that end together one merges; the other waits for it.
    """
    own = out / "shards" / str(shard)
    parts = [own.with_name(f"{index}-of-{shard.count}") for index in range(shard.count)]
    deadline = time.monotonic() + PATIENCE_S
    while all((part / ENDED).exists() for part in parts):
        try:
            with Records(out, header) as records:
                if own.exists():
                    reasons = absorb(records, parts)
                    missing = [key for key in episodes if key not in records.rows]
                    return records.summarise({key: reasons.get(key, "not run") for key in missing})
        except Locked:
            if time.monotonic() > deadline:
                return None
            time.sleep(0.05)
    return None if own.exists() else json.loads((out / "summary.json").read_text())
