"""Seconds of a training step: with inverse dynamics beside without, and the trainer's loop beside the bare step.

One policy with random weights serves both arms, so that both fit where one does, and the arms take turns step by step:
what disturbs the machine disturbs both. FLOPs are counted by torch over one forward and backward pass (matrix products,
convolutions and attention), so the ratio of step times can be held against that of the arithmetic. MFU is those FLOPs
per second over the device's rate at a large matrix product, measured in the same run, and over the data sheet's where
the device is known.

The trainer's loop is Lightning's with this project's module, loader and callbacks, on a frame store of noise.
"""

from __future__ import annotations

import statistics
import tempfile
import time
from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from pathlib import Path

import lightning as L
import numpy as np
import torch
from rich.progress import track
from rich.table import Table

from data.episode import Episode
from data.frame_store import FrameStore
from data.sampler import PairDataset, StatelessBatches, training_loader
from data.store_writer import write_store
from vla.bench.latency import MARGIN, describe, free_bytes, random_policy
from vla.build import build_inverse_dynamics
from vla.callbacks import Throughput
from vla.config import TrainConfig
from vla.errors import UserError
from vla.flops import FlopCounter, data_sheet_rate, measured_rate, synchronize
from vla.module import VLAModule
from vla.training import quiet_lightning

TARGETS = {"ratio_cuda": 1.12, "loop": 1.03}
BATCHES = 4
WARM_UP = 3


def measure(
    baseline: str,
    size: str,
    batch: int | None,
    device: str,
    precision: str,
    rounds: int,
    steps: int,
    backward_only: bool,
) -> dict:
    """
    Args:
        batch: samples a step; None is the configuration's.
        precision: fp32, bf16-mixed (autocast, fp32 weights) or bf16 (the weights too).
        rounds: of each arm, one step each; steps: of the trainer's loop, per measurement.
        backward_only: forward and backward passes without the optimiser, for models whose optimiser does not fit.

    Raises:
        UserError: the device cannot hold it.
    """
    with torch.device("meta"):
        sketch, cfg = random_policy(baseline, size)
    fits(sum(p.numel() for p in sketch.parameters()), device, precision, backward_only)
    batch = batch or cfg.batch_size
    with tempfile.TemporaryDirectory() as folder:
        store = noise(cfg, Path(folder) / "store")
        module = build(baseline, size, device, precision)
        arms = {
            arm: Arm(module, cfg, arm, store, batch, device, precision, backward_only) for arm in ("vanilla", "ptr")
        }
        seconds: dict[str, list[float]] = {arm: [] for arm in arms}
        for index in track(range(WARM_UP + rounds), description="steps", transient=True):
            for name, arm in arms.items():
                took = timed(partial(arm.step, index), device)
                if index >= WARM_UP:
                    seconds[name].append(took)
        flops = {name: arm.flops() for name, arm in arms.items()}
        loop = None if backward_only else loop_overhead(arms["ptr"], steps, device)
    peak = measured_rate(device, torch.float32 if precision == "fp32" else torch.bfloat16)
    rows = {name: row(times, flops[name], peak, device, batch) for name, times in seconds.items()}
    ratios = [a / b for a, b in zip(seconds["ptr"], seconds["vanilla"], strict=True)]
    return {
        "bench": "train",
        "baseline": baseline,
        "size": size,
        "batch": batch,
        "precision": precision,
        "pairs": cfg.data.pairs,
        "passes": "forward and backward" if backward_only else "a whole step",
        "device": describe(device),
        "peak": peak,
        "rounds": rounds,
        "rows": rows,
        "ratio": {
            "time": statistics.median(ratios),
            "flops": flops["ptr"] / flops["vanilla"],
            "target": target(device),
        },
        "loop": loop,
    }


