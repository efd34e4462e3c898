"""One process or many: how a step's batch is shared out, which strategy runs it, what is sharded and recomputed.

    trainer=ddp  trainer.devices=4     every process holds the whole model (Lightning's DDPStrategy)
    trainer=fsdp trainer.devices=8     weights, gradients, optimiser and average are sharded (FSDP2, fully_shard)

`batch_size` is of an optimiser step. It is cut into world · accumulate parts (data/sampler.py), each process has one
part a backward pass, and torch is seeded with (seed, step, part): two processes draw what one with trainer.accumulate=2
does, and give its losses up to rounding. Models know nothing of all this. What is wrapped are the elements of their
lists of layers; the rest of a model is one more shard, gathered for as long as `training_step` and its backward run.

One command starts all processes of a machine. Under torchrun, and under `srun` with a task a device, they are there
already. Random weights and released ones are made in every process, equally, and sharded from there.
"""

from __future__ import annotations

import functools
import itertools
import os
import pickle
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.plugins.environments import (
    ClusterEnvironment,
    LightningEnvironment,
    SLURMEnvironment,
    TorchElasticEnvironment,
)
from lightning.pytorch.strategies import DDPStrategy, ModelParallelStrategy, Strategy
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.fsdp import (
    FSDPModule,
    fully_shard,
    register_fsdp_forward_method,
)
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils.checkpoint import checkpoint

from vla.config import OptimConfig, TrainConfig, TrainerConfig
from vla.errors import UserError
from vla.module import VLAModule
from vla.nonfinite import running_statistics
from vla.optim import ema_decay, towards

STRATEGIES = ("single", "ddp", "fsdp")


def check_layout(cfg: TrainConfig, robot: int) -> None:
    """Refuse what cannot be shared out; `robot` of a batch are robot samples, the others questions.

    Raises:
        UserError: an unknown strategy, devices that are not there, or a batch that leaves a remainder.
    """
    trainer = cfg.trainer
    world = trainer.devices * trainer.num_nodes
    parts = world * trainer.accumulate
    if trainer.strategy not in STRATEGIES:
        raise UserError(f"trainer.strategy={trainer.strategy} is not known; choose trainer=cpu, gpu, ddp or fsdp")
    if min(trainer.devices, trainer.num_nodes, trainer.accumulate) < 1:
        raise UserError("trainer.devices, trainer.num_nodes and trainer.accumulate must be at least 1")
    if trainer.strategy == "single" and world > 1:
        raise UserError(f"trainer.devices={trainer.devices} on {trainer.num_nodes} machines needs trainer=ddp or fsdp")
    if trainer.accelerator == "gpu" and torch.cuda.device_count() < trainer.devices:
        raise UserError(
            f"trainer.devices={trainer.devices}, but {torch.cuda.device_count()} GPUs are here; set trainer.devices or "
            "trainer.accelerator=cpu"
        )
    pair = 2 if cfg.data.pairs == "shared" else 1
    for count, what, multiple in ((robot, "robot samples", pair * parts), (cfg.batch_size - robot, "questions", parts)):
        if count % multiple:
            raise UserError(
                f"batch_size={cfg.batch_size} has {count} {what}, which {world} processes × trainer.accumulate="
                f"{trainer.accumulate}{' × data.pairs=shared' if multiple > parts else ''} cannot share evenly; "
                f"make them a multiple of {multiple}"
            )


def environment(trainer: TrainerConfig) -> ClusterEnvironment:
    """Who starts the processes: torchrun, srun with a task a device, or this one. Signals are never Lightning's.

    Raises:
        UserError: this process would have to start others by its own command line, which is a sweep's.
    """
    world = trainer.devices * trainer.num_nodes
    if TorchElasticEnvironment.detect():
        if (there := int(os.environ["WORLD_SIZE"])) != world:
            raise UserError(
                f"torchrun started {there} processes and the configuration has {world}; set trainer.devices (on each "
                "machine) and trainer.num_nodes"
            )
        return TorchElasticEnvironment()
    if world > 1 and "SLURM_STEP_ID" in os.environ and int(os.environ.get("SLURM_NTASKS", "1")) == world:
        return SLURMEnvironment(auto_requeue=False)
    if trainer.devices > 1 and "LOCAL_RANK" not in os.environ and _swept():
        raise UserError(
            f"trainer.devices={trainer.devices} in a sweep: start each run by a command of its own, or with "
            f"hydra/launcher=slurm hydra.launcher.tasks_per_node={trainer.devices}"
        )
    return LightningEnvironment()


