"""Convert demonstrations of a real format into the frame store that training reads.

    python scripts/convert.py benchmark=libero_goal data.path=datasets/libero_goal

train.py does the same the first time it meets a folder; this chooses the place, and shows what is in it.
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from vla.cli import main
from vla.config import ConvertConfig


@main("convert")
def run(cfg: ConvertConfig) -> None:
    from data.source import open_source

    store = open_source(cfg.benchmark, cfg.data, Path(cfg.out) if cfg.out else None, cfg.pairing)
    meta = store.meta
    instructions = sorted({window["instruction"] for window in store.windows})
    counts = f"{meta.episodes} episodes, {meta.steps} steps, {meta.frames} of them with frames"
    print(f"{store.path}: {counts}, cameras {meta.cameras}, {meta.encoding}")
    for instruction in instructions:
        print(f"  {sum(w['instruction'] == instruction for w in store.windows):5d} × {instruction}")
    print("  actions q01", [round(x, 3) for x in meta.statistics["q01"]])
    print("  actions q99", [round(x, 3) for x in meta.statistics["q99"]])


if __name__ == "__main__":
    run()
