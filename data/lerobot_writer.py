"""Episodes of any reader as a LeRobot v3 data set, all of it or nothing.

    write_lerobot(read_libero(folder, ("static", "wrist")), out, fps=20, gripper="libero", orientation="rotate180")
    LeRobotDataset("local/out", root=out)                         # in an environment with huggingface's lerobot

Written to the format of lerobot 0.6.1 (codebase_version v3.0, `src/lerobot/datasets`). A language window becomes an
episode: frames outside windows (CALVIN's margin too) are left out, those in two are there twice. Camera c is
observation.images.c, in mp4 (data/video.py) or as PNG in the parquet files (lossless); state and action are float32.
What lerobot has no place for stands beside its own: the gripper's coding and the images' orientation in `info` of their
features, `task` and `source` of each episode in meta/episodes. data/lerobot.py reads both back.
"""

from __future__ import annotations

import io
import json
import os
import shutil
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image
from rich.progress import track

from data.episode import Episode, Window
from data.lerobot import GRIPPERS
from data.lerobot_stats import histogram, image_stats, vector_stats
from data.video import CODEC_NAME, PIXEL_FORMAT, VideoWriter
from vla.errors import UserError

FILES_OF_CHUNK = 1000
DATA_MEGABYTES = 100
VIDEO_MEGABYTES = 200
EPISODES_OF_FILE = 5000
FILE = "chunk-{chunk_index:03d}/file-{file_index:03d}"
FPS = {"libero": 20, "calvin": 30}
"""Control rate of each family's simulator."""
GRIPPER = {"libero": "libero"}
"""The simulator's own coding, so that what is trained elsewhere on the data acts in it; open1 where there is none."""
ACTION_NAMES = ("x", "y", "z", "roll", "pitch", "yaw", "gripper")
STATE_NAMES = {
    "libero": ("x", "y", "z", "axis_angle_x", "axis_angle_y", "axis_angle_z", "finger_left", "finger_right"),
    "calvin": (
        "x", "y", "z", "roll", "pitch", "yaw", "gripper_width", *(f"joint_{i}" for i in range(7)), "gripper_command",
    ),
}  # fmt: skip
_INDICES = ("frame_index", "episode_index", "index", "task_index")


def write_lerobot(
    episodes: Iterable[Episode],
    out: Path,
    fps: int,
    *,
    video: bool = True,
    gripper: str = "open1",
    orientation: str | None = None,
    state_names: Sequence[str] | None = None,
    action_names: Sequence[str] = ACTION_NAMES,
    robot: str = "panda",
) -> dict:
    """Write `episodes` to the folder `out`.

    Args:
        episodes: non-empty; all with the same cameras, frame sizes and state width, every frame rendered.
        fps: steps a second.
        video: mp4, of H.264; otherwise PNG in the parquet files, exact and five times larger (LIBERO).
        gripper: the coding to write, see data/lerobot.py's `Reading`.
        orientation: of the frames given, noted for whoever reads ("rotate180", "upright"); None notes nothing.
        state_names, action_names: what the dimensions are called; state_0 ... where there are no names.

    Returns:
        meta/info.json.

    Raises:
        UserError: no episodes, cameras or sizes that differ, a frame that was not rendered, `out` exists, bad options.
    """
    if gripper not in GRIPPERS:
        raise UserError(f"unknown gripper {gripper!r}: choose one of {', '.join(GRIPPERS)}")
    if int(fps) != fps or fps < 1:
        raise UserError(f"fps={fps}: LeRobot wants a whole number of steps a second")
    if out.exists():
        raise UserError(f"{out} exists; remove it or choose another place with out=DIR")
    partial = out.with_name(f".{out.name}.partial-{os.getpid()}")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        with _Writer(partial, int(fps), video, gripper) as writer:
            for episode in episodes:
                for window in episode.described():
                    writer.add(episode, window)
        info = writer.finish(orientation, state_names, action_names, robot)
        os.replace(partial, out)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return info


def read_units(units: list, skipped: list[str] | None) -> Iterator[Episode]:
    """The episodes of the units of a conversion, with a progress bar; what cannot be read: see data/store_writer.py."""
    for unit in track(units, "writing"):
        try:
            yield from unit.read(skipped)
        except UserError as error:
            if skipped is None:
                raise
            skipped.append(str(error))


@dataclass
class _Place:
    """The file that grows at the moment."""

    chunk_index: int = 0
    file_index: int = 0

    def advance(self) -> None:
        self.file_index += 1
        if self.file_index == FILES_OF_CHUNK:
            self.chunk_index, self.file_index = self.chunk_index + 1, 0

    def of(self, template: str) -> str:
        return template.format(chunk_index=self.chunk_index, file_index=self.file_index)


