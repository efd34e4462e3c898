"""The Lightning side of train.py: the trainer, checkpoints, and the export at the end."""

from __future__ import annotations

import importlib.metadata
import logging
import os
import platform
import subprocess
import time
import warnings
from dataclasses import asdict
from datetime import timedelta
from pathlib import Path

import lightning as L
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import WandbLogger
from omegaconf import OmegaConf
from torch.utils.data import DataLoader

from data.frame_store import FrameStore
from data.normalization import ActionStatistics
from vla.build import build_policy
from vla.callbacks import MetricsCSV, Throughput
from vla.checkpoint import export_policy, initial_policy
from vla.config import TrainConfig, run_hash
from vla.module import VLAModule
from vla.optim import weight_average
from vla.policy import Policy

PACKAGES = ("torch", "lightning", "transformers", "numpy")


def statistics_of(store: FrameStore) -> ActionStatistics:
    return ActionStatistics(**store.meta.statistics)


def policy_arguments(cfg: TrainConfig) -> dict:
    arguments = {key: value for key, value in asdict(cfg.policy).items() if key != "name"}
    return arguments | dict(chunk=cfg.chunk, cameras=list(cfg.cameras), tap=cfg.inverse_dynamics.tap)


def initial(cfg: TrainConfig, store: FrameStore, arguments: dict) -> Policy:
    """The policy before its first step: a fresh one, or `init_from` with this data's statistics."""
    if cfg.init_from is None:
        policy = build_policy(cfg.policy.name, statistics_of(store), cfg.normalization, arguments)
    else:
        policy = initial_policy(
            Path(cfg.init_from), cfg.policy.name, statistics_of(store), cfg.normalization, arguments
        )
    policy.fit_to(torch.from_numpy(store.actions))
    return policy


def first_step_of(checkpoint: Path | None) -> int:
    return 0 if checkpoint is None else torch.load(checkpoint, weights_only=True, map_location="cpu")["global_step"]


def make_trainer(cfg: TrainConfig, run: Path, first_step: int, steps: int) -> L.Trainer:
    run.mkdir(parents=True, exist_ok=True)
    OmegaConf.save(OmegaConf.create(asdict(cfg)), run / "config.yaml")
    loggers = [MetricsCSV(run / "metrics.csv", first_step)]
    if cfg.logger.wandb:
        loggers.append(
            WandbLogger(
                name=run.name,
                id=run.name,
                project=cfg.logger.project,
                offline=cfg.logger.offline,
                save_dir=run,
                config=asdict(cfg),
            )
        )
    callbacks = [
        Throughput(steps, cfg.trainer.log_every, f"{cfg.arm} seed {cfg.seed}"),
        ModelCheckpoint(
            run / "checkpoints",
            filename="{step}",
            monitor="step",
            mode="max",
            save_top_k=cfg.trainer.keep_checkpoints,
            every_n_train_steps=cfg.trainer.checkpoint_every,
        ),
    ]
    if average := weight_average(cfg.optim):
        callbacks.append(average)
    limit = cfg.time_limit_minutes
    quiet_lightning()
    return L.Trainer(
        accelerator=cfg.trainer.accelerator,
        devices=cfg.trainer.devices,
        precision=cfg.trainer.precision,
        max_steps=steps,
        max_time=None if limit is None else timedelta(minutes=limit),
        gradient_clip_val=cfg.optim.clip,
        logger=loggers,
        callbacks=callbacks,
        log_every_n_steps=cfg.trainer.log_every,
        enable_progress_bar=False,
        enable_model_summary=False,
        use_distributed_sampler=False,
        default_root_dir=run,
    )


def quiet_lightning() -> None:
    """Silence advice that does not apply: our sampler is exact on resume, our loader gathers whole batches."""
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    for message in (
        "not resumable",
        "does not have many workers",
        "exists and is not empty",
        "treespec, LeafSpec",
        "in eval mode",
    ):
        warnings.filterwarnings("ignore", message=f".*{message}.*")


def fit(
    cfg: TrainConfig,
    run: Path,
    trainer: L.Trainer,
    module: VLAModule,
    loader: DataLoader,
    checkpoint: Path | None,
    arguments: dict,
    store: FrameStore,
) -> Path:
    started = time.monotonic()
    if not cfg.untouched:
        trainer.fit(module, loader, ckpt_path=checkpoint, weights_only=True)
    if trainer.interrupted:
        raise KeyboardInterrupt
    about = dict(
        arm=cfg.arm,
        size=cfg.size,
        benchmark=cfg.benchmark.name,
        image_rotation=store.meta.reader.get("image_rotation", cfg.data.image_rotation),
        train_seed=cfg.seed,
        steps=trainer.global_step,
        max_steps=module.max_steps,
        seconds=round(time.monotonic() - started, 1),
        config_hash=run_hash(cfg),
        data_hash=store.meta.content_hash,
        hardware=torch.cuda.get_device_name() if torch.cuda.is_available() else f"{platform.machine()}, CPU",
        commit=commit(),
        versions={name: importlib.metadata.version(name) for name in PACKAGES} | {"python": platform.python_version()},
    )
    export_policy(module.policy, run / "policy", name=cfg.policy.name, arguments=arguments, about=about)
    took = f"{trainer.global_step} steps in {about['seconds']:.0f} s"
    print(f"{cfg.arm} seed {cfg.seed}: {took}; policy in {run / 'policy'}")
    return run / "policy"


def commit() -> str | None:
    """The commit this code is at, with "+" where files differ from it; None outside a git checkout."""
    root = Path(__file__).resolve().parent.parent
    environment = {"PATH": os.environ.get("PATH", ""), "GIT_OPTIONAL_LOCKS": "0"}

    def git(*words: str) -> str | None:
        try:
            done = subprocess.run(["git", "-C", str(root), *words], capture_output=True, text=True, env=environment)
        except FileNotFoundError:
            return None
        return done.stdout.strip() if done.returncode == 0 else None

    head = git("rev-parse", "--short=12", "HEAD")
    return head if head is None else head + ("+" if git("status", "--porcelain", "--untracked-files=no") else "")
