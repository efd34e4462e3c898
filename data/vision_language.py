"""Vision-language data for co-training: pictures with a question and an answer (GenVLA §III-C; fact sheet §8.3, §8.4).

Two forms, told by what is there:
    FILE.json          LLaVA's: a list of {"image": path, "conversations": [{"from": "human" or "gpt", "value": text}]};
                       pictures below `images` (LLaVA-CC3M-595K's chat.json, RoboPoint's robopoint_1432k.json)
    folder of parquet  rows with "image" {bytes} and "conversations" as above (LLaVA-OneVision), or "images" and
                       "messages" [{"role", "content": [{"type", "text"}, …]}, …] (VQASynth-Spatial)
Of a conversation the first question and its answer are read, without the mark `<image>`, in lower case as in the public
code. Rows without a picture or an answer are left out and counted.

    mixture = Mixture([open_set("llava/chat.json", "llava/images")], size=224, seed=0, batch=16, by_length=8)
    mixture.batch(np.arange(64, 80))       # examples 64 to 79 of an endless order: a function of these and the seed
"""

from __future__ import annotations

import io
import itertools
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError
from rich.progress import track
from torch.utils.data import Dataset

from data.inside import inside
from data.sampler import PairDataset, StatelessBatches, sample_at
from vla.config import CoTrainConfig
from vla.errors import UserError

MARK = "<image>"


@dataclass(frozen=True)
class VLSet:
    """Questions and answers in memory, pictures where they are.

    Attributes:
        texts: (question, answer) of each example.
        picture: an example's encoded picture.
        left_out: rows that are no example.
    """

    name: str
    texts: list[tuple[str, str]]
    picture: Callable[[int], bytes]
    left_out: int

    def __len__(self) -> int:
        return len(self.texts)

    def image(self, index: int, size: int) -> np.ndarray:
        """uint8 (size, size, 3), resized without keeping its aspect, as Prismatic does ("resize-naive")."""
        try:
            with Image.open(io.BytesIO(self.picture(index))) as image:
                return np.asarray(image.convert("RGB").resize((size, size), Image.Resampling.BICUBIC))
        except (OSError, UnidentifiedImageError) as error:
            raise UserError(
                f"{self.name}: the picture of example {index} cannot be read ({error}); mend the set"
            ) from error


def open_set(annotations: str | Path, images: str | Path | None = None, name: str | None = None) -> VLSet:
    """The set at `annotations`: a JSON file, with pictures below `images`, or a folder of parquet files.

    Raises:
        UserError: a file that is missing or of another layout, or no example at all.
    """
    path = Path(annotations)
    name = name or path.stem
    if not path.exists():
        raise UserError(f"{name}: {path} does not exist; download it (docs/genvla.md), or leave it out of cotrain.use")
    made = _of_json(name, path, images) if path.suffix == ".json" else _of_parquet(name, path)
    if not len(made):
        raise UserError(f"{path} holds no picture with a question and an answer ({made.left_out} rows left out)")
    return made


def first_exchange(conversation: object) -> tuple[str, str] | None:
    """(question, answer) of the first exchange in either form, lower case, without the mark; None without both."""
    if not isinstance(conversation, list):
        return None
    said = [_said(turn) for turn in conversation if isinstance(turn, dict)]
    for (who, question), (other, answer) in itertools.pairwise(said):
        if (who, other) == ("human", "gpt"):
            question, answer = (text.replace(MARK, "").strip().lower() for text in (question, answer))
            return (question, answer) if question and answer else None
    return None


def _said(turn: dict) -> tuple[str, str]:
    """("human" | "gpt" | another, text) of a turn of either form."""
    who = {"user": "human", "assistant": "gpt"}.get(turn.get("role"), turn.get("from", turn.get("role", "")))
    text = turn.get("value", turn.get("content"))
    if isinstance(text, list):
        text = "".join(part.get("text") or "" for part in text if isinstance(part, dict))
    return str(who), text if isinstance(text, str) else ""


