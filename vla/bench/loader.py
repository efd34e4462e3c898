"""Samples/s from the frame store against reading CALVIN's npz files and HDF5 directly: the same samples, interleaved.

A sample is (o_t, o_{t+10}, a_{t:t+10}) with two cameras. Read from the files, it costs a decompression per frame: the
public loaders load all eleven frames of the window; a frugal one would take only the images of the two it needs. Both
are measured. Both sides read from the page cache, as they do after the first epoch on a machine with memory enough; on
a cold or a network disk the files' side is slower by what eleven small reads cost against two.

The HDF5 file holds the same frames as the official LIBERO files hold theirs, uncompressed, and stays open. "Bare
gather" is what no loader can beat: the samples' frames copied from one array in memory into fresh ones, nothing else.
"""

from __future__ import annotations

import statistics
import tempfile
import time
from pathlib import Path

import h5py
import numpy as np
from rich.progress import Progress
from rich.table import Table

from data.calvin import CalvinSplit, read_frame
from data.frame_store import FrameStore
from data.sampler import PairDataset
from data.store_writer import convert
from vla.bench.latency import describe

HORIZON, BATCH = 10, 32
CAMERAS = ("static", "wrist")
IMAGES = {"rgb_static": (200, 200, 3), "rgb_gripper": (84, 84, 3)}
LOW = {"rel_actions": (7,), "robot_obs": (15,)}
WHOLE, NEEDED = "npz, the whole window (as the public loaders)", "npz, only what the sample needs"
HDF5_WHOLE, HDF5_NEEDED, BARE = (
    "HDF5, the whole window",
    "HDF5, only what the sample needs",
    "bare gather of the frames",
)
TARGETS = {WHOLE: 20.0, HDF5_WHOLE: 10.0, BARE: 0.9}
"""Times as fast as these that the store is to be."""


def measure(data: Path | None, batches: int, rounds: int) -> dict:
    """Medians over `rounds` of `batches` batches each way.

    Args:
        data: a CALVIN split; None makes frames of the real sizes that compress like the real ones.
    """
    with tempfile.TemporaryDirectory() as folder:
        split = data or synthetic_split(Path(folder) / "training")
        store_path = Path(folder) / "store"
        convert(CalvinSplit(split).parts(CAMERAS, HORIZON), store_path, {})
        dataset = PairDataset(FrameStore(store_path), HORIZON, list(CAMERAS), "separate", "whole")
        files = CalvinSplit(split)
        frame_of = frame_numbers(dataset.store)
        rng = np.random.default_rng(0)
        draws = [rng.integers(0, len(dataset), BATCH) for _ in range(batches)]
        steps = np.arange(len(dataset.store))
        arrays = {camera: dataset.store.frames(camera, steps) for camera in CAMERAS}
        hdf5 = as_hdf5(Path(folder) / "demo.hdf5", arrays, dataset.store.actions)
        ways = {
            "frame store": lambda rows: dataset.__getitems__(rows),
            WHOLE: lambda rows: direct(files, dataset, frame_of, rows, True),
            NEEDED: lambda rows: direct(files, dataset, frame_of, rows, False),
            HDF5_WHOLE: lambda rows: from_hdf5(hdf5, dataset, rows, True),
            HDF5_NEEDED: lambda rows: from_hdf5(hdf5, dataset, rows, False),
            BARE: lambda rows: gather(arrays, dataset, rows),
        }
        same = agree(ways, draws[0])
        seconds: dict[str, list[float]] = {name: [] for name in ways}
        with Progress(transient=True) as progress:
            task = progress.add_task("measuring", total=rounds * len(ways))
            for _ in range(rounds):
                for name, way in ways.items():
                    start = time.perf_counter()
                    for rows in draws:
                        way(rows)
                    seconds[name].append(time.perf_counter() - start)
                    progress.advance(task)
        hdf5.close()
        kilobytes = statistics.mean(f.stat().st_size for f in list(split.glob("*.npz"))[:100]) / 1000
    samples = batches * BATCH
    store = statistics.median(seconds["frame store"])
    rows = {
        name: {
            "samples_per_s": samples / statistics.median(times),
            "slowest": samples / max(times),
            "fastest": samples / min(times),
            "store_is_times": statistics.median(times) / store,
        }
        for name, times in seconds.items()
    }
    facts = {"samples": samples, "rounds": rounds, "kb_per_file": kilobytes, "samples_equal": same}
    for name, row in rows.items():
        row["target"] = TARGETS.get(name)
    return {"bench": "loader", "device": describe("cpu"), "rows": rows} | facts


def frame_numbers(store: FrameStore) -> np.ndarray:
    """Step of the store → number of its frame file."""
    numbers = np.empty(len(store), dtype=np.int64)
    for episode in store.episodes:
        first = int("".join(c for c in episode["source"].split("/")[-1] if c.isdigit()))
        numbers[episode["start"] : episode["start"] + episode["length"]] = first + np.arange(episode["length"])
    return numbers


