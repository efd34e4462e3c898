"""LIBERO's official HDF5 demonstrations, the public files and `envs.collection`'s alike, as episodes.

Layout (fact sheet libero §4): `<suite>/<task>_demo.hdf5`, group `data`, one group `demo_i` per demonstration. Frames
are stored upside down; the gripper is -1 open, +1 closed; `obs[t]` was recorded AFTER `actions[t]` was executed.

    for episode in read_libero(Path("datasets/libero_goal"), cameras=("static",)): ...
"""

from __future__ import annotations

import contextlib
import json
import re
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from data.episode import Episode
from vla.errors import UserError

CAMERA_KEYS = {"static": "agentview_rgb", "wrist": "eye_in_hand_rgb"}
PAIRINGS = ("aligned", "official")
ROTATIONS = ("rotate180", "upright")
FILE_SUFFIX = "_demo.hdf5"
_FOUR = ("libero_spatial", "libero_object", "libero_goal", "libero_10")
SUITES = {"libero_four": _FOUR} | {
    suite.replace("libero_", "libero_pro_"): tuple(f"{suite}_{kind}" for kind in ("lan", "object", "swap", "task"))
    for suite in _FOUR
}
"""Several suites under one name; any other name is a suite."""


def suites_of(name: str) -> tuple[str, ...]:
    return SUITES.get(name, (name,))


def orient(frames: np.ndarray, image_rotation: str) -> np.ndarray:
    """Raw LIBERO frames in the policy's orientation; one function for training data and for live observations.

    Args:
        frames: (..., H, W, C), upside down as robosuite stores them.
        image_rotation: "rotate180", the community's convention, which published checkpoints expect and which mirrors
            left and right; or "upright", geometrically right (§4).

    Raises:
        UserError: another image_rotation.
    """
    if image_rotation == "rotate180":
        return np.ascontiguousarray(frames[..., ::-1, ::-1, :])
    if image_rotation == "upright":
        return np.ascontiguousarray(frames[..., ::-1, :, :])
    raise UserError(f"unknown image_rotation {image_rotation!r}: choose one of {', '.join(ROTATIONS)}")


def instruction_of(task: str) -> str:
    """The instruction a rollout of `task` is given, from its name: words without the scene prefix of libero_90 and _10.

    Not `problem_info["language_instruction"]`: the scene files say "pick the akita black bowl ..." where the benchmark,
    the published evaluations and the RLDS data say "pick up the black bowl ..." (29 of 130 tasks differ).
    """
    return re.sub(r"^[A-Z_]+SCENE\d+_", "", task).replace("_", " ")


def read_libero(
    path: Path,
    cameras: tuple[str, ...],
    image_rotation: str = "rotate180",
    pairing: str = "aligned",
    skipped: list[str] | None = None,
) -> Iterator[Episode]:
    """Every demonstration of a file, or of all `*.hdf5` of a folder, in file and demonstration order.

    Args:
        cameras: keys of CAMERA_KEYS.
        image_rotation: see `orient`.
        pairing: "aligned" pairs obs[t] with actions[t + 1], the action chosen on seeing it, and drops the last
            observation; "official" pairs obs[t] with actions[t], as most published training code does.
        skipped: where given, a demonstration that cannot be read is named there and left out.

    Yields:
        Episodes whose state is 8 numbers: end-effector position (m), axis-angle (rad), two finger positions (m). A
        file of the collector's may hold a frame for every k-th step only, and then says so in `obs/frame_valid`.

    Raises:
        UserError: nothing there, an unreadable or truncated file, a missing key, lengths that differ, non-finite
            actions; the message names file and demonstration.
    """
    if pairing not in PAIRINGS:
        raise UserError(f"unknown pairing {pairing!r}: choose one of {', '.join(PAIRINGS)}")
    if unknown := set(cameras) - set(CAMERA_KEYS):
        raise UserError(f"unknown LIBERO cameras {sorted(unknown)}: choose from {', '.join(CAMERA_KEYS)}")
    for file in _files(path):
        yield from _read_file(file, cameras, image_rotation, pairing, skipped)


def _files(path: Path) -> list[Path]:
    path = Path(path)
    if path.is_file():
        return [path]
    if not path.is_dir():
        raise UserError(f"{path}: no such file or folder: collect or download LIBERO demonstrations there first")
    files = sorted(path.glob("*.hdf5"))
    if not files:
        raise UserError(f"{path}: holds no *.hdf5 file: collect or download LIBERO demonstrations there first")
    return files


