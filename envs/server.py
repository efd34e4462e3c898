"""A policy behind vla-eval's batching websocket server, in the process that holds the policy.

`serve(server)` is a context manager giving the url that workers (and vla-eval's own benchmarks) connect to. Cameras
and keys on the wire: {"images": {camera: uint8 (H, W, 3)}, "state": float (S,), "task_description": str} and, from our
own workers, "seed" and "step".
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Protocol

import numpy as np
import torch
from vla_eval.api import serve_background
from vla_eval.model_servers.base import SessionContext
from vla_eval.model_servers.predict import PredictModelServer
from vla_eval.specs import DimSpec

from envs.benchmark import ACTION_SPEC, OBSERVATION_SPEC
from vla.ensemble import TemporalEnsembler


class Predictor(Protocol):
    """What the server needs of a policy (see vla/policy.py)."""

    chunk: int

    def predict(self, observation: dict[str, Any]) -> torch.Tensor:
        """(B, chunk, 7) actions in the benchmark's units from the batch `observation_batch` makes."""


class PolicyServer(PredictModelServer):
    """Answers an observation with the first `execute_steps` actions of the policy's chunk.

    Args:
        policy: called under `torch.inference_mode`, from one thread, with CPU tensors.
        execute_steps: actions per reply, 1..policy.chunk.
        max_batch: most observations stacked into one call of the policy (`exact=False` only).
        exact: compute every observation in a call of its own, in the order of arrival. Floating-point sums change
            with the batch size, so that otherwise an episode's outcome would depend on which requests happened to
            share a batch. vla-eval's batching is then off: a batch computed row by row would hold back the first
            reply until the last is done. `exact=False` stacks whatever is waiting; use it when throughput on a GPU
            matters more than a bit-reproducible record.
        ensemble: temperature of temporal ensembling (vla/ensemble.py); the policy is then asked every step.

    Attributes:
        error: the first exception out of the policy. vla-eval sends clients its text only; a caller in this process
            raises this one.
    """

    def __init__(
        self,
        policy: Predictor,
        execute_steps: int,
        max_batch: int = 1,
        exact: bool = True,
        ensemble: float | None = None,
    ) -> None:
        super().__init__(max_batch_size=1 if exact else max_batch)
        self.policy = policy
        self.ensemble = ensemble
        self._ensemblers: dict[str, tuple[str, TemporalEnsembler]] = {}
        self.execute_steps = execute_steps
        self.error: Exception | None = None

    def predict_batch(self, obs_batch: list[dict[str, Any]], ctx_batch: list[SessionContext]) -> list[dict[str, Any]]:
        """One {"actions": float32 (execute_steps, 7)} per observation, from one call of the policy.

        Raises:
            ValueError: the policy returned another shape, or NaN or infinite actions; and whatever the policy raises.
        """
        try:
            steps = [
                obs.get("step", ctx.step * self.execute_steps) for obs, ctx in zip(obs_batch, ctx_batch, strict=True)
            ]
            with torch.inference_mode():
                chunks = self.policy.predict(observation_batch(obs_batch, steps, device_of(self.policy)))
            actions = chunks.float().cpu().numpy()
            expected = (len(obs_batch), self.policy.chunk, 7)
            if actions.shape != expected or not np.isfinite(actions).all():
                got = f"{actions.shape}" + ("" if np.isfinite(actions).all() else " with NaN or infinity")
                raise ValueError(f"the policy must return finite actions of shape {expected}, got {got}")
        except Exception as error:
            self.error = self.error or error
            raise
        if self.ensemble is None:
            return [{"actions": chunk[: self.execute_steps]} for chunk in actions]
        executed = [self._ensembler(o, c)(a) for o, c, a in zip(obs_batch, ctx_batch, actions, strict=True)]
        return [{"actions": action[None]} for action in executed]

    def _ensembler(self, observation: dict[str, Any], ctx: SessionContext) -> TemporalEnsembler:
        """The session's; a new one with every episode, and in a chain with every instruction."""
        told, ensembler = self._ensemblers.get(ctx.session_id, (None, None))
        if ctx.is_first or told != observation["task_description"]:
            ensembler = TemporalEnsembler(self.policy.chunk, self.ensemble)
            self._ensemblers[ctx.session_id] = (observation["task_description"], ensembler)
        return ensembler

    def get_action_spec(self) -> dict[str, DimSpec]:
        return ACTION_SPEC

    def get_observation_spec(self) -> dict[str, DimSpec]:
        return OBSERVATION_SPEC


def device_of(policy: Predictor) -> torch.device:
    """Where a policy's weights are; the CPU for one that has none."""
    if isinstance(policy, torch.nn.Module) and (first := next(policy.parameters(), None)) is not None:
        return first.device
    return torch.device("cpu")


def observation_batch(
    observations: list[dict[str, Any]], steps: list[int], device: torch.device | str = "cpu"
) -> dict[str, Any]:
    """Stack wire observations into a policy's input; images and state go to `device`.

    Returns:
        {"images": {camera: uint8 (B, 3, H, W)}, "state": float32 (B, S), "instruction": list[str],
         "seed": int64 (B,) the episode's seed, "step": int64 (B,) control steps executed so far}
    """

    def stacked(arrays: list[np.ndarray]) -> torch.Tensor:
        return torch.from_numpy(np.stack(arrays)).to(device)

    cameras = observations[0]["images"]
    return {
        "images": {c: stacked([obs["images"][c] for obs in observations]).permute(0, 3, 1, 2) for c in cameras},
        "state": stacked([np.asarray(obs["state"], dtype=np.float32) for obs in observations]),
        "instruction": [obs["task_description"] for obs in observations],
        "seed": torch.tensor([obs.get("seed", 0) for obs in observations]),
        "step": torch.tensor(steps),
    }


@contextmanager
def serve(server: PolicyServer) -> Iterator[str]:
    """Serve on a free port of the loopback interface from a background thread; yields the ws:// url."""
    # vla-eval logs a traceback per failed request and warns of several requests in flight; the first comes out as
    # `server.error`, the second is how batching works.
    log = logging.getLogger("vla_eval.model_servers")
    level = log.level
    log.setLevel(logging.CRITICAL)
    try:
        with serve_background(server, host="127.0.0.1", port=0) as handle:
            yield handle.url
    finally:
        log.setLevel(level)
