"""The metadata of a LeRobot v3 data set: its features, its instructions, and where each episode lies.

Format: huggingface/lerobot 0.6.1, `src/lerobot/datasets`, codebase_version v3.0; data/lerobot.py reads the data.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from data.inside import inside
from vla.errors import UserError

CAMERA_FEATURES = {
    "static": (
        "observation.images.static", "observation.images.image", "image", "observation.images.agentview",
        "observation.images.agentview_image", "observation.images.agentview_rgb", "images.agentview_rgb",
    ),
    "wrist": (
        "observation.images.wrist", "observation.images.image2", "observation.images.wrist_image", "wrist_image",
        "observation.images.robot0_eye_in_hand_image", "observation.images.eye_in_hand_rgb", "images.wrist_rgb",
    ),
}  # fmt: skip
"""What the field calls the cameras; the first is data/lerobot_writer.py's name."""
STATE_FEATURES = ("observation.state", "state")
ACTION_FEATURES = ("action", "actions")
PARQUET_DAMAGE = (OSError, ValueError, KeyError, TypeError)
"""What reading a damaged parquet file raises; pyarrow's own errors are among the first three."""


def is_lerobot(path: Path) -> bool:
    """Whether `path` is a LeRobot data set of any version, as its folder of metadata says."""
    return (Path(path) / "meta").is_dir()


def lerobot_files(path: Path) -> list[Path]:
    """Every file of the data set in folder `path`, info.json first; UserError where it is none that can be read."""
    read_info(path)
    files = sorted(file for file in Path(path).rglob("*") if file.suffix in (".parquet", ".mp4"))
    return [Path(path) / "meta" / "info.json", *files]


@dataclass(frozen=True)
class EpisodeRow:
    """Where one episode lies."""

    index: int
    length: int
    data_file: str
    films: dict[str, tuple[str, float]]
    """Video feature -> file, seconds at which the episode begins in it."""
    tasks: tuple[str, ...]
    task: str | None
    source: str | None
    """`task` and `source` of the Episode that was written; None in a data set from elsewhere."""


class LeRobotSet:
    """The metadata of the data set in folder `path`.

    Raises:
        UserError: not one, another version than v3, metadata that is missing or damaged.
    """

    def __init__(self, path: Path):
        self.path = Path(path)
        self.info = read_info(self.path)
        self.features: dict[str, dict] = self.info["features"]

    @property
    def image_features(self) -> list[str]:
        return [name for name, feature in self.features.items() if feature.get("dtype") in ("image", "video")]

    def camera_feature(self, camera: str, keys: Mapping[str, str]) -> str:
        """The image feature that is `camera`, as `keys` say or as the field usually calls it."""
        there = f"{self.path} has the image features {', '.join(self.image_features) or '(none)'}"
        remedy = f"say which it is with keys.{camera}=FEATURE in scripts/convert.py"
        if camera in keys:
            if keys[camera] not in self.image_features:
                raise UserError(f"{there}, and no {keys[camera]} for the camera {camera}; {remedy}")
            return keys[camera]
        found = [name for name in CAMERA_FEATURES.get(camera, ()) if name in self.image_features]
        if len(found) != 1:
            which = f"and {' and '.join(found)} could each be" if found else "and none is known to be"
            raise UserError(f"{there}, {which} the camera {camera}; {remedy}")
        return found[0]

    def vector_feature(self, usual: tuple[str, ...]) -> str:
        for name in usual:
            if name in self.features:
                return name
        raise UserError(f"{self.path} has no feature {' or '.join(usual)}, only {', '.join(self.features)}")

    def declared(self, feature: str, what: str) -> Any:
        """What data/lerobot_writer.py noted beside a feature, or None."""
        return (self.features[feature].get("info") or {}).get(what)

    @cached_property
    def tasks(self) -> dict[int, str]:
        """Task index -> instruction."""
        import pandas as pd

        file = self.path / "meta" / "tasks.parquet"
        try:
            table = pd.read_parquet(file)
            words = table["task"] if "task" in table.columns else table.index
            return {int(index): str(word) for index, word in zip(table["task_index"], words, strict=True)}
        except PARQUET_DAMAGE as error:
            raise UserError(f"{file} cannot be read ({error}); download the data set again") from error

    @cached_property
    def episodes(self) -> list[EpisodeRow]:
        """By episode index; as many as info.json promises."""
        import pyarrow.parquet as pq

        rows: list[EpisodeRow] = []
        for file in sorted((self.path / "meta" / "episodes").glob("*/*.parquet")):
            try:
                with pq.ParquetFile(file, page_checksum_verification=True) as opened:
                    names = [name for name in opened.schema_arrow.names if not name.startswith("stats/")]
                    rows += [self._row(row) for row in opened.read(columns=names).to_pylist()]
            except PARQUET_DAMAGE as error:
                raise UserError(f"{file} cannot be read ({error}); download the data set again") from error
        rows.sort(key=lambda row: row.index)
        if [row.index for row in rows] != list(range(self.info["total_episodes"])) or not rows:
            promised = f"meta/info.json promises {self.info['total_episodes']}"
            raise UserError(f"{self.path}/meta/episodes describes {len(rows)} episodes, {promised}; download it again")
        return rows

    def _row(self, row: dict) -> EpisodeRow:
        def place(template: str, of: str, **more: str) -> str:
            chunk, file = int(row[f"{of}/chunk_index"]), int(row[f"{of}/file_index"])
            try:
                name = template.format(chunk_index=chunk, file_index=file, **more)
            except (KeyError, IndexError, AttributeError, ValueError) as error:
                raise UserError(f"{self.path}/meta/info.json: {template!r} names no file ({error!r})") from error
            inside(self.path, name, f"{self.path}/meta/info.json")
            return name

        films = [name for name in self.image_features if self.features[name]["dtype"] == "video"]
        return EpisodeRow(
            index=row["episode_index"],
            length=row["length"],
            data_file=place(self.info["data_path"], "data"),
            films={
                name: (
                    place(self.info["video_path"], f"videos/{name}", video_key=name),
                    row[f"videos/{name}/from_timestamp"],
                )
                for name in films
            },
            tasks=tuple(row.get("tasks") or ()),
            task=row.get("task"),
            source=row.get("source"),
        )


def read_info(path: Path) -> dict:
    """meta/info.json, checked.

    Raises:
        UserError: missing, damaged, or of another version, with the way to convert it.
    """
    file = Path(path) / "meta" / "info.json"
    try:
        info = json.loads(file.read_text())
        version, fps, features = str(info["codebase_version"]), float(info["fps"]), dict(info["features"])
    except FileNotFoundError:
        raise UserError(f"{file} is missing: not a LeRobot data set, or not all of it; download it again") from None
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{file} cannot be read ({error!r}); download the data set again") from error
    if version.startswith("v2"):
        first = " (v2.0 first to v2.1, with lerobot 0.3)" if version == "v2.0" else ""
        raise UserError(
            f"{path} is a LeRobot {version} data set, v3.0 is read; where lerobot is installed, convert it{first}: "
            f"python -m lerobot.scripts.convert_dataset_v21_to_v30 --repo-id=NAME --root={path} --push-to-hub=false"
        )
    if not version.startswith("v3.") or fps <= 0 or not {"data_path", "total_episodes"} <= set(info):
        raise UserError(f"{file} says codebase_version {version}, fps {fps}; LeRobot v3.0 is read, with all its fields")
    if any(feature.get("dtype") == "video" for feature in features.values()) and not info.get("video_path"):
        raise UserError(f"{file} has video features and no video_path; download the data set again")
    return info
