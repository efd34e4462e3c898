"""RLDS data sets as TFDS prepares them (TFRecord shards), as episodes; TensorFlow is not needed.

Layout (tensorflow_datasets 4.9, core/example_serializer.py): a folder `<name>/<version>` with `dataset_info.json` (name
and shard lengths), `features.json` (types) and shards `<name>-train.tfrecord-00000-of-00042`; one tf.train.Example an
episode, nested features joined by "/". A feature of the steps is one list: the T steps' values one after another, an
image or a text being one byte string a step. A list within a step is `<key>/ragged_flat_values` with its lengths in
`<key>/ragged_row_lengths_0`, and `_1` for a list within that.

    parts = rlds_parts(Path("datasets/libero_goal_no_noops"), cameras=("static",))   # units of conversion, one a shard
    for episode in parts[0].read(None): ...

What the keys mean is in data/oxe.py. The split "train" is read whole; openvla trains on its first 95 % where a data set
has no "val". An episode without an instruction keeps its actions (openvla's statistics count them) and gets no window,
so that nothing is trained on it (openvla skips it).
"""

from __future__ import annotations

import io
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path, PurePosixPath

import numpy as np
from PIL import Image

from data.episode import Episode, Window
from data.inside import inside
from data.noops import without_noops
from data.oxe import DataSet, data_set
from data.tfrecord import Values, parse_example, read_records
from vla.errors import UserError

FILES = ("dataset_info.json", "features.json")
FILE_KEY = "episode_metadata/file_path"


@dataclass(frozen=True)
class Feature:
    """A leaf of features.json: what one step holds."""

    kind: str
    """ "image", "text" or a number's type, e.g. "float32"."""
    shape: tuple[int, ...] = ()
    """Of one element; -1 where features.json leaves it open."""
    ragged: int = 0
    """How many lists the element lies in, within the step."""


def is_rlds(path: Path) -> bool:
    """Whether `path` is a TFDS folder, `<name>/<version>`, or `<name>` with versions in it; opens no file."""
    return bool(_versions(Path(path)))


def rlds_parts(
    path: Path,
    cameras: tuple[str, ...],
    split: str = "train",
    drop_noops: bool = False,
    instructions: tuple[str, ...] | None = None,
) -> list[RldsShard]:
    """The shards of a split, each a unit of conversion (data.store_writer.Unit).

    Args:
        path: `<name>/<version>`, or `<name>` when it holds one version.
        cameras: the project's names of those to read; data/oxe.py says which a data set has.
        drop_noops: leave out no-ops (data/noops.py); the LIBERO data sets called no_noops have none.
        instructions: those whose episodes are read; None for all.

    Raises:
        UserError: no such folder or split, a data set without a known conversion, another file format, a camera or a
            feature that the data set does not have, or has in another shape.
    """
    folder = _folder(Path(path))
    info = _json(folder / "dataset_info.json")
    try:
        name = str(info["name"])
        lengths = {s["name"]: [int(length) for length in s["shardLengths"]] for s in info["splits"]}
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(f"{folder}/dataset_info.json lacks name or splits with shardLengths ({error!r})") from error
    if (form := info.get("fileFormat", "tfrecord")) != "tfrecord":
        raise UserError(f"{folder} holds {form} files; prepare it again with file_format=tfrecord")
    if not lengths.get(split):
        raise UserError(f"{folder} has no split {split!r} with shards; it has {', '.join(lengths)}")
    kind = data_set((name, folder.resolve().parent.name), str(folder))
    needed = _needed(kind, cameras, features_of(folder / "features.json"), folder)
    files = [f"{name}-{split}.tfrecord-{i:05d}-of-{len(lengths[split]):05d}" for i in range(len(lengths[split]))]
    choices = tuple(cameras), drop_noops, instructions
    return [
        RldsShard(inside(folder, file, f"{folder}/dataset_info.json"), length, kind, needed, *choices)
        for file, length in zip(files, lengths[split], strict=True)
    ]


