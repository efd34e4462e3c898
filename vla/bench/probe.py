"""What keeping a frozen encoder's tokens saves: the first behaviour cloning probe of a task, the second, one without.

The first encodes every frame once and trains the head, the second finds the tokens on disk; without the cache every
batch is encoded, of which a few steps are timed and the rest extrapolated (said so in the table).
"""

from __future__ import annotations

import os
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from rich.table import Table

from data.episode import Episode
from data.frame_store import FrameStore
from data.store_writer import write_store
from vla.analysis.bc_probe import CloningSettings, describe, train_head
from vla.analysis.features import TaskFeatures
from vla.bench.latency import describe as describe_device
from vla.bench.latency import random_policy

TASK, LENGTH, RESOLUTION = "made_up", 50, 128
LIVE_STEPS = 3


def measure(baseline: str, size: str, frames: int, steps: int, device: str) -> dict:
    """Seconds of the three ways, on `frames` made-up frames of one task (`steps` of 64 samples)."""
    torch.manual_seed(0)
    policy, _ = random_policy(baseline, size)
    policy = policy.eval().to(device)
    settings = CloningSettings(steps, 64, 2e-4, 100, 0.1, 0, chunk=4, gripper_weight=0.01, validation=0.1)
    with tempfile.TemporaryDirectory() as folder:
        before = os.environ.get("VLA_DATA")
        os.environ["VLA_DATA"] = folder
        try:
            store = made_up(Path(folder) / "store", frames, policy.cameras)
            features = TaskFeatures(policy, "0" * 64, store, policy.cameras[0], device)
            seconds, fits = [], []
            for _ in range(2):
                start = time.perf_counter()
                job = describe(features, TASK, settings.chunk, settings.validation, on_disk=True)
                encoded = time.perf_counter()
                fits.append(train_head(job, settings, features, on_disk=True))
                seconds.append((encoded - start, time.perf_counter() - start))
            short = CloningSettings(**{**settings.__dict__, "steps": LIVE_STEPS, "validate_every": steps + 1})
            start = time.perf_counter()
            live = train_head(job, short, features, on_disk=False)
            without = (time.perf_counter() - start) * steps / LIVE_STEPS
        finally:
            os.environ.pop("VLA_DATA") if before is None else os.environ.__setitem__("VLA_DATA", before)
    tokens, channels = features.shape
    difference = max(abs(a - b) for a, b in zip(live.train_curve, fits[0].train_curve, strict=False))
    return {
        "bench": "probe",
        "device": describe_device(device),
        "baseline": baseline,
        "size": size,
        "frames": frames,
        "steps": steps,
        "tokens": [tokens, channels],
        "first_s": seconds[0][1],
        "encoding_s": seconds[0][0],
        "second_s": seconds[1][1],
        "without_cache_s": without,
        "equal": fits[0].train_curve == fits[1].train_curve,
        "difference_without_cache": difference,
    }


def made_up(place: Path, frames: int, cameras: list[str]) -> FrameStore:
    rng = np.random.default_rng(0)

    def episode(index: int) -> Episode:
        images = {c: rng.integers(0, 256, (LENGTH, RESOLUTION, RESOLUTION, 3), dtype=np.uint8) for c in cameras}
        actions = rng.uniform(-1, 1, (LENGTH, 7)).astype(np.float32)
        actions[:, 6] = actions[:, 6] > 0
        return Episode("made up", images, np.zeros((LENGTH, 8), np.float32), actions, TASK, f"episode {index}")

    write_store(map(episode, range(max(2, frames // LENGTH))), place, reader={})
    return FrameStore(place)


def show(result: dict) -> Table:
    tokens, channels = result["tokens"]
    what = f"{result['baseline']} {result['size']}, {tokens} × {channels} tokens, {result['frames']} frames"
    table = Table(title=f"behaviour cloning probe, {what}; {result['device']}", title_justify="left")
    for column in ("", "seconds", "of them encoding", "× the second"):
        table.add_column(column, justify="left" if not column else "right")
    second = result["second_s"]
    table.add_row(
        "first probe", f"{result['first_s']:.1f}", f"{result['encoding_s']:.1f}", f"{result['first_s'] / second:.1f}"
    )
    table.add_row("second probe", f"{second:.1f}", "0", "1.0")
    extrapolated = f"{result['without_cache_s']:.0f} (from {LIVE_STEPS} steps)"
    table.add_row("without the cache", extrapolated, "", f"{result['without_cache_s'] / second:.0f}")
    equal = "equal" if result["equal"] else "NOT EQUAL"
    table.caption = (
        f"losses of first and second {equal}; without the cache within {result['difference_without_cache']:.1e}"
    )
    return table
