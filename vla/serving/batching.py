"""Requests of concurrent clients, answered by as few calls of the policy as they allow.

The policy runs in one thread of its own. A request starts a batch, which closes when it is full, when every connected
client is in it, or after a window; while the policy is busy the next batch gathers.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from envs.server import Predictor, observation_batch
from vla.errors import UserError

log = logging.getLogger(__name__)
STOPPING = "the server is stopping; connect again later"


@dataclass
class _Request:
    observation: dict[str, Any]
    answer: asyncio.Future[np.ndarray]

    def shapes(self) -> tuple:
        """Requests stack where these are equal."""
        images = self.observation["images"]
        return tuple(sorted((c, image.shape) for c, image in images.items())), self.observation["state"].shape


class Batcher:
    """Answers observations (vla/serving/observation.py) with action chunks.

    Args:
        policy: called under `torch.inference_mode`, from one thread, with images and state on `device`.
        max_batch: most observations in one call. Floating-point sums depend on how many share it; 1 keeps every answer
            a function of its own observation.
        window_s: longest wait for others.
        clients: how many clients could be asking; a request that is the only possible one does not wait.
    """

    def __init__(
        self, policy: Predictor, max_batch: int, window_s: float, clients: Callable[[], int], device: str = "cpu"
    ) -> None:
        self.policy, self.max_batch, self.window_s, self.clients = policy, max_batch, window_s, clients
        self.device = device
        self._queue: asyncio.Queue[_Request] = asyncio.Queue()
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="policy")
        self._waiting: set[asyncio.Future[np.ndarray]] = set()
        self._stopped = False

    async def predict(self, observation: dict[str, Any]) -> np.ndarray:
        """The chunk, float32 (H, 7), for one observation.

        Raises:
            ValueError: the policy gave NaN or another shape; and whatever the policy raises.
            UserError: the server is stopping.
        """
        if self._stopped:
            raise UserError(STOPPING)
        answer = asyncio.get_running_loop().create_future()
        self._waiting.add(answer)
        try:
            await self._queue.put(_Request(observation, answer))
            return await answer
        finally:
            self._waiting.discard(answer)

    async def run(self, warm_up: dict[str, Any], warm: Callable[[], None]) -> None:
        """Predict `warm_up` alone and as a full batch, call `warm`, then answer requests until cancelled."""
        try:
            for size in sorted({1, self.max_batch}):
                await self._call([warm_up] * size)
            warm()
            while True:
                groups: dict[tuple, list[_Request]] = {}
                for request in await self._gather():
                    groups.setdefault(request.shapes(), []).append(request)
                for group in groups.values():
                    await self._answer(group)
        finally:
            self._stopped = True
            for answer in [answer for answer in self._waiting if not answer.done()]:
                answer.set_exception(UserError(STOPPING))
            self._thread.shutdown(wait=False, cancel_futures=True)

    async def _gather(self) -> list[_Request]:
        batch = [await self._queue.get()]
        closing = asyncio.get_running_loop().time() + self.window_s
        try:
            async with asyncio.timeout_at(closing):
                while len(batch) < self.max_batch and (len(batch) < self.clients() or not self._queue.empty()):
                    batch.append(await self._queue.get())
        except TimeoutError:
            log.debug("a batch of %d after the window", len(batch))
        return batch

    async def _answer(self, group: list[_Request]) -> None:
        """One call for all; where it fails, one for each, so that only those at fault are told so."""
        try:
            chunks = await self._call([request.observation for request in group])
        except Exception as error:
            if len(group) > 1:
                for request in group:
                    await self._answer([request])
            elif not group[0].answer.done():
                group[0].answer.set_exception(error)
            return
        for request, chunk in zip(group, chunks, strict=True):
            if not request.answer.done():  # cancelled, with the task that asked
                request.answer.set_result(chunk)

    async def _call(self, observations: list[dict[str, Any]]) -> np.ndarray:
        return await asyncio.get_running_loop().run_in_executor(self._thread, self._predict, observations)

    def _predict(self, observations: list[dict[str, Any]]) -> np.ndarray:
        batch = observation_batch(observations, [o["step"] for o in observations], self.device)
        with torch.inference_mode():
            chunks = self.policy.predict(batch)
        actions = chunks.float().cpu().numpy()
        expected = (len(observations), self.policy.chunk, 7)
        if actions.shape != expected or not np.isfinite(actions).all():
            raise ValueError(f"the policy must give finite actions {expected}, got {actions.shape}, perhaps with NaN")
        return actions
