"""Train one VLA policy: a baseline × an ablation on a benchmark's demonstrations.

    python train.py baseline=vlm4vla size=tiny ablation=ptr benchmark=libero_goal trainer=cpu
    python train.py --help

Writes runs/<name>-<hash of the config>/: config.yaml, metrics.csv, checkpoints/ and, at the end, policy/, which
evaluate.py reads. A run that was stopped goes on with resume=auto; a finished one is not run again.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path

from data.source import open_source, require_source
from vla import saving
from vla.cli import main
from vla.config import TrainConfig
from vla.errors import UserError
from vla.interruption import Interruption
from vla.launched import requeued
from vla.run_identity import run_dir
from vla.saving import step_of


def train(cfg: TrainConfig) -> Path:
    """One run, start to export; returns the exported policy directory. A signal ends it by a checkpoint and code 75."""
    with Interruption() as interruption, ExitStack() as held:
        return train_until(cfg, interruption, held)


def train_until(cfg: TrainConfig, interruption: Interruption, held: ExitStack) -> Path:
    """`held` gets the run's folder for this process alone: at once if there is one, else when it is made."""
    run = run_dir(cfg)
    if (run / "policy" / "config.json").exists():
        print(f"already trained: {run / 'policy'} (delete {run} to train it again)")
        return run / "policy"
    if begun := run.exists():
        held.enter_context(saving.hold(run))
    checkpoint, damaged = newest_checkpoint(cfg, run)
    require_source(cfg.benchmark, cfg.data)

    import torch

    from data.instructions import Rewording
    from data.sampler import PairDataset, Share, StatelessBatches, training_loader
    from data.vision_language import CoTrainingBatches, CoTrainingDataset, open_mixture
    from vla.build import build_inverse_dynamics
    from vla.memory import check_memory
    from vla.module import VLAModule
    from vla.parallel import ShardedModule, check_layout, recompute_blocks
    from vla.training import co_training, fit, initial, make_trainer, policy_arguments, statistics_of

    if cfg.trainer.threads:
        torch.set_num_threads(cfg.trainer.threads)
    torch.manual_seed(cfg.seed)
    store = open_source(cfg.benchmark, cfg.data, cameras=cfg.cameras)
    check(cfg, store)
    check_layout(cfg, robot_samples(cfg))
    check_memory(cfg, statistics_of(store))
    arguments = policy_arguments(cfg)
    policy = initial(cfg, store, arguments)
    inverse_dynamics = build_inverse_dynamics(policy, cfg.inverse_dynamics)
    pairs = cfg.data.pairs if cfg.data.pairs == "shared" or inverse_dynamics is not None else None
    dataset = PairDataset(store, cfg.chunk, cfg.cameras, pairs, cfg.data.tail)
    robot = robot_samples(cfg)
    questions = open_mixture(cfg.cotrain, policy.image_size, cfg.seed, cfg.batch_size - robot)
    steps = total_steps(cfg, len(dataset), robot)
    module = (ShardedModule if cfg.trainer.strategy == "fsdp" else VLAModule)(
        policy,
        inverse_dynamics,
        cfg.optim,
        cfg.augment,
        max_steps=steps,
        warmup_steps=warmup_steps(cfg, len(dataset), robot, steps),
        seed=cfg.seed,
        cotrain=co_training(policy, cfg.cotrain),
        rewording=Rewording(cfg.data.rewordings) if cfg.data.rewordings else None,
        on_nan=cfg.trainer.on_nan,
        max_skipped=cfg.trainer.max_skipped,
    )
    first_step = step_of(checkpoint) if checkpoint else 0
    if not begun:
        held.enter_context(saving.hold(run))
    trainer = make_trainer(cfg, run, first_step, steps, interruption, damaged)
    size = robot // 2 if cfg.data.pairs == "shared" else robot
    share = Share(trainer.global_rank, trainer.world_size, cfg.trainer.accumulate)
    batches = StatelessBatches(len(dataset), size, cfg.seed, first_step, share)
    module.whole = valid_of(dataset, batches)
    if cfg.trainer.activation_checkpointing:
        recompute_blocks(module)
    if questions is not None:
        dataset, batches = CoTrainingDataset(dataset, questions), CoTrainingBatches(batches, cfg.batch_size - robot)
    loader = training_loader(dataset, batches, cfg.trainer.num_workers, pin=cfg.trainer.accelerator == "gpu")
    return fit(cfg, run, trainer, module, loader, checkpoint, arguments, store, interruption)


