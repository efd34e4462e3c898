"""From `data.path` to a frame store: a store is opened, a folder of a real format is converted once and kept.

The converted store lies under $VLA_DATA/stores (datasets/stores by default), named by what it was made of: the files'
names, sizes and times, and the reader's options. Another camera or orientation is therefore another store.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from data.lerobot import Reading, lerobot_parts
from data.lerobot_meta import is_lerobot, lerobot_files
from data.libero import instruction_of, suites_of
from vla.config import BenchmarkConfig, DataConfig
from vla.errors import UserError

if TYPE_CHECKING:
    from data.episode import Episode
    from data.frame_store import FrameStore
    from data.store_writer import Unit


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
    files = source_files(benchmark, data)
    options = reader_options(benchmark, data, pairing, reading)

    def place(of: list[str]) -> Path:
        facts = options | {"cameras": list(of), "encoding": data.encoding, "version": VERSION}
        return stores_root() / f"{path.resolve().name}-{fingerprint(files, facts)}"

    whole, wanted = list(benchmark.cameras), list(cameras or benchmark.cameras)
    if out is None:
        out = place(whole) if set(wanted) <= set(whole) and is_store(place(whole)) else place(wanted)
    if not is_store(out):
        units = units_of(files, options, tuple(wanted))
        convert(units, out, options | {"cameras": wanted}, data.encoding, data.workers, data.bad_files == "skip")
    return FrameStore(out)


def require_source(benchmark: BenchmarkConfig, data: DataConfig) -> None:
    """UserError when there is nothing at data.path to open; takes no heavy import, so a run can ask it first."""
    if not is_store(Path(data.path)):
        source_files(benchmark, data)


def is_store(path: Path) -> bool:
    return (path / "meta.json").exists()


def stores_root() -> Path:
    return Path(os.environ.get("VLA_DATA", "datasets")) / "stores"


def reader_options(benchmark: BenchmarkConfig, data: DataConfig, pairing: str, reading: Reading | None = None) -> dict:
    """What decides how the benchmark family's files are read; kept in the store's meta."""
    reading = reading or Reading()
    if is_lerobot(Path(data.path)):
        tasks = chosen_tasks(benchmark)
        options = {"family": benchmark.family, "format": "lerobot", "reading": asdict(reading)}
        options["instructions"] = None if tasks is None else [instruction_of(task) for task in tasks]
        return options | ({"image_rotation": data.image_rotation} if benchmark.family == "libero" else {})
    if reading != Reading():
        raise UserError(f"{data.path} is no LeRobot data set; gripper=, orientation= and keys= are for those alone")
    if benchmark.family == "calvin":
        return {"family": "calvin", "margin": data.margin, "language": data.language}
    if benchmark.family == "libero":
        return {"family": "libero", "image_rotation": data.image_rotation, "pairing": pairing}
    raise UserError(f"benchmark.family={benchmark.family} has no reader; known: libero, calvin")


def source_files(benchmark: BenchmarkConfig, data: DataConfig) -> list[Path]:
    """The files under data.path that stand for the data: they are looked for now, and their change is another store."""
    path = Path(data.path)
    hint = (
        f"collect demonstrations with `python scripts/collect.py benchmark={benchmark.name}`, or set data.path=FOLDER"
    )
    if not path.exists():
        raise UserError(f"no data at {path}; {hint}")
    if is_lerobot(path):
        return lerobot_files(path)
    if benchmark.family == "calvin":
        split = path / data.split if (path / data.split).is_dir() else path
        return [split / "ep_start_end_ids.npy", split / data.language / "auto_lang_ann.npy"]
    suites = suites_of(benchmark.suite)
    folders = [path / suite for suite in suites] if len(suites) > 1 else [path]
    files = [path] if path.is_file() else [file for folder in folders for file in sorted(folder.glob("*.hdf5"))]
    if (wanted := chosen_tasks(benchmark)) is not None:
        files = [file for file in files if file.stem in {f"{task}_demo" for task in wanted}]
    if not files:
        tasks = "" if benchmark.tasks is None else f" for benchmark.tasks={benchmark.tasks}"
        raise UserError(f"{path} holds no *.hdf5 demonstrations{tasks}; {hint}")
    return files


def chosen_tasks(benchmark: BenchmarkConfig) -> list[str] | None:
    """The names of benchmark.tasks, numbered through the benchmark's suites; None for all."""
    if benchmark.tasks is None:
        return None
    from envs.libero import task_list

    names = [name for suite in suites_of(benchmark.suite) for name, _ in task_list(suite)]
    return [names[task] for task in benchmark.tasks]


def units_of(files: list[Path], options: dict, cameras: tuple[str, ...]) -> list[Unit]:
    """The parts of a conversion."""
    if options.get("format") == "lerobot":
        instructions = options["instructions"] and tuple(options["instructions"])
        reading = Reading(**options["reading"])
        return lerobot_parts(files[0].parents[1], cameras, reading, options.get("image_rotation"), instructions)
    if options["family"] == "calvin":
        from data.calvin import CalvinSplit

        return CalvinSplit(files[0].parent, options["language"]).parts(cameras, options["margin"])
    return [LiberoFile(file, cameras, options["image_rotation"], options["pairing"]) for file in files]


def fingerprint(files: list[Path], options: dict) -> str:
    if missing := [file for file in files if not file.exists()]:
        raise UserError(f"{missing[0]} is missing; set data.path to the folder that holds it")
    facts = [(file.name, file.stat().st_size, file.stat().st_mtime_ns) for file in files]
    return hashlib.sha256(json.dumps([facts, options], sort_keys=True).encode()).hexdigest()[:10]


@dataclass(frozen=True)
class LiberoFile:
    """One HDF5 file of demonstrations as a unit of conversion."""

    path: Path
    cameras: tuple[str, ...]
    image_rotation: str
    pairing: str

    @property
    def name(self) -> str:
        return self.path.name

    def read(self, skipped: list[str] | None) -> Iterator[Episode]:
        from data.libero import read_libero

        return read_libero(self.path, self.cameras, image_rotation=self.image_rotation, pairing=self.pairing)
