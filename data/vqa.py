"""Five visual question answering benchmarks from the annotation files their authors publish (fact sheet §8.6).

TextVQA   TextVQA_0.5.1_val.json: {"data": [{question_id, image_id, question, answers: [ten strings]}]}; <image_id>.jpg
POPE      a folder with coco_pope_{random,popular,adversarial}.json, an object a line: {question_id, image, text, label}
GQA       testdev_balanced_questions.json: {question id: {imageId, question, answer}}; <imageId>.jpg
VizWiz    val.json: [{image, question, answers: [ten of {answer}], answer_type}]
VSR       test.jsonl of the zero-shot split, an object a line: {image, caption, label: 0 or 1}

    questions = read_questions("gqa", Path("testdev_balanced_questions.json"), Path("images"))
    picture = read_image(questions[0].image)
"""

from __future__ import annotations

import hashlib
import json
import random
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, UnidentifiedImageError

from data.inside import inside
from vla.errors import UserError

POPE_SPLITS = ("random", "popular", "adversarial")
HUMANS = 10


@dataclass(frozen=True)
class Question:
    """One question about one picture.

    Attributes:
        id: unique within its benchmark.
        text: the question as annotated, without any prompt; of VSR the statement to judge.
        answers: ten of people (TextVQA, VizWiz), or the one that is right; yes/no of POPE, true/false of VSR.
        group: what the benchmark reports apart: POPE's split, VizWiz's answer type, else "".
    """

    id: str
    image: Path
    text: str
    answers: tuple[str, ...]
    group: str = ""


def read_questions(benchmark: str, annotations: Path, images: Path) -> list[Question]:
    """Every question of a benchmark in the order of its file, each with a picture that exists.

    Raises:
        UserError: an unknown benchmark, a missing or damaged file, an entry that lacks a key, an id given twice, or a
            missing picture.
    """
    if benchmark not in READERS:
        raise UserError(f"evaluation.vqa.select={benchmark} is not known; choose among {', '.join(READERS)}")
    if not images.is_dir():
        raise UserError(f"{images} is not a folder; put {benchmark}'s pictures there or set evaluation.vqa.sets")
    questions = READERS[benchmark](annotations, images)
    if not questions:
        raise UserError(f"{annotations} holds no questions; download it again")
    seen: set[str] = set()
    for question in questions:
        if question.id in seen:
            raise UserError(f"{annotations} has question {question.id} twice; download it again")
        seen.add(question.id)
    pictures = dict.fromkeys(question.image for question in questions)
    if missing := [picture for picture in pictures if not picture.exists()]:
        raise UserError(
            f"{missing[0]} is missing ({len(missing)} of {benchmark}'s {len(pictures)} pictures are); "
            "unpack the archive whole or set evaluation.vqa.sets"
        )
    return questions


def annotations_hash(annotations: Path) -> str:
    """sha256 of a file, or of a folder's coco_pope_*.json: what makes two sets of questions the same."""
    files = [pope_file(annotations, split) for split in POPE_SPLITS] if annotations.is_dir() else [annotations]
    digest = hashlib.sha256()
    for file in files:
        digest.update(_read(file))
    return digest.hexdigest()


def some(questions: list[Question], limit: int | None, seed: int = 0) -> list[Question]:
    """`limit` questions drawn at random, in the order of the file; a smaller draw is part of a larger one."""
    if limit is None or limit >= len(questions):
        return questions
    chosen = list(range(len(questions)))
    random.Random(seed).shuffle(chosen)
    return [questions[index] for index in sorted(chosen[:limit])]


def read_image(path: Path) -> np.ndarray:
    """uint8 (h, w, 3); RGB whatever the file has, not turned by EXIF (as the benchmarks' own code).

    Raises:
        UserError: the file is missing or no picture.
    """
    try:
        with Image.open(path) as picture:
            return np.asarray(picture.convert("RGB"))
    except (OSError, UnidentifiedImageError, SyntaxError) as error:
        raise UserError(f"{path} cannot be read as a picture ({error}); download it again") from error


def textvqa(annotations: Path, images: Path) -> list[Question]:
    return [
        Question(
            id=str(entry.take("question_id")),
            image=inside(images, f"{entry.take('image_id')}.jpg", entry.where),
            text=str(entry.take("question")),
            answers=_ten(entry, [str(answer) for answer in entry.take("answers", list)]),
        )
        for entry in _entries(annotations, Entry(_json(annotations), str(annotations)).take("data", list))
    ]


