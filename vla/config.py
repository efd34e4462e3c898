"""The typed shape of every configuration: YAML in conf/ is checked against these dataclasses when a run starts.

Hydra composes YAML, OmegaConf checks it against the dataclasses below (a misspelt key or a wrong type fails before
anything is imported or written), and `typed()` turns it into frozen objects, so that no DictConfig reaches a model.
Nothing here imports torch: `--help` and a misspelt key answer at once.
"""

from __future__ import annotations

from dataclasses import FrozenInstanceError, dataclass, field
from functools import cache
from typing import Any

from hydra.core.config_store import ConfigStore
from omegaconf import MISSING, DictConfig, OmegaConf

from vla.errors import UserError
from vla.evaluation_configs import EvaluationConfig
from vla.policy_configs import POLICIES
from vla.serving.config import ServeConfig

REPLAY, EXPERT, NOTHING = "replay:", "expert", "nothing"
"""Values of `policy` that no training made (vla/replay.py)."""


@dataclass(frozen=True)
class InverseDynamicsConfig:
    """IDL §3, A.1 and tables 7-10. `enabled` is what the ablation switches, `reverse_prob` is p_rev of PTR."""

    enabled: bool = False
    weight: float = 0.1
    gripper_weight: float = 0.01
    dim: int = 1024
    tap: str = "post_projector"
    reverse_prob: float = 0.0
    reverse_space: str = "physical"


@dataclass(frozen=True)
class OptimConfig:
    """AdamW, its schedule (vla/optim.py) and the average of the weights.

    `no_decay` are substrings of parameter names; `schedule_steps` is the schedule's length where it is not max_steps;
    `ema` is a constant decay, `ema_power` FLOWER's growing one (fact sheet §4.5); at most one of the two.
    """

    lr: float = MISSING
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1.0e-8
    weight_decay: float = 0.0
    no_decay: list[str] = field(default_factory=list)
    clip: float = 1.0
    schedule: str = "constant"
    schedule_steps: int | None = None
    warmup_steps: int | None = None
    warmup_epochs: float = 0.0
    warmup_ratio: float = 0.0
    min_lr_ratio: float = 0.0
    tristage_late: bool = False
    ema: float = 0.0
    ema_power: float = 0.0


@dataclass(frozen=True)
class AugmentConfig:
    """Training-time image augmentation (data/augment.py), the same draw for o_t and o_{t+H}.

    shift: pixels per camera. crop: area of the random crop, per camera. rotation: degrees, per camera. brightness is a
    factor 1 ± b, brightness_delta a shift (of 1), contrast and saturation are factors 1 ± x, hue a shift (of 1 turn).
    """

    shift: dict[str, int] = field(default_factory=dict)
    crop: dict[str, float] = field(default_factory=dict)
    rotation: dict[str, float] = field(default_factory=dict)
    brightness: float = 0.0
    brightness_delta: float = 0.0
    contrast: float = 0.0
    saturation: float = 0.0
    hue: float = 0.0


@dataclass(frozen=True)
class DataConfig:
    """Where demonstrations come from and how they are read; encoding … tail: data/store_writer.py, data/sampler.py.

    split, language, margin are of CALVIN: which folder, which annotation, frames kept after a window for o_{t+H}.
    drop_noops leaves out LIBERO steps that do nothing (data/noops.py).
    rewordings: other words for the training instructions, a file of data/instructions.py's form.
    bad_files: raise, or skip and count.
    """

    path: str = MISSING
    image_rotation: str = "rotate180"
    encoding: str = "raw"
    pairs: str = "separate"
    tail: str = "pad"
    split: str = "training"
    language: str = "lang_annotations"
    margin: int = 16
    drop_noops: bool = False
    rewordings: str | None = None
    bad_files: str = "raise"
    workers: int | None = None


