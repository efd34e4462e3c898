"""The typed arguments of evaluate.py's `evaluation`: rollouts, probes, questions, latency. No import of torch here."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from omegaconf import MISSING


@dataclass(frozen=True)
class ProbeConfig:
    """How a light head is trained on frozen visual tokens (IDL tables 11 and 12; vla/analysis/mlp_probe.py)."""

    lr: float = 2.0e-4
    batch_size: int = 64
    steps: int = 1000
    epochs: float = 1.0
    chunk: int = 4
    gripper_weight: float = 0.01
    dropout: float = 0.1
    validation: float = 0.1
    validate_every: int = 100
    seed: int = 0


@dataclass(frozen=True)
class VQASetConfig:
    """One benchmark: its annotation file (POPE: a folder of three), its pictures, and `{question}` in a prompt."""

    annotations: str = ""
    images: str = ""
    prompt: str = ""


@dataclass(frozen=True)
class VQASetsConfig:
    textvqa: VQASetConfig = field(default_factory=VQASetConfig)
    pope: VQASetConfig = field(default_factory=VQASetConfig)
    gqa: VQASetConfig = field(default_factory=VQASetConfig)
    vizwiz: VQASetConfig = field(default_factory=VQASetConfig)
    vsr: VQASetConfig = field(default_factory=VQASetConfig)


@dataclass(frozen=True)
class VQAConfig:
    """Questions to a policy's language model (vla/analysis/vqa.py, vla/generation.py).

    select: the benchmarks to run, all by default. limit: as many questions of each, drawn at random.
    template: what stands around a prompt, with `{prompt}`; by default the baseline's own. lower_case: the prompt in
    lower case. head: where Qwen's language head comes from, which a policy does not keep.
    """

    sets: VQASetsConfig = field(default_factory=VQASetsConfig)
    select: list[str] | None = None
    limit: int | None = None
    batch_size: int = 16
    max_new_tokens: int = 128
    template: str | None = None
    lower_case: bool = False
    head: str | None = None


@dataclass(frozen=True)
class Cifar10Config:
    """Linear probe and t-SNE of pooled visual tokens on CIFAR-10 (vla/analysis/cifar10.py).

    train, test, tsne: how many images, drawn at random, as many of each class. l2: the penalties to choose among.
    """

    path: str = ""
    train: int = 50000
    test: int = 10000
    tsne: int = 2000
    perplexity: float = 30.0
    batch_size: int = 64
    l2: list[float] = field(default_factory=lambda: [1e-4, 1e-3, 1e-2, 1e-1])
    seed: int = 0


@dataclass(frozen=True)
class EvaluationConfig:
    """Rollouts: execute_steps … ensemble (envs/rollout.py), compile (vla/compiled.py).

    Probes: tap, features (keep, drop, off), probe.
    """

    name: str = MISSING
    execute_steps: int | None = None
    workers: int = 2
    max_batch: int = 8
    exact: bool = True
    retries: int = 2
    episode_timeout: float = 600.0
    videos: int = 0
    ensemble: Any = "policy"
    compile: bool = False
    tap: str | None = None
    features: str = "keep"
    probe: ProbeConfig = field(default_factory=ProbeConfig)
    repeats: int = 100  # calls that evaluation=latency times
    vqa: VQAConfig = field(default_factory=VQAConfig)
    cifar10: Cifar10Config = field(default_factory=Cifar10Config)
