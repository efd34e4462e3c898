"""One port for both protocols: the path chooses, "/" openpi's and "/vla-eval" vla-eval's.

The first frame cannot choose: openpi's client waits for the server to speak, vla-eval's speaks first. One port means
one bound on clients and messages, one health check, and batches that clients of both share.

    with serve(policy, cfg, about) as port: ...         # from a background thread
    asyncio.run(run(policy, cfg, about, print))         # for good: scripts/serve.py

There is no password and no encryption: bind it to loopback or a network of your own (or put a proxy in front).
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import threading
from collections.abc import Callable, Iterator
from http import HTTPStatus
from typing import Any

import numpy as np
from websockets.asyncio.server import Request, Response, Server, ServerConnection
from websockets.asyncio.server import serve as listen
from websockets.exceptions import ConnectionClosed

from envs.server import Predictor
from vla.errors import UserError
from vla.serving import harness, openpi
from vla.serving.batching import Batcher
from vla.serving.config import ServeConfig

OPENPI, VLA_EVAL = "/", "/vla-eval"
HEALTH = ("/healthz", "/health")
"""Where openpi's and vla-eval's servers have it."""
WARM_UP_SIZE = 224
QUEUED = 1
"""Frames of a client that are read ahead: with the size of a message and the number of clients, the bound on memory."""

log = logging.getLogger(__name__)
quiet = logging.getLogger("vla.serving.handshakes")
quiet.setLevel(logging.CRITICAL)  # websockets has a traceback for every stranger that speaks no HTTP


class PolicyService:
    """A policy's clients; `ready` once it has been warmed up.

    Args:
        about: of the policy directory's config.json, for the clients' information.

    Raises:
        UserError: a configuration that cannot be (a camera without a key, more steps than the chunk has).
    """

    def __init__(self, policy: Predictor, cfg: ServeConfig, about: dict[str, Any]) -> None:
        self.policy, self.cfg, self.about = policy, cfg, about
        self.cameras = list(policy.cameras)
        self.ready = False
        self.server: Server | None = None
        self.batcher = Batcher(policy, cfg.max_batch, cfg.window_ms / 1000, self.clients, cfg.device)
        self.execute_steps = cfg.execute_steps or (policy.chunk if getattr(policy, "ensemble", None) is None else 1)
        check(self)

    def clients(self) -> int:
        return len(self.server.connections) if self.server else 0

    async def run(self, started: Callable[[int], None], warm: Callable[[], None] = lambda: None) -> None:
        """Listen, warm up, serve until cancelled. `started` gets the port; requests before `warm` wait.

        Raises:
            UserError: the port is taken.
        """

        def warmed() -> None:
            self.ready = True
            warm()

        options = {"compression": None, "max_size": int(self.cfg.max_message_mb * 2**20), "max_queue": QUEUED}
        options |= {"origins": [None]}  # a browser names the page it was told by; no robot does
        options |= {"logger": quiet}
        try:
            server = await listen(self.handle, self.cfg.host, self.cfg.port, process_request=self.answer, **options)
        except OSError as error:
            raise UserError(f"{self.cfg.host}:{self.cfg.port} cannot be listened on ({error}); try port=…") from error
        async with server:
            self.server = server
            started(next(iter(server.sockets)).getsockname()[1])
            await self.batcher.run(self.blank(), warmed)

    def answer(self, connection: ServerConnection, request: Request) -> Response | None:
        """Health checks, and who is let in."""
        path = request.path.partition("?")[0]
        if path in HEALTH:
            if self.ready:
                return connection.respond(HTTPStatus.OK, "OK\n")
            return connection.respond(HTTPStatus.SERVICE_UNAVAILABLE, "warming up\n")
        if path not in (OPENPI, VLA_EVAL):
            return connection.respond(HTTPStatus.NOT_FOUND, f"openpi's protocol is at /, vla-eval's at {VLA_EVAL}\n")
        if self.clients() >= self.cfg.max_clients:
            told = f"{self.cfg.max_clients} clients are connected, and no more are let in (max_clients)\n"
            return connection.respond(HTTPStatus.SERVICE_UNAVAILABLE, told)
        return None

    async def handle(self, connection: ServerConnection) -> None:
        path = connection.request.path.partition("?")[0]
        try:
            if path == VLA_EVAL:
                keys = self.cfg.vla_eval
                await harness.talk(connection, self.batcher, keys, self.cameras, self.execute_steps, self.cfg.gripper)
            else:
                await openpi.talk(connection, self.batcher, self.cfg.openpi, self.cameras, self.metadata())
        except ConnectionClosed as closed:
            log.info("a client of %s left: %s", path, closed)
        except Exception:
            log.exception("the policy failed a client of %s", path)

    def metadata(self) -> dict[str, Any]:
        """What an openpi client is told on connecting."""
        keys = self.cfg.openpi
        return {
            "policy": {key: self.about.get(key) for key in ("baseline", "arm", "benchmark", "checkpoint")},
            "cameras": {camera: keys.cameras[camera] for camera in self.cameras},
            "state": keys.state,
            "prompt": keys.prompt,
            "chunk": self.policy.chunk,
            "action": "translation 3, rotation 3, in the units of the training data; gripper, 1 = open, 0 = closed",
            "image_rotation": self.about.get("image_rotation"),
        }

    def blank(self) -> dict[str, Any]:
        """An observation to warm up with."""
        statistics = getattr(getattr(self.policy, "normalizer", None), "statistics", None)
        state = getattr(statistics, "state", None)
        frame = np.zeros((WARM_UP_SIZE, WARM_UP_SIZE, 3), np.uint8)
        return {
            "images": {camera: frame for camera in self.cameras},
            "state": np.array(state["mean"] if state else [], np.float32),
            "task_description": "warm up",
            "seed": 0,
            "step": 0,
        }


def check(service: PolicyService) -> None:
    cfg, chunk = service.cfg, service.policy.chunk
    for name, keys in (("openpi", cfg.openpi), ("vla_eval", cfg.vla_eval)):
        if lacking := [camera for camera in service.cameras if camera not in keys.cameras]:
            raise UserError(f"the policy reads the camera {lacking[0]!r}; say what clients call it: +{name}.cameras.…")
    if not 1 <= service.execute_steps <= chunk:
        raise UserError(f"execute_steps={cfg.execute_steps} is not in 1..{chunk}, the length of the policy's chunk")
    if cfg.gripper not in harness.GRIPPERS:
        raise UserError(f"gripper={cfg.gripper} is not known; choose one of {', '.join(harness.GRIPPERS)}")
    for name in ("max_batch", "max_clients", "max_message_mb"):
        if getattr(cfg, name) <= 0:
            raise UserError(f"{name}={getattr(cfg, name)} lets nobody in; give a positive number")


@contextlib.contextmanager
def serve(policy: Predictor, cfg: ServeConfig, about: dict[str, Any], wait_s: float = 600.0) -> Iterator[int]:
    """Serve from a background thread; yields the port once the policy is warm.

    Raises:
        UserError: as PolicyService; TimeoutError: not warm within `wait_s`; and what the policy raises warming up.
    """
    service = PolicyService(policy, cfg, about)
    warm, place, failed = threading.Event(), {}, []

    async def main() -> None:
        place["loop"], place["task"] = asyncio.get_running_loop(), asyncio.current_task()
        with contextlib.suppress(asyncio.CancelledError):
            await service.run(lambda port: place.update(port=port), warm.set)

    def body() -> None:
        try:
            asyncio.run(main())
        except Exception as error:
            failed.append(error)
        finally:
            warm.set()

    thread = threading.Thread(target=body, name="policy server", daemon=True)
    thread.start()
    try:
        if not warm.wait(wait_s):
            raise TimeoutError(f"the policy was not warm after {wait_s} s")
        if failed:
            raise failed[0]
        yield place["port"]
    finally:
        if thread.is_alive():
            place["loop"].call_soon_threadsafe(place["task"].cancel)
            thread.join(10)
