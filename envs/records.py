"""Episode records: what a rollout leaves on disk, and the only thing a results table is made from.

A results folder holds
  run.json        the header: the arguments that define the run (checkpoint and config hash among them), written
                  with the first episode and never changed
  shards/         what jobs that share the episodes have done and nobody has merged yet (envs/shards.py)
  episodes.jsonl  one row per finished episode (`COLUMNS`), appended and fsynced as episodes end, sorted at the end
  summary.json    counts, success rate with its 95 % interval, per task too, and what is missing; always up to date
An episode is (benchmark, task, seed). Only episodes that ran to their end have a row: a simulator that crashed leaves
none, so it can make a run incomplete but never lower its success rate (fact sheet anchors §D.2 points 4 and 5).

    frame = load_records("results/libero_goal/ptr")
"""

from __future__ import annotations

import fcntl
import json
import os
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from vla.errors import UserError
from vla.files import lock, write_atomic, writing

if TYPE_CHECKING:
    import pandas as pd

EPISODES = "episodes.jsonl"
COLUMNS = {
    "benchmark": str,
    "task": str,
    "seed": int,
    "success": bool,
    "steps": int,  # control steps the episode took
    "seconds": float,  # wall clock, reset included
    "subtasks": list,  # of a chain: {"task", "success", "steps"} in order, up to the first that failed; else []
    "attempts": int,  # 1 + simulator failures this episode was retried after
    "checkpoint": str,  # sha256 of the policy's model.safetensors
    "config": str,  # hash of the resolved config
    "execute_steps": int,
    "renderer": str,
    "versions": dict,  # simulator package -> version
}


class Key(NamedTuple):
    """The identity of an episode; two arms of a comparison are paired on it."""

    benchmark: str
    task: str
    seed: int


class Records:
    """An open results folder, locked against a second evaluator. Use as a context manager.

    Args:
        folder: created when missing.
        header: JSON-able arguments that define the run. A folder holds one run, so a second header is refused.
        name: of the file with the rows.

    Attributes:
        rows: {Key: row} of the finished episodes, those of earlier calls included.

    Raises:
        Locked: another process is evaluating into the folder.
        UserError: it holds another run, or a record cannot be read.
    """

    def __init__(self, folder: Path, header: dict[str, Any], name: str = EPISODES) -> None:
        self.folder = folder
        self.file = folder / name
        self.header = json.loads(json.dumps(header))
        self.rows: dict[Key, dict[str, Any]] = {}
        self._lock = lock(folder, fcntl.LOCK_EX)
        try:
            self.rows = {key_of(row): row for row in read_rows(self.file)}
            if self.rows:
                check_header(folder, self.header)
            drop_torn_line(self.file)
        except BaseException:
            self._lock.close()
            raise

    def __enter__(self) -> Records:
        return self

    def __exit__(self, *exc: object) -> None:
        self._lock.close()

    def append(self, row: dict[str, Any]) -> None:
        """Add a finished episode; it is on disk when this returns.

        Raises:
            UserError: the row comes from another simulator or renderer than the rows before it; scores of the two
                must not be averaged (anchors §A.2: CPU and EGL rendering change CALVIN scores).
        """
        self._admit(row)
        with writing(self.file), self.file.open("a") as file:
            file.write(json.dumps(row) + "\n")
            file.flush()
            os.fsync(file.fileno())
        self.rows[key_of(row)] = row

    def merge(self, rows: Iterable[dict[str, Any]]) -> None:
        """Add the rows of episodes that have none yet, all of them or, where the process is killed, none.

        Raises:
            UserError: as `append`.
        """
        for row in rows:
            if key_of(row) not in self.rows:
                self._admit(row)
                self.rows[key_of(row)] = row
        self.sort()

    def _admit(self, row: dict[str, Any]) -> None:
        check_row(row, str(self.folder))
        if self.rows:
            other = next(iter(self.rows.values()))
            for column in ("renderer", "versions"):
                if row[column] != other[column]:
                    raise UserError(
                        f"{self.folder} holds episodes with {column} {other[column]}, now it is {row[column]}; "
                        "finish it where it was begun or choose another results folder"
                    )
        else:
            write_atomic(self.folder / "run.json", json.dumps(self.header, indent=2) + "\n")

    def sort(self) -> None:
        """Rewrite the rows in the order of their keys, so that the file does not depend on which worker was faster."""
        if self.rows:
            write_atomic(self.file, "".join(json.dumps(self.rows[key]) + "\n" for key in sorted(self.rows)))

    def summarise(self, missing: dict[Key, str]) -> dict[str, Any]:
        """Write and return summary.json. `missing`: {episode: why it has no row}."""
        rows = [self.rows[key] for key in sorted(self.rows)]
        tasks = sorted({(row["benchmark"], row["task"]) for row in rows})
        per_task = [
            {"benchmark": b, "task": t, **rate_of([r for r in rows if (r["benchmark"], r["task"]) == (b, t)])}
            for b, t in tasks
        ]
        summary = {
            **rate_of(rows),
            "complete": not missing,
            "missing": len(missing),
            "missing_episodes": [{**key._asdict(), "reason": missing[key]} for key in sorted(missing)],
            "per_task": per_task,
        }
        if rows and all(row["subtasks"] for row in rows):
            from vla.analysis.chains import chain_metrics

            summary["chains"] = chain_metrics(rows)
        write_atomic(self.folder / "summary.json", json.dumps(summary, indent=2) + "\n")
        return summary


