"""FLOPs of a training step of any size, with inverse dynamics beside without: no weights, no GPU, seconds on a laptop.

The step runs on torch's meta device, where tensors have shapes and no values, so what is counted is what would run:
both towers, padding, heads, forward and backward. Counted too is how often the host asks the device for a value, for
then it must wait until the device has caught up, as when it sends a tensor and stays until that has arrived.

Pairs "separate" encode o_{t+H} for inverse dynamics alone (IDL §3.3); with "shared" it is a policy sample of both arms,
and inverse dynamics costs its head.
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import torch
from rich.progress import track
from rich.table import Table

from vla.bench.latency import random_policy
from vla.bench.train import Arm, noise
from vla.build import build_inverse_dynamics
from vla.flops import DATA_SHEET, FlopCounter
from vla.module import VLAModule

SHARE = 0.4
"""Of the data sheet's rate, for the column of hours (the limit for VLM4VLA on one large GPU)."""


class MetaCounter(FlopCounter):
    """`waits`: values that the host asked for, which are all 0 here, and tensors that it sent and saw arrive; another
    question than these is an error."""

    def __init__(self) -> None:
        super().__init__()
        self.waits = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        if function is torch.ops.aten._local_scalar_dense.default and args[0].is_meta:
            self.waits += 1
            return False if args[0].dtype is torch.bool else 0
        if function is torch.ops.aten._unique2.default:  # ZoeDepth: which of its heads the frames choose
            self.waits += 1
            return tuple(args[0].new_empty(1) for _ in range(3))
        if function is torch.ops.aten._to_copy.default and not args[0].is_meta and not kwargs.get("non_blocking"):
            self.waits += torch.device(kwargs.get("device") or "cpu").type == "meta"
        return super().__torch_dispatch__(function, types, args, kwargs)


def measure(baselines: list[str], sizes: list[str], batch: int) -> dict:
    """
    Args:
        batch: samples a step; FLOPs are given per sample.
    """
    cells = [(baseline, size) for size in sizes for baseline in baselines]
    rows = [count(*cell, batch) for cell in track(cells, description="counting", transient=True)]
    return {"bench": "flops", "batch": batch, "rows": rows}


def count(baseline: str, size: str, batch: int) -> dict:
    """TFLOP per sample of both arms, forward and backward pass, without the optimiser."""
    with torch.device("meta"):
        policy, cfg = random_policy(baseline, size, "ablation=ptr")
        head = build_inverse_dynamics(policy, cfg.inverse_dynamics)
    module = VLAModule(policy, head, cfg.optim, cfg.augment, max_steps=10**6, warmup_steps=10, seed=0)
    module.to("meta").train()
    with tempfile.TemporaryDirectory() as folder:
        store = noise(cfg, Path(folder) / "store")
        arms = {arm: Arm(module, cfg, arm, store, batch, "meta", "fp32", True) for arm in ("vanilla", "ptr")}
        counts = {}
        for name, arm in arms.items():
            with MetaCounter() as counts[name]:
                arm.step(0)
    per_sample = {name: counter.total / batch for name, counter in counts.items()}
    return {
        "baseline": baseline,
        "size": size,
        "parameters": sum(p.numel() for p in module.policy.parameters()),
        "pairs": cfg.data.pairs,
        "tflop": {name: flops / 1e12 for name, flops in per_sample.items()},
        "ratio": per_sample["ptr"] / per_sample["vanilla"],
        "samples_per_s": SHARE * DATA_SHEET["H200"] / per_sample["vanilla"],
        "waits": counts["ptr"].waits,
    }


def show(result: dict) -> Table:
    table = Table(
        title=f"FLOPs of a sample, forward and backward; batches of {result['batch']} on the meta device",
        caption=f"samples/s: vanilla, at {SHARE:.0%} of an H100's or H200's dense bf16 rate\n"
        "waits: values that the host asks of the device within a step, beside the one at its end",
        title_justify="left",
        caption_justify="left",
    )
    for column in ("baseline", "size", "pairs"):
        table.add_column(column)
    for column in ("parameters", "TFLOP vanilla", "ptr", "ptr / vanilla", "samples/s", "waits"):
        table.add_column(column, justify="right")
    for row in result["rows"]:
        numbers = [f"{row['tflop'][arm]:.4g}" for arm in ("vanilla", "ptr")]
        speed = f"{row['samples_per_s']:,.0f}" if row["size"] == "full" else "–"
        facts = [f"{row['ratio']:.3f}", speed, str(row["waits"])]
        table.add_row(row["baseline"], row["size"], row["pairs"], f"{row['parameters'] / 1e6:,.0f} M", *numbers, *facts)
    return table
