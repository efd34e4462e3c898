"""Simulators that start while the policy is still being read: both take seconds, and neither needs the other.

    with early_workers(cfg, config) as workers:
        policy = load_policy(...)
        run_rollouts(policy, ..., early=workers)

What is started is a guess, from the configuration and the policy directory's config.json. A worker that guessed wrong
builds its environment again when it gets its first episode, and one that nobody asks for is ended.
"""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

from envs.episodes import interpreter, simulator
from envs.pool import Worker, choose
from vla.config import EvaluateConfig


@contextmanager
def early_workers(cfg: EvaluateConfig, config: dict | None) -> Iterator[list[Worker]]:
    """Workers that build the environments of the first episodes; they are ended when the context is left.

    Args:
        config: of the policy directory; None where it is not known, and then nothing is started.

    Raises:
        UserError: as `envs.episodes.simulator`.
    """
    workers: list[Worker] = []
    if config is None or "about" not in config or "cameras" not in config["arguments"]:
        yield workers
        return
    known = SimpleNamespace(cameras=config["arguments"]["cameras"])
    factory, shared, episodes = simulator(cfg, known, config["about"])
    with tempfile.TemporaryDirectory() as folder:
        try:
            pending = list(episodes)
            for index in range(min(cfg.evaluation.workers, len(episodes))):
                workers.append(Worker(str(interpreter(cfg) or sys.executable), Path(folder) / f"worker_{index}.log"))
                spec = choose(pending, workers[-1], workers)
                pending.remove(spec)
                workers[-1].prepare(factory, spec.kwargs, shared | spec.kwargs)
            yield workers
        finally:
            for worker in workers:
                worker.kill()
