"""The typed arguments of each baseline, under `policy` in a run's configuration; its constructor explains each.

No import of torch here: `--help` and a misspelt key answer at once.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from omegaconf import MISSING


@dataclass(frozen=True)
class StringConfig:
    """How actions are written as text (vla/action_tokens/strings.py).

    form: genvla or fixed. constrained: decode by the grammar; without it a text may be malformed, which is counted.
    released_label_mask: count the space before the text too, as the public code does (fact sheet §8.2).
    """

    form: str = "genvla"
    prompt: str = "<VLA_PROMPT> What action should the robot take to {instruction}?"
    constrained: bool = True
    released_label_mask: bool = False


@dataclass(frozen=True)
class IdeasConfig:
    """What GenVLA changes in a baseline, applied to one that is built (vla/build.py). GenVLA §III; fact sheet §8.

    dual: a frozen vision encoder beside the trained one (vla/dual_encoder.py).
    actions: native, or string: as text, the baseline's own action head gone (vla/string_policy.py).
    speaks: keep the language decoder trained for text beside native actions (co-training).
    language_head: of VLM4VLA, which keeps none: tied (Qwen3-VL 2B and 4B), or the release whose lm_head it is (8B).
    """

    dual: bool = False
    actions: str = "native"
    string: StringConfig = field(default_factory=StringConfig)
    speaks: bool = False
    language_head: str = "tied"


@dataclass(frozen=True)
class VLM4VLAConfig(IdeasConfig):
    """Fact sheet §3; the constructor of vla/baselines/vlm4vla.py explains each."""

    name: str = "vlm4vla"
    pretrained: str | None = None
    vision: str = "qwen"
    vision_config: dict[str, Any] = field(default_factory=dict)
    text_config: dict[str, Any] = field(default_factory=dict)
    image_size: int = 224
    vision_size: int = 448
    attention: str = "sdpa"
    deepstack: bool = True
    prompt: str = MISSING
    head_width: int = 1024
    huber_delta: float = 1.0
    gripper_weight: float = 0.01


@dataclass(frozen=True)
class FlowerConfig(IdeasConfig):
    """Fact sheet §4; the constructor of vla/baselines/flower.py explains each."""

    name: str = "flower"
    pretrained: str | None = None
    vision_config: dict[str, Any] = field(default_factory=dict)
    text_config: dict[str, Any] = field(default_factory=dict)
    dit_config: dict[str, Any] = field(default_factory=dict)
    image_size: int = 224
    prompt: str = MISSING
    max_text_tokens: int = 77
    flow_steps: int = 4
    times: str = "stratified"
    draws: int = 1
    token_dropout: float = 0.1
    attend_padding: bool = True
    attention: str = "sdpa"


@dataclass(frozen=True)
class SpatialVLAConfig(IdeasConfig):
    """Fact sheet §5; the constructor of vla/baselines/spatialvla.py explains each."""

    name: str = "spatialvla"
    pretrained: str | None = None
    pretrained_depth: str | None = None
    vision_config: dict[str, Any] = field(default_factory=dict)
    text_config: dict[str, Any] = field(default_factory=dict)
    depth_config: dict[str, Any] = field(default_factory=dict)
    image_size: int = 224
    bins: list[int] = MISSING
    intrinsics: dict[str, float] = MISSING
    min_sigma: float = 0.0
    adapt_grid: bool = False
    mask: str = "prefix_lm"
    ensemble: float | None = None
    attention: str = "sdpa"


@dataclass(frozen=True)
class OpenVLAConfig(IdeasConfig):
    """Fact sheet §6; the constructor of vla/baselines/openvla.py explains each."""

    name: str = "openvla"
    pretrained: str | None = None
    dino_config: dict[str, Any] = field(default_factory=dict)
    siglip_config: dict[str, Any] = field(default_factory=dict)
    text_config: dict[str, Any] = field(default_factory=dict)
    image_size: int = 224
    prompt: str = MISSING
    space_id: int | None = None
    bins_end: int | None = None
    center_crop: bool = False
    frozen_tower: str = "siglip"
    attention: str = "sdpa"


@dataclass(frozen=True)
class Pi0Config(IdeasConfig):
    """Fact sheet §7; the constructor of vla/baselines/pi0.py explains each."""

    name: str = "pi0"
    pretrained: str | None = None
    vision_config: dict[str, Any] = field(default_factory=dict)
    text_config: dict[str, Any] = field(default_factory=dict)
    expert_config: dict[str, Any] = field(default_factory=dict)
    image_size: int = 224
    state_dim: int = 32
    action_dim: int = 32
    flow_steps: int = 10
    max_text_tokens: int = 48
    gripper: list[float] = field(default_factory=lambda: [0.5, 0.5])
    attention: str = "sdpa"


POLICIES = {
    "vlm4vla": VLM4VLAConfig,
    "flower": FlowerConfig,
    "spatialvla": SpatialVLAConfig,
    "openvla": OpenVLAConfig,
    "pi0": Pi0Config,
}
"""Baseline -> schema; the only list of the baselines' names. `FlowerConfig` is the schema of class `Flower`."""