def _of_json(name: str, path: Path, images: str | Path | None) -> VLSet:
    if images is None or not Path(images).is_dir():
        raise UserError(f"{name}: the pictures' folder {images} does not exist; set cotrain.sets.{name}.images")
    try:
        rows = json.loads(path.read_text())
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise UserError(f"{path} is damaged ({error}); download it again") from error
    if not isinstance(rows, list):
        raise UserError(f"{path} is not a list of conversations")
    root, texts, files, left_out = Path(images), [], [], 0
    for row in rows:
        exchange = first_exchange(row.get("conversations")) if isinstance(row, dict) else None
        if exchange is None or not isinstance(row.get("image"), str):
            left_out += 1
            continue
        texts.append(exchange)
        files.append(row["image"])

    def picture(index: int) -> bytes:
        return inside(root, files[index], str(path)).read_bytes()

    return VLSet(name, texts, picture, left_out)


def _of_parquet(name: str, folder: Path) -> VLSet:
    """Pictures stay in the files, row group by row group; the one read last is kept, with its neighbours."""
    import pyarrow as arrow
    import pyarrow.parquet as parquet

    files = sorted(folder.rglob("*.parquet"))
    if not files:
        raise UserError(f"{folder} holds no parquet file; set cotrain.sets.{name}.annotations")
    texts, places, left_out = [], [], 0
    try:
        columns = [_columns(file, parquet.read_schema(file).names) for file in files]
        for number, file in enumerate(track(files, f"reading {name}", transient=True, disable=len(files) < 4)):
            reader = parquet.ParquetFile(file)
            for group in range(reader.num_row_groups):
                talk = reader.read_row_group(group, columns=[columns[number][1]]).column(0)
                for row, conversation in enumerate(talk.to_pylist()):
                    exchange = first_exchange(_parsed(conversation))
                    texts += [exchange] if exchange else []
                    places += [(number, group, row)] if exchange else []
                    left_out += exchange is None
    except (arrow.ArrowException, OSError) as error:
        raise UserError(f"{folder} cannot be read as parquet ({error}); download it again") from error
    held: dict[tuple[int, int], list] = {}

    def picture(index: int) -> bytes:
        number, group, row = places[index]
        if (number, group) not in held:
            held.clear()
            column = parquet.ParquetFile(files[number]).read_row_group(group, columns=[columns[number][0]]).column(0)
            held[number, group] = column
        found = held[number, group][row].as_py()
        found = found[0] if isinstance(found, list) and found else found
        if not isinstance(found, dict) or not found.get("bytes"):
            raise UserError(
                f"{files[number]}, row group {group}, row {row} has no picture; leave {name} out, or mend it"
            )
        return found["bytes"]

    return VLSet(name, texts, picture, left_out)


def _columns(file: Path, names: list[str]) -> tuple[str, str]:
    """(picture, conversation) columns of a file."""
    for pair in (("image", "conversations"), ("images", "messages"), ("images", "conversations")):
        if set(pair) <= set(names):
            return pair
    raise UserError(
        f"{file} has the columns {', '.join(names)}; expected image and conversations, or images and messages"
    )


def _parsed(conversation: object) -> object:
    """A conversation that some sets keep as JSON; None where it is none, so that the row counts as left out."""
    if not isinstance(conversation, str):
        return conversation
    try:
        return json.loads(conversation)
    except json.JSONDecodeError:
        return None