@dataclass(frozen=True)
class BenchmarkConfig:
    name: str = MISSING
    family: str = MISSING
    suite: str = MISSING
    folder: str = "${.name}"  # under $VLA_DATA
    tasks: list[int] | None = None
    trials: list[str] | None = None  # tasks of a real robot, by name
    cameras: list[str] = MISSING
    resolution: int = MISSING
    init_states: int = 50
    settle_steps: int = 10
    start_displacement: float = 0.0
    fixture_seed: int = 0
    scene: str = "D"
    renderer: str = "auto"
    groups: list[str] | None = None
    simulator: str = "maniskill3"
    python: str = ".venv-simpler/bin/python"  # of simulator=original; relative to the project's root
    shader: str = "auto"
    success_rule: str = "last_step"
    background: str = "overlay"
    paraphrases: str | None = None
    rotation: str = "euler"
    action_scale: float = 1.0
    max_steps: int | None = None
    chunk: int = MISSING


@dataclass(frozen=True)
class CoTrainConfig:
    """Vision-language data in every batch (GenVLA §III-C; data/vision_language.py, vla/co_training.py).

    use: which of `sets` ({name: {annotations, images}}), evenly. share: of the batch's samples. by_length: batches
    among which examples are dealt by length, for less padding (1: as drawn). max_tokens: longer examples are left out.
    weight: of the text loss beside an action loss that is no cross-entropy. released_label_mask: as the public code
    (fact sheet §8.3).
    """

    enabled: bool = False
    use: list[str] = field(default_factory=list)
    sets: dict[str, dict[str, str]] = field(default_factory=dict)
    share: float = 0.5
    prompt: str = "<VLM_PROMPT> {question}"
    by_length: int = 8
    max_tokens: int = 768
    weight: float = 1.0
    released_label_mask: bool = False


@dataclass(frozen=True)
class TrainerConfig:
    """How a run is spread and watched. strategy: single, ddp or fsdp, on `devices` of each of `num_nodes` machines.

    accumulate: backward passes an optimiser step; batch_size is divided by it and by the processes (vla/parallel.py).
    activation_checkpointing: blocks are computed again in the backward pass. check_memory: refuse what cannot fit.
    async_checkpoints: written by a thread while training goes on (vla/callbacks.py). on_nan: where a loss or gradient
    is not finite, stop, or skip the step, at most max_skipped in all (vla/nonfinite.py).
    """

    accelerator: str = "cpu"
    strategy: str = "single"
    devices: int = 1
    num_nodes: int = 1
    accumulate: int = 1
    activation_checkpointing: bool = False
    check_memory: bool = True
    precision: str = "32-true"
    threads: int | None = None
    num_workers: int = 0
    checkpoint_every: int = 500
    keep_checkpoints: int = 2
    async_checkpoints: bool = False
    on_nan: str = "stop"
    max_skipped: int = 10
    log_every: int = 10


@dataclass(frozen=True)
class LoggerConfig:
    wandb: bool = False
    project: str = "vla"
    offline: bool = True