def direct(split: CalvinSplit, dataset: PairDataset, frame_of: np.ndarray, rows: np.ndarray, whole: bool) -> dict:
    """The batch of `rows` from the frame files, one after the other."""
    shapes = {name: (None, None, 3) for name in IMAGES}
    pixels: dict[str, list] = {name: [] for name in IMAGES}
    future: dict[str, list] = {name: [] for name in IMAGES}
    actions, last = [], dataset.store.last_step
    for row in rows:
        step = dataset.steps[row]
        count = min(HORIZON, last[step] - step) + 1
        window = [
            read_frame(split.frame_file(frame_of[step + i]), LOW | (shapes if whole or i in (0, count - 1) else {}))
            for i in range(count)
        ]
        for name in IMAGES:
            pixels[name].append(window[0][name])
            future[name].append(window[-1][name])
        actions.append(np.stack([frame["rel_actions"] for frame in window[:HORIZON]]))
    return {
        "images": {name: np.stack(frames) for name, frames in pixels.items()},
        "future_images": {name: np.stack(frames) for name, frames in future.items()},
        "actions": np.stack(actions),
    }


def as_hdf5(path: Path, arrays: dict[str, np.ndarray], actions: np.ndarray) -> h5py.File:
    with h5py.File(path, "w") as file:
        for name, array in (arrays | {"actions": actions}).items():
            file[name] = array
    return h5py.File(path, "r")


def from_hdf5(file: h5py.File, dataset: PairDataset, rows: np.ndarray, whole: bool) -> dict:
    """The batch of `rows` from one open file, one sample after the other."""
    last = dataset.store.last_step
    now, future, actions = {c: [] for c in CAMERAS}, {c: [] for c in CAMERAS}, []
    for row in rows:
        step = dataset.steps[row]
        end = min(step + HORIZON, last[step])
        for camera in CAMERAS:
            frames = file[camera][step : end + 1] if whole else (file[camera][step], file[camera][end])
            now[camera].append(frames[0])
            future[camera].append(frames[-1])
        actions.append(file["actions"][step : step + HORIZON])
    stacked = [
        {name: np.stack(part[camera]) for camera, name in zip(CAMERAS, IMAGES, strict=True)} for part in (now, future)
    ]
    return {"images": stacked[0], "future_images": stacked[1], "actions": np.stack(actions)}


def gather(arrays: dict[str, np.ndarray], dataset: PairDataset, rows: np.ndarray) -> dict:
    """The frames of `rows` alone."""
    steps = dataset.steps[rows]
    future = np.minimum(steps + HORIZON, dataset.store.last_step[steps])
    named = dict(zip(IMAGES, arrays.values(), strict=True))
    return {
        "images": {name: array.take(steps, axis=0) for name, array in named.items()},
        "future_images": {name: array.take(future, axis=0) for name, array in named.items()},
    }


def agree(ways: dict, rows: np.ndarray) -> bool:
    """Whether all ways give the same images and motions."""
    store, *others = [way(rows) for way in ways.values()]
    for other in others:
        for key in ("images", "future_images"):
            for camera, name in zip(CAMERAS, IMAGES, strict=True):
                ours = store[key][camera].permute(0, 2, 3, 1).numpy()
                if not np.array_equal(ours, other[key][name]):
                    return False
        actions = other.get("actions")
        if actions is not None and not np.array_equal(store["actions"][..., :6], actions[..., :6].astype(np.float32)):
            return False
    return True


def synthetic_split(path: Path, frames: int = 600) -> Path:
    """Frames of the real layout and sizes: smooth shapes and a little noise, about 55 kB each as the rendered ones."""
    (path / "lang_annotations").mkdir(parents=True)
    rng = np.random.default_rng(0)
    coarse = {name: rng.integers(0, 200, (shape[0] // 4, shape[1] // 4, 3)) for name, shape in IMAGES.items()}
    for index in range(frames):
        arrays = {name: rng.uniform(-1, 1, shape[0]) for name, shape in LOW.items()}
        arrays |= {"actions": arrays["rel_actions"], "scene_obs": np.zeros(24)}
        for name, image in coarse.items():
            fine = np.roll(image, index, axis=1).repeat(4, 0).repeat(4, 1)
            noisy = rng.random(fine.shape[:2])[..., None] < 0.25
            arrays[name] = (fine + noisy * rng.integers(0, 32, fine.shape)).astype(np.uint8)
        arrays["rel_actions"][6] = 1.0
        np.savez_compressed(path / f"episode_{index:07d}.npz", **arrays)
    np.save(path / "ep_start_end_ids.npy", np.array([(0, frames - 1)]))
    starts = range(0, frames - 64, 50)
    content = {
        "language": {"ann": ["push it"] * len(starts), "task": ["push"] * len(starts)},
        "info": {"episodes": [], "indx": [(start, start + 60) for start in starts]},
    }
    np.save(path / "lang_annotations" / "auto_lang_ann.npy", content)
    return path


def show(result: dict) -> Table:
    what = f"{result['rounds']} × {result['samples']} samples, window of {HORIZON}, two cameras"
    table = Table(
        title=f"{what}, {result['kb_per_file']:.0f} kB a file; {result['device']}",
        caption="the samples " + ("are equal" if result["samples_equal"] else "DIFFER"),
        title_justify="left",
        caption_justify="left",
    )
    table.add_column("read from")
    for column in ("samples/s (median)", "range", "the store is … times as fast", "target"):
        table.add_column(column, justify="right")
    for name, row in result["rows"].items():
        spread = f"{row['slowest']:.0f}–{row['fastest']:.0f}"
        target = "" if row["target"] is None else f"≥ {row['target']:g}"
        table.add_row(name, f"{row['samples_per_s']:.0f}", spread, f"{row['store_is_times']:.2f}", target)
    return table
