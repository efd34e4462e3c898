"""Questions about demonstrations in LLaVA's form, so that co-training can be rehearsed with nothing downloaded.

    python scripts/convert.py benchmark=libero_goal to=llava out=datasets/vl/own
    python train.py ablation=cotrain cotrain.use=[own]

A picture is a frame of the static view; a question asks for the instruction, the gripper, or the direction of the next
motion, each answered from the recording. They are no substitute for the paper's sets (GenVLA table I): nothing about
the world beyond the demonstrations is in them.
"""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import numpy as np
from PIL import Image
from rich.progress import track

from data.frame_store import FrameStore
from vla.errors import UserError

DIRECTIONS = (("backward", "forward"), ("right", "left"), ("down", "up"))
"""Along -x and +x, -y and +y, -z and +z of the robot's base."""
STILL = 0.05
"""Largest translation, in action units, that counts as none."""


def exchanges(instruction: str, action: np.ndarray) -> list[tuple[str, str]]:
    """All questions and answers about a frame, given the action (7,) chosen on seeing it."""
    axis = int(np.abs(action[:3]).argmax())
    still = abs(action[axis]) < STILL
    direction = "it stays" if still else DIRECTIONS[axis][int(action[axis] > 0)]
    return [
        ("What is the robot asked to do?", instruction),
        ("Is the gripper to be open or closed?", "open" if action[6] > 0.5 else "closed"),
        ("Which way does the gripper move next, seen from the robot?", direction),
    ]


def write_llava(store: FrameStore, out: Path, count: int, seed: int = 0, camera: str = "static") -> int:
    """Write `count` examples (fewer where the store has fewer frames) of frames drawn at random; returns how many.

    The folder appears whole or not at all.

    Raises:
        UserError: `out` exists, or the store lacks the camera.
    """
    if out.exists():
        raise UserError(f"{out} exists; remove it, or choose another out=")
    if camera not in store.meta.cameras:
        raise UserError(f"{store.path} has no camera {camera}; it has {', '.join(sorted(store.meta.cameras))}")
    rng = np.random.default_rng(seed)
    chosen = np.sort(rng.permutation(len(store.samples))[:count])
    partial = out.with_name(f".{out.name}.partial-{os.getpid()}")
    shutil.rmtree(partial, ignore_errors=True)
    (partial / "images").mkdir(parents=True)
    try:
        rows = []
        for sample in track(chosen, "writing pictures", transient=True):
            step = int(store.samples[sample])
            name = f"{step:08d}.png"
            Image.fromarray(store.frames(camera, np.array([step]))[0]).save(partial / "images" / name)
            told = store.windows[int(store.sample_window[sample])]["instruction"]
            asked = exchanges(told, store.actions[step])
            question, answer = asked[rng.integers(len(asked))]
            talk = [{"from": "human", "value": f"<image>\n{question}"}, {"from": "gpt", "value": answer}]
            rows.append({"id": str(step), "image": name, "conversations": talk})
        (partial / "chat.json").write_text(json.dumps(rows, indent=1))
        os.replace(partial, out)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return len(rows)
