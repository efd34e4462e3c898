"""LeRobot v3 data sets in a local folder, as episodes.

    reading = Reading(gripper="libero", orientation="rotate180")
    for episode in read_lerobot(Path("datasets/libero"), ("static", "wrist"), reading, "rotate180"): ...
    units = lerobot_parts(Path("datasets/libero"), ("static",), reading, "rotate180")     # one for each data file

Layout (huggingface/lerobot 0.6.1, `src/lerobot/datasets`, codebase_version v3.0): `meta/info.json` names the features;
`meta/tasks.parquet` the instructions; `meta/episodes/**.parquet` says in which file each episode lies;
`data/chunk-*/file-*.parquet` holds a row a step, `videos/<feature>/chunk-*/file-*.mp4` the films, several episodes in
one. Images may instead be a column of {bytes, path}. A row holds what was seen and the action then chosen: there is no
pairing to choose.

LIBERO's data sets, from their converters, cards and evaluation code (no file of theirs was at hand):

| data set | images | state and action | gripper | version |
|---|---|---|---|---|
| lerobot/libero, HuggingFaceVLA/libero | observation.images.image, image2 | observation.state, action | libero | 3.0 |
| physical-intelligence/libero | image, wrist_image | state, actions | libero | 2.0 |
| IPEC-COMMUNITY/libero_*_lerobot | observation.images.image, wrist_image | observation.state, action | open1 | 2.x |

All come from OpenVLA's regenerated demonstrations (256 × 256, no-ops and failures left out), whose images are turned by
180°: orientation=rotate180 (openpi's main.py and lerobot's LiberoProcessorStep turn the simulator's to match). State =
position (m), axis-angle (rad), two finger positions (m). "libero" follows from both evaluators handing the policy's
output to the simulator as it is, "open1" from IPEC's converters (any4lerobot), which clip and invert. Most say 10 fps;
control runs at 20 Hz. As one name carries either coding, nothing is guessed of gripper and orientation: they are
arguments, or stand in info.json where data/lerobot_writer.py wrote it.
"""

from __future__ import annotations

import io
import struct
import zlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from data.episode import Episode, Window
from data.inside import inside
from data.lerobot_meta import ACTION_FEATURES, PARQUET_DAMAGE, STATE_FEATURES, EpisodeRow, LeRobotSet
from data.libero import ROTATIONS, orient
from vla.errors import UserError

GRIPPERS = ("libero", "open1", "closed1")
ORIENTATIONS = ("raw", *ROTATIONS)


@dataclass(frozen=True)
class Reading:
    """What a data set that is not this project's does not say about itself.

    gripper: "libero" (-1 open, +1 closed), "open1" (0 closed, 1 open) or "closed1" (0 open, 1 closed).
    orientation: how its images are stored, "raw" (as LIBERO renders, upside down), "rotate180" or "upright".
    keys: camera -> image feature, where CAMERA_FEATURES does not know it.
    """

    gripper: str | None = None
    orientation: str | None = None
    keys: Mapping[str, str] = field(default_factory=dict)


def lerobot_parts(
    path: Path,
    cameras: tuple[str, ...],
    reading: Reading | None = None,
    image_rotation: str | None = None,
    instructions: tuple[str, ...] | None = None,
) -> list[LeRobotPart]:
    """The units of conversion, one for each data file.

    Args:
        cameras: names that the episodes' frames get; which feature each is: see `LeRobotSet.camera_feature`.
        reading: what the data set does not say itself; where it does, the two must agree.
        image_rotation: orientation wanted, "rotate180" or "upright" (see data/libero.py); None: as stored.
        instructions: take the episodes of these tasks alone; None: all.

    Raises:
        UserError: as `LeRobotSet`; an unknown camera, gripper or orientation, or one that nobody says.
    """
    reading = reading or Reading()
    data = LeRobotSet(path)
    features = {camera: data.camera_feature(camera, reading.keys) for camera in cameras}
    action = data.vector_feature(ACTION_FEATURES)
    gripper, stored = _conventions(data, action, features, reading, image_rotation is not None)
    rows = [row for row in data.episodes if instructions is None or set(row.tasks) & set(instructions)]
    if not rows:
        wanted = ", ".join(instructions or ())
        raise UserError(f"{path} holds no episode of: {wanted}; its tasks are: {'; '.join(data.tasks.values())}")
    shared = dict(
        path=data.path,
        fps=float(data.info["fps"]),
        tasks=data.tasks,
        features=features,
        state=data.vector_feature(STATE_FEATURES),
        action=action,
        gripper=gripper,
        stored=stored,
        image_rotation=image_rotation,
    )
    by_file: dict[str, list[EpisodeRow]] = {}
    for row in rows:
        by_file.setdefault(row.data_file, []).append(row)
    return [LeRobotPart(file, tuple(found), **shared) for file, found in by_file.items()]