def _swept() -> bool:
    from hydra.core.hydra_config import HydraConfig
    from hydra.types import RunMode

    return HydraConfig.initialized() and HydraConfig.get().mode == RunMode.MULTIRUN


def strategy(cfg: TrainConfig) -> Strategy | str:
    if cfg.trainer.strategy == "fsdp":
        return ShardedStrategy(cfg.trainer.devices * cfg.trainer.num_nodes, tensor_parallel_size=1)
    if cfg.trainer.strategy == "ddp":
        return DDPStrategy(
            forward_sync_buffers=False,  # a part's batch statistics (ConvTower's) are its own, as in accumulation
            gradient_as_bucket_view=True,
            find_unused_parameters=True,  # a part's questions may all be too long; DeepStack may be off
        )
    return "auto"


def lists_of_layers(module: nn.Module) -> list[list[nn.Module]]:
    """The outermost lists of layers (towers' and decoders'), stage by stage; each layer is called by its forward."""
    if not isinstance(module, nn.ModuleList):
        return [found for child in module.children() for found in lists_of_layers(child)]
    if any(isinstance(element, nn.ModuleList) for element in module):
        return [found for stage in module for found in lists_of_layers(stage)]
    return [list(module)] if len(module) else []


def blocks(module: nn.Module) -> list[nn.Module]:
    return list(itertools.chain.from_iterable(lists_of_layers(module)))


def recompute_blocks(module: nn.Module) -> int:
    """Let each block's activations be computed again in the backward pass; how many blocks that are.

    Not of a block without a gradient, nor of one with batch normalisation (it would count a batch twice). A block that
    is given a cache for its keys and values is computed once all the same, for it writes there.
    """
    count = 0
    for block in blocks(module):
        trained = any(p.requires_grad for p in block.parameters())
        if trained and not any(isinstance(part, _BatchNorm) for part in block.modules()):
            block.forward = functools.partial(_recomputed, block.forward)
            count += 1
    return count


def _recomputed(forward: Callable, *inputs: Any, **options: Any) -> Any:
    if not torch.is_grad_enabled() or options.get("past_key_values") is not None:
        return forward(*inputs, **options)
    return checkpoint(forward, *inputs, use_reentrant=False, **options)


class ShardedModule(VLAModule):
    """VLAModule under FSDP2. Its average of the weights is sharded as they are and part of its state.

    Lightning's callback copies the module, which a sharded one forbids.
    """

    def __init__(self, *args: Any, **options: Any):
        super().__init__(*args, **options)
        self.average: ShardedAverage | None = None

    def configure_model(self) -> None:
        if isinstance(self, FSDPModule):
            return
        shard(self, self.device_mesh["data_parallel"])
        register_fsdp_forward_method(self, "training_step")
        if self.optim.ema or self.optim.ema_power:
            self.average = ShardedAverage(self, self.optim)


class ShardedStrategy(ModelParallelStrategy):
    """Lightning's, which under that name shards data only here. The index of a checkpoint is a pickle: it is looked at
    before torch reads it."""

    def load_checkpoint(self, checkpoint_path: Path, weights_only: bool | None = None) -> dict[str, Any]:
        require_plain_index(Path(self.broadcast(checkpoint_path)) / ".metadata")
        return super().load_checkpoint(checkpoint_path, weights_only)


