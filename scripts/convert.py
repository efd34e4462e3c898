"""Convert demonstrations of a real format into the frame store that training reads, or into a LeRobot v3 data set.

    python scripts/convert.py benchmark=libero_goal data.path=datasets/libero_goal
    python scripts/convert.py benchmark=libero_goal data.path=datasets/libero_goal to=lerobot out=datasets/goal_v3
    python scripts/convert.py benchmark=libero_goal to=llava out=datasets/vl/own    # questions, to rehearse co-training

train.py makes the store the first time it meets a folder; this chooses the place, and shows what is in it.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from vla.cli import main
from vla.config import ConvertConfig
from vla.errors import UserError

if TYPE_CHECKING:
    from data.lerobot import Reading


@main("convert")
def run(cfg: ConvertConfig) -> None:
    from data.lerobot import Reading
    from data.source import open_source

    keys = {camera: feature for camera, feature in cfg.keys.items() if feature}
    reading = Reading(cfg.gripper, cfg.orientation, keys)
    if cfg.to == "lerobot":
        write_lerobot(cfg, reading)
        return
    if cfg.to == "llava":
        write_questions(cfg, reading)
        return
    if cfg.to != "store":
        raise UserError(f"to={cfg.to} is not known; choose store, lerobot or llava")
    store = open_source(cfg.benchmark, cfg.data, Path(cfg.out) if cfg.out else None, cfg.pairing, reading=reading)
    meta = store.meta
    instructions = sorted({window["instruction"] for window in store.windows})
    counts = f"{meta.episodes} episodes, {meta.steps} steps, {meta.frames} of them with frames"
    print(f"{store.path}: {counts}, cameras {meta.cameras}, {meta.encoding}")
    for instruction in instructions:
        print(f"  {sum(w['instruction'] == instruction for w in store.windows):5d} × {instruction}")
    print("  actions q01", [round(x, 3) for x in meta.statistics["q01"]])
    print("  actions q99", [round(x, 3) for x in meta.statistics["q99"]])


def write_questions(cfg: ConvertConfig, reading: Reading) -> None:
    from data.llava_writer import write_llava
    from data.source import open_source

    if not cfg.out:
        raise UserError("to=llava needs a place: out=DIR")
    store = open_source(cfg.benchmark, cfg.data, None, cfg.pairing, reading=reading)
    count = write_llava(store, Path(cfg.out), cfg.count)
    print(f"{cfg.out}: {count} questions about frames of {store.path}, for cotrain.sets")


def write_lerobot(cfg: ConvertConfig, reading: Reading) -> None:
    from data import lerobot_writer as lerobot
    from data.lerobot_meta import is_lerobot, read_info
    from data.source import is_store, source_of

    if not cfg.out:
        raise UserError("to=lerobot needs a place: out=DIR")
    path, family = Path(cfg.data.path), cfg.benchmark.family
    if is_store(path):
        raise UserError(f"{path} is a frame store; give the folder it was made from")
    source = source_of(cfg.benchmark, cfg.data, cfg.pairing, reading)
    if not is_lerobot(path) and family not in lerobot.FPS:
        raise UserError(f"the control rate of {family} is not known; add it to FPS in data/lerobot_writer.py")
    skipped: list[str] | None = [] if cfg.data.bad_files == "skip" else None
    info = lerobot.write_lerobot(
        lerobot.read_units(source.units(tuple(cfg.benchmark.cameras)), skipped),
        Path(cfg.out),
        fps=round(read_info(path)["fps"]) if is_lerobot(path) else lerobot.FPS[family],
        video=cfg.video,
        gripper=lerobot.GRIPPER.get(family, "open1"),
        orientation=source.options.get("image_rotation"),
        state_names=lerobot.STATE_NAMES.get(family),
    )
    for message in skipped or ():
        print(f"skipped: {message}")
    counts = f"{info['total_episodes']} episodes, {info['total_frames']} steps, {info['total_tasks']} instructions"
    print(f"{cfg.out}: LeRobot {info['codebase_version']}, {counts}, {', '.join(info['features'])}")


if __name__ == "__main__":
    run()