def _conventions(
    data: LeRobotSet, action: str, features: dict[str, str], reading: Reading, oriented: bool
) -> tuple[str, str | None]:
    """How the gripper is coded and how images are stored: as the data set says, as `reading` says, never two things."""
    said = {"gripper": {data.declared(action, "gripper")}}
    if oriented:
        said["orientation"] = {data.declared(feature, "orientation") for feature in features.values()}
    agreed, unsaid = {"orientation": None}, []
    for what, choices in (("gripper", GRIPPERS), ("orientation", ORIENTATIONS)):
        given, declared = getattr(reading, what), said.get(what, set()) - {None}
        if given is not None and given not in choices:
            raise UserError(f"unknown {what} {given!r}: choose one of {', '.join(choices)}")
        if len(declared) > 1 or (given and declared and declared != {given}):
            told = ", ".join(sorted(declared))
            raise UserError(f"{data.path}: its info.json says {what}={told}, not {given}; leave {what}= out")
        if given or declared:
            agreed[what] = given or declared.pop()
        elif said.get(what):
            unsaid.append(f"{what}={'|'.join(choices)}")
    if unsaid:
        words = " and ".join(word.split("=")[0] for word in unsaid)
        raise UserError(
            f"{data.path} does not say its {words} (see data/lerobot.py); convert it once, `python scripts/convert.py "
            f"data.path={data.path} out=STORE {' '.join(unsaid)}`, and use data.path=STORE"
        )
    return agreed["gripper"], agreed["orientation"]


def read_lerobot(
    path: Path,
    cameras: tuple[str, ...],
    reading: Reading | None = None,
    image_rotation: str | None = None,
    instructions: tuple[str, ...] | None = None,
) -> Iterator[Episode]:
    """Every episode, in order; arguments and errors as for `lerobot_parts`."""
    for part in lerobot_parts(path, cameras, reading, image_rotation, instructions):
        yield from part.read(None)


