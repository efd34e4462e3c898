"""What a run shows and writes while it trains: the progress line and metrics.csv.

metrics.csv is written here and not by Lightning's CSVLogger, which deletes the old file when a run is resumed.
"""

from __future__ import annotations

import csv
import sys
import time
from pathlib import Path
from typing import Any

import lightning as L
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.loggers.logger import Logger
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn


class MetricsCSV(Logger):
    """Appends a row per logged step to metrics.csv; rows after the step a run resumes from are cut off."""

    def __init__(self, path: Path, first_step: int):
        super().__init__()
        self.path, self.columns = path, []
        rows = []
        if path.exists():
            with open(path, newline="") as file:
                rows = [row for row in csv.DictReader(file) if int(row["step"]) < first_step]
        path.unlink(missing_ok=True)
        for row in rows:
            self.write(row)

    @property
    def name(self) -> str:
        return "csv"

    @property
    def version(self) -> str:
        return ""

    def log_hyperparams(self, *args: Any, **kwargs: Any) -> None:
        """config.yaml holds them."""

    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        metrics = {key.removeprefix("train/"): value for key, value in metrics.items() if key != "epoch"}
        self.write({"step": step, **metrics})

    def write(self, row: dict) -> None:
        new = not self.columns
        if new:
            self.columns = list(row)
        with open(self.path, "a", newline="") as file:
            writer = csv.DictWriter(file, self.columns, extrasaction="ignore")
            if new:
                writer.writeheader()
            writer.writerow(row)


class Throughput(Callback):
    """Step, loss, samples/s, share of the time spent waiting for data, and ETA: a bar on a terminal, else lines.

    Logs `samples_per_s` and `data_wait` with the losses.
    """

    def __init__(self, max_steps: int, log_every: int, label: str):
        self.max_steps, self.log_every, self.label = max_steps, log_every, label
        self.wait = self.busy = self.samples = 0.0
        self.bar: Progress | None = None
        self.printed = time.monotonic()

    def on_train_start(self, trainer: L.Trainer, module: L.LightningModule) -> None:
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

    def on_train_batch_end(
        self, trainer: L.Trainer, module: L.LightningModule, out: Any, batch: dict, index: int
    ) -> None:
        now = time.perf_counter()
        self.busy += now - self.mark
        self.mark = now
        self.samples += len(batch["actions"]) * trainer.world_size
        if trainer.global_step % self.log_every:
            return
        total = self.wait + self.busy
        rates = {"samples_per_s": self.samples / total, "data_wait": self.wait / total}
        module.log_dict(rates)
        self.wait = self.busy = self.samples = 0.0
        loss = float(out["loss"])
        status = f"loss {loss:.4f}  {rates['samples_per_s']:.0f} samples/s  data wait {rates['data_wait']:.1%}"
        if self.bar is not None:
            self.bar.update(self.row, completed=trainer.global_step, status=status)
        elif trainer.is_global_zero and time.monotonic() - self.printed > 15:
            self.printed = time.monotonic()
            left = self.eta(trainer, total)
            print(f"{self.label}  step {trainer.global_step}/{self.max_steps}  {status}  {left} left", flush=True)

    def eta(self, trainer: L.Trainer, seconds_per_log: float) -> str:
        seconds = (self.max_steps - trainer.global_step) / self.log_every * seconds_per_log
        return f"{seconds / 60:.1f} min"

    def teardown(self, trainer: L.Trainer, module: L.LightningModule, stage: str) -> None:
        if self.bar is not None:
            self.bar.stop()
            self.bar = None