class _Index(pickle.Unpickler):
    """Reads the names, shapes and places of tensors that torch's distributed checkpoints list, nothing else."""

    def find_class(self, module: str, name: str) -> Any:
        plain = module == "torch.distributed.checkpoint.metadata" and "." not in name  # "os.system" is found there too
        known = plain or (module, name) in (
            ("torch.distributed.checkpoint.filesystem", "_StorageInfo"),
            ("torch.serialization", "_get_layout"),
            ("torch", "Size"),
            ("pathlib", "PosixPath"),
        )
        if known or (module == "torch" and isinstance(getattr(torch, name, None), torch.dtype)):
            return super().find_class(module, name)
        raise pickle.UnpicklingError(f"it names {module}.{name}")


def require_plain_index(index: Path) -> None:
    """
    Raises:
        UserError: the index of a sharded checkpoint is missing, damaged, or holds what torch never writes there.
    """
    try:
        with open(index, "rb") as file:
            _Index(file).load()
    except (OSError, EOFError, ValueError, TypeError, KeyError, AttributeError, pickle.UnpicklingError) as error:
        raise UserError(
            f"{index} is not the index of a sharded checkpoint ({error}); resume=never starts over"
        ) from error


class AverageShards(Callback):
    """Keeps a ShardedModule's average, if it has one, and leaves the module with it at the end."""

    def on_train_start(self, trainer: L.Trainer, module: ShardedModule) -> None:
        self.step = trainer.global_step

    def on_train_batch_end(self, trainer: L.Trainer, module: ShardedModule, *_: Any) -> None:
        if trainer.global_step == self.step:  # within an accumulation
            return
        self.step = trainer.global_step
        for buffer in running_statistics(module):  # of each process its own, and a checkpoint has one: the first's
            torch.distributed.broadcast(buffer, 0)
        if module.average is not None and module.skipped_step != self.step - 1:
            module.average.update(module)

    def on_train_end(self, trainer: L.Trainer, module: ShardedModule) -> None:
        if module.average is not None:
            module.average.copy_to(module)


def shard(module: nn.Module, mesh: torch.distributed.DeviceMesh) -> None:
    """Shard every block by itself and the rest together.

    Weights are gathered in their own dtype and autocast does what it does in one process: on a CPU it has no layer norm
    of fp32 activations with bf16 weights. The last block of a list stays whole until its backward pass, which comes
    next; where only its keys and values are read (π0's prefix), nothing would tell that it is needed again.
    """
    for layers in lists_of_layers(module):
        for block in layers:
            fully_shard(block, mesh=mesh, reshard_after_forward=block is not layers[-1])
    fully_shard(module, mesh=mesh)


class ShardedAverage(nn.Module):
    """The average of a sharded module's trained weights, in its shards; the first update copies, as Lightning's does.

    Buffers, so that they are in the module's checkpoint; frozen weights are their own average.
    """

    def __init__(self, module: nn.Module, cfg: OptimConfig):
        super().__init__()
        self.cfg = cfg
        for name, parameter in _trained(module):
            self.register_buffer(name, parameter.detach().clone())
        self.register_buffer("updates", torch.zeros((), dtype=torch.int64))

    @torch.no_grad()
    def update(self, module: nn.Module) -> None:
        for name, parameter in _trained(module):
            average, now = getattr(self, name).to_local(), parameter.to_local()
            if self.updates == 0:
                average.copy_(now)
            elif self.cfg.ema:
                average.copy_(self.cfg.ema * average + (1 - self.cfg.ema) * now)
            else:
                average.copy_(towards(average, now, ema_decay(self.updates, self.cfg.ema_power)))
        self.updates += 1

    @torch.no_grad()
    def copy_to(self, module: nn.Module) -> None:
        for name, parameter in _trained(module):
            parameter.copy_(getattr(self, name))


def _trained(module: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """(name without the dots a buffer's may not have, parameter)"""
    return ((n.replace(".", "/"), p) for n, p in module.named_parameters() if p.requires_grad)


def full_weights(module: nn.Module) -> dict[str, Tensor]:
    """A sharded module's whole state on the first process's CPU, {} on others; every process must call it."""
    return get_model_state_dict(module, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