def _read_file(
    file: Path, cameras: tuple[str, ...], image_rotation: str, pairing: str, skipped: list[str] | None
) -> Iterator[Episode]:
    import h5py

    with _reading(file), h5py.File(file, "r") as opened:
        names = _demo_names(opened, file)
        task = file.name.removesuffix(FILE_SUFFIX).removesuffix(file.suffix)
        instruction = instruction_of(task) if file.name.endswith(FILE_SUFFIX) else _scene_instruction(opened, file)
    for name in names:
        source = f"{file.name}:{name}"
        try:
            with _reading(f"{file}:{name}"), h5py.File(file, "r") as opened:
                actions, state, frames = _read_demo(opened["data"][name], cameras, f"{file}:{name}")
                valid = opened["data"][name].get("obs/frame_valid")
                valid = None if valid is None else valid[()].astype(bool)
        except UserError as error:
            if skipped is None:
                raise
            skipped.append(str(error))
            continue
        if pairing == "aligned":
            actions, state = actions[1:], state[:-1]
            frames = {camera: frame[:-1] for camera, frame in frames.items()}
            valid = None if valid is None else valid[:-1]
        frames = {camera: orient(frame, image_rotation) for camera, frame in frames.items()}
        yield Episode(instruction, frames, state, actions, task, source, valid)


def _read_demo(demo, cameras: tuple[str, ...], where: str) -> tuple[np.ndarray, np.ndarray, dict[str, np.ndarray]]:
    shapes = {"actions": (7,), "obs/ee_states": (6,), "obs/gripper_states": (2,)}
    shapes |= {f"obs/{CAMERA_KEYS[camera]}": (None, None, 3) for camera in cameras}
    arrays = {}
    for key, shape in shapes.items():
        if key not in demo:
            raise UserError(f"{where}: has no dataset {key!r}: not LIBERO's official layout, or not collected with it")
        if demo[key].file.filename != demo.file.filename or demo[key].external or demo[key].is_virtual:
            raise UserError(f"{where}: {key} lies in another file, which a download must not reach for")
        arrays[key] = demo[key][()]
        actual = arrays[key].shape[1:]
        if len(actual) != len(shape) or any(want not in (None, got) for want, got in zip(shape, actual, strict=True)):
            raise UserError(f"{where}: {key} has the shape {arrays[key].shape}, not (T, {', '.join(map(str, shape))})")
    lengths = {key: len(array) for key, array in arrays.items()}
    if len(set(lengths.values())) != 1:
        raise UserError(f"{where}: lengths differ, {lengths}: collect or download the file again")
    if lengths["actions"] < 2:
        raise UserError(f"{where}: has {lengths['actions']} steps; a demonstration needs two: remove it from the file")
    raw = arrays["actions"]
    if not np.isfinite(raw).all():
        step = int(np.flatnonzero(~np.isfinite(raw).all(axis=1))[0])
        raise UserError(f"{where}: the action at step {step} is not finite: remove the demonstration from the file")
    actions = np.column_stack([raw[:, :6], raw[:, 6] <= 0]).astype(np.float32)
    state = np.column_stack([arrays["obs/ee_states"], arrays["obs/gripper_states"]]).astype(np.float32)
    return actions, state, {camera: arrays[f"obs/{CAMERA_KEYS[camera]}"] for camera in cameras}


def _demo_names(opened, file: Path) -> list[str]:
    if "data" not in opened:
        raise UserError(f"{file}: has no group 'data': not LIBERO's official layout")
    names = [name for name in opened["data"] if re.fullmatch(r"demo_\d+", name)]
    if not names:
        raise UserError(f"{file}: group 'data' holds no demonstration demo_0, demo_1, ...: collect or download again")
    return sorted(names, key=lambda name: int(name.removeprefix("demo_")))


def _scene_instruction(opened, file: Path) -> str:
    try:
        words = json.loads(opened["data"].attrs["problem_info"])["language_instruction"]
    except (KeyError, json.JSONDecodeError) as error:
        raise UserError(
            f"{file}: no instruction in data.attrs['problem_info'] ({error}): name it <task>_demo.hdf5"
        ) from error
    return words if isinstance(words, str) else "".join(words)


@contextlib.contextmanager
def _reading(where: Path | str) -> Iterator[None]:
    """h5py reports damage as OSError, RuntimeError or KeyError, whichever layer meets it first."""
    try:
        yield
    except (OSError, RuntimeError, KeyError) as error:
        raise UserError(
            f"{where}: cannot be read ({error}): truncated or damaged, collect or download it again"
        ) from error
