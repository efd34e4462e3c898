"""What three RLDS data sets mean: which keys to read, and the conversion to `Episode`'s actions and state.

Sources: openvla, prismatic/vla/datasets/rlds/oxe/transforms.py, oxe/configs.py and utils/data_utils.py (fact sheet
baselines §0a.9, §1.1, §1.6). Arithmetic is in float32, as there; the results are equal bit for bit.

- libero_*_no_noops (openvla/modified_libero_rlds; its libero_10 calls itself "liber_o10"): LIBERO's demonstrations
  replayed without no-ops at 256 × 256. Frames are stored rotated by 180° (data.libero.orient's "rotate180"), and
  observation t is what was seen before action t, so steps are paired as they lie. Gripper −1 open, +1 closed:
  1 − clip(g, 0, 1). State: position (m), axis-angle (rad), two finger positions (m), as data/libero.py's.
- bridge_orig (BridgeData V2 from its own site, where it is called bridge_dataset): the first step, whose action is all
  zero, is left out; the six motion dims are the differences of successive states, and the last step, which has no
  successor, goes too: steps 1 … T−2 remain. Gripper: see `binarize_gripper`. State: x, y, z (m), roll, pitch, yaw
  (rad), gripper opening.
- fractal20220817_data (RT-1): motion as stored, in m and rad; gripper: see `absolute_gripper`. State: position (m),
  quaternion, gripper closedness, as stored.

openvla's configs put a zero before Bridge's and LIBERO's gripper state; it is left out here, as in openvla-oft.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from vla.errors import UserError

OPEN, CLOSED = 0.95, 0.05
"""Above and below these an absolute gripper value is open and closed; between them it is on its way."""

Steps = tuple[np.ndarray, np.ndarray, slice]
"""Actions (N, 7) and state (N, S), float32, and which of the recording's T steps they belong to."""


def binarize_gripper(values: np.ndarray) -> np.ndarray:
    """(T,) opening in [0, 1] → (T,) float32: a value on its way becomes the state it arrives in, 0 or 1.

    Values still on their way at the end become the last raw value, as in the reference.
    """
    result, latest = np.empty(len(values), np.float32), values[-1]
    for step in reversed(range(len(values))):
        if values[step] > OPEN or values[step] < CLOSED:
            latest = values[step] > OPEN
        result[step] = latest
    return result


def absolute_gripper(values: np.ndarray) -> np.ndarray:
    """(T,) commands, above 0.1 closes and below −0.1 opens → (T,) float32 state after each, 1 open, 0 closed.

    Before the first command the state is the opposite of what it asks for; without any command it is open.
    """
    commands = np.where(values < -0.1, 1, np.where(values > 0.1, 0, -1))
    given = np.flatnonzero(commands >= 0)
    if not len(given):
        return np.ones(len(values), np.float32)
    latest = np.maximum.accumulate(np.where(commands >= 0, np.arange(len(values)), -1))
    return np.where(latest >= 0, commands[latest], 1 - commands[given[0]]).astype(np.float32)


def libero_steps(numbers: dict[str, np.ndarray]) -> Steps:
    action = numbers["action"]
    return np.column_stack([action[:, :6], 1 - np.clip(action[:, 6], 0, 1)]), numbers["observation/state"], slice(None)


def bridge_steps(numbers: dict[str, np.ndarray]) -> Steps:
    action, state = numbers["action"][1:], numbers["observation/state"][1:]
    if len(action) < 2:
        return action[:0], state[:0], slice(0)
    motion = state[1:, :6] - state[:-1, :6]
    return np.column_stack([motion, binarize_gripper(action[:, 6])[:-1]]), state[:-1], slice(1, -1)


def fractal_steps(numbers: dict[str, np.ndarray]) -> Steps:
    gripper = absolute_gripper(numbers["action/gripper_closedness_action"][:, 0])
    actions = np.column_stack([numbers["action/world_vector"], numbers["action/rotation_delta"], gripper])
    pose, closed = numbers["observation/base_pose_tool_reached"], numbers["observation/gripper_closed"]
    return actions, np.column_stack([pose, closed]), slice(None)


@dataclass(frozen=True)
class DataSet:
    """One kind of RLDS data set; keys are those of a step."""

    cameras: dict[str, str]
    """The project's camera name -> key."""
    numbers: dict[str, int]
    """Key -> width of a step's vector, what `steps` needs."""
    instruction: str
    steps: Callable[[dict[str, np.ndarray]], Steps]
    file_names_task: bool = False
    """`episode_metadata/file_path` is the HDF5 file, which is called after the task."""


LIBERO = DataSet(
    cameras={"static": "observation/image", "wrist": "observation/wrist_image"},
    numbers={"action": 7, "observation/state": 8},
    instruction="language_instruction",
    steps=libero_steps,
    file_names_task=True,
)
BRIDGE = DataSet(
    cameras={"static": "observation/image_0"},
    numbers={"action": 7, "observation/state": 7},
    instruction="language_instruction",
    steps=bridge_steps,
)
FRACTAL = DataSet(
    cameras={"static": "observation/image"},
    numbers={
        "action/world_vector": 3,
        "action/rotation_delta": 3,
        "action/gripper_closedness_action": 1,
        "observation/base_pose_tool_reached": 7,
        "observation/gripper_closed": 1,
    },
    instruction="observation/natural_language_instruction",
    steps=fractal_steps,
)


def data_set(names: tuple[str, ...], where: str) -> DataSet:
    """The kind that the first known of `names` stands for: a data set's own name, or its folder's.

    Raises:
        UserError: none is known; `where` is named.
    """
    for name in names:
        if name.replace("_", "").startswith("libero"):
            return LIBERO
        if name in ("bridge_orig", "bridge_dataset"):
            return BRIDGE
        if name == "fractal20220817_data":
            return FRACTAL
    known = "libero_*, bridge_orig, fractal20220817_data"
    raise UserError(f"{where}: no conversion is known for {' or '.join(names)}; known: {known} (data/oxe.py)")
