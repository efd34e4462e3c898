"""Episodes to write, and a LeRobot data set made with pandas and Pillow as the Hub's look, not by our writer."""

from __future__ import annotations

import io
import json
from pathlib import Path

import numpy as np
import pandas as pd
from PIL import Image

from data.episode import Episode, Window


def episode(
    seed: int, steps: int, sizes: dict[str, tuple[int, int]], windows: tuple[Window, ...] | None = None
) -> Episode:
    rng = np.random.default_rng(seed)
    gripper = rng.integers(0, 2, (steps, 1))
    return Episode(
        instruction=f"put it on plate {seed % 2}",
        frames={c: rng.integers(0, 256, (steps, *size, 3), np.uint8) for c, size in sizes.items()},
        state=rng.normal(size=(steps, 8)).astype(np.float32),
        actions=np.hstack([rng.uniform(-1, 1, (steps, 6)), gripper]).astype(np.float32),
        task=f"KITCHEN_SCENE3_plate_{seed % 2}",
        source=f"made.hdf5:demo_{seed}",
        windows=windows,
    )


def parts_of(made: Episode) -> list[tuple[Window, Episode]]:
    """What a writer should make of an episode: one for each window."""
    parts = []
    for w in made.described():
        cut = slice(w.start, w.start + w.length)
        frames = {camera: pixels[cut] for camera, pixels in made.frames.items()}
        parts.append((w, Episode(w.instruction, frames, made.state[cut], made.actions[cut], w.task, made.source)))
    return parts


INFO = {"dtype": "image", "shape": [6, 5, 3], "names": ["height", "width", "channel"], "fps": 10}


def hub_like(root: Path, lengths: tuple[int, ...] = (4, 3, 5), bytes_inside: bool = True) -> dict[str, np.ndarray]:
    """A data set with the feature names of HuggingFaceVLA/libero, an episode a file; returns what is in it, by step."""
    rng = np.random.default_rng(1)
    total = sum(lengths)
    content = {
        "observation.images.image": rng.integers(0, 256, (total, 6, 5, 3), np.uint8),
        "observation.images.image2": rng.integers(0, 256, (total, 6, 5, 3), np.uint8),
        "observation.state": rng.normal(size=(total, 8)).astype(np.float32),
        "action": rng.uniform(-1, 1, (total, 7)).astype(np.float32),
    }
    content["action"][:, 6] = np.where(rng.integers(0, 2, total), 1, -1)
    (root / "meta/episodes/chunk-000").mkdir(parents=True)
    rows, start = [], 0
    for index, length in enumerate(lengths):
        steps = range(start, start + length)
        table = {name: list(values[start : start + length]) for name, values in content.items()}
        for name in ("observation.images.image", "observation.images.image2"):
            table[name] = [_stored(root, f"{name}-{step}.png", content[name][step], bytes_inside) for step in steps]
        table |= {"timestamp": np.float32(np.arange(length) / 10), "frame_index": np.arange(length)}
        table |= {"episode_index": [index] * length, "index": list(steps), "task_index": [index % 2] * length}
        path = root / f"data/chunk-000/file-{index:03d}.parquet"
        path.parent.mkdir(parents=True, exist_ok=True)
        pd.DataFrame(table).to_parquet(path)
        row = {"episode_index": index, "tasks": [f"task {index % 2}"], "length": length}
        row |= {"data/chunk_index": 0, "data/file_index": index, "stats/action/mean": [0.0] * 7}
        rows.append(row | {"dataset_from_index": start, "dataset_to_index": start + length})
        start += length
    pd.DataFrame(rows).to_parquet(root / "meta/episodes/chunk-000/file-000.parquet")
    pd.DataFrame({"task_index": [0, 1]}, index=["task 0", "task 1"]).to_parquet(root / "meta/tasks.parquet")
    info = {
        "codebase_version": "v3.0", "robot_type": "panda", "total_episodes": len(lengths), "total_frames": total,
        "total_tasks": 2, "chunks_size": 1000, "fps": 10.0, "splits": {"train": f"0:{len(lengths)}"},
        "data_path": "data/chunk-{chunk_index:03d}/file-{file_index:03d}.parquet", "video_path": None,
        "features": {
            "observation.images.image": INFO, "observation.images.image2": INFO,
            "observation.state": {"dtype": "float32", "shape": [8], "names": ["state"]},
            "action": {"dtype": "float32", "shape": [7], "names": ["actions"]},
        },
    }  # fmt: skip
    (root / "meta/info.json").write_text(json.dumps(info))
    return content


def _stored(root: Path, name: str, pixels: np.ndarray, inside: bool) -> dict:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, format="PNG")
    if inside:
        return {"bytes": buffer.getvalue(), "path": name}
    (root / "images").mkdir(exist_ok=True)
    (root / "images" / name).write_bytes(buffer.getvalue())
    return {"bytes": None, "path": f"images/{name}"}
