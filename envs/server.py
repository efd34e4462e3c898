"""A policy behind vla-eval's batching websocket server, in the process that holds the policy.

`serve(server)` is a context manager giving the url that workers (and vla-eval's own benchmarks) connect to. Cameras
and keys on the wire: {"images": {camera: uint8 (H, W, 3)}, "state": float (S,), "task_description": str} and, from our
own workers, "seed" and "step".

vla-eval's handler of a connection is used and not its server, which takes messages of any length and lets whoever is on
the machine connect and change the batch size: here the url holds a secret and a message has a bound.
"""

from __future__ import annotations

import logging
import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from http import HTTPStatus
from typing import Any, Protocol

import anyio
import numpy as np
import torch
from anyio.abc import TaskStatus
from anyio.from_thread import start_blocking_portal
from vla_eval.model_servers.base import SessionContext
from vla_eval.model_servers.predict import PredictModelServer
from vla_eval.model_servers.serve import _handle_connection
from vla_eval.specs import DimSpec
from websockets.asyncio.server import Request, Response, ServerConnection
from websockets.asyncio.server import serve as listen

from envs.benchmark import ACTION_SPEC, OBSERVATION_SPEC
from vla.ensemble import TemporalEnsembler

MAX_MESSAGE = 64 * 2**20
"""Bytes; an observation of three cameras of 512 × 512 is 2.4 MB."""


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
    loggers = [logging.getLogger(name) for name in ("vla_eval.model_servers", "websockets.server")]
    levels = [log.level for log in loggers]
    for log in loggers:
        log.setLevel(logging.CRITICAL)
    secret = f"/{secrets.token_urlsafe(16)}"
    try:
        with start_blocking_portal() as portal:
            serving, port = portal.start_task(_serve, server, secret)
            try:
                yield f"ws://127.0.0.1:{port}{secret}"
            finally:
                serving.cancel()
    finally:
        for log, level in zip(loggers, levels, strict=True):
            log.setLevel(level)


async def _serve(server: PolicyServer, secret: str, *, task_status: TaskStatus[int]) -> None:
    """vla-eval's serve_async with a door and a bound; reports its port and goes on until it is cancelled."""

    def admit(connection: ServerConnection, request: Request) -> Response | None:
        if not secrets.compare_digest(request.path.encode(), secret.encode()):
            return connection.respond(HTTPStatus.FORBIDDEN, "this server has its own clients\n")
        return None

    async with anyio.create_task_group() as group:
        await server.on_serve_start(group)
        async with listen(
            partial(_handle_connection, model_server=server), "127.0.0.1", 0, process_request=admit,
            compression=None, max_size=MAX_MESSAGE, ping_interval=None,
        ) as listening:  # fmt: skip
            task_status.started(listening.sockets[0].getsockname()[1])
            await anyio.sleep_forever()
