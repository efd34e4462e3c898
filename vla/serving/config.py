"""The typed arguments of scripts/serve.py. No import of torch here."""

from __future__ import annotations

from dataclasses import dataclass, field

from omegaconf import MISSING


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
    vla-eval's benchmark takes, open_01, close_positive or close_negative (vla/serving/harness.py). compile: the policy
    first, in a minute or two (vla/compiled.py).
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
    compile: bool = False
    threads: int | None = None
    device: str = "cpu"