@dataclass(frozen=True)
class RldsShard:
    """One shard as a unit of conversion."""

    path: Path
    episodes: int
    """How many dataset_info.json says there are."""
    kind: DataSet
    features: dict[str, Feature]
    """Those needed, by key."""
    cameras: tuple[str, ...]
    drop_noops: bool = False
    instructions: tuple[str, ...] | None = None

    @property
    def name(self) -> str:
        return self.path.name

    def read(self, skipped: list[str] | None) -> Iterator[Episode]:
        """An episode per record. A bad one is named in `skipped`, where that is given, and so are those that lack."""
        keys = {FILE_KEY}.union(*(_stored_keys(key, feature) for key, feature in self.features.items()))
        count = 0
        for number, record in read_records(self.path, skipped):
            where, count = f"{self.path}: record {number}", number + 1
            try:
                values = parse_example(record, where, keys)
                if self._wanted(values):
                    episode = self._episode(values, f"{self.name}:{number}", where)
                    yield without_noops(episode) if self.drop_noops else episode
            except UserError as error:
                if skipped is None:
                    raise
                skipped.append(str(error))
        if count != self.episodes:
            message = f"{self.path} ends after {count} of {self.episodes} episodes: download it again"
            if skipped is None:
                raise UserError(message)
            skipped.append(message)

    def _wanted(self, values: dict[str, Values]) -> bool:
        if self.instructions is None:
            return True
        return any(text.encode() in values.get(f"steps/{self.kind.instruction}", []) for text in self.instructions)

    def _episode(self, values: dict[str, Values], source: str, where: str) -> Episode:
        read = {key: step_values(values, key, feature, where) for key, feature in self.features.items()}
        lengths = {key: len(content) for key, content in read.items()}
        if len(set(lengths.values())) != 1:
            raise UserError(f"{where}: lengths differ, {lengths}: download it again")
        numbers = {key: read[f"steps/{key}"] for key in self.kind.numbers}
        for key, content in numbers.items():
            if not np.isfinite(content).all():
                raise UserError(f"{where}: {key} is not finite: leave it out with data.bad_files=skip")
        actions, state, kept = self.kind.steps(numbers)
        if not len(actions):
            total = len(next(iter(read.values())))
            raise UserError(f"{where} has {total} steps, too few: leave it out with data.bad_files=skip")
        texts = [text.decode(errors="replace") for text in read[f"steps/{self.kind.instruction}"][kept]]
        task = ""
        if self.kind.file_names_task and values.get(FILE_KEY):
            task = PurePosixPath(values[FILE_KEY][0].decode(errors="replace")).name.removesuffix("_demo.hdf5")
        frames = {}
        for camera in self.cameras:
            key = f"steps/{self.kind.cameras[camera]}"
            frames[camera] = decode_frames(read[key][kept], f"{where}: {key}")
        actions[:, 6] = actions[:, 6] >= 0.5  # Bridge may end on a gripper that is on its way
        windows = _windows(texts, task)
        whole = windows[0] if len(windows) == 1 and windows[0].length == len(texts) else None
        return Episode(
            instruction=whole.instruction if whole else "",
            frames=frames,
            state=state,
            actions=actions,
            task=whole.task if whole else "",
            source=source,
            windows=None if whole else windows,
        )


def _windows(texts: list[str], task: str) -> tuple[Window, ...]:
    """A window for every run of steps with the same instruction; none where it is empty."""
    windows, start = [], 0
    for text, run in groupby(texts):
        length = len(list(run))
        if text.strip():
            windows.append(Window(text, task or text, start, length))
        start += length
    return tuple(windows)


def step_values(values: dict[str, Values], key: str, feature: Feature, where: str) -> np.ndarray:
    """The T steps' values of a feature, (T, *lists, *shape); images and texts are byte strings.

    Args:
        values: of `parse_example`, with at least the keys that `_stored_keys` names.

    Raises:
        UserError: missing, of another type, not a whole number of steps, or lists of differing lengths, which no array
            can hold.
    """
    flat, *levels = _stored_keys(key, feature)
    for name in (flat, *levels):
        if name not in values:
            raise UserError(f"{where} has no {name!r}, which features.json promises: download it again")
    content = values[flat]
    if len(content) and isinstance(content, list) != (feature.kind in ("image", "text")):
        raise UserError(f"{where}: {key} is not stored as {feature.kind}: features.json belongs to another data set")
    if isinstance(content, list):
        content = np.array(content, object)
    shape = [len(values[levels[0]]) if levels else -1]
    for name in levels:
        lengths = np.unique(values[name]).tolist()
        if len(lengths) > 1:
            raise UserError(f"{where}: {key} holds lists of differing lengths, {lengths}; it cannot be read")
        shape += lengths
    try:
        return content.reshape(*shape, *feature.shape)
    except ValueError:
        raise UserError(f"{where}: {key} has {len(content)} values, not steps of {feature.shape}") from None


