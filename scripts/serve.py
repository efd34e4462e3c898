"""Serve an exported policy over a socket: to robots that speak openpi's client protocol, and to vla-eval.

    python scripts/serve.py policy=runs/<run>/policy port=8000 device=cuda

A robot's side with limits on the motion is examples/robot_loop.py. Ctrl-C or SIGTERM ends it.
"""

from __future__ import annotations

import asyncio
import signal
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from vla.cli import main
from vla.serving.config import ServeConfig


@main("serve")
def run(cfg: ServeConfig) -> None:
    import torch

    from vla.checkpoint import checkpoint_hash, load_policy
    from vla.compiled import compile_policy
    from vla.experiment import RUN, policy_of_run
    from vla.serving.server import VLA_EVAL, WARM_UP_SIZE, PolicyService

    if cfg.threads:
        torch.set_num_threads(cfg.threads)
    path = policy_of_run(cfg.policy) if cfg.policy.startswith(RUN) else Path(cfg.policy)
    policy, config = load_policy(path, cfg.device)
    if cfg.compile:
        compile_policy(policy, cfg.device, WARM_UP_SIZE)
    about = config["about"] | {"baseline": config["baseline"], "checkpoint": checkpoint_hash(path)}
    service = PolicyService(policy, cfg, about)

    async def until_stopped() -> None:
        asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, asyncio.current_task().cancel)
        await service.run(
            lambda port: say(f"listening on {cfg.host}:{port}; warming up"),
            lambda: say(f"ready: openpi clients at /, vla-eval's at {VLA_EVAL}, health at /healthz"),
        )

    try:
        asyncio.run(until_stopped())
    except asyncio.CancelledError:
        say("stopped")


def say(line: str) -> None:
    print(line, flush=True)


if __name__ == "__main__":
    run()
