"""CALVIN's official layout: one npz per frame, play segments, language windows (fact sheet calvin §5).

    split = CalvinSplit(Path("task_ABC_D/training"))
    for part in split.parts(cameras=("static", "wrist"), margin=16): ...   # units of conversion

Of the play data only what language describes is taken, plus `margin` frames after each window for o_{t+H}, never beyond
the play segment. Windows that overlap or touch share their frames. Actions are `rel_actions`: in [-1, 1], 1 = 2 cm or
0.05 rad, gripper ±1 stored as {0, 1}, 1 = open. float32 and float64 files are read alike; depth and tactile are not
asked for. Object arrays go through an unpickler that builds numpy arrays and plain containers and nothing else.
"""

from __future__ import annotations

import io
import pickle
import re
import zipfile
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from data.episode import Episode, Window
from vla.errors import UserError

CAMERA_KEYS = {"static": "rgb_static", "wrist": "rgb_gripper"}
PART_FRAMES = 2000
"""Frames of one unit of conversion: seconds of reading, some hundred megabytes."""

_SAFE = {
    ("numpy", "ndarray"): np.ndarray,
    ("numpy", "dtype"): np.dtype,
    ("_codecs", "encode"): lambda text, encoding: text.encode(encoding),
}
for _module in ("numpy.core.multiarray", "numpy._core.multiarray"):
    _SAFE[_module, "_reconstruct"] = np._core.multiarray._reconstruct
    _SAFE[_module, "scalar"] = np._core.multiarray.scalar


class _ArrayUnpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in _SAFE:
            raise pickle.UnpicklingError(f"it names {module}.{name}, which is not an array")
        return _SAFE[module, name]


def load_objects(path: Path) -> Any:
    """The content of a 0-d object array saved by np.save, without running anything in it.

    Raises:
        UserError: the file is missing, damaged, or holds something that is neither array nor container.
    """
    try:
        with open(path, "rb") as file:
            version = np.lib.format.read_magic(file)
            header = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
            shape, _, dtype = header(file)
            if not dtype.hasobject:
                raise UserError(f"{path} holds no annotations but an array of {dtype} {shape}; is it another file?")
            content = _ArrayUnpickler(file).load()
    except FileNotFoundError:
        raise UserError(f"{path} is missing; a CALVIN split needs it (set data.path to task_ABC_D/training)") from None
    except (ValueError, EOFError, pickle.UnpicklingError, AttributeError, IndexError, TypeError) as error:
        raise UserError(f"{path} cannot be read ({error}); download it again") from error
    return content.item() if isinstance(content, np.ndarray) and content.ndim == 0 else content


@dataclass(frozen=True)
class Annotation:
    """Frames start … end (both included) do `task`, described by `instruction`."""

    instruction: str
    task: str
    start: int
    end: int


class CalvinSplit:
    """A folder `training` or `validation` of the official layout.

    Raises:
        UserError: not such a folder, or an annotation that is not inside one play segment (named).
    """

    def __init__(self, path: Path, language: str = "lang_annotations"):
        self.path = Path(path)
        self.annotation_file = self.path / language / "auto_lang_ann.npy"
        if not self.path.is_dir() or not (self.path / "ep_start_end_ids.npy").exists():
            inner = " or ".join(f"{self.path}/{name}" for name in ("training", "validation"))
            hint = f"; did you mean {inner}?" if (self.path / "training").is_dir() else "; set data.path"
            raise UserError(f"{self.path} is no CALVIN split (it has no ep_start_end_ids.npy){hint}")

    @cached_property
    def segments(self) -> np.ndarray:
        """int64 (n, 2): first and last frame of each play segment, in order."""
        try:
            ids = np.load(self.path / "ep_start_end_ids.npy", allow_pickle=False)
        except (ValueError, EOFError) as error:
            raise UserError(f"{self.path}/ep_start_end_ids.npy cannot be read ({error}); download it again") from error
        if (
            ids.ndim != 2
            or ids.shape[1] != 2
            or not np.issubdtype(ids.dtype, np.integer)
            or (ids[:, 0] > ids[:, 1]).any()
        ):
            raise UserError(f"{self.path}/ep_start_end_ids.npy should hold pairs of frame numbers, first ≤ last")
        return ids[np.argsort(ids[:, 0])].astype(np.int64)

    @cached_property
    def annotations(self) -> list[Annotation]:
        """Every language window, by first frame."""
        content = load_objects(self.annotation_file)
        try:
            sentences, tasks = content["language"]["ann"], content["language"]["task"]
            bounds = [(int(start), int(end)) for start, end in content["info"]["indx"]]
        except (KeyError, TypeError, ValueError) as error:
            raise UserError(
                f"{self.annotation_file} lacks language/ann, language/task or info/indx ({error})"
            ) from None
        if not len(sentences) == len(tasks) == len(bounds):
            counts = f"{len(sentences)} sentences, {len(tasks)} tasks, {len(bounds)} windows"
            raise UserError(f"{self.annotation_file} has {counts}; they should be equally many")
        found = [Annotation(str(s), str(t), a, b) for s, t, (a, b) in zip(sentences, tasks, bounds, strict=True)]
        for annotation in found:
            last = self.segment_end(annotation.start)
            if last is None or annotation.end > last or annotation.end < annotation.start:
                raise UserError(
                    f"{self.annotation_file}: the window {annotation.start}-{annotation.end} ({annotation.task}) is in "
                    "no play segment of ep_start_end_ids.npy; the two files do not belong together"
                )
        return sorted(found, key=lambda a: (a.start, a.end, a.task))

    def segment_end(self, frame: int) -> int | None:
        """The last frame of the play segment that `frame` lies in."""
        index = int(np.searchsorted(self.segments[:, 0], frame, side="right")) - 1
        return int(self.segments[index, 1]) if index >= 0 and frame <= self.segments[index, 1] else None

    @cached_property
    def template(self) -> tuple[str, int]:
        """Prefix and number of digits of the frame files' names, from the first one there is."""
        for file in self.path.iterdir():
            if found := re.fullmatch(r"(.*?)(\d+)\.npz", file.name):
                return found.group(1), len(found.group(2))
        raise UserError(f"{self.path} holds no frame files (episode_0000000.npz); download it again")

    def frame_file(self, frame: int) -> Path:
        prefix, digits = self.template
        return self.path / f"{prefix}{frame:0{digits}d}.npz"

    def parts(self, cameras: tuple[str, ...], margin: int) -> list[CalvinPart]:
        """The units of conversion: stretches of frames, each with the windows that begin in it."""
        stretches: list[tuple[int, int, list[Annotation]]] = []
        for annotation in self.annotations:
            end = min(annotation.end + margin, self.segment_end(annotation.start))
            joins = stretches and annotation.start <= stretches[-1][1] + 1
            if joins and self.segment_end(stretches[-1][0]) == self.segment_end(annotation.start):
                first, last, windows = stretches[-1]
                stretches[-1] = (first, max(last, end), [*windows, annotation])
            else:
                stretches.append((annotation.start, end, [annotation]))
        parts: list[list] = [[]]
        frames = 0
        for stretch in stretches:
            if frames >= PART_FRAMES:
                parts.append([])
                frames = 0
            parts[-1].append(stretch)
            frames += stretch[1] - stretch[0] + 1
        prefix, digits = self.template
        return [
            CalvinPart(self.path, prefix, digits, tuple(cameras), tuple(_frozen(s) for s in part))
            for part in parts
            if part
        ]