def _stored_keys(key: str, feature: Feature) -> list[str]:
    """The Example's keys of a feature: its values, and the lengths of the lists they lie in."""
    if not feature.ragged:
        return [key]
    return [f"{key}/ragged_flat_values", *(f"{key}/ragged_row_lengths_{level}" for level in range(feature.ragged))]


def decode_frames(encoded: Sequence[bytes], where: str) -> np.ndarray:
    """JPEG or PNG byte strings, all of one size → (T, H, W, 3) uint8 RGB.

    Pillow decodes a JPEG exactly as TensorFlow does with dct_method="INTEGER_ACCURATE"; TensorFlow's default, which
    openvla trains with, is a faster approximation, about 1.4 of 255 away on average.

    Raises:
        UserError: one that is damaged or of another size; the step is named.
    """
    frames: np.ndarray | None = None
    for step, content in enumerate(encoded):
        try:
            with Image.open(io.BytesIO(content), formats=("JPEG", "PNG")) as image:
                frame = np.asarray(image.convert("RGB"))
        except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
            raise UserError(f"{where}: the image at step {step} cannot be read ({error}): download it again") from error
        if frames is None:
            frames = np.empty((len(encoded), *frame.shape), np.uint8)
        if frame.shape != frames.shape[1:]:
            raise UserError(f"{where}: the image at step {step} is {frame.shape}, those before it {frames.shape[1:]}")
        frames[step] = frame
    return frames


def features_of(path: Path) -> dict[str, Feature]:
    """features.json flattened: key → leaf. The lists around the steps are not counted in `Feature.ragged`.

    Raises:
        UserError: unreadable, or not in TFDS' form of features.
    """
    found: dict[str, Feature] = {}

    def walk(node: dict, key: str, lists: int) -> None:
        if "featuresDict" in node:
            for name, child in node["featuresDict"]["features"].items():
                walk(child, f"{key}/{name}" if key else name, lists)
        elif "sequence" in node:
            walk(node["sequence"]["feature"], key, lists + 1)
        elif "image" in node or "text" in node:
            found[key] = Feature("image" if "image" in node else "text", ragged=max(lists - 1, 0))
        elif "tensor" in node:
            tensor = node["tensor"]
            kind = "text" if tensor["dtype"] in ("string", "object") else tensor["dtype"]
            if tensor.get("encoding", "none") != "none":
                kind = f"{kind} ({tensor['encoding']})"
            shape = tuple(int(size) for size in tensor.get("shape", {}).get("dimensions", []))
            found[key] = Feature(kind, shape, max(lists - 1, 0))

    try:
        walk(_json(path), "", 0)
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise UserError(f"{path} is not in TFDS' form ({error!r}); prepare the data with TFDS 4.5 or newer") from error
    if not found:
        raise UserError(f"{path} describes no features; prepare the data with TFDS 4.5 or newer")
    return found


def _needed(kind: DataSet, cameras: tuple[str, ...], features: dict[str, Feature], folder: Path) -> dict[str, Feature]:
    """The features to read, checked against what the conversion takes."""
    if unknown := sorted(set(cameras) - set(kind.cameras)):
        raise UserError(f"{folder} has no camera {', '.join(unknown)}: choose from {', '.join(kind.cameras)}")
    expected = {key: Feature("float32", (width,)) for key, width in kind.numbers.items()}
    expected |= {kind.cameras[camera]: Feature("image") for camera in cameras} | {kind.instruction: Feature("text")}
    for key, feature in expected.items():
        if (found := features.get(f"steps/{key}")) != feature:
            raise UserError(
                f"{folder}/features.json: steps/{key} is {found or 'missing'} where {feature} is expected: not the "
                "data set that its name says (data/oxe.py)"
            )
    return {f"steps/{key}": feature for key, feature in expected.items()}


def _folder(path: Path) -> Path:
    found = _versions(path)
    if len(found) == 1:
        return found[0]
    if found:
        raise UserError(f"{path} holds several versions: set data.path to one of {', '.join(v.name for v in found)}")
    raise UserError(f"{path} is no RLDS data set, which has {' and '.join(FILES)}: set data.path to <name>/<version>")


def _versions(path: Path) -> list[Path]:
    candidates = [path] if (path / FILES[0]).exists() else sorted(path.glob("*/")) if path.is_dir() else []
    return [folder for folder in candidates if all((folder / name).is_file() for name in FILES)]


def _json(path: Path) -> dict:
    try:
        content = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read ({error}): download it again") from error
    if not isinstance(content, dict):
        raise UserError(f"{path} holds no JSON object: download it again")
    return content
