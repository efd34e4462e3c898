"""What asking leaves on disk, and what is made of it: a row per question, accuracy with its interval.

A benchmark's folder holds
  run.json          the header: policy, prompt, template, annotations' hash …; a folder holds one run
  answers.jsonl     one row per question (`COLUMNS`), appended and fsynced batch by batch
  vqa_probe.json    header and summary, written when asking has ended
Pictures are the units of chance: one that several questions are about is drawn with all of them.
"""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from data.vqa import Question
from envs.records import check_header, drop_torn_line
from vla.analysis.statistics import Estimate, mean_interval, rate_interval
from vla.analysis.vqa_metrics import says_true, says_yes, yes_no
from vla.errors import UserError
from vla.files import lock, write_atomic

COLUMNS = {
    "id": str,
    "image": str,  # file name
    "group": str,  # what the benchmark reports apart, or ""
    "said": str,
    "score": float,  # in [0, 1]
}
SUMMARY = "vqa_probe.json"


class Answers:
    """An open folder of answers, locked against a second evaluation. Use as a context manager.

    Attributes:
        rows: {question id: row}, those of earlier calls included.

    Raises:
        UserError: another process writes into the folder, it holds another run, or a row cannot be read.
    """

    def __init__(self, folder: Path, header: dict[str, Any]):
        self.folder, self.file = folder, folder / "answers.jsonl"
        self._lock = lock(folder)
        try:
            drop_torn_line(self.file)
            self.rows = {row["id"]: row for row in read_answers(folder)}
            header = json.loads(json.dumps(header))
            if self.rows:
                check_header(folder, header)
            else:
                write_atomic(folder / "run.json", json.dumps(header, indent=2) + "\n")
        except BaseException:
            self._lock.close()
            raise

    def __enter__(self) -> Answers:
        return self

    def __exit__(self, *exc: object) -> None:
        self._lock.close()

    def append(self, rows: list[dict[str, Any]]) -> None:
        """Add the answers of a batch; they are on disk when this returns."""
        with self.file.open("a") as file:
            file.write("".join(json.dumps(row) + "\n" for row in rows))
            file.flush()
            os.fsync(file.fileno())
        self.rows |= {row["id"]: row for row in rows}


def read_answers(folder: Path) -> list[dict[str, Any]]:
    """The rows of a folder, checked; a last line without newline is skipped, [] where there is no file."""
    file = folder / "answers.jsonl"
    rows = []
    for number, line in enumerate(file.read_bytes().split(b"\n")[:-1] if file.exists() else (), 1):
        try:
            row = json.loads(line)
        except ValueError:
            raise UserError(f"{file} line {number} is not JSON; delete that line, to ask its question again") from None
        if not isinstance(row, dict) or {key: type(value) for key, value in row.items()} != COLUMNS:
            raise UserError(f"{file} line {number} is no answer: it needs {', '.join(COLUMNS)}; delete that line")
        rows.append(row)
    return rows


def summarise(name: str, rows: list[dict[str, Any]], questions: list[Question]) -> dict[str, Any]:
    """
    Args:
        rows: of the questions answered so far, at least one.

    Returns:
        accuracy: value in [0, 1], 95 % interval and n, the number of questions; of POPE the mean of its splits.
        images: how many pictures they are about.
        missing: questions of the benchmark without an answer.
        groups: the same of each group there is.
        pope: split → accuracy, precision, recall, f1, yes_ratio; and "mean", that of the splits.
        unread: of VSR, the share of answers that say neither true nor false (and count as wrong).
    """
    groups = sorted({row["group"] for row in rows} - {""})
    of_group = {group: [row for row in rows if row["group"] == group] for group in groups}
    summary: dict[str, Any] = {
        "accuracy": asdict(estimate(rows, weights_of(name, [row["group"] for row in rows]))),
        "images": len({row["image"] for row in rows}),
        "missing": len(questions) - len(rows),
        "groups": {group: asdict(estimate(members, [1.0] * len(members))) for group, members in of_group.items()},
    }
    if name == "pope":
        label = {question.id: question.answers[0] == "yes" for question in questions}
        splits = {
            group: asdict(yes_no([says_yes(row["said"]) for row in members], [label[row["id"]] for row in members]))
            for group, members in of_group.items()
        }
        mean = {key: float(np.mean([split[key] for split in splits.values()])) for key in next(iter(splits.values()))}
        summary["pope"] = splits | {"mean": mean}
    if name == "vsr":
        summary["unread"] = sum(says_true(row["said"]) is None for row in rows) / len(rows)
    return summary


def weights_of(name: str, groups: Sequence[str]) -> list[float]:
    """What each question counts, given the group of each: one, but POPE's so that its splits count alike."""
    sizes = Counter(groups)
    return [1 / sizes[group] if name == "pope" else 1.0 for group in groups]


def estimate(rows: Sequence[dict[str, Any]], weights: Sequence[float]) -> Estimate:
    """Weighted mean of the scores and its 95 % interval.

    Wilson's where every picture has one question that is right or wrong, or where all are right or all wrong (n is then
    the number of pictures, the cautious count); else a bootstrap over pictures.
    """
    scores, weights = np.array([row["score"] for row in rows]), np.asarray(weights, dtype=np.float64)
    names, picture = np.unique([row["image"] for row in rows], return_inverse=True)
    weight = np.bincount(picture, weights)
    means = np.bincount(picture, weights * scores) / weight
    value = float((weights * scores).sum() / weights.sum())
    exact = set(scores) <= {0.0, 1.0}
    if exact and (len(set(scores)) == 1 or (len(names) == len(rows) and len(set(weights)) == 1)):
        low, high = rate_interval(round(means.sum()), len(names))
    elif len(names) < 2:
        low, high = 0.0, 1.0  # one picture: anything
    else:
        low, high = mean_interval(means, weights=weight)
    return Estimate(value, low, high, n=len(rows))
