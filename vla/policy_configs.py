"""The typed arguments of each baseline, under `policy` in a run's configuration; its constructor explains each.

No import of torch here: `--help` and a misspelt key answer at once.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from omegaconf import MISSING


@dataclass(frozen=True)
class VLM4VLAConfig:
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


POLICIES = {"vlm4vla": VLM4VLAConfig}
"""Baseline -> schema; the only list of the baselines' names."""