def _frozen(stretch: tuple[int, int, list[Annotation]]) -> tuple[int, int, tuple[Annotation, ...]]:
    return stretch[0], stretch[1], tuple(stretch[2])


@dataclass(frozen=True)
class CalvinPart:
    """Some stretches (first frame, last frame, windows) of a split; one unit of conversion, an episode each."""

    path: Path
    prefix: str
    digits: int
    cameras: tuple[str, ...]
    stretches: tuple[tuple[int, int, tuple[Annotation, ...]], ...]

    @property
    def name(self) -> str:
        return f"frames {self.stretches[0][0]}-{self.stretches[-1][1]}"

    def read(self, skipped: list[str] | None) -> Iterator[Episode]:
        """An episode per stretch. A bad frame ends its stretch where it is skipped: the windows it lies in are lost."""
        for first, last, windows in self.stretches:
            if skipped is None:
                yield self._episode(first, [self._frame(frame) for frame in range(first, last + 1)], windows)
                continue
            runs: list[tuple[int, list]] = [(first, [])]
            for frame in range(first, last + 1):
                try:
                    runs[-1][1].append(self._frame(frame))
                except UserError as error:
                    lost = sum(w.start <= frame <= w.end for w in windows)
                    skipped.append(f"{error} ({lost} windows left out)")
                    runs.append((frame + 1, []))
            for start, frames in runs:
                whole = [w for w in windows if start <= w.start and w.end < start + len(frames)]
                if whole:
                    yield self._episode(start, frames, whole)

    def _episode(self, first: int, frames: list[dict[str, np.ndarray]], found: Sequence[Annotation]) -> Episode:
        actions = np.stack([frame["rel_actions"] for frame in frames]).astype(np.float32)
        actions[:, 6] = actions[:, 6] > 0
        windows = tuple(Window(a.instruction, a.task, a.start - first, a.end - a.start + 1) for a in found)
        return Episode(
            instruction="",
            frames={camera: np.stack([frame[CAMERA_KEYS[camera]] for frame in frames]) for camera in self.cameras},
            state=np.stack([frame["robot_obs"] for frame in frames]).astype(np.float32),
            actions=actions,
            task="",
            source=f"{self.path.name}/{self.prefix}{first:0{self.digits}d}",
            windows=windows,
        )

    def _frame(self, frame: int) -> dict[str, np.ndarray]:
        file = self.path / f"{self.prefix}{frame:0{self.digits}d}.npz"
        shapes = {"rel_actions": (7,), "robot_obs": (15,)} | {CAMERA_KEYS[c]: (None, None, 3) for c in self.cameras}
        return read_frame(file, shapes)


def read_frame(file: Path, shapes: dict[str, tuple[int | None, ...]]) -> dict[str, np.ndarray]:
    """The arrays named in `shapes` of one frame file, checked; nothing else in it is decompressed.

    Raises:
        UserError: the file is missing, damaged, or an array is missing, of another shape or not finite.
    """
    try:
        content = io.BytesIO(file.read_bytes())  # one read a file: network file systems are slow at seeking
        with np.load(content, allow_pickle=False) as arrays:
            found = {name: arrays[name] for name in shapes}
    except FileNotFoundError:
        raise UserError(f"{file} is missing, inside a window that language describes; download it again") from None
    except KeyError as error:
        raise UserError(f"{file} has no array {error}; it is not a frame of CALVIN") from None
    except (ValueError, OSError, EOFError, zipfile.BadZipFile, zlib.error) as error:
        raise UserError(f"{file} cannot be read ({error}); download it again") from error
    for name, shape in shapes.items():
        array = found[name]
        fits = array.ndim == len(shape) and all(
            want in (None, size) for want, size in zip(shape, array.shape, strict=True)
        )
        if not fits or (array.dtype != np.uint8 if len(shape) == 3 else not np.isfinite(array).all()):
            raise UserError(f"{file}: {name} is {array.dtype} {array.shape}, or not finite; expected {shape}")
    return found
