"""Read a whole data set, or a frame store, and say what of it is damaged.

    python scripts/check_data.py benchmark=libero_goal data.path=datasets/libero_goal
    python scripts/check_data.py data.path=datasets/stores/libero_goal-0123456789

Exit code 0: everything can be read. 1: something cannot; each file, episode or frame is named. 2: nothing to read.
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from vla.cli import main
from vla.config import CheckDataConfig

SHOWN = 50
"""Lines of what is damaged that are printed; all of them are counted."""


@main("check_data")
def run(cfg: CheckDataConfig) -> None:
    from rich.progress import track

    from data.audit import Audit, audit_source, audit_store, store_files
    from data.lerobot import Reading
    from data.source import is_store, source_of

    path, audit = Path(cfg.data.path), Audit()
    if is_store(path):
        total, running = len(store_files(path)), audit_store(path, audit)
    else:
        keys = {camera: feature for camera, feature in cfg.keys.items() if feature}
        source = source_of(cfg.benchmark, cfg.data, reading=Reading(cfg.gripper, cfg.orientation, keys))
        units = source.units(tuple(cfg.benchmark.cameras))
        total, running = len(units), audit_source(units, cfg.data.workers, audit)
    for _ in track(running, "reading", total=total, transient=True):
        pass
    show(path, audit)
    if audit.bad:
        sys.exit(1)


def show(path: Path, audit) -> None:
    counts = f"{audit.episodes} episodes, {audit.windows} windows, {audit.steps} steps, {audit.frames} with frames"
    print(f"{path}: {counts}\ncontent {audit.content}")
    for line in audit.notes:
        print(f"note: {line}")
    for line in audit.bad[:SHOWN]:
        print(f"bad: {line}")
    if len(audit.bad) > SHOWN:
        print(f"… and {len(audit.bad) - SHOWN} more")
    remedy = f"{len(audit.bad)} cannot be read; data.bad_files=skip leaves out what a conversion can do without"
    print(remedy if audit.bad else "all of it is whole")


if __name__ == "__main__":
    run()
