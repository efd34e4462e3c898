"""Small data sets in the form TFDS prepares, shards, features.json and dataset_info.json: written, and read whole."""

from __future__ import annotations

import io
import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from data.episode import Episode
from data.rlds import rlds_parts
from data.tfrecord import Values, encode_example, write_records


def png(frame: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(frame).save(buffer, format="PNG")
    return buffer.getvalue()


def numbers(*shape: int, dtype: str = "float32") -> dict:
    return {"tensor": {"shape": {"dimensions": [str(size) for size in shape]}, "dtype": dtype, "encoding": "none"}}


IMAGE = {"image": {"shape": {"dimensions": ["8", "8", "3"]}, "dtype": "uint8", "encodingFormat": "png"}}
TEXT = {"text": {}}

LIBERO = {
    "action": numbers(7),
    "is_first": numbers(dtype="bool"),
    "language_instruction": TEXT,
    "observation/image": IMAGE,
    "observation/wrist_image": IMAGE,
    "observation/state": numbers(8),
}
BRIDGE = {
    "action": numbers(7),
    "language_instruction": TEXT,
    "observation/image_0": IMAGE,
    "observation/state": numbers(7),
}
FRACTAL = {
    "action/world_vector": numbers(3),
    "action/rotation_delta": numbers(3),
    "action/gripper_closedness_action": numbers(1),
    "observation/base_pose_tool_reached": numbers(7),
    "observation/gripper_closed": numbers(1),
    "observation/image": IMAGE,
    "observation/natural_language_instruction": numbers(dtype="string"),
}


def made_steps(features: dict, steps: int, rng: np.random.Generator, instruction: str = "pick it up") -> dict:
    """Random content for T steps: key of a step → (T, …) array, T images or T texts."""
    content: dict[str, Values] = {}
    for key, leaf in features.items():
        if "image" in leaf:
            content[key] = [png(frame) for frame in rng.integers(0, 256, (steps, 8, 8, 3), np.uint8)]
        elif "text" in leaf or leaf["tensor"]["dtype"] == "string":
            content[key] = [instruction.encode()] * steps
        elif leaf["tensor"]["dtype"] == "bool":
            content[key] = np.arange(steps) == 0
        else:
            shape = [int(size) for size in leaf["tensor"]["shape"]["dimensions"]]
            content[key] = rng.normal(size=(steps, *shape)).astype(np.float32)
    return content


def write_rlds(
    folder: Path,
    name: str,
    features: dict,
    episodes: Sequence[Mapping[str, Values]],
    shards: int = 1,
    split: str = "train",
    files: Sequence[str] | None = None,
) -> Path:
    """`folder` (called <name>/<version> by TFDS) with `episodes`, given as `made_steps` gives them, dealt to shards.

    Args:
        features: key of a step → its leaf of features.json.
        files: the HDF5 file each episode came from, its `episode_metadata/file_path`.
    """
    folder.mkdir(parents=True)
    parts = np.array_split(np.arange(len(episodes)), shards)
    for index, part in enumerate(parts):
        records = []
        for episode in part:
            values = {f"steps/{key}": content for key, content in episodes[episode].items()}
            if files is not None:
                values["episode_metadata/file_path"] = [files[episode].encode()]
            records.append(encode_example(values))
        write_records(folder / f"{name}-{split}.tfrecord-{index:05d}-of-{shards:05d}", records)
    top = {"steps": {"sequence": {"feature": _nested(features), "length": "-1"}}}
    top |= {} if files is None else {"episode_metadata": _nested({"file_path": TEXT})}
    (folder / "features.json").write_text(json.dumps({"featuresDict": {"features": top}}))
    splits = [{"name": split, "shardLengths": [str(len(part)) for part in parts]}]
    info = {"name": name, "version": folder.name, "fileFormat": "tfrecord", "splits": splits}
    (folder / "dataset_info.json").write_text(json.dumps(info))
    return folder


def read_all(folder: Path, cameras: tuple[str, ...] = ("static",), **options) -> list[Episode]:
    """Every episode of a data set; damage is raised. Options are rlds_parts'."""
    return [episode for part in rlds_parts(folder, cameras, **options) for episode in part.read(None)]


def _nested(features: dict) -> dict:
    """{"a/b": leaf} as features.json nests it."""
    tree: dict = {}
    for key, leaf in features.items():
        *path, last = key.split("/")
        node = tree
        for part in path:
            node = node.setdefault(part, {"featuresDict": {"features": {}}})["featuresDict"]["features"]
        node[last] = leaf
    return {"featuresDict": {"features": tree}}
