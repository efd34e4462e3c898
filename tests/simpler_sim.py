"""For the tests of SimplerEnv's WidowX tasks: whether the simulator is here, and the action that does nothing."""

from __future__ import annotations

import numpy as np
import pytest

from envs.simpler.maniskill3 import asset_folder
from vla.errors import UserError

NOTHING = np.array([0, 0, 0, 0, 0, 0, 1.0])


def absent() -> str:
    """Why there is no simulator here, or nothing."""
    try:
        asset_folder()
    except UserError as error:
        return str(error)
    return ""


sim = pytest.mark.skipif(bool(absent()), reason=absent() or "the simulator is here")
