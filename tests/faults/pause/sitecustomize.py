"""On PYTHONPATH: training steps and episodes take longer in the first PAUSE_LIVES (1) starts of a Slurm job.

So that a run of a tiny policy is still at work when Slurm gets round to its limits (it looks every 30 s), without
keeping a processor busy, and changes nothing that is computed. And evaluate.py rolls out in tests/fake_env.py.
"""

import importlib.abc
import importlib.util
import os
import sys
import time

EPISODES = 8


def pause() -> float:
    """Seconds, of a step."""
    first = int(os.environ.get("SLURM_RESTART_COUNT", 0)) < int(os.environ.get("PAUSE_LIVES", 1))
    return float(os.environ.get("PAUSE_S", 0)) if first else 0.0


def slow_training(module) -> None:
    step = module.VLAModule.training_step

    def slow_step(*arguments):
        time.sleep(pause())
        return step(*arguments)

    module.VLAModule.training_step = slow_step


def fake_simulator(module) -> None:
    specs = [module.EpisodeSpec("fake", "task", seed) for seed in range(EPISODES)]
    module.simulator = lambda cfg, policy, about: ("slow_env:make", {}, specs)


PATCHES = {"vla.module": slow_training, "envs.episodes": fake_simulator}


class Patch(importlib.abc.MetaPathFinder):
    """Changes a module of PATCHES once it is imported."""

    def find_spec(self, name, path, target=None):
        if name not in PATCHES:
            return None
        patch = PATCHES.pop(name)
        spec = importlib.util.find_spec(name)
        execute = spec.loader.exec_module

        def exec_module(module):
            execute(module)
            patch(module)

        spec.loader.exec_module = exec_module
        return spec


sys.meta_path.insert(0, Patch())