@dataclass(frozen=True)
class TrainConfig:
    size: str = MISSING
    arm: str = MISSING
    policy: Any = MISSING
    inverse_dynamics: InverseDynamicsConfig = field(default_factory=InverseDynamicsConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    augment: AugmentConfig = field(default_factory=AugmentConfig)
    data: DataConfig = field(default_factory=DataConfig)
    cotrain: CoTrainConfig = field(default_factory=CoTrainConfig)
    benchmark: BenchmarkConfig = field(default_factory=BenchmarkConfig)
    trainer: TrainerConfig = field(default_factory=TrainerConfig)
    logger: LoggerConfig = field(default_factory=LoggerConfig)
    chunk: int = MISSING
    cameras: list[str] = MISSING
    normalization: str = MISSING
    init_from: str | None = None
    untouched: bool = False
    batch_size: int = MISSING
    max_steps: int = MISSING
    max_epochs: float | None = None  # whichever of the two is reached first
    time_limit_minutes: float | None = None
    seed: int = 0
    resume: str | None = None
    run_root: str = "runs"
    cell: str | None = None  # another command line to run in place of this one (vla/experiment.py)


@dataclass(frozen=True)
class EvaluateConfig:
    policy: str = MISSING
    arm: str | None = None
    benchmark: BenchmarkConfig = field(default_factory=BenchmarkConfig)
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    data: DataConfig = field(default_factory=DataConfig)
    episodes: int = 20
    first_seed: int = 0
    threads: int | None = None
    device: str = "cpu"
    shard: int | None = None  # of rollouts: this job's share, 0 … shards - 1 (envs/shards.py)
    shards: int | None = None
    results_root: str = "results"


@dataclass(frozen=True)
class CollectConfig:
    benchmark: BenchmarkConfig = field(default_factory=BenchmarkConfig)
    out: str = MISSING
    demos: int = 20
    init_pool: int = 30
    noise: float = 0.4
    frame_every: int = 1
    seed: int = 0
    workers: int = 2


@dataclass(frozen=True)
class ConvertConfig:
    """to: store, lerobot (with video or PNG) or llava (`count` questions, data/llava_writer.py).

    gripper, orientation, keys: of a LeRobot source (data/lerobot.py).
    """

    benchmark: BenchmarkConfig = field(default_factory=BenchmarkConfig)
    data: DataConfig = field(default_factory=DataConfig)
    out: str | None = None
    pairing: str = "aligned"
    to: str = "store"
    video: bool = True
    count: int = 1000
    gripper: str | None = None
    orientation: str | None = None
    keys: dict[str, str | None] = field(default_factory=lambda: {"static": None, "wrist": None})


@dataclass(frozen=True)
class CheckDataConfig:
    """gripper, orientation, keys: of a LeRobot source, as for a conversion."""

    benchmark: BenchmarkConfig = field(default_factory=BenchmarkConfig)
    data: DataConfig = field(default_factory=DataConfig)
    gripper: str | None = None
    orientation: str | None = None
    keys: dict[str, str | None] = field(default_factory=lambda: {"static": None, "wrist": None})


@dataclass(frozen=True)
class ConvertWeightsConfig:
    baseline: str = MISSING
    source: str = MISSING
    out: str = MISSING
    base: str | None = None
    dataset: str | None = None
    image_rotation: str = "rotate180"
    allow_missing: list[str] = field(default_factory=list)
    allow_unexpected: list[str] = field(default_factory=list)


PROGRAMS = {
    "train": TrainConfig,
    "evaluate": EvaluateConfig,
    "collect": CollectConfig,
    "check_data": CheckDataConfig,
    "convert": ConvertConfig,
    "convert_weights": ConvertWeightsConfig,
    "serve": ServeConfig,
}


@cache
def register() -> None:
    """Make the dataclasses known to Hydra, under the names that the defaults lists in conf/ use."""
    store = ConfigStore.instance()
    for name, node in PROGRAMS.items():
        store.store(name=f"schema_{name}", node=open_schema(node))
    for name, node in POLICIES.items():
        store.store(group="schema", name=name, node=open_schema(node), package="policy")


def open_schema(node: type) -> DictConfig:
    """The schema of a frozen dataclass, writable while Hydra composes; `typed` gives the frozen object back."""
    schema = OmegaConf.structured(node)

    def unlock(config: DictConfig) -> None:
        OmegaConf.set_readonly(config, None)
        for key in config:
            child = config._get_node(key)
            if isinstance(child, DictConfig) and not child._is_none() and not child._is_missing():
                unlock(child)

    unlock(schema)
    return schema


def typed(cfg: DictConfig) -> Any:
    """Resolve every interpolation and return the frozen dataclass; a missing value is an OmegaConf error."""
    OmegaConf.resolve(cfg)
    try:
        return OmegaConf.to_object(cfg)
    except FrozenInstanceError as error:
        raise UserError(f"{error}: there is no such key; remove it (+key=value adds nothing here)") from error
