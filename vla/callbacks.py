"""What a run shows and writes while it trains: the progress line, metrics.csv and checkpoints.

The order of the callbacks is that of this file: a step's row is on disk before the checkpoint that follows the step, so
that a run that is killed in between has no gap in its metrics when it goes on.
"""

from __future__ import annotations

import csv
import os
import sys
import threading
import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.fabric.plugins import TorchCheckpointIO
from lightning.pytorch.callbacks import Callback, Checkpoint
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch.distributed.checkpoint.api import CheckpointException
from torch.utils._pytree import tree_map_only

from vla import saving
from vla.errors import UserError
from vla.files import sync
from vla.flops import FlopCounter, device_rate
from vla.interruption import Interruption


class Throughput(Callback):
    """Step, loss, samples/s, share of the time spent waiting for data, MFU and ETA: a bar on a terminal, else lines.

    Logs `samples_per_s`, `data_wait`, `mfu` and, where they may be, how many steps were skipped so far with the losses.
    MFU is of the first process, with the FLOPs of its first pass (vla/flops.py; recomputed activations count).
    """

    def __init__(self, max_steps: int, log_every: int, label: str):
        self.max_steps, self.log_every, self.label = max_steps, log_every, label
        self.wait = self.busy = self.samples = 0.0
        self.passes, self.rate = 0, 1.0
        self.flops = 0
        self.counter: FlopCounter | None = None
        self.counting: ExitStack | None = None  # open during the first pass
        self.bar: Progress | None = None
        self.printed = time.monotonic()

    def on_train_start(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        if trainer.is_global_zero:
            half = trainer.precision.startswith("bf16")
            self.rate = device_rate(module.device, torch.bfloat16 if half else torch.float32)
            self.counting = ExitStack()
        self.mark = time.perf_counter()
        if trainer.is_global_zero and sys.stderr.isatty():
            self.bar = Progress(
                TextColumn("{task.description}"),
                BarColumn(),
                MofNCompleteColumn(),
                TextColumn("{task.fields[status]}"),
                TimeRemainingColumn(),
            )
            self.bar.start()
            self.row = self.bar.add_task(self.label, total=self.max_steps, completed=trainer.global_step, status="")

    def on_train_batch_start(self, trainer: L.Trainer, module: L.LightningModule, batch: dict, index: int) -> None:
        now = time.perf_counter()
        self.wait += now - self.mark
        self.mark = now
        if self.counting is not None:
            self.counter = self.counting.enter_context(FlopCounter())

    def on_train_batch_end(
        self, trainer: L.Trainer, module: L.LightningModule, out: Any, batch: dict, index: int
    ) -> None:
        self.stop_counting()
        now = time.perf_counter()
        self.busy += now - self.mark
        self.mark = now
        self.passes += 1
        self.samples += len(batch["actions"]) * trainer.world_size
        if trainer.global_step % self.log_every:
            return
        total = self.wait + self.busy
        rates = {"samples_per_s": self.samples / total, "data_wait": self.wait / total}
        rates["mfu"] = self.flops * self.passes / total / self.rate
        if module.on_nan == "skip":
            rates["skipped"] = float(module.skipped)
        module.log_dict(rates)
        self.wait = self.busy = self.samples = 0.0
        self.passes = 0
        loss = float(out["loss"])
        status = f"loss {loss:.4f}  {rates['samples_per_s']:.0f} samples/s  data wait {rates['data_wait']:.1%}"
        status += f"  MFU {rates['mfu']:.1%}"
        if self.bar is not None:
            self.bar.update(self.row, completed=trainer.global_step, status=status)
        elif trainer.is_global_zero and time.monotonic() - self.printed > 15:
            self.printed = time.monotonic()
            left = self.eta(trainer, total)
            print(f"{self.label}  step {trainer.global_step}/{self.max_steps}  {status}  {left} left", flush=True)

    def stop_counting(self) -> None:
        if self.counting is not None:
            self.counting.close()
            self.flops, self.counting = self.counter.total if self.counter else 0, None

    def on_exception(self, trainer: L.Trainer, module: L.LightningModule, exception: BaseException) -> None:
        self.stop_counting()

    def eta(self, trainer: L.Trainer, seconds_per_log: float) -> str:
        seconds = (self.max_steps - trainer.global_step) / self.log_every * seconds_per_log
        return f"{seconds / 60:.1f} min"

    def teardown(self, trainer: L.Trainer, module: L.LightningModule, stage: str) -> None:
        if self.bar is not None:
            self.bar.stop()
            self.bar = None


class MetricsCSV(Callback):
    """Appends a row per logged step to metrics.csv; rows after the step a run resumes from are cut off.

    Not Lightning's CSVLogger: it deletes the old file when a run is resumed, and writes after the checkpoint.
    """

    def __init__(self, path: Path, first_step: int, log_every: int):
        self.path, self.first_step, self.log_every = path, first_step, log_every
        self.columns: list[str] = []
        self.written = first_step - 1

    def on_fit_start(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        if not trainer.is_global_zero:
            return
        rows = []
        if self.path.exists():
            with open(self.path, newline="") as file:
                rows = [row for row in csv.DictReader(file) if int(row["step"]) < self.first_step]
        partial = self.path.with_name(f".{self.path.name}.partial")
        partial.unlink(missing_ok=True)
        if rows:
            write_rows(partial, list(rows[0]), rows)
            os.replace(partial, self.path)
            self.columns = list(rows[0])
        else:
            self.path.unlink(missing_ok=True)

    def on_train_batch_end(
        self, trainer: L.Trainer, module: L.LightningModule, out: Any, batch: dict, index: int
    ) -> None:
        step = trainer.global_step - 1
        if not trainer.is_global_zero or step == self.written or trainer.global_step % self.log_every:
            return
        self.written = step
        metrics = {key.removeprefix("train/"): float(value) for key, value in trainer.callback_metrics.items()}
        row = {"step": step, **metrics}
        self.columns = self.columns or list(row)
        write_rows(self.path, self.columns, [row])


def write_rows(path: Path, columns: list[str], rows: list[dict]) -> None:
    """Append, with the names of the columns where the file is new."""
    with open(path, "a", newline="") as file:
        writer = csv.DictWriter(file, columns, extrasaction="ignore")
        if not file.tell():
            writer.writeheader()
        writer.writerows(rows)


class PlainIO(TorchCheckpointIO):
    """Writes a checkpoint where it is told. Lightning's own writes into memory, then $TMPDIR, and moves it.

    An error is kept and not raised: it falls on one process, while the others wait for it at the end of the save.

    Attributes:
        keep: copy the state to the CPU's memory (`held`) and write nothing.
    """

    def __init__(self, keep: bool):
        self.keep, self.held, self.error = keep, None, None

    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any = None) -> None:
        self.error = None
        if self.keep:
            self.held = tree_map_only(torch.Tensor, lambda tensor: tensor.detach().to("cpu", copy=True), checkpoint)
        else:
            self.error = failure(lambda: self.write(checkpoint, Path(path)))

    def write(self, checkpoint: dict[str, Any], path: Path) -> None:
        with open(path, "wb") as file:
            try:
                torch.save(checkpoint, file)
            except RuntimeError as error:
                if isinstance(error.__context__, OSError):  # torch makes another of a write that failed
                    raise error.__context__ from None
                raise


def failure(save: Callable[[], Any]) -> BaseException | None:
    """What went wrong on the disk."""
    try:
        save()
    except (OSError, CheckpointException) as error:
        return error
    return None


class Checkpoints(Checkpoint):
    """Saves every `every` optimiser steps, and when a signal ends the training; vla/saving.py has the layout.

    All processes enter a save; the first one seals it. A save that fails, here or in the background, stops the run with
    one line on all of them. Weights that are not finite are never saved.

    Args:
        keep: so many of the newest are kept.
        io: the trainer's plugin; None where the strategy writes by itself (a sharded run).
        damaged: names of older checkpoints that are left alone.
    """

    def __init__(
        self,
        run: Path,
        every: int,
        keep: int,
        batch_size: int,
        io: PlainIO | None,
        interruption: Interruption,
        first_step: int = 0,
        damaged: frozenset[str] = frozenset(),
    ):
        self.run, self.folder = run, run / "checkpoints"
        self.every, self.keep, self.batch_size, self.io = every, keep, batch_size, io
        self.interruption, self.damaged = interruption, set(damaged)
        self.done = first_step
        self.writer: threading.Thread | None = None
        self.writing = 0  # the step it writes
        self.error: BaseException | None = None

    def on_train_start(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        self.interruption.install()
        if trainer.strategy.broadcast(self.done) != self.done:
            raise UserError(f"the processes see other checkpoints in {self.folder}; run again once the disk is in step")

    def on_train_batch_end(
        self, trainer: L.Trainer, module: L.LightningModule, out: Any, batch: dict, index: int
    ) -> None:
        step = trainer.global_step
        if step == self.done:  # within an accumulation
            return
        self.done = step
        if self.error is not None and trainer.world_size == 1:  # of several, they hear of it together at the next save
            self.wait(trainer)
        stop = self.interruption.agreed(trainer)
        if stop or step % self.every == 0:
            self.save(trainer, module, step)
        if stop:
            self.wait(trainer)
            trainer.should_stop = True

    def on_train_end(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        self.wait(trainer)

    def on_exception(self, trainer: L.Trainer, module: L.LightningModule, exception: BaseException) -> None:
        if self.writer is not None:
            self.writer.join()

    def save(self, trainer: L.Trainer, module: L.LightningModule, step: int) -> None:
        self.wait(trainer)
        if not trainer.strategy.reduce_boolean_decision(weights_are_finite(module), all=True):
            raise UserError(
                f"weights are not finite after step {step}; nothing was saved after the last checkpoint. Lower "
                "optim.lr, then resume=auto"
            )
        error = failure(lambda: saving.aside(self.folder, step)) if trainer.is_global_zero else None
        self.all_well(trainer, step, error)
        path = self.folder / f".step={step}.partial" / saving.STATE
        error = failure(lambda: trainer.save_checkpoint(path))
        self.all_well(trainer, step, error or (self.io and self.io.error))
        about = saving.About(step, trainer.world_size, self.batch_size)
        if self.io is not None and self.io.keep:
            if trainer.is_global_zero:
                state, self.io.held, self.writing = self.io.held, None, step
                self.writer = threading.Thread(target=self.write_held, args=(state, path, about))
                self.writer.start()
            return
        error = failure(lambda: self.seal(path.parent, about)) if trainer.is_global_zero else None
        self.all_well(trainer, step, error)

    def write_held(self, state: dict[str, Any], path: Path, about: saving.About) -> None:
        """In the background."""
        try:
            self.io.write(state, path)
            self.seal(path.parent, about)
        except BaseException as error:  # raised where the training next looks
            self.error = error

    def seal(self, partial: Path, about: saving.About) -> None:
        if (metrics := self.run / "metrics.csv").exists():
            sync(metrics)
        self.damaged.discard(saving.seal(partial, about).name)
        saving.drop_older(self.run, self.keep, self.damaged)

    def wait(self, trainer: L.Trainer) -> None:
        """For the save in the background, and raise what went wrong in it."""
        if self.io is None or not self.io.keep:
            return
        if self.writer is not None:
            self.writer.join()
            self.writer = None
        error, self.error = self.error, None
        self.all_well(trainer, self.writing, error)

    def all_well(self, trainer: L.Trainer, step: int, error: BaseException | None) -> None:
        """Raise on all processes where one failed."""
        if trainer.strategy.reduce_boolean_decision(error is None, all=True):
            return
        if trainer.is_global_zero:
            saving.remove_partial(self.folder, step)
        raise saving.unwritable(self.folder, step, error or OSError("another process failed")) from error


def weights_are_finite(module: torch.nn.Module) -> bool:
    """Whether every parameter is; on a sharded model, this process's share of them."""
    local = (getattr(p, "to_local", lambda p=p: p)() for p in module.parameters())
    checks = [tensor.detach().isfinite().all() for tensor in local if tensor.is_floating_point()]
    return bool(torch.stack(checks).all()) if checks else True
