"""From `data.path` to a frame store: a store is opened, a folder of a real format is converted once and kept.

The converted store lies under $VLA_DATA/stores (datasets/stores by default), named by what it was made of: the files'
names, sizes and times, and the reader's options. Another camera or orientation is therefore another store.

A format is a class below: what files stand for the data, what decides how they are read, and the units of a conversion.
Adding one: such a class, and a line in `source_of`. Readers are imported when they are needed: a run asks first whether
its data are there.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from data.libero import instruction_of, suites_of
from vla.config import BenchmarkConfig, DataConfig
from vla.errors import UserError

if TYPE_CHECKING:
    from data.episode import Episode
    from data.frame_store import FrameStore
    from data.lerobot import Reading
    from data.store_writer import Unit


class Source(Protocol):
    """A folder of one format, read for one benchmark."""

    files: list[Path]
    """What stands for the data: looked for at once, and their change makes another store."""
    options: dict
    """JSON-able: everything that decides how the files are read; kept in the store's meta."""

    def units(self, cameras: tuple[str, ...]) -> list[Unit]:
        """The parts of a conversion."""


def open_source(
    benchmark: BenchmarkConfig,
    data: DataConfig,
    out: Path | None = None,
    pairing: str = "aligned",
    cameras: list[str] | None = None,
    reading: Reading | None = None,
) -> FrameStore:
    """The frame store of `data.path`, converted first where it is a folder of a real format.

    Args:
        out: where a converted store goes; by default a place derived from its content.
        pairing: see data/libero.py.
        cameras: those needed; a store with all of `benchmark.cameras` serves where there is one, otherwise one with
            these alone is made. Default: all of the benchmark's.
        reading: what a LeRobot data set does not say about itself, see data/lerobot.py.

    Raises:
        UserError: nothing at data.path, no episodes in it, or files that cannot be read (each named).
    """
    from data.frame_store import VERSION, FrameStore
    from data.store_writer import convert

    path = Path(data.path)
    if is_store(path):
        return FrameStore(path)
    if data.bad_files not in ("raise", "skip"):
        raise UserError(f"data.bad_files={data.bad_files} is not known; choose raise or skip")
    source = source_of(benchmark, data, pairing, reading)

    def place(of: list[str]) -> Path:
        facts = source.options | {"cameras": list(of), "encoding": data.encoding, "version": VERSION}
        return stores_root() / f"{path.resolve().name}-{fingerprint(source.files, facts, data.bad_files == 'skip')}"

    whole, wanted = list(benchmark.cameras), list(cameras or benchmark.cameras)
    if out is None:
        out = place(whole) if set(wanted) <= set(whole) and is_store(place(whole)) else place(wanted)
    if not is_store(out):
        options = source.options | {"cameras": wanted}
        convert(source.units(tuple(wanted)), out, options, data.encoding, data.workers, data.bad_files == "skip")
    return FrameStore(out)


def require_source(benchmark: BenchmarkConfig, data: DataConfig) -> None:
    """UserError when there is nothing at data.path to open; imports no torch, so a run can ask it first."""
    if not is_store(Path(data.path)):
        source_of(benchmark, data)


def is_store(path: Path) -> bool:
    return (path / "meta.json").exists()


def stores_root() -> Path:
    return Path(os.environ.get("VLA_DATA", "datasets")) / "stores"


def source_of(
    benchmark: BenchmarkConfig, data: DataConfig, pairing: str = "aligned", reading: Reading | None = None
) -> Source:
    """The format of `data.path`, by what lies there.

    Raises:
        UserError: nothing there, or nothing that this benchmark's readers know.
    """
    path = Path(data.path)
    if not path.exists():
        raise UserError(f"no data at {path}; {hint(benchmark)}")
    if (path / "meta").is_dir():
        return LeRobot(benchmark, data, reading)
    if reading is not None and (reading.gripper or reading.orientation or reading.keys):
        raise UserError(f"{data.path} is no LeRobot data set; gripper=, orientation= and keys= are for those alone")
    if benchmark.family == "calvin":
        return Calvin(data)
    if (path / "dataset_info.json").exists() or any(path.glob("*/dataset_info.json")):
        return Rlds(benchmark, data)
    if benchmark.family == "libero":
        return Libero(benchmark, data, pairing)
    raise UserError(f"{path} is of no format that {benchmark.name} is read from (RLDS, LeRobot v3); set data.path")


def hint(benchmark: BenchmarkConfig) -> str:
    if benchmark.family == "simpler":
        return f"download {benchmark.folder} (RLDS or LeRobot v3), or set data.path=FOLDER"
    return (
        f"collect demonstrations with `python scripts/collect.py benchmark={benchmark.name}`, or set data.path=FOLDER"
    )


