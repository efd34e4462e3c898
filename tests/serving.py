"""What the tests of the policy server share: a policy that shows who asked, and clients."""

from __future__ import annotations

import http.client
import time

import numpy as np
import torch
import websockets.sync.client

from vla.cli import compose_config
from vla.errors import UserError
from vla.serving.client import PolicyClient


class Echo:
    """Says the first number of the state in every action; fails at a negative one, and is slow where told to wait."""

    chunk = 3
    cameras = ("static",)

    def __init__(self) -> None:
        self.batches: list[int] = []

    def predict(self, observation: dict) -> torch.Tensor:
        self.batches.append(len(observation["instruction"]))
        if "wait" in observation["instruction"]:
            time.sleep(0.3)
        state = observation["state"]
        if state.shape[1] and (state[:, 0] < 0).any():
            raise ZeroDivisionError("secret path /home/someone")
        if state.shape[1] == 2:
            raise UserError("the state has 2 numbers")
        first = state[:, 0] if state.shape[1] else torch.zeros(len(state))
        return first[:, None, None].expand(-1, self.chunk, 7)


def config(*overrides: str):
    return compose_config("serve", "policy=none", "port=0", *overrides)


def frame(value: int = 0, size: int = 16) -> np.ndarray:
    return np.full((size, size, 3), value, np.uint8)


def said(number: float = 0.0, prompt: str = "go", size: int = 16) -> dict:
    """An openpi client's observation."""
    state = np.array([number, 0, 0], np.float32)
    return {"observation/image": frame(size=size), "observation/state": state, "prompt": prompt}


def client(port: int, **kwargs) -> PolicyClient:
    return PolicyClient(f"ws://127.0.0.1:{port}", **kwargs)


def get(port: int, path: str) -> tuple[int, str]:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=5)
    connection.request("GET", path)
    answer = connection.getresponse()
    return answer.status, answer.read().decode()


def works(port: int) -> None:
    with client(port) as robot:
        assert robot.infer(said(5.0))["actions"].tolist() == np.full((3, 7), 5.0).tolist()


def websocket(port: int, path: str = "/", **kwargs):
    return websockets.sync.client.connect(f"ws://127.0.0.1:{port}{path}", compression=None, max_size=None, **kwargs)
