"""Whether a run's weights, gradients and optimiser fit into memory, known before the first of them is made.

    need(cfg, 8.16e9, 8.16e9).total      bytes a device, before activations and the inverse dynamics head
    python train.py baseline=vlm4vla size=full trainer=fsdp dry_run=true       prints it

The policy is built without memory for its weights (torch's meta device). AdamW keeps two numbers a trained parameter,
the average one more a parameter (a trained one, where it is sharded); DDP holds all of that on every device, FSDP a
share of it. FSDP's "gathered" is what of the weights is whole on a device at a time: everything that is not in a block,
and two blocks (the next one is fetched ahead). What activations need depends on the batch; they are not counted.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path

import torch
from transformers import AutoConfig

from data.normalization import ActionStatistics
from vla.build import apply_ideas, build_policy
from vla.checkpoint import initial_arguments
from vla.cli import compose_config
from vla.config import TrainConfig, TrainerConfig
from vla.errors import UserError
from vla.parallel import blocks
from vla.policy import Policy
from vla.training import policy_arguments

GB = 1e9


@dataclass(frozen=True)
class Sizes:
    """Numbers of parameters: all, those trained, those in no block, those of the largest block."""

    held: int
    trained: int
    outside: int
    largest: int


@dataclass(frozen=True)
class Need:
    """Bytes a device, before activations."""

    weights: float
    gradients: float
    optimiser: float
    average: float
    gathered: float

    @property
    def total(self) -> float:
        return sum(asdict(self).values())

    def __str__(self) -> str:
        parts = ((field.name, getattr(self, field.name)) for field in fields(self))
        return " + ".join(f"{name} {size / GB:.1f}" for name, size in parts if size)


def need(cfg: TrainConfig, sizes: Sizes) -> Need:
    """Of a configuration whose policy has these `sizes`."""
    sharded = cfg.trainer.strategy == "fsdp"
    shards = cfg.trainer.devices * cfg.trainer.num_nodes if sharded else 1
    width = 2 if cfg.trainer.precision.endswith("-true") and not cfg.trainer.precision.startswith("32") else 4
    averaged = sizes.trained if sharded else sizes.held
    return Need(
        weights=width * sizes.held / shards,
        gradients=width * sizes.trained / shards,
        optimiser=2 * width * sizes.trained / shards,
        average=width * averaged / shards if cfg.optim.ema or cfg.optim.ema_power else 0.0,
        gathered=width * (sizes.outside + 2 * sizes.largest) if sharded else 0.0,
    )


def sizes_of(policy: Policy) -> Sizes:
    own = [sum(p.numel() for p in block.parameters()) for block in blocks(policy)]
    held = sum(p.numel() for p in policy.parameters())
    trained = sum(p.numel() for p in policy.parameters() if p.requires_grad)
    return Sizes(held, trained, held - sum(own), max(own, default=0))


def sketch(cfg: TrainConfig, statistics: ActionStatistics) -> Policy:
    """The configuration's policy without memory for its weights.

    Its dimensions are the configuration's, or those of the policy directory `init_from`, or of the release
    `policy.pretrained` where that is not the configuration's own.
    """
    wanted = policy_arguments(cfg)
    arguments = wanted | {name: None for name in wanted if name.startswith("pretrained")}
    if cfg.init_from is not None:
        arguments = initial_arguments(Path(cfg.init_from), cfg.policy.name, wanted)
    elif getattr(cfg.policy, "pretrained", None):
        arguments |= {name: value for name, value in released(cfg).items() if name in arguments}
    if arguments.get("language_head", "tied") != "tied":
        arguments["language_head"] = "kept"  # the release that it is from is not read
    with torch.device("meta"):
        policy = build_policy(cfg.policy.name, statistics, cfg.normalization, arguments)
        return apply_ideas(policy, wanted | {"language_head": arguments.get("language_head", "tied")})


def released(cfg: TrainConfig) -> dict:
    """text_config and vision_config of the release that `policy.pretrained` names in place of the usual one."""
    name = cfg.policy.pretrained
    if compose_config("train", f"baseline={cfg.policy.name}", f"size={cfg.size}").policy.pretrained == name:
        return {}
    try:
        found = AutoConfig.from_pretrained(name, trust_remote_code=False).to_dict()
    except (OSError, ValueError):  # what loads the weights says it better
        return {}
    return {part: found[part] for part in ("text_config", "vision_config") if part in found}


def check_memory(cfg: TrainConfig, statistics: ActionStatistics) -> None:
    """Refuse a run that cannot fit, before its weights are made.

    Raises:
        UserError: the devices have less memory than the run needs before activations, or the machine less than its
            processes need to make the weights in.
    """
    if not cfg.trainer.check_memory or cfg.untouched:
        return
    sizes = sizes_of(sketch(cfg, statistics))
    needed, device = need(cfg, sizes), device_bytes(cfg.trainer)
    what = f"{cfg.policy.name} has {sizes.held / 1e9:.2f} B parameters; training them"
    if needed.total > device:
        raise UserError(
            f"{what} with trainer={cfg.trainer.strategy} needs {needed.total / GB:.0f} GB a device before activations "
            f"({needed}), and there are {device / GB:.0f}; {remedy(cfg, sizes, device)}, or trainer.check_memory=false"
        )
    built = 4 * sizes.held * cfg.trainer.devices
    if cfg.trainer.accelerator == "gpu" and built > free_bytes():
        raise UserError(
            f"{what} on {cfg.trainer.devices} devices of a machine makes them as often in its memory first, "
            f"{built / GB:.0f} GB, and {free_bytes() / GB:.0f} are free; use fewer devices a machine, or "
            "trainer.check_memory=false"
        )


def remedy(cfg: TrainConfig, sizes: Sizes, device: float) -> str:
    """The fewest devices of this size that a sharded run fits on, before activations. A CPU's share one memory."""
    if cfg.trainer.accelerator == "cpu":
        return "train it on GPUs (trainer=fsdp), or take a smaller size="
    for devices in range(2, 129):
        trainer = replace(cfg.trainer, strategy="fsdp", devices=devices, num_nodes=1)
        if need(replace(cfg, trainer=trainer), sizes).total < device:
            return (
                f"shard it over {devices} or more (trainer=fsdp, trainer.devices × trainer.num_nodes, and "
                "trainer.activation_checkpointing=true for the activations), or take a smaller size="
            )
    return "take a device with more memory, or a smaller size="


def device_bytes(trainer: TrainerConfig) -> float:
    """Memory of the smallest device; on a CPU, what is free, shared among the processes."""
    if trainer.accelerator == "gpu":
        return min(torch.cuda.get_device_properties(i).total_memory for i in range(trainer.devices))
    return free_bytes() / trainer.devices


def free_bytes() -> float:
    """What this machine can still give without swapping."""
    meminfo = Path("/proc/meminfo")
    if not meminfo.exists():
        return float("inf")
    lines = dict(line.split(":", 1) for line in meminfo.read_text().splitlines())
    return 1024 * float(lines["MemAvailable"].split()[0])
