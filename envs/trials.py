"""Trials on a real robot, told by a person, in the records that rollouts leave (envs/records.py).

    with TrialLog(folder, header, tasks, per_task) as log:
        log.add("PickCarrot", success=True, note="second try of the gripper")
        log.undo()

Beside the records lies trials.jsonl: a line per trial and per undoing, only ever appended to, and what the records are
made from; so a process killed between the two is mended by the next. A trial's number is its seed: number n of a task
is one placement of the objects, the same for every policy, on which arms are paired.
"""

from __future__ import annotations

import json
import os
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from envs.records import Key, Records, drop_torn_line, key_of, rate_of
from vla.errors import UserError
from vla.files import write_atomic

LINE = {"what": str, "at": str, "task": str, "trial": int, "success": bool, "steps": int, "seconds": float, "note": str}
"""A line of trials.jsonl; `what` is "trial" or "undo", `at` UTC."""


class TrialLog:
    """Use as a context manager; one at a time per folder.

    Args:
        folder: created when missing.
        header: JSON-able identity of the policy, of evaluate.py; a folder holds one policy's trials.
        tasks: the names that exist.
        per_task: trials of a task are numbered 1 … per_task.

    Raises:
        UserError: as Records, or a line of trials.jsonl that cannot be read.
    """

    def __init__(self, folder: Path, header: dict[str, Any], tasks: list[str], per_task: int) -> None:
        self.header, self.tasks, self.per_task = header, tasks, per_task
        self.path = folder / "trials.jsonl"
        self.records = Records(folder, header)
        try:
            drop_torn_line(self.path)
            self.lines = read_lines(self.path)
            self._derive()
        except BaseException:
            self.records.__exit__()
            raise

    def __enter__(self) -> TrialLog:
        return self

    def __exit__(self, *exc: object) -> None:
        self.records.__exit__()

    def add(
        self, task: str, success: bool, trial: int | None = None, note: str = "", steps: int = 0, seconds: float = 0.0
    ) -> dict[str, Any]:
        """Log a trial and return its line.

        Args:
            trial: 1 … per_task; by default the first that has not been logged.
            steps, seconds: 0 where nobody counted.

        Raises:
            UserError: no such task or trial, or one that is logged already.
        """
        if task not in self.tasks:
            raise UserError(f"the task {task!r} is not known; choose one of: {', '.join(self.tasks)}")
        logged = {line["trial"]: line for line in standing(self.lines) if line["task"] == task}
        free = [number for number in range(1, self.per_task + 1) if number not in logged]
        if trial is None and not free:
            raise UserError(f"all {self.per_task} trials of {task} are logged; go on with another task")
        trial = free[0] if trial is None else trial
        if not 1 <= trial <= self.per_task:
            raise UserError(f"--trial {trial} is not in 1 … {self.per_task}, the trials of a task; choose another")
        if trial in logged:
            was = "success" if logged[trial]["success"] else "failure"
            raise UserError(f"trial {trial} of {task} is logged already ({was}); --undo takes back the last one logged")
        about = {"task": task, "trial": trial, "success": success}
        return self._append({"what": "trial"} | about | {"steps": steps, "seconds": float(seconds), "note": note})

    def undo(self) -> dict[str, Any]:
        """Take back the last trial; its line stays, followed by one that says so. UserError where there is none."""
        if not (left := standing(self.lines)):
            raise UserError(f"{self.path} has no trial to take back")
        return self._append(left[-1] | {"what": "undo"})

    def per_task_rates(self) -> list[tuple[str, dict[str, Any]]]:
        """Per task: n, successes, rate and its 95 % interval (envs.records.rate_of)."""
        rows = list(self.records.rows.values())
        return [(task, rate_of([row for row in rows if row["task"] == task])) for task in self.tasks]

    def _append(self, line: dict[str, Any]) -> dict[str, Any]:
        line = line | {"at": datetime.now(UTC).isoformat(timespec="seconds")}
        with self.path.open("a") as file:
            file.write(json.dumps(line) + "\n")
            file.flush()
            os.fsync(file.fileno())
        self.lines.append(line)
        self._derive()
        return line

    def _derive(self) -> None:
        """Make the records say what trials.jsonl says."""
        folder, records = self.records.folder, self.records
        rows = [self._row(line) for line in standing(self.lines)]
        records.rows = {key_of(row): row for row in rows}
        if not rows:  # records of nothing would not be readable as records
            for name in ("episodes.jsonl", "summary.json"):
                (folder / name).unlink(missing_ok=True)
            return
        write_atomic(folder / "run.json", json.dumps(records.header, indent=2) + "\n")
        records.sort()
        every = [Key(rows[0]["benchmark"], task, n) for task in self.tasks for n in range(1, self.per_task + 1)]
        records.summarise({key: "not run yet" for key in every if key not in records.rows})

    def _row(self, line: dict[str, Any]) -> dict[str, Any]:
        told = {"success": line["success"], "steps": line["steps"], "seconds": line["seconds"]}
        told |= {"task": line["task"], "seed": line["trial"], "subtasks": [], "attempts": 1}
        policy = {key: self.header[key] for key in ("benchmark", "checkpoint", "config", "execute_steps")}
        return told | policy | {"renderer": "real", "versions": {}}


def standing(lines: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The trials that have not been taken back, in the order they were logged."""
    left: list[dict[str, Any]] = []
    for line in lines:
        if line["what"] == "trial":
            left.append(line)
        else:
            left.pop()
    return left


def read_lines(path: Path) -> list[dict[str, Any]]:
    """The lines of a trials.jsonl, checked; [] where there is none."""
    lines: list[dict[str, Any]] = []
    depth = 0
    for number, text in enumerate(path.read_text().splitlines() if path.exists() else [], 1):
        try:
            line = json.loads(text)
        except ValueError:
            line = None
        if not isinstance(line, dict) or any(type(line.get(key)) is not kind for key, kind in LINE.items()):
            raise UserError(
                f"{path} line {number} is not a trial's; restore the file, nothing but scripts/trial.py writes it"
            )
        depth += 1 if line["what"] == "trial" else -1
        if depth < 0:
            raise UserError(f"{path} line {number} takes back a trial that is not there; restore the file")
        lines.append(line)
    return lines
