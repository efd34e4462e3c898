"""Fixtures that several test files share: small data made on the spot, tiny policies."""

from __future__ import annotations

import time
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, settings

from data.episode import Episode
from data.frame_store import FrameStore
from data.store_writer import write_store
from vla.cli import compose_config

torch.set_num_threads(1)  # more spin when tests run beside each other
BEGUN = time.monotonic()
settings.register_profile("any machine", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("any machine")  # a busy one is not an error; where CI is set, the examples are always the same


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--minutes", type=float, help="skip the tests that have not begun after so many minutes")


def pytest_runtest_setup(item: pytest.Item) -> None:
    minutes = item.config.getoption("minutes")
    if minutes is not None and time.monotonic() - BEGUN > 60 * minutes:
        pytest.skip(f"not begun within --minutes {minutes:g}")


def make_episodes(
    count: int = 4, length: int = 24, cameras=("static",), size: int = 32, seed: int = 0
) -> list[Episode]:
    """Random episodes whose frames and actions share no structure; good for plumbing, not for learning."""
    rng = np.random.default_rng(seed)
    episodes = []
    for index in range(count):
        steps = length + index
        motion = rng.uniform(-1, 1, (steps, 6))
        gripper = rng.integers(0, 2, (steps, 1))
        episodes.append(
            Episode(
                instruction="put the bowl on the plate" if index % 2 == 0 else "open it",
                frames={c: rng.integers(0, 256, (steps, size, size, 3), dtype=np.uint8) for c in cameras},
                state=rng.normal(size=(steps, 8)).astype(np.float32),
                actions=np.concatenate([motion, gripper], axis=1).astype(np.float32),
                task=f"task{index % 2}",
                source=f"made.hdf5:demo_{index}",
            )
        )
    return episodes


@pytest.fixture(scope="session")
def store(tmp_path_factory) -> FrameStore:
    path = tmp_path_factory.mktemp("data") / "store"
    write_store(make_episodes(), path, reader={"image_rotation": "rotate180"})
    return FrameStore(path)


def train_config(store_path: Path, run_root: Path, *overrides: str):
    """A run of seconds: tiny policy, few steps, single precision."""
    small = ("batch_size=4", "max_steps=6", "optim.warmup_steps=2", "trainer.log_every=1", "trainer.precision=32-true")
    return compose_config("train", f"data.path={store_path}", f"run_root={run_root}", *small, *overrides)
