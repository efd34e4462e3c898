"""From what a client calls things to the observation that a policy reads, checked by name on the way."""

from __future__ import annotations

from typing import Any

import numpy as np

from vla.serving.config import ClientKeysConfig
from vla.serving.wire import WireError

MAX_PROMPT = 2000  # characters


def read_observation(message: Any, keys: ClientKeysConfig, cameras: list[str], step: int) -> dict[str, Any]:
    """The observation of a client's message, in the form that envs/server.py stacks.

    Args:
        message: what `unpack` gave; keys that nobody asks for are ignored.
        keys: where the message holds each camera, the state and the instruction.
        cameras: those the policy reads.
        step: the control step, where the message has none of its own ("step"; with "seed", 0 by default, it is what a
            sampling policy draws its noise from).

    Returns:
        {"images": {camera: uint8 (H, W, 3)}, "state": float32 (S,), "task_description": str, "seed": int, "step": int}

    Raises:
        WireError: something is missing, has another shape or type, or is NaN.
    """
    if not isinstance(message, dict):
        raise WireError(f"an observation must be a map, not {type(message).__name__}")
    prompt = find(message, keys.prompt)
    if not isinstance(prompt, str) or len(prompt) > MAX_PROMPT:
        raise WireError(f"{keys.prompt!r} must be text of at most {MAX_PROMPT} characters")
    return {
        "images": {camera: _image(message, keys.cameras[camera]) for camera in cameras},
        "state": np.zeros(0, np.float32) if keys.state is None else _state(message, keys.state),
        "task_description": prompt,
        "seed": _count(message, "seed", 0),
        "step": _count(message, "step", step),
    }


def find(message: dict, key: str) -> Any:
    """The value at "a/b": the key itself, or b in the map at a."""
    if key in message:
        return message[key]
    head, _, rest = key.partition("/")
    if rest and isinstance(message.get(head), dict):
        return find(message[head], rest)
    there = ", ".join(repr(name)[:40] for name in list(message)[:12]) or "nothing"
    raise WireError(f"{key!r} is missing; there is {there}")


def _image(message: dict, key: str) -> np.ndarray:
    """uint8 (H, W, 3); channels may come first, as LeRobot's and ALOHA's clients send them."""
    image = find(message, key)
    if isinstance(image, np.ndarray) and image.dtype == np.uint8 and image.ndim == 3 and image.size:
        if image.shape[-1] == 3:
            return image
        if image.shape[0] == 3:
            return image.transpose(1, 2, 0)
    raise WireError(f"{key!r} must be an image, uint8 (H, W, 3), not {_describe(image)}")


def _state(message: dict, key: str) -> np.ndarray:
    value = find(message, key)
    if isinstance(value, list) and all(isinstance(x, int | float) for x in value):
        value = np.array(value, dtype=np.float64)
    if not isinstance(value, np.ndarray) or value.ndim != 1 or value.dtype.kind not in "iuf":
        raise WireError(f"{key!r} must be a vector of numbers, not {_describe(value)}")
    with np.errstate(over="ignore"):
        state = value.astype(np.float32)
    if not np.isfinite(state).all():
        raise WireError(f"{key!r} holds NaN or infinity at index {int(np.flatnonzero(~np.isfinite(state))[0])}")
    return state


def _count(message: dict, key: str, default: int) -> int:
    value = message.get(key, default)
    if not isinstance(value, int | np.integer) or not 0 <= value < 2**63:
        raise WireError(f"{key!r} must be a whole number from 0 to 2^63 - 1")
    return int(value)


def _describe(value: Any) -> str:
    return f"{value.dtype} {value.shape}" if isinstance(value, np.ndarray) else type(value).__name__
