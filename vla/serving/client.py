"""The robot's side of openpi's protocol, with a time limit on every answer, which openpi's own client lacks."""

from __future__ import annotations

import contextlib
import socket
import struct
import time
from typing import Any

from websockets.exceptions import WebSocketException
from websockets.sync.client import connect

from vla.serving.wire import WireError, pack, unpack


class ServerError(RuntimeError):
    """The server refused the observation, failed, or is gone."""


class PolicyClient:
    """Use as a context manager.

    Args:
        url: "ws://host:port".
        timeout_s: for connecting and for every answer.

    Attributes:
        metadata: what the server says of its policy (vla/serving/server.py).
    """

    def __init__(self, url: str, timeout_s: float = 5.0) -> None:
        self.timeout_s = timeout_s
        self._open = contextlib.ExitStack()
        self._late = False
        try:
            self._socket = self._open.enter_context(
                connect(url, open_timeout=timeout_s, close_timeout=0.2, compression=None, max_size=2**24)
            )
        except (OSError, WebSocketException) as error:
            raise ServerError(f"no policy server at {url}: {error}") from error
        # A server that hangs does not read either, and the socket would block for ever once its buffers are full.
        limit = struct.pack("ll", int(timeout_s), int(timeout_s % 1 * 1e6))
        self._socket.socket.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, limit)
        self.metadata = self._receive(timeout_s)

    def infer(self, observation: dict[str, Any]) -> dict[str, Any]:
        """The server's answer, {"actions": float32 (H, 7), "server_timing": {…}}.

        Raises:
            ServerError: an error instead of an answer, a broken connection, or none within `timeout_s`. The answer may
                still be on its way then, so that this client asks no more: make a new one.
        """
        if self._late:
            raise ServerError("an earlier answer may still come; make a new client")
        start = time.monotonic()
        try:
            self._socket.send(pack(observation))
        except (OSError, WebSocketException) as error:
            raise ServerError(f"the connection is gone: {error}") from error
        return self._receive(self.timeout_s - (time.monotonic() - start))

    def _receive(self, timeout_s: float) -> dict[str, Any]:
        try:
            answer = self._socket.recv(timeout=max(timeout_s, 0))
            if isinstance(answer, str):
                raise ServerError(answer)
            return unpack(answer)
        except TimeoutError:
            self._late = True
            raise ServerError(f"no answer within {self.timeout_s} s") from None
        except (OSError, WebSocketException, WireError) as error:
            raise ServerError(f"the connection is gone: {error}") from error

    def close(self) -> None:
        self._open.close()

    def __enter__(self) -> PolicyClient:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()