class _Writer:
    def __init__(self, root: Path, fps: int, video: bool, gripper: str):
        self.root, self.fps, self.video, self.gripper = root, fps, video, gripper
        self.shapes: dict[str, tuple[int, ...]] | None = None
        self.tasks: dict[str, int] = {}
        self.rows: list[dict[str, Any]] = []
        self.steps = 0
        self.vectors: dict[str, list[np.ndarray]] = {}
        self.histograms: dict[str, tuple[np.ndarray, int]] = {}
        self.data_place, self.data = _Place(), None
        self.films: dict[str, tuple[_Place, VideoWriter]] = {}

    def __enter__(self) -> _Writer:
        return self

    def __exit__(self, *_) -> None:
        """Close what is open, also where writing failed."""
        if self.data is not None:
            self.data.close()
        for _, film in self.films.values():
            film.close()

    def add(self, episode: Episode, window: Window) -> None:
        """One episode of the data set: the steps of `window`."""
        part = slice(window.start, window.start + window.length)
        whole = window == Window(episode.instruction, episode.task, 0, len(episode.actions))
        source = episode.source if whole else f"{episode.source}:{part.start}-{part.stop}"
        frames = {f"observation.images.{camera}": pixels[part] for camera, pixels in episode.frames.items()}
        vectors = {"observation.state": episode.state[part].astype(np.float32)}
        vectors["action"] = coded_gripper(episode.actions[part], self.gripper)
        self._check(episode, part, frames, vectors)
        steps = np.arange(window.length)
        vectors["timestamp"] = (steps / self.fps).astype(np.float32)
        task = self.tasks.setdefault(window.instruction, len(self.tasks))
        numbers = (steps, np.full_like(steps, len(self.rows)), self.steps + steps, np.full_like(steps, task))
        vectors |= dict(zip(_INDICES, numbers, strict=True))
        row = {
            "episode_index": len(self.rows),
            "tasks": [window.instruction],
            "length": window.length,
            "dataset_from_index": self.steps,
            "dataset_to_index": self.steps + window.length,
            "task": window.task,
            "source": source,
        }
        row |= self._add_data(vectors, {} if self.video else frames)
        if self.video:
            for name, pixels in frames.items():
                row |= self._add_film(name, pixels)
        self.rows.append(row | self._add_stats(vectors, frames))
        self.steps += window.length

    def _check(self, episode: Episode, part: slice, frames: dict, vectors: dict) -> None:
        if episode.frame_valid is not None and not episode.frame_valid[part].all():
            raise UserError(
                f"{episode.source} has steps without a frame, LeRobot wants all; collect with frame_every=1"
            )
        shapes = {name: values.shape[1:] for name, values in (frames | vectors).items()}
        self.shapes = self.shapes or shapes
        if shapes != self.shapes:
            raise UserError(f"{episode.source} has {shapes}, the episodes before it {self.shapes}; convert them apart")

    def _add_data(self, vectors: dict[str, np.ndarray], frames: dict[str, np.ndarray]) -> dict:
        columns = {name: _png_column(pixels) for name, pixels in frames.items()}
        columns |= {name: _column(values) for name, values in vectors.items()}
        table = pa.table(columns).replace_schema_metadata(_schema_metadata(vectors, frames))
        path = self.root / self.data_place.of(f"data/{FILE}.parquet")
        if self.data is not None and path.stat().st_size > DATA_MEGABYTES * 2**20:
            self.data.close()
            self.data = None
            self.data_place.advance()
            path = self.root / self.data_place.of(f"data/{FILE}.parquet")
        if self.data is None:
            path.parent.mkdir(parents=True, exist_ok=True)
            self.data = pq.ParquetWriter(path, table.schema, compression="snappy", write_page_checksum=True)
        self.data.write_table(table)  # a row group an episode, as lerobot writes it
        return {"data/chunk_index": self.data_place.chunk_index, "data/file_index": self.data_place.file_index}

    def _add_film(self, name: str, pixels: np.ndarray) -> dict:
        place, film = self.films.get(name, (_Place(), None))
        if film is not None and film.size > VIDEO_MEGABYTES * 2**20:
            film.close()
            film = None
            place.advance()
        if film is None:
            film = VideoWriter(self.root / place.of(f"videos/{name}/{FILE}.mp4"), self.fps)
            self.films[name] = (place, film)
        start = film.frames
        film.add(pixels)
        return {
            f"videos/{name}/chunk_index": place.chunk_index,
            f"videos/{name}/file_index": place.file_index,
            f"videos/{name}/from_timestamp": start / self.fps,
            f"videos/{name}/to_timestamp": film.frames / self.fps,
        }

    def _add_stats(self, vectors: dict[str, np.ndarray], frames: dict[str, np.ndarray]) -> dict:
        """The episode's own statistics, kept for the whole's as well."""
        stats = {name: vector_stats(values) for name, values in vectors.items()}
        for name, values in vectors.items():
            self.vectors.setdefault(name, []).append(values)
        for name, pixels in frames.items():
            counts, number = histogram(pixels)
            stats[name] = image_stats(counts, number)
            before = self.histograms.get(name, (0, 0))
            self.histograms[name] = (before[0] + counts, before[1] + number)
        return {f"stats/{name}/{stat}": value for name, of in stats.items() for stat, value in of.items()}

    def finish(self, orientation: str | None, state_names, action_names, robot: str) -> dict:
        """Write the metadata of what was added."""
        if not self.rows:
            raise UserError("no episodes to write; collect some first: python scripts/collect.py")
        for first in range(0, len(self.rows), EPISODES_OF_FILE):
            chunk, file = divmod(first // EPISODES_OF_FILE, FILES_OF_CHUNK)
            here = {"meta/episodes/chunk_index": chunk, "meta/episodes/file_index": file}
            rows = [row | here for row in self.rows[first : first + EPISODES_OF_FILE]]
            path = self.root / f"meta/episodes/{FILE}.parquet".format(chunk_index=chunk, file_index=file)
            path.parent.mkdir(parents=True, exist_ok=True)
            pq.write_table(pa.Table.from_pylist(rows), path, write_page_checksum=True)
        index = pd.Index(list(self.tasks), name="task")
        pd.DataFrame({"task_index": list(self.tasks.values())}, index=index).to_parquet(
            self.root / "meta/tasks.parquet"
        )
        stats = {name: vector_stats(np.concatenate(values)) for name, values in self.vectors.items()}
        stats |= {name: image_stats(*counted) for name, counted in self.histograms.items()}
        (self.root / "meta/stats.json").write_text(json.dumps(stats, indent=4))
        info = {
            "codebase_version": "v3.0",
            "fps": self.fps,
            "features": self._features(orientation, state_names, action_names),
            "total_episodes": len(self.rows),
            "total_frames": self.steps,
            "total_tasks": len(self.tasks),
            "chunks_size": FILES_OF_CHUNK,
            "data_files_size_in_mb": DATA_MEGABYTES,
            "video_files_size_in_mb": VIDEO_MEGABYTES,
            "data_path": f"data/{FILE}.parquet",
            "video_path": f"videos/{{video_key}}/{FILE}.mp4" if self.video else None,
            "robot_type": robot,
            "splits": {"train": f"0:{len(self.rows)}"},
        }
        (self.root / "meta/info.json").write_text(json.dumps(info, indent=4))
        return info

    def _features(self, orientation: str | None, state_names, action_names) -> dict:
        features: dict[str, dict] = {}
        for name, shape in self.shapes.items():
            if name.startswith("observation.images."):
                features[name] = _image_feature(shape, self.video, self.fps, orientation)
        width = self.shapes["observation.state"][0]
        states = list(state_names or ())
        states = states if len(states) == width else [f"state_{i}" for i in range(width)]
        features["observation.state"] = {"dtype": "float32", "shape": [width], "names": states}
        features["action"] = {"dtype": "float32", "shape": [7], "names": list(action_names)}
        features["action"]["info"] = {"gripper": self.gripper}
        features["timestamp"] = {"dtype": "float32", "shape": [1], "names": None}
        return features | {name: {"dtype": "int64", "shape": [1], "names": None} for name in _INDICES}


def coded_gripper(actions: np.ndarray, coding: str) -> np.ndarray:
    """(T, 7) float32 actions with their gripper, {0, 1} and 1 = open, as `coding` has it."""
    actions = actions.astype(np.float32)  # a copy
    is_open = actions[:, 6].copy()
    if coding == "libero":
        actions[:, 6] = 1 - 2 * is_open
    elif coding == "closed1":
        actions[:, 6] = 1 - is_open
    return actions


def _image_feature(shape: tuple[int, ...], video: bool, fps: int, orientation: str | None) -> dict:
    info: dict[str, Any] = {"is_depth_map": False}
    if orientation is not None:
        info["orientation"] = orientation
    if video:
        info |= {
            "video.height": shape[0], "video.width": shape[1], "video.channels": 3, "video.fps": fps,
            "video.codec": CODEC_NAME, "video.pix_fmt": PIXEL_FORMAT,
            "has_audio": False,
        }  # fmt: skip
    dtype = "video" if video else "image"
    return {"dtype": dtype, "shape": list(shape), "names": ["height", "width", "channels"], "info": info}


def _column(values: np.ndarray) -> pa.Array:
    if values.ndim == 1:
        return pa.array(values)
    return pa.FixedSizeListArray.from_arrays(pa.array(np.ascontiguousarray(values).reshape(-1)), values.shape[1])


def _png_column(frames: np.ndarray) -> pa.Array:
    pictures = []
    for step, pixels in enumerate(frames):
        buffer = io.BytesIO()
        Image.fromarray(pixels).save(buffer, format="PNG")
        pictures.append({"bytes": buffer.getvalue(), "path": f"frame-{step:06d}.png"})
    return pa.array(pictures, pa.struct({"bytes": pa.binary(), "path": pa.string()}))


def _schema_metadata(vectors: dict[str, np.ndarray], frames: dict[str, np.ndarray]) -> dict[str, str]:
    """What Hugging Face's datasets keeps in a parquet file to know images from structs."""
    features: dict[str, dict] = {name: {"_type": "Image"} for name in frames}
    for name, values in vectors.items():
        number = {"dtype": str(values.dtype), "_type": "Value"}
        vector = {"feature": number, "length": values.shape[-1], "_type": "Sequence"}
        features[name] = number if values.ndim == 1 else vector
    return {"huggingface": json.dumps({"info": {"features": features}})}
