"""For the tests of SimplerEnv: whether its simulators are here, and the action that does nothing."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path

import numpy as np
import pytest

from envs.simpler.maniskill3 import asset_folder
from vla.errors import UserError

ROOT = Path(__file__).resolve().parent.parent
PYTHON = ROOT / ".venv-simpler/bin/python"
NOTHING = np.array([0, 0, 0, 0, 0, 0, 1.0])


def absent() -> str:
    """Why there is no simulator here, or nothing."""
    try:
        asset_folder()
    except UserError as error:
        return str(error)
    return ""


sim = pytest.mark.skipif(bool(absent()), reason=absent() or "the simulator is here")


def asset_path(name: str) -> Path:
    """Of the original simulator's data folder."""
    data = os.environ.get("MS2_REAL2SIM_ASSET_DIR") or ROOT / ".venv-simpler/src/ManiSkill2_real2sim/data"
    return Path(data) / name


def original_absent() -> str:
    """Why the original simulator is not here, or nothing; whether it can draw is found out by the tests."""
    if not PYTHON.exists():
        return f"{PYTHON} is not there: make simpler-original"
    if not asset_path("custom/info_pick_custom_v0.json").exists():
        return f"{asset_path('')} is not ManiSkill2_real2sim's data folder: set MS2_REAL2SIM_ASSET_DIR"
    return ""


original = pytest.mark.skipif(bool(original_absent()), reason=original_absent() or "the simulator is here")


def ask_original(place: Path, name: str, **arguments) -> dict[str, np.ndarray]:
    """What the function `name` of tests/simpler_original_run.py returns, run in the simulator's interpreter."""
    out = place / f"{name}_{len(list(place.glob('*.npz')))}.npz"
    command = [PYTHON, "-W", "ignore", "-m", "tests.simpler_original_run", name, out, json.dumps(arguments)]
    done = subprocess.run(
        command, capture_output=True, text=True, cwd=ROOT, env={**os.environ, "PYTHONPATH": str(ROOT)}
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return dict(np.load(out))