def pope(annotations: Path, images: Path) -> list[Question]:
    questions = []
    for split in POPE_SPLITS:
        for entry in _lines(pope_file(annotations, split)):
            label = entry.take("label")
            if label not in ("yes", "no"):
                raise UserError(f"{entry.where} has the label {label!r}, not yes or no; download it again")
            name = f"{split}-{entry.take('question_id')}"
            picture = inside(images, str(entry.take("image")), entry.where)
            questions.append(Question(name, picture, str(entry.take("text")), (label,), split))
    return questions


def gqa(annotations: Path, images: Path) -> list[Question]:
    content = _json(annotations)
    if not isinstance(content, dict):
        raise UserError(f"{annotations} is not GQA's questions by id; give testdev_balanced_questions.json")
    entries = ((name, Entry(value, f"{annotations} question {name}")) for name, value in content.items())
    return [
        Question(
            id=name,
            image=inside(images, f"{entry.take('imageId')}.jpg", entry.where),
            text=str(entry.take("question")),
            answers=(str(entry.take("answer")),),
        )
        for name, entry in entries
    ]


def vizwiz(annotations: Path, images: Path) -> list[Question]:
    content = _json(annotations)
    if not isinstance(content, list):
        raise UserError(f"{annotations} is not VizWiz's list of questions; give val.json")
    questions = []
    for entry in _entries(annotations, content):
        answers = [Entry(answer, f"{entry.where}, answers") for answer in entry.take("answers", list)]
        questions.append(
            Question(
                id=str(entry.take("image")),
                image=inside(images, str(entry.take("image")), entry.where),
                text=str(entry.take("question")),
                answers=_ten(entry, [str(answer.take("answer")) for answer in answers]),
                group=str(entry.take("answer_type")),
            )
        )
    return questions


def vsr(annotations: Path, images: Path) -> list[Question]:
    questions = []
    for number, entry in enumerate(_lines(annotations)):
        label = entry.take("label")
        if label not in (0, 1):
            raise UserError(f"{entry.where} has the label {label!r}, not 0 or 1; download it again")
        picture, caption = inside(images, str(entry.take("image")), entry.where), str(entry.take("caption"))
        questions.append(Question(str(number), picture, caption, ("true" if label else "false",)))
    return questions


READERS: dict[str, Callable[[Path, Path], list[Question]]] = {
    "textvqa": textvqa,
    "pope": pope,
    "gqa": gqa,
    "vizwiz": vizwiz,
    "vsr": vsr,
}


@dataclass(frozen=True)
class Entry:
    """A JSON object and where it stands, so that a missing key is told with its place."""

    content: Any
    where: str

    def take(self, key: str, kind: type = object) -> Any:
        if not isinstance(self.content, dict) or key not in self.content:
            raise UserError(f"{self.where} has no {key}; is this the benchmark's own annotation file?")
        if not isinstance(self.content[key], kind):
            raise UserError(f"{self.where}: {key} is no {kind.__name__}; is this the benchmark's own annotation file?")
        return self.content[key]


def pope_file(folder: Path, split: str) -> Path:
    return folder / f"coco_pope_{split}.json"


def _ten(entry: Entry, answers: list[str]) -> tuple[str, ...]:
    if len(answers) != HUMANS:
        raise UserError(f"{entry.where} has {len(answers)} answers, not {HUMANS}; download it again")
    return tuple(answers)


def _entries(path: Path, content: list) -> list[Entry]:
    return [Entry(item, f"{path} entry {number}") for number, item in enumerate(content)]


def _lines(path: Path) -> list[Entry]:
    lines = [(number, line) for number, line in enumerate(_read(path).splitlines(), 1) if line.strip()]
    return [Entry(_parse(line, f"{path} line {number}"), f"{path} line {number}") for number, line in lines]


def _json(path: Path) -> Any:
    return _parse(_read(path), str(path))


def _parse(text: bytes, where: str) -> Any:
    try:
        return json.loads(text)
    except ValueError as error:
        raise UserError(f"{where} is not JSON ({error}); download it again") from error


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror}); download it or set evaluation.vqa.sets") from error
