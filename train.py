"""Train one VLA policy: a baseline × an ablation on a benchmark's demonstrations.

    python train.py baseline=vlm4vla size=tiny ablation=ptr benchmark=libero_goal trainer=cpu
    python train.py --help

Writes runs/<name>-<hash of the config>/: config.yaml, metrics.csv, checkpoints/ and, at the end, policy/, which
evaluate.py reads. A run that was stopped goes on with resume=auto; a finished one is not run again.
"""

from __future__ import annotations

import shutil
from pathlib import Path

from data.source import open_source, require_source
from vla.cli import main
from vla.config import TrainConfig, run_dir
from vla.errors import UserError


def train(cfg: TrainConfig) -> Path:
    """One run, start to export; returns the exported policy directory."""
    run = run_dir(cfg)
    if (run / "policy" / "config.json").exists():
        print(f"already trained: {run / 'policy'} (delete {run} to train it again)")
        return run / "policy"
    checkpoint = newest_checkpoint(cfg, run)
    require_source(cfg.benchmark, cfg.data)

    import torch

    from data.instructions import Rewording
    from data.sampler import PairDataset, StatelessBatches, training_loader
    from vla.build import build_inverse_dynamics
    from vla.co_training import CoTraining, CoTrainingBatches, CoTrainingDataset, mixture, split
    from vla.module import VLAModule
    from vla.training import first_step_of, fit, initial, make_trainer, policy_arguments

    if cfg.trainer.threads:
        torch.set_num_threads(cfg.trainer.threads)
    torch.manual_seed(cfg.seed)
    store = open_source(cfg.benchmark, cfg.data, cameras=cfg.cameras)
    check(cfg, store)
    arguments = policy_arguments(cfg)
    policy = initial(cfg, store, arguments)
    inverse_dynamics = build_inverse_dynamics(policy, cfg.inverse_dynamics)
    pairs = cfg.data.pairs if cfg.data.pairs == "shared" or inverse_dynamics is not None else None
    dataset = PairDataset(store, cfg.chunk, cfg.cameras, pairs, cfg.data.tail)
    robot, examples = split(cfg.batch_size, cfg.cotrain.share) if cfg.cotrain.enabled else (cfg.batch_size, 0)
    steps = total_steps(cfg, len(dataset))
    module = VLAModule(
        policy,
        inverse_dynamics,
        cfg.optim,
        cfg.augment,
        max_steps=steps,
        warmup_steps=warmup_steps(cfg, len(dataset), steps),
        seed=cfg.seed,
        cotrain=CoTraining(policy, cfg.cotrain) if cfg.cotrain.enabled else None,
        rewording=None if cfg.data.rewordings is None else Rewording(cfg.data.rewordings),
    )
    first_step = first_step_of(checkpoint)
    trainer = make_trainer(cfg, run, first_step, steps)
    shared = cfg.data.pairs == "shared"
    size = robot // 2 if shared else robot
    batches = StatelessBatches(len(dataset), size, cfg.seed, first_step, trainer.global_rank, trainer.world_size)
    if cfg.cotrain.enabled:
        questions = mixture(cfg.cotrain, policy.image_size, cfg.seed)
        dataset, batches = CoTrainingDataset(dataset, questions), CoTrainingBatches(batches, examples)
    loader = training_loader(dataset, batches, cfg.trainer.num_workers, pin=cfg.trainer.accelerator == "gpu")
    return fit(cfg, run, trainer, module, loader, checkpoint, arguments, store)


def newest_checkpoint(cfg: TrainConfig, run: Path) -> Path | None:
    """The checkpoint to go on from. A run with checkpoints is neither resumed nor overwritten unless told which."""
    if cfg.resume not in (None, "auto", "never"):
        raise UserError(f"resume={cfg.resume} is not known; choose auto (go on) or never (start over)")
    found = sorted((run / "checkpoints").glob("step=*.ckpt"), key=lambda p: int(p.stem.removeprefix("step=")))
    if cfg.resume == "never":
        shutil.rmtree(run / "checkpoints", ignore_errors=True)  # or a later resume=auto would take up the old run
        return None
    if not found:
        return None
    if cfg.resume is None:
        raise UserError(
            f"{run} holds an unfinished run (at {found[-1].stem}); add resume=auto to go on, resume=never to start over"
        )
    return found[-1]


def check(cfg: TrainConfig, store) -> None:
    """What would otherwise fail late or train on nothing."""
    if cfg.max_steps < 1 or cfg.batch_size < 1:
        raise UserError(f"max_steps={cfg.max_steps} and batch_size={cfg.batch_size} must both be at least 1")
    if cfg.data.tail not in ("pad", "whole"):
        raise UserError(f"data.tail={cfg.data.tail} is not known; choose pad or whole")
    if cfg.data.pairs not in ("separate", "shared"):
        raise UserError(f"data.pairs={cfg.data.pairs} is not known; choose separate or shared")
    if cfg.data.pairs == "shared" and cfg.batch_size % 2:
        raise UserError(f"batch_size={cfg.batch_size} must be even with data.pairs=shared, where samples come in pairs")
    if missing := set(cfg.cameras) - set(store.meta.cameras):
        known = ",".join(sorted(store.meta.cameras))
        raise UserError(f"{store.path} has no camera {sorted(missing)}; collect it, or train with cameras=[{known}]")
    if cfg.data.pairs == "shared" or cfg.inverse_dynamics.enabled:
        starts = store.samples[store.samples + cfg.chunk <= store.last_step[store.samples]] + cfg.chunk
        if not (store.last_frame[starts] == starts).any():
            raise UserError(f"no frame of {store.path} has another chunk={cfg.chunk} steps later; collect more frames")
    shortest = min(store.episodes, key=lambda episode: episode["length"])
    if cfg.chunk < 1 or cfg.chunk >= shortest["length"]:
        raise UserError(
            f"chunk={cfg.chunk} must be between 1 and the shortest episode's length minus one "
            f"({shortest['length']} steps: {shortest['source']}); set chunk=N"
        )


def total_steps(cfg: TrainConfig, samples: int) -> int:
    """max_steps, or fewer where max_epochs is reached before."""
    if cfg.max_epochs is None:
        return cfg.max_steps
    return max(1, min(cfg.max_steps, round(cfg.max_epochs * samples / cfg.batch_size)))


def warmup_steps(cfg: TrainConfig, samples: int, steps: int) -> int:
    if cfg.optim.warmup_steps is not None:
        return cfg.optim.warmup_steps
    if cfg.optim.warmup_ratio:
        return round(cfg.optim.warmup_ratio * steps)
    return round(cfg.optim.warmup_epochs * samples / cfg.batch_size)


@main("train")
def run(cfg: TrainConfig) -> None:
    train(cfg)


if __name__ == "__main__":
    run()