class Mixture:
    """An endless stream of examples, evenly from all sets: example n is a function of n and the arguments alone.

    A batch's texts are padded to its longest, and captions stand beside essays. So the examples that `by_length`
    batches draw are dealt among them by length, the short ones of all sets to one batch; the batches come in random
    order.

    Args:
        sets: those of a composition, in its order.
        size: side of the pictures in pixels.
        batch: examples of an optimiser step.
        by_length: batches among which examples are dealt by length; 1 leaves them as drawn.
    """

    def __init__(self, sets: list[VLSet], size: int, seed: int, batch: int = 1, by_length: int = 1):
        if not sets:
            raise UserError("cotrain.use names no vision-language set; name one, or train without ablation=cotrain")
        if by_length < 1:
            raise UserError(f"cotrain.by_length={by_length} is no number of batches; 1 leaves examples as drawn")
        self.sets, self.size, self.seed, self.by_length = sets, size, seed, by_length
        self.per_batch = -(-batch // len(sets))
        self._lengths = [np.array([len(q) + len(a) for q, a in of.texts]) for of in sets]

    def places(self, numbers: np.ndarray) -> list[tuple[VLSet, int]]:
        """Which set, and which example of it, each number (ascending) of the stream is: the sets take turns."""
        turns, which = np.divmod(numbers, len(self.sets))
        examples = np.empty(len(numbers), dtype=np.int64)
        for index in np.unique(which):
            mine = which == index
            deals, within = np.divmod(turns[mine], self.by_length * self.per_batch)
            examples[mine] = np.concatenate(
                [self._deal(index, deal)[within[deals == deal]] for deal in np.unique(deals)]
            )
        return [(self.sets[index], int(example)) for index, example in zip(which, examples, strict=True)]

    def _deal(self, index: int, deal: int) -> np.ndarray:
        """A set's examples of `by_length` batches, in the order in which they come."""
        size = self.by_length * self.per_batch
        drawn = sample_at(np.arange(deal * size, (deal + 1) * size), len(self.sets[index]), self.seed + index)
        if self.by_length == 1:
            return drawn
        drawn = drawn[np.argsort(self._lengths[index][drawn], kind="stable")]
        # One order for all sets: their short texts belong to the same batch.
        batches = np.random.default_rng([self.seed, deal]).permutation(self.by_length)
        return drawn.reshape(self.by_length, self.per_batch)[batches].ravel()

    def batch(self, numbers: np.ndarray) -> dict:
        """{"images": uint8 (N, 3, size, size), "question": list of N str, "answer": list of N str}."""
        places = self.places(numbers)
        images = torch.from_numpy(np.stack([chosen.image(index, self.size) for chosen, index in places]))
        questions, answers = zip(*(chosen.texts[index] for chosen, index in places), strict=True)
        return {"images": images.permute(0, 3, 1, 2), "question": list(questions), "answer": list(answers)}


class CoTrainingDataset(Dataset):
    """Robot batches with questions in them; indices come from `CoTrainingBatches`."""

    def __init__(self, robot: PairDataset, mixture: Mixture):
        self.robot, self.mixture = robot, mixture

    def __getitems__(self, indices: tuple[np.ndarray, np.ndarray]) -> dict:
        steps, examples = indices
        return self.robot.__getitems__(steps) | {"vl": self.mixture.batch(examples)}


class CoTrainingBatches:
    """(robot steps, numbers of the vision-language stream) of each part of an optimiser step's batch, which has
    `examples` of the latter: both go on exactly on resume."""

    def __init__(self, robot: StatelessBatches, examples: int):
        self.robot, self.examples = robot, examples

    def __iter__(self) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        robot = self.robot
        return zip(robot, robot.share.positions(robot.first_step, self.examples), strict=True)


def open_mixture(cfg: CoTrainConfig, size: int, seed: int, batch: int) -> Mixture | None:
    """The stream of the sets in use, `batch` examples a step; None where there is no co-training.

    Raises:
        UserError: an unknown set, or one that cannot be read.
    """
    if not cfg.enabled:
        return None
    if unknown := set(cfg.use) - set(cfg.sets):
        raise UserError(f"cotrain.use={sorted(unknown)} is not known; choose among {', '.join(cfg.sets)}")
    sets = [(name, cfg.sets[name]) for name in cfg.use]
    if incomplete := [name for name, of in sets if not of.get("annotations")]:
        raise UserError(
            f"cotrain.sets.{incomplete[0]} has no annotations; set cotrain.sets.{incomplete[0]}.annotations"
        )
    opened = [open_set(of["annotations"], of.get("images"), name) for name, of in sets]
    return Mixture(opened, size, seed, batch, cfg.by_length)
