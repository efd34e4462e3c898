"""vla-eval's protocol, version 1 (vla-eval 0.8.0, protocol/messages.py and model_servers/serve.py).

The client speaks first. Messages are maps with type, payload, seq and timestamp; a reply carries the seq of what it
answers. hello → hello with the specs of actions and observations; episode_start and episode_end have no reply;
observation → action {"actions": float32 (7,)} or error {"error": text}, after which the connection stays, as in
vla-eval's own server. That server is not used: it bounds neither messages nor clients, closes on a malformed frame
without a word, and lets any client change its batch size.
"""

from __future__ import annotations

import asyncio
from collections import deque
from typing import Any

import numpy as np
from vla_eval.protocol.messages import Message, MessageType, make_hello_payload, pack_message
from vla_eval.specs import GRIPPER_CLOSE_NEG, GRIPPER_CLOSE_POS
from websockets.asyncio.server import ServerConnection

from envs.benchmark import ACTION_SPEC, OBSERVATION_SPEC
from vla.ensemble import TemporalEnsembler
from vla.errors import UserError
from vla.serving.batching import Batcher
from vla.serving.config import ClientKeysConfig
from vla.serving.observation import read_observation
from vla.serving.openpi import INTERNAL_ERROR, INVALID
from vla.serving.wire import WireError, unpack

GRIPPERS = {
    "open_01": (ACTION_SPEC["gripper"], (0, 1)),
    "close_positive": (GRIPPER_CLOSE_POS, (1, -1)),
    "close_negative": (GRIPPER_CLOSE_NEG, (-1, 1)),
}
"""What a benchmark takes: its spec, and the numbers for closed and open. vla-eval's LIBERO and SimplerEnv close at +1,
its CALVIN at -1; a client of another kind than the server's is only warned by vla-eval, and then drops everything."""


class Episode:
    """One action per observation; the policy is asked when the ones it gave are used up.

    Args:
        execute_steps: actions executed per chunk; with `ensemble`, the temperature of temporal ensembling, always 1.
    """

    def __init__(self, chunk: int, execute_steps: int, ensemble: float | None) -> None:
        self.execute_steps = execute_steps
        self.ensembler = None if ensemble is None else TemporalEnsembler(chunk, ensemble)
        self.plan: deque[np.ndarray] = deque()
        self.step = 0

    async def act(self, payload: Any, batcher: Batcher, keys: ClientKeysConfig, cameras: list[str]) -> np.ndarray:
        if not self.plan:
            chunk = await batcher.predict(read_observation(payload, keys, cameras, self.step))
            self.plan.extend(chunk[: self.execute_steps] if self.ensembler is None else [self.ensembler(chunk)])
        self.step += 1
        return self.plan.popleft()


async def talk(
    connection: ServerConnection,
    batcher: Batcher,
    keys: ClientKeysConfig,
    cameras: list[str],
    execute_steps: int,
    gripper: str = "open_01",
) -> None:
    """Serve one client until it leaves.

    Raises:
        Exception: what the policy raised, after the client was told.
    """
    policy = batcher.policy
    ensemble = None if execute_steps > 1 else getattr(policy, "ensemble", None)
    episode = Episode(policy.chunk, execute_steps, ensemble)
    gripper_spec, (closed, opened) = GRIPPERS[gripper]

    async def reply(kind: MessageType, payload: dict[str, Any], seq: int) -> None:
        await connection.send(pack_message(Message(kind, payload, seq)))

    async for data in connection:
        try:
            kind, payload, seq = read_message(await asyncio.to_thread(unpack, data))
        except WireError as error:
            await reply(MessageType.ERROR, {"error": str(error)}, 0)
            await connection.close(INVALID, "the frame before this says what was wrong")
            return
        if kind is MessageType.HELLO:
            both = ACTION_SPEC | {"gripper": gripper_spec}, OBSERVATION_SPEC
            actions, observations = ({name: spec.to_dict() for name, spec in specs.items()} for specs in both)
            specs = {"action_spec": actions, "observation_spec": observations}
            hello = make_hello_payload(model_server=type(policy).__name__, capabilities={}, **specs)
            await reply(MessageType.HELLO, hello, seq)
        elif kind is MessageType.EPISODE_START:
            episode = Episode(policy.chunk, execute_steps, ensemble)
        elif kind is MessageType.OBSERVATION:
            try:
                action = await episode.act(payload, batcher, keys, cameras)
            except (WireError, UserError) as error:
                await reply(MessageType.ERROR, {"error": str(error)}, seq)
                continue
            except Exception as error:
                told = f"the policy failed: {type(error).__name__}; the server's log has more"
                await reply(MessageType.ERROR, {"error": told}, seq)
                await connection.close(INTERNAL_ERROR, "the policy failed")
                raise
            command = np.float32(closed + (opened - closed) * action[6])
            await reply(MessageType.ACTION, {"actions": np.append(action[:6], command)}, seq)


def read_message(message: Any) -> tuple[MessageType, Any, int]:
    """(type, payload, seq) of a decoded message; WireError where it is none."""
    if not isinstance(message, dict) or (lacking := {"type", "payload", "seq"} - message.keys()):
        what = "a map" if not isinstance(message, dict) else repr(sorted(lacking)[0])
        raise WireError(f"a message must have type, payload and seq; {what} is missing")
    kinds = [kind.value for kind in MessageType]
    if message["type"] not in kinds or type(message["seq"]) is not int:
        raise WireError(f"a message's type is one of {', '.join(kinds)} and its seq a whole number")
    return MessageType(message["type"]), message["payload"], message["seq"]