def load_records(folder: str | Path) -> pd.DataFrame:
    """The rows of a results folder as a frame with the columns `COLUMNS`, sorted by (benchmark, task, seed).

    Reads a folder that is still being written too (an unfinished last line is skipped): ask summary.json whether the
    run is complete.

    Raises:
        UserError: no records there, or a row that lacks a column or holds another type.
    """
    import pandas as pd  # half a second that the workers and a misspelt command need not pay

    folder = Path(folder)
    rows = sorted(read_rows(folder / EPISODES), key=key_of)
    if not rows:
        raise UserError(f"{folder} holds no episode records; give a folder written by evaluate.py evaluation=rollout")
    return pd.DataFrame(rows, columns=list(COLUMNS))


def rate_of(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """n, successes, success rate in [0, 1] and its 95 % Wilson interval (None where n = 0)."""
    from vla.analysis.statistics import rate_interval

    n, successes = len(rows), sum(row["success"] for row in rows)
    interval = list(rate_interval(successes, n)) if n else None
    return {"n": n, "successes": successes, "rate": successes / n if n else None, "interval": interval}


def ready_to_summarise() -> None:
    """Import what a summary needs, before there is one to interrupt: a signal may turn an import into a wreck."""
    import vla.analysis.chains  # noqa: F401

    rate_of([{"success": True}])


def key_of(row: dict[str, Any]) -> Key:
    return Key(row["benchmark"], row["task"], row["seed"])


def check_row(row: dict[str, Any], where: str) -> None:
    """UserError unless `row` has exactly the columns `COLUMNS` with values of their types."""
    wrong = [c for c, kind in COLUMNS.items() if type(row.get(c)) is not kind] + sorted(row.keys() - COLUMNS.keys())
    if wrong:
        raise UserError(
            f"{where}: column {wrong[0]!r} is missing, unknown or of the wrong type; is this an episode record?"
        )


def read_rows(path: Path) -> list[dict[str, Any]]:
    """The rows of a file, checked; [] where there is no file. A last line without newline is skipped."""
    lines = path.read_bytes().split(b"\n")[:-1] if path.exists() else []
    rows: dict[Key, dict[str, Any]] = {}
    for number, line in enumerate(lines, 1):
        where = f"{path} line {number}"
        try:
            row = json.loads(line)
        except ValueError:
            raise UserError(f"{where} is not JSON; delete that line, its episode will run again") from None
        check_row(row, where)
        if key_of(row) in rows:
            raise UserError(f"{where} repeats episode {tuple(key_of(row))}; delete one of the two lines")
        rows[key_of(row)] = row
    return list(rows.values())


def drop_torn_line(path: Path) -> None:
    """Cut off a last line without newline, which a killed process left half written; its episode runs again."""
    if path.exists() and not (content := path.read_bytes()).endswith(b"\n"):
        os.truncate(path, content.rfind(b"\n") + 1)


def check_header(folder: Path, header: dict[str, Any]) -> None:
    """UserError unless `header` is that of the episodes in `folder`; it names every difference."""
    path = folder / "run.json"
    try:
        found = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise UserError(
            f"{path} cannot be read ({error}), so nobody knows whose episodes these are; choose another results folder"
        ) from None
    keys = [*header, *(key for key in found if key not in header)]
    differing = [
        f"{key} was {_short(found.get(key))}, now {_short(header.get(key))}"
        for key in keys
        if found.get(key) != header.get(key)
    ]
    if differing:
        raise UserError(
            f"{folder} holds another run: {'; '.join(differing)}; choose another results folder or delete this one"
        )


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 80 else text[:77] + "..."
