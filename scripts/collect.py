"""Collect demonstrations with a scripted expert, in the real simulator and the benchmark's official file layout.

    python scripts/collect.py benchmark=libero_goal benchmark.tasks=[8] demos=40

Only successful episodes are kept; the same call again keeps what is there.
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from vla.cli import main
from vla.config import CollectConfig


@main("collect")
def run(cfg: CollectConfig) -> None:
    benchmark = cfg.benchmark
    if benchmark.family == "calvin":
        from envs.calvin_collection import collect_calvin

        cameras, seed = tuple(benchmark.cameras), cfg.seed
        for folder in collect_calvin(Path(cfg.out), cfg.demos, cameras, benchmark.renderer, seed, cfg.workers):
            print(folder)
        return
    from envs.collection import collect
    from envs.experts import SOLVED

    tasks = benchmark.tasks if benchmark.tasks is not None else list(SOLVED.get(benchmark.suite, ()))
    files = collect(
        benchmark.suite,
        tasks,
        cfg.demos,
        Path(cfg.out),
        cameras=tuple(benchmark.cameras),
        resolution=benchmark.resolution,
        init_pool=cfg.init_pool,
        start_displacement=benchmark.start_displacement,
        noise=cfg.noise,
        seed=cfg.seed,
        frame_every=cfg.frame_every,
        workers=cfg.workers,
    )
    for file in files:
        print(file)


if __name__ == "__main__":
    run()
