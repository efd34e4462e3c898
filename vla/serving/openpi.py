"""openpi's client protocol (packages/openpi-client 0.1.2; openpi 15a9616, serving/websocket_policy_server.py).

The server speaks first: a map of what the policy is. Then each observation is answered by {"actions": float32 (H, 7),
"server_timing": {"infer_ms", "prev_total_ms" of the reply before}}. A text frame is an error; the connection is then
closed, since the client raises and does not read on.
"""

from __future__ import annotations

import asyncio
import time
from typing import Any

from websockets.asyncio.server import ServerConnection

from vla.errors import UserError
from vla.serving.batching import Batcher
from vla.serving.config import ClientKeysConfig
from vla.serving.observation import read_observation
from vla.serving.wire import WireError, pack, unpack

INVALID, INTERNAL_ERROR = 1007, 1011
"""Close codes (RFC 6455 §7.4.1): what the client sent, what went wrong here."""


async def talk(
    connection: ServerConnection, batcher: Batcher, keys: ClientKeysConfig, cameras: list[str], metadata: dict[str, Any]
) -> None:
    """Serve one client until it leaves.

    Raises:
        Exception: what the policy raised, after the client was told.
    """
    await connection.send(pack(metadata))
    total_ms: float | None = None
    step = 0
    async for message in connection:
        start = time.perf_counter()
        try:
            observation = read_observation(await asyncio.to_thread(unpack, message), keys, cameras, step)
            asked = time.perf_counter()
            chunk = await batcher.predict(observation)
        except (WireError, UserError) as error:
            await connection.send(f"error: {error}")
            await connection.close(INVALID, "the frame before this says what was wrong")
            return
        except Exception as error:
            await connection.send(f"error: the policy failed: {type(error).__name__}; the server's log has more")
            await connection.close(INTERNAL_ERROR, "the policy failed")
            raise
        timing = {"infer_ms": 1000 * (time.perf_counter() - asked)}
        if total_ms is not None:
            timing["prev_total_ms"] = total_ms
        await connection.send(pack({"actions": chunk, "server_timing": timing}))
        total_ms = 1000 * (time.perf_counter() - start)
        step += 1