class Libero:
    """LIBERO's official HDF5 files (data/libero.py)."""

    def __init__(self, benchmark: BenchmarkConfig, data: DataConfig, pairing: str):
        path, suites = Path(data.path), suites_of(benchmark.suite)
        folders = [path / suite for suite in suites] if len(suites) > 1 else [path]
        files = [path] if path.is_file() else [file for folder in folders for file in sorted(folder.glob("*.hdf5"))]
        if (wanted := chosen_tasks(benchmark)) is not None:
            files = [file for file in files if file.stem in {f"{task}_demo" for task in wanted}]
        if not files:
            tasks = "" if benchmark.tasks is None else f" for benchmark.tasks={benchmark.tasks}"
            raise UserError(f"{path} holds no *.hdf5 demonstrations{tasks}; {hint(benchmark)}")
        self.files = files
        self.options = {"family": "libero", "image_rotation": data.image_rotation, "pairing": pairing}
        if data.drop_noops:
            self.options["drop_noops"] = True

    def units(self, cameras: tuple[str, ...]) -> list[Unit]:
        rotation, pairing = self.options["image_rotation"], self.options["pairing"]
        return [LiberoFile(file, cameras, rotation, pairing, "drop_noops" in self.options) for file in self.files]


class Calvin:
    """CALVIN's official frame files (data/calvin.py)."""

    def __init__(self, data: DataConfig):
        path = Path(data.path)
        split = path / data.split if (path / data.split).is_dir() else path
        self.files = [split / "ep_start_end_ids.npy", split / data.language / "auto_lang_ann.npy"]
        self.options = {"family": "calvin", "margin": data.margin, "language": data.language}

    def units(self, cameras: tuple[str, ...]) -> list[Unit]:
        from data.calvin import CalvinSplit

        return CalvinSplit(self.files[0].parent, self.options["language"]).parts(cameras, self.options["margin"])


class LeRobot:
    """A LeRobot v3 data set (data/lerobot.py)."""

    def __init__(self, benchmark: BenchmarkConfig, data: DataConfig, reading: Reading | None):
        from data.lerobot import Reading
        from data.lerobot_meta import lerobot_files

        self.path, self.reading = Path(data.path), reading or Reading()
        self.files = lerobot_files(self.path)
        self.instructions = instructions_of(benchmark)
        self.rotation = data.image_rotation if benchmark.family == "libero" else None
        self.options = {"family": benchmark.family, "format": "lerobot", "reading": asdict(self.reading)}
        self.options["instructions"] = self.instructions
        if self.rotation:
            self.options["image_rotation"] = self.rotation

    def units(self, cameras: tuple[str, ...]) -> list[Unit]:
        from data.lerobot import lerobot_parts

        return lerobot_parts(self.path, cameras, self.reading, self.rotation, self.instructions)


class Rlds:
    """A TFDS-prepared RLDS data set (data/rlds.py), which fixes orientation and pairing itself."""

    def __init__(self, benchmark: BenchmarkConfig, data: DataConfig):
        from data.oxe import LIBERO
        from data.rlds import rlds_parts

        path = Path(data.path)
        parts = rlds_parts(path, ())
        libero = parts[0].kind is LIBERO
        if libero != (benchmark.family == "libero"):
            raise UserError(f"{path} is not {benchmark.name}'s robot: set data.path or benchmark")
        if libero and data.image_rotation != "rotate180":
            raise UserError(f"{path} holds rotated frames; set data.image_rotation=rotate180")
        self.files, self.drop_noops = [part.path for part in parts], data.drop_noops
        self.instructions = instructions_of(benchmark)
        self.options = {"family": benchmark.family, "format": "rlds", "instructions": self.instructions}
        self.options |= {"drop_noops": data.drop_noops} | ({"image_rotation": "rotate180"} if libero else {})

    def units(self, cameras: tuple[str, ...]) -> list[Unit]:
        from data.rlds import rlds_parts

        folder = self.files[0].parent
        return rlds_parts(folder, cameras, drop_noops=self.drop_noops, instructions=self.instructions)


def chosen_tasks(benchmark: BenchmarkConfig) -> list[str] | None:
    """The names of benchmark.tasks, numbered through the benchmark's suites; None for all."""
    if benchmark.tasks is None:
        return None
    from envs.libero_files import task_list

    names = [name for name, _ in task_list(benchmark.suite)]
    return [names[task] for task in benchmark.tasks]


def instructions_of(benchmark: BenchmarkConfig) -> tuple[str, ...] | None:
    """What the chosen tasks are told, for formats that know instructions only."""
    tasks = chosen_tasks(benchmark)
    return None if tasks is None else tuple(instruction_of(task) for task in tasks)


def fingerprint(files: list[Path], options: dict, skip: bool = False) -> str:
    """What tells one conversion from another; UserError where a file is missing, unless that may be skipped."""
    missing = [file for file in files if not file.exists()]
    if missing and not skip:
        raise UserError(f"{missing[0]} is missing; set data.path to the folder that holds it")
    facts = [(file.name, file.stat().st_size, file.stat().st_mtime_ns) for file in files if file not in missing]
    return hashlib.sha256(json.dumps([facts, options], sort_keys=True).encode()).hexdigest()[:10]


@dataclass(frozen=True)
class LiberoFile:
    """One HDF5 file of demonstrations as a unit of conversion."""

    path: Path
    cameras: tuple[str, ...]
    image_rotation: str
    pairing: str
    drop_noops: bool = False

    @property
    def name(self) -> str:
        return self.path.name

    def read(self, skipped: list[str] | None) -> Iterator[Episode]:
        from data.libero import read_libero
        from data.noops import without_noops

        episodes = read_libero(self.path, self.cameras, self.image_rotation, self.pairing, skipped)
        return map(without_noops, episodes) if self.drop_noops else episodes