class Arm:
    """One arm's step on a few batches that lie on the device already.

    Attributes:
        module: shared with the other arm but for the inverse dynamics head, which `step` puts in or takes out.
    """

    def __init__(self, module, cfg: TrainConfig, arm: str, store, batch: int, device: str, precision: str, bare: bool):
        self.module, self.cfg, self.arm, self.device, self.bare = module, cfg, arm, device, bare
        self.head = module.inverse_dynamics if arm == "ptr" else None
        pairs = cfg.data.pairs if cfg.data.pairs == "shared" or arm == "ptr" else None
        self.dataset = PairDataset(store, cfg.chunk, list(cfg.cameras), pairs, cfg.data.tail)
        self.size = batch // 2 if cfg.data.pairs == "shared" else batch
        draws = iter(StatelessBatches(len(self.dataset), self.size, seed=0))
        self.batches = [moved(self.dataset.__getitems__(next(draws)), device) for _ in range(BATCHES)]
        self.autocast = precision == "bf16-mixed"
        self.precision = precision
        self.optimizer = None if bare else module.configure_optimizers()["optimizer"]

    def step(self, index: int) -> None:
        module = self.module
        module.inverse_dynamics = self.head
        torch.manual_seed(index)
        with torch.autocast(self.device.partition(":")[0], torch.bfloat16) if self.autocast else nullcontext():
            loss = module.losses(self.batches[index % BATCHES])["total"]
        loss.backward()
        if self.optimizer is not None:
            torch.nn.utils.clip_grad_norm_(module.parameters(), self.cfg.optim.clip or float("inf"))
            self.optimizer.step()
        module.zero_grad(set_to_none=True)

    def flops(self) -> int:
        optimizer, self.optimizer = self.optimizer, None
        with FlopCounter() as counter:
            self.step(0)
        self.optimizer = optimizer
        return counter.total


def build(baseline: str, size: str, device: str, precision: str) -> VLAModule:
    previous = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16 if precision == "bf16" else torch.float32)
    try:
        torch.manual_seed(0)
        with torch.device(device):
            policy, cfg = random_policy(baseline, size, "ablation=ptr")
            head = build_inverse_dynamics(policy, cfg.inverse_dynamics)
    finally:
        torch.set_default_dtype(previous)
    return VLAModule(policy, head, cfg.optim, cfg.augment, max_steps=10**6, warmup_steps=10, seed=0).to(device).train()


def loop_overhead(arm: Arm, steps: int, device: str) -> dict:
    """Median step of the trainer's loop and of the bare step, taken in turns."""
    quiet_lightning()
    bare, looped, waits = [], [], []
    arm.module.inverse_dynamics = arm.head
    for turn in range(3):
        bare += [timed(partial(arm.step, turn), device) for _ in range(steps)]
        clock = Clock(device)
        batches = StatelessBatches(len(arm.dataset), arm.size, seed=turn)
        trainer = L.Trainer(
            accelerator="gpu" if device.startswith("cuda") else "cpu",
            devices=1,
            precision={"fp32": "32-true", "bf16": "bf16-true", "bf16-mixed": "bf16-mixed"}[arm.precision],
            max_steps=steps + WARM_UP,
            gradient_clip_val=arm.cfg.optim.clip,
            logger=False,
            callbacks=[clock, Throughput(steps + WARM_UP, 10, "loop")],
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            use_distributed_sampler=False,
        )
        loader = training_loader(arm.dataset, batches, arm.cfg.trainer.num_workers, pin=device.startswith("cuda"))
        trainer.fit(arm.module, loader)
        looped += clock.seconds[WARM_UP:]
        waits += clock.waits[WARM_UP:]
        arm.module.to(device).train()
    return {
        "bare_ms": 1000 * statistics.median(bare),
        "loop_ms": 1000 * statistics.median(looped),
        "ratio": statistics.median(looped) / statistics.median(bare),
        "data_wait": sum(waits) / (sum(looped) or 1),
        "target": TARGETS["loop"],
        "steps": len(looped),
    }


class Clock(L.Callback):
    """Seconds from batch to batch, and of them those before a batch was there."""

    def __init__(self, device: str):
        self.device, self.seconds, self.waits = device, [], []
        self.begin = self.end = 0.0

    def on_train_batch_start(self, *_) -> None:
        now = time.perf_counter()
        self.begin = self.end or now
        self.waits.append(now - self.begin)

    def on_train_batch_end(self, *_) -> None:
        synchronize(self.device)
        self.end = time.perf_counter()
        self.seconds.append(self.end - self.begin)


