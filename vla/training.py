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
from typing import TYPE_CHECKING

import lightning as L
import torch
from lightning.pytorch.callbacks import WeightAveraging
from lightning.pytorch.loggers import WandbLogger
from omegaconf import OmegaConf
from torch.utils.data import DataLoader

from data.frame_store import FrameStore
from data.normalization import ActionStatistics
from vla.build import build_policy
from vla.callbacks import Checkpoints, MetricsCSV, PlainIO, Throughput, weights_are_finite
from vla.checkpoint import export_policy, initial_policy
from vla.config import CoTrainConfig, TrainConfig
from vla.errors import UserError
from vla.interruption import Interrupted, Interruption, outlive
from vla.module import VLAModule
from vla.optim import weight_average
from vla.parallel import AverageShards, environment, full_weights, strategy
from vla.policy import Policy
from vla.run_identity import run_hash
from vla.saving import STATE, rank, step_of

if TYPE_CHECKING:
    from vla.co_training import CoTraining

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


def co_training(policy: Policy, cfg: CoTrainConfig) -> CoTraining | None:
    if not cfg.enabled:
        return None
    from vla.co_training import CoTraining  # and with it every baseline

    return CoTraining(policy, cfg)


def make_trainer(
    cfg: TrainConfig,
    run: Path,
    first_step: int,
    steps: int,
    interruption: Interruption | None = None,
    damaged: set[str] = frozenset(),
) -> L.Trainer:
    """`damaged`: names of checkpoints that are left alone."""
    if rank() == 0:
        run.mkdir(parents=True, exist_ok=True)
        OmegaConf.save(OmegaConf.create(asdict(cfg)), run / "config.yaml")
    loggers = []
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
    io = None if cfg.trainer.strategy == "fsdp" else PlainIO(keep=cfg.trainer.async_checkpoints)
    callbacks = [
        Throughput(steps, cfg.trainer.log_every, f"{cfg.arm} seed {cfg.seed}"),
        MetricsCSV(run / "metrics.csv", first_step, cfg.trainer.log_every),
        Checkpoints(
            run,
            cfg.trainer.checkpoint_every,
            cfg.trainer.keep_checkpoints,
            cfg.batch_size,
            io,
            interruption or Interruption(),
            first_step,
            damaged,
        ),
    ]
    if average := AverageShards() if cfg.trainer.strategy == "fsdp" else weight_average(cfg.optim):
        callbacks.append(average)
    limit = cfg.time_limit_minutes
    quiet_lightning()
    return L.Trainer(
        accelerator=cfg.trainer.accelerator,
        strategy=strategy(cfg),
        devices=cfg.trainer.devices,
        num_nodes=cfg.trainer.num_nodes,
        accumulate_grad_batches=cfg.trainer.accumulate,
        precision=cfg.trainer.precision,
        max_steps=steps,
        max_time=None if limit is None else timedelta(minutes=limit),
        gradient_clip_val=cfg.optim.clip,
        logger=loggers,
        callbacks=callbacks,
        plugins=[environment(cfg.trainer), *([io] if io else [])],
        log_every_n_steps=cfg.trainer.log_every,
        enable_progress_bar=False,
        enable_model_summary=False,
        use_distributed_sampler=False,
        default_root_dir=run,
    )


def quiet_lightning() -> None:
    """Silence advice that does not apply: our sampler is exact on resume, our loader gathers whole batches."""
    for name in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.WARNING)
    for message in (
        "not resumable",
        "does not have many workers",
        "exists and is not empty",
        "treespec, LeafSpec",
        "in eval mode",
        "`srun` command is available",  # vla/parallel.py chooses
        "find_unused_parameters=True was specified",
        "returned a view tensor",  # of a sharded block; nothing adds to one in place
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
    interruption: Interruption | None = None,
) -> Path:
    """Train, and export what came of it.

    Args:
        checkpoint: the folder to go on from.

    Raises:
        Interrupted: a signal ended the training before its time; a checkpoint holds it.
    """
    started = time.monotonic()
    loader.worker_init_fn = outlive
    if not cfg.untouched:
        trainer.fit(module, loader, ckpt_path=checkpoint and checkpoint / STATE, weights_only=True)
        if checkpoint and trainer.global_step == step_of(checkpoint):  # killed after the last one, before the export
            for average in (c for c in trainer.callbacks if isinstance(c, WeightAveraging | AverageShards)):
                average.on_train_end(trainer, module)  # which Lightning leaves out where there is no step to take
    if trainer.interrupted:
        raise KeyboardInterrupt
    if interruption and interruption.stopped:
        raise Interrupted
    if not trainer.strategy.reduce_boolean_decision(weights_are_finite(module), all=True):
        raise UserError(
            f"weights are not finite after step {trainer.global_step}; nothing was exported. Lower optim.lr, then "
            "resume=auto"
        )
    weights = full_weights(module.policy) if cfg.trainer.strategy == "fsdp" else None
    out = run / "policy"
    if not trainer.is_global_zero:
        return out
    about = dict(
        arm=cfg.arm,
        size=cfg.size,
        benchmark=cfg.benchmark.name,
        image_rotation=store.meta.reader.get("image_rotation", cfg.data.image_rotation),
        train_seed=cfg.seed,
        steps=trainer.global_step,
        skipped_steps=module.skipped,
        max_steps=module.max_steps,
        seconds=round(time.monotonic() - started, 1),
        config_hash=run_hash(cfg),
        data_hash=store.meta.content_hash,
        hardware=torch.cuda.get_device_name() if torch.cuda.is_available() else f"{platform.machine()}, CPU",
        commit=commit(),
        versions={name: importlib.metadata.version(name) for name in PACKAGES} | {"python": platform.python_version()},
    )
    export_policy(module.policy, out, name=cfg.policy.name, arguments=arguments, about=about, weights=weights)
    took = f"{trainer.global_step} steps in {about['seconds']:.0f} s"
    print(f"{cfg.arm} seed {cfg.seed}: {took}; policy in {out}")
    return out


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
