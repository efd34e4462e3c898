"""tests/fake_env.py, as slow as sitecustomize.py says."""

import os

from sitecustomize import pause

from tests.fake_env import FakeEnv


def make() -> FakeEnv:
    return FakeEnv(os.environ["JOURNAL"], step_seconds=pause())