def row(times: list[float], flops: int, peak: float, device: str, batch: int) -> dict:
    median = statistics.median(times)
    sheet = data_sheet_rate(describe(device))
    return {
        "ms": 1000 * median,
        "fastest": 1000 * min(times),
        "slowest": 1000 * max(times),
        "samples_per_s": batch / median,
        "tflop": flops / 1e12,
        "of_measured_peak": flops / median / peak,
        "mfu": None if sheet is None else flops / median / sheet,
    }


def target(device: str) -> float | None:
    return TARGETS["ratio_cuda"] if device.startswith("cuda") else None


def timed(work: Callable[[], None], device: str) -> float:
    synchronize(device)
    start = time.perf_counter()
    work()
    synchronize(device)
    return time.perf_counter() - start


def fits(parameters: int, device: str, precision: str, backward_only: bool) -> None:
    size = 2 if precision == "bf16" else 4
    needed = MARGIN * parameters * size * (2 if backward_only else 4)
    if needed > free_bytes(device):
        raise UserError(
            f"{parameters / 1e9:.1f} B parameters need {needed / 2**30:.0f} GB before activations and {device} has "
            f"{free_bytes(device) / 2**30:.0f}; try --precision bf16 --backward-only, or a smaller --size"
        )


def noise(cfg: TrainConfig, path: Path) -> FrameStore:
    """Two episodes of random frames of the benchmark's size and random actions."""
    rng, side, steps = np.random.default_rng(0), cfg.benchmark.resolution, max(40, 4 * cfg.chunk)
    episodes = [
        Episode(
            instruction="put the wine bottle on top of the cabinet",
            frames={c: rng.integers(0, 256, (steps, side, side, 3), dtype=np.uint8) for c in cfg.cameras},
            state=rng.normal(size=(steps, 8)).astype(np.float32),
            actions=np.concatenate([rng.uniform(-1, 1, (steps, 6)), rng.integers(0, 2, (steps, 1))], 1).astype(
                np.float32
            ),
            task="noise",
            source=f"noise:{index}",
        )
        for index in range(2)
    ]
    write_store(episodes, path, reader={"image_rotation": "upright"})
    return FrameStore(path)


def moved(batch: dict, device: str) -> dict:
    def move(value):
        if isinstance(value, dict):
            return {key: move(item) for key, item in value.items()}
        return value.to(device) if isinstance(value, torch.Tensor) else value

    return move(batch)


def show(result: dict) -> Table:
    ratio, loop = result["ratio"], result["loop"]
    limit = f" (limit {ratio['target']})" if ratio["target"] else " (limit: within 10 % of the FLOPs')"
    told = [f"ptr / vanilla: time {ratio['time']:.3f}, FLOPs {ratio['flops']:.3f}{limit}"]
    if loop:
        told.append(
            f"the trainer's loop: {loop['loop_ms']:.2f} ms a step, bare {loop['bare_ms']:.2f}, ratio "
            f"{loop['ratio']:.3f} (limit {loop['target']}), waiting for data {loop['data_wait']:.1%}"
        )
    what = f"{result['baseline']} {result['size']}, {result['passes']}, batch {result['batch']}, {result['precision']}"
    table = Table(
        title=f"{what}, pairs {result['pairs']}; {result['device']}, {result['peak'] / 1e12:.2f} TFLOP/s measured; "
        f"{result['rounds']} rounds in turns",
        caption="\n".join(told),
        title_justify="left",
        caption_justify="left",
    )
    table.add_column("arm")
    for column in ("ms (median)", "range", "samples/s", "TFLOP", "of the measured peak", "MFU (data sheet)"):
        table.add_column(column, justify="right")
    for name, r in result["rows"].items():
        mfu = "–" if r["mfu"] is None else f"{r['mfu']:.1%}"
        table.add_row(
            name,
            f"{r['ms']:.1f}",
            f"{r['fastest']:.1f}–{r['slowest']:.1f}",
            f"{r['samples_per_s']:.1f}",
            f"{r['tflop']:.4f}",
            f"{r['of_measured_peak']:.1%}",
            mfu,
        )
    return table
