"""The typed shape of every configuration: YAML in conf/ is checked against these dataclasses when a run starts.

Hydra composes YAML, OmegaConf checks it against the dataclasses below (a misspelt key or a wrong type fails before
anything is imported or written), and `typed()` turns it into frozen objects, so that no DictConfig reaches a model.
Nothing here imports torch: `--help` and a misspelt key answer at once.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import FrozenInstanceError, asdict, dataclass, field
from pathlib import Path
from typing import Any

from hydra.core.config_store import ConfigStore
from omegaconf import MISSING, DictConfig, OmegaConf

from vla.errors import UserError
from vla.evaluation_configs import EvaluationConfig
from vla.policy_configs import POLICIES, IdeasConfig

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

    use: which of `sets` ({name: {annotations, images}}), evenly. share: of the batch's samples. max_tokens: longer
    examples are left out. weight: of the text loss beside an action loss that is no cross-entropy.
    released_label_mask: as the public code (fact sheet §8.3).
    """

    enabled: bool = False
    use: list[str] = field(default_factory=list)
    sets: dict[str, dict[str, str]] = field(default_factory=dict)
    share: float = 0.5
    prompt: str = "<VLM_PROMPT> {question}"
    max_tokens: int = 768
    weight: float = 1.0
    released_label_mask: bool = False


@dataclass(frozen=True)
class TrainerConfig:
    accelerator: str = "cpu"
    devices: int = 1
    precision: str = "32-true"
    threads: int | None = None
    num_workers: int = 0
    checkpoint_every: int = 500
    keep_checkpoints: int = 2
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
class ConvertWeightsConfig:
    baseline: str = MISSING
    source: str = MISSING
    out: str = MISSING
    base: str | None = None
    dataset: str | None = None
    image_rotation: str = "rotate180"
    allow_missing: list[str] = field(default_factory=list)
    allow_unexpected: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class ClientKeysConfig:
    """Where a client's observation holds what the policy reads; "a/b" is that key, or b in the map at a.

    cameras: per camera of the policy. state: null where the robot sends none (π0 needs one).
    """

    cameras: dict[str, str] = MISSING
    state: str | None = None
    prompt: str = MISSING


@dataclass(frozen=True)
class ServeConfig:
    """scripts/serve.py. window_ms: how long a request waits for others to share its batch, if other clients are there.

    execute_steps: actions of a chunk that a vla-eval client executes before its next observation is read. gripper: what
    vla-eval's benchmark takes, open_01, close_positive or close_negative (vla/serving/harness.py).
    """

    policy: str = MISSING
    host: str = "127.0.0.1"
    port: int = 8000
    openpi: ClientKeysConfig = field(default_factory=ClientKeysConfig)
    vla_eval: ClientKeysConfig = field(default_factory=ClientKeysConfig)
    execute_steps: int | None = None
    gripper: str = "open_01"
    max_batch: int = 16
    window_ms: float = 5.0
    max_message_mb: float = 16.0
    max_clients: int = 64
    threads: int | None = None
    device: str = "cpu"


PROGRAMS = {
    "train": TrainConfig,
    "evaluate": EvaluateConfig,
    "collect": CollectConfig,
    "convert": ConvertConfig,
    "convert_weights": ConvertWeightsConfig,
    "serve": ServeConfig,
}


def register() -> None:
    """Make the dataclasses known to Hydra, under the names that the defaults lists in conf/ use."""
    store = ConfigStore.instance()
    for name, node in PROGRAMS.items():
        store.store(name=f"schema_{name}", node=_open(node))
    for name, node in POLICIES.items():
        store.store(group="schema", name=name, node=_open(node), package="policy")


def _open(node: type) -> DictConfig:
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


# What may change between two launches of one run without making it another run.
_NOT_IDENTITY = ("resume", "run_root", "logger", "time_limit_minutes", "cell")
_NOT_IDENTITY_OF_DATA = ("workers",)
_IDENTITY_OF_BENCHMARK = ("name", "family", "suite", "tasks", "cameras", "resolution")  # the rest is about rollouts
_NOT_IDENTITY_OF_TRAINER = ("num_workers", "checkpoint_every", "keep_checkpoints", "log_every")


def run_hash(cfg: TrainConfig) -> str:
    """Eight hex digits that are a function of the resolved configuration alone, never of the clock or the machine."""
    identity = {k: v for k, v in asdict(cfg).items() if k not in _NOT_IDENTITY}
    identity["data"] = {k: v for k, v in identity["data"].items() if k not in _NOT_IDENTITY_OF_DATA}
    # What came later and is off leaves no trace, so that runs made before it are found.
    if not cfg.cotrain.enabled:
        del identity["cotrain"]
    if cfg.data.rewordings is None:
        del identity["data"]["rewordings"]
    off = asdict(IdeasConfig())
    identity["policy"] = {k: v for k, v in identity["policy"].items() if k not in off or v != off[k]}
    identity["benchmark"] = {k: v for k, v in identity["benchmark"].items() if k in _IDENTITY_OF_BENCHMARK}
    identity["trainer"] = {k: v for k, v in identity["trainer"].items() if k not in _NOT_IDENTITY_OF_TRAINER}
    return hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:8]


def run_dir(cfg: TrainConfig) -> Path:
    """runs/<what it is>-<hash>: the same for every launch of the same configuration."""
    name = f"{cfg.policy.name}-{cfg.size}-{cfg.arm}-{cfg.benchmark.name}-s{cfg.seed}-{run_hash(cfg)}"
    return Path(cfg.run_root) / name
