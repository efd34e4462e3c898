"""A policy whose heavy parts run through torch.compile, for those who act with it for long.

Compiling takes from half a minute to some minutes per policy and process and saves what Python and small kernels cost:
much on a small model or a GPU that waits for its host, little where large products fill the device (scripts/bench.py
latency --compile). Actions agree with the plain policy's to rounding, not to the bit, so a rollout that is compiled is
another run than one that is not.
"""

from __future__ import annotations

import sys
import time

import numpy as np
import torch

from envs.server import observation_batch
from vla.errors import UserError
from vla.policy import Policy


def compile_policy(policy: Policy, device: str, resolution: int) -> Policy:
    """`policy`, its `compiled_parts` compiled now, for frames of `resolution` pixels; others compile again.

    Raises:
        UserError: torch cannot compile here, for want of a C++ compiler for instance.
    """
    for name in policy.compiled_parts:
        setattr(policy, name, torch.compile(getattr(policy, name)))
    parts = " and ".join(policy.compiled_parts)
    print(f"compiling {parts}; this may take a minute or two", file=sys.stderr, flush=True)
    start = time.monotonic()
    try:
        with torch.inference_mode():
            policy.predict(blank(policy, device, resolution))
    except torch._dynamo.exc.BackendCompilerFailed as error:
        why = str(error).strip().splitlines()[0]
        raise UserError(
            f"torch cannot compile the policy here ({why}); install a C++ compiler, or compile=false"
        ) from error
    print(f"compiled in {time.monotonic() - start:.0f} s", file=sys.stderr, flush=True)
    return policy


def blank(policy: Policy, device: str, resolution: int) -> dict:
    """One row of an observation, laid out in memory as the servers lay it out: another layout compiles again."""
    state = policy.normalizer.statistics.state
    frame = np.zeros((resolution, resolution, 3), dtype=np.uint8)
    wire = {"images": {camera: frame for camera in policy.cameras}, "state": state["mean"] if state else []}
    return observation_batch([wire | {"task_description": "warm up"}], [0], device)