def valid_of(dataset, batches) -> Callable[[int], tuple[int, int]]:
    """Optimiser step → (action steps, pairs) that are valid in its whole batch."""
    return lambda step: dataset.valid(batches.whole(step))


def newest_checkpoint(cfg: TrainConfig, run: Path) -> tuple[Path | None, set[str]]:
    """(the checkpoint to go on from, names of damaged ones), as vla/saving.py.

    A job that Slurm starts again goes on, whatever `resume` says. Another batch_size is another run: run_hash differs.
    Another number of processes is the same run, and its data come in the same order; only shards are read by as many
    processes as wrote them.
    """
    if cfg.resume not in (None, "auto", "never"):
        raise UserError(f"resume={cfg.resume} is not known; choose auto (go on) or never (start over)")
    newest, damaged = saving.newest_checkpoint("auto" if requeued() else cfg.resume, run)
    if newest is not None:
        world, wrote = cfg.trainer.devices * cfg.trainer.num_nodes, saving.read_manifest(newest)["world_size"]
        sharded = (newest / saving.STATE).is_dir()
        if sharded != (cfg.trainer.strategy == "fsdp") or (sharded and world != wrote):
            how = f"trainer=fsdp on {wrote} devices" if sharded else "a trainer other than fsdp"
            raise UserError(f"{newest} was written by {how}; go on with that, or start over with resume=never")
    return newest, damaged


def check(cfg: TrainConfig, store) -> None:
    """What would otherwise fail late or train on nothing."""
    if cfg.max_steps < 1 or cfg.batch_size < 1:
        raise UserError(f"max_steps={cfg.max_steps} and batch_size={cfg.batch_size} must both be at least 1")
    if cfg.trainer.on_nan not in ("stop", "skip"):
        raise UserError(f"trainer.on_nan={cfg.trainer.on_nan} is not known; choose stop or skip")
    if cfg.trainer.async_checkpoints and cfg.trainer.strategy == "fsdp":
        raise UserError("trainer.async_checkpoints=true is not for trainer=fsdp, whose shards are written in place")
    if cfg.data.tail not in ("pad", "whole"):
        raise UserError(f"data.tail={cfg.data.tail} is not known; choose pad or whole")
    if cfg.data.pairs not in ("separate", "shared"):
        raise UserError(f"data.pairs={cfg.data.pairs} is not known; choose separate or shared")
    if cfg.data.pairs == "shared" and robot_samples(cfg) % 2:
        raise UserError(
            f"batch_size={cfg.batch_size} gives {robot_samples(cfg)} robot samples; with data.pairs=shared, where they "
            "come in pairs, it must be an even number"
        )
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


def robot_samples(cfg: TrainConfig) -> int:
    """Of a batch; the others are questions of co-training."""
    if not cfg.cotrain.enabled:
        return cfg.batch_size
    robot = cfg.batch_size - round(cfg.batch_size * cfg.cotrain.share)
    if not 0 < robot < cfg.batch_size:
        raise UserError(
            f"cotrain.share={cfg.cotrain.share} of batch_size={cfg.batch_size} leaves one kind of data out; "
            "change either"
        )
    return robot


def total_steps(cfg: TrainConfig, samples: int, robot: int) -> int:
    """max_steps, or fewer where max_epochs of the robot data, `robot` samples a step, are reached before."""
    if cfg.max_epochs is None:
        return cfg.max_steps
    return max(1, min(cfg.max_steps, round(cfg.max_epochs * samples / robot)))


def warmup_steps(cfg: TrainConfig, samples: int, robot: int, steps: int) -> int:
    if cfg.optim.warmup_steps is not None:
        return cfg.optim.warmup_steps
    if cfg.optim.warmup_ratio:
        return round(cfg.optim.warmup_ratio * steps)
    return round(cfg.optim.warmup_epochs * samples / robot)


@main("train")
def run(cfg: TrainConfig) -> None:
    train(cfg)


if __name__ == "__main__":
    run()