@dataclass(frozen=True)
class LeRobotPart:
    """The episodes of one data file; one unit of conversion."""

    data_file: str
    rows: tuple[EpisodeRow, ...]
    path: Path
    fps: float
    tasks: dict[int, str]
    features: dict[str, str]
    """Camera -> image feature."""
    state: str
    action: str
    gripper: str
    stored: str | None
    image_rotation: str | None

    @property
    def name(self) -> str:
        return self.data_file

    def read(self, skipped: list[str] | None) -> Iterator[Episode]:
        """Its episodes; one that cannot be read raises UserError or, where `skipped` is given, is named there."""
        import pyarrow as pa
        import pyarrow.parquet as pq

        file = self.path / self.data_file
        images = [name for name in self.features.values() if name not in self.rows[0].films]
        columns = ["episode_index", "frame_index", "timestamp", "task_index", self.state, self.action, *images]
        try:
            with pq.ParquetFile(file, page_checksum_verification=True) as opened:
                if missing := set(columns) - set(opened.schema_arrow.names):
                    raise UserError(f"{file} has no column {', '.join(sorted(missing))}; download the data set again")
                table = opened.read(columns=columns)
        except FileNotFoundError:
            raise UserError(f"{file} is missing; download the data set again") from None
        except (*PARQUET_DAMAGE, pa.ArrowException) as error:
            raise UserError(f"{file} cannot be read ({error}); damaged or truncated, download it again") from error
        episode_index = table.column("episode_index").to_numpy()
        for row in self.rows:
            try:
                yield self._episode(table.filter(pa.array(episode_index == row.index)), row)
            except UserError as error:
                if skipped is None:
                    raise
                skipped.append(str(error))

    def _episode(self, table: Any, row: EpisodeRow) -> Episode:
        where = f"{self.path / self.data_file}: episode {row.index}"
        steps = table.column("frame_index").to_numpy()
        if len(steps) != row.length or not np.array_equal(steps, np.arange(row.length)) or not row.length:
            raise UserError(f"{where} has {len(steps)} steps, not 0 ... {row.length - 1} as meta/episodes says")
        state, actions = (_vectors(table.column(name), where, name) for name in (self.state, self.action))
        if actions.shape[1] != 7:
            raise UserError(f"{where}: {self.action} has {actions.shape[1]} numbers a step; 6 of motion and a gripper")
        actions[:, 6] = open_gripper(actions[:, 6], self.gripper, where)
        frames = {camera: self._frames(table, row, name, where) for camera, name in self.features.items()}
        windows = self._windows(table.column("task_index").to_numpy(), row, where)
        return Episode(
            instruction=windows[0].instruction if len(windows) == 1 else "",
            frames=frames,
            state=state,
            actions=actions,
            task=windows[0].task if len(windows) == 1 else "",
            source=row.source or f"{self.path.name}:episode_{row.index}",
            windows=None if len(windows) == 1 else windows,
        )

    def _windows(self, task_index: np.ndarray, row: EpisodeRow, where: str) -> tuple[Window, ...]:
        """A window for each stretch of steps that one instruction holds for; mostly one."""
        if unknown := set(task_index.tolist()) - set(self.tasks):
            raise UserError(f"{where} has task {min(unknown)}, unknown to meta/tasks.parquet; download it again")
        starts = [0, *(np.flatnonzero(np.diff(task_index)) + 1).tolist()]
        words = [self.tasks[int(task_index[start])] for start in starts]
        lengths = np.diff([*starts, row.length]).tolist()
        return tuple(
            Window(word, row.task or word.replace(" ", "_"), start, length)
            for word, start, length in zip(words, starts, lengths, strict=True)
        )

    def _frames(self, table: Any, row: EpisodeRow, feature: str, where: str) -> np.ndarray:
        if feature in row.films:
            from data.video import read_frames

            file, start = row.films[feature]
            times = start + table.column("timestamp").to_numpy().astype(np.float64)
            if row.length > 1 and np.diff(times).min() <= 0.5 / self.fps:
                raise UserError(f"{where}: its timestamps are not {self.fps:g} a second; download the data set again")
            frames = read_frames(self.path / file, times, 0.25 / self.fps)
        else:
            pictures = table.column(feature).to_pylist()
            frames = [decode_image(p, self.path, f"{where}, {feature} {t}") for t, p in enumerate(pictures)]
            if len({frame.shape for frame in frames}) != 1:
                raise UserError(f"{where}: {feature} has images of different sizes; download the data set again")
            frames = np.stack(frames)
        if self.image_rotation in (None, self.stored):
            return frames
        raw = frames if self.stored == "raw" else orient(frames, self.stored)  # either rotation undoes itself
        return orient(raw, self.image_rotation)


def decode_image(stored: dict | None, root: Path, where: str) -> np.ndarray:
    """(H, W, 3) uint8 RGB of {bytes, path}; the path, below `root`, counts where there are no bytes."""
    from PIL import Image

    try:
        content = stored["bytes"] if stored["bytes"] is not None else inside(root, stored["path"], where).read_bytes()
        with Image.open(io.BytesIO(content)) as image:
            return np.asarray(image.convert("RGB"))
    except (OSError, ValueError, TypeError, KeyError, SyntaxError, zlib.error, struct.error) as error:
        raise UserError(f"{where} cannot be decoded ({error}); download the data set again") from error


def open_gripper(values: np.ndarray, coding: str, where: str) -> np.ndarray:
    """Gripper commands as {0, 1}, 1 = open; values that `coding` cannot hold are an error: a wrong one shows."""
    if coding == "libero":
        fits, is_open, range_ = (np.abs(values) >= 0.5) & (np.abs(values) <= 1.001), values < 0, "-1 or +1"
    else:
        fits, range_ = (values >= -0.001) & (values <= 1.001), "0 to 1"
        is_open = values > 0.5 if coding == "open1" else values < 0.5
    if not fits.all():
        step = int(np.flatnonzero(~fits)[0])
        others = " or ".join(other for other in GRIPPERS if other != coding)
        raise UserError(
            f"{where}: the gripper is {values[step]:.3g} at step {step}, gripper={coding} means {range_}; "
            f"is it gripper={others}?"
        )
    return is_open.astype(np.float32)


def _vectors(column: Any, where: str, name: str) -> np.ndarray:
    """(T, D) float32 of a column of numbers or of lists of numbers."""
    try:
        values = np.array(column.to_pylist(), dtype=np.float32)
    except (ValueError, TypeError) as error:
        raise UserError(f"{where}: {name} is not the same number of numbers at every step ({error})") from error
    values = values.reshape(len(values), -1)
    if not np.isfinite(values).all():
        step = int(np.flatnonzero(~np.isfinite(values).all(axis=1))[0])
        raise UserError(f"{where}: {name} at step {step} is not finite; leave the episode out")
    return values
