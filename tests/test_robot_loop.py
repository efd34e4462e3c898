"""examples/robot_loop.py: the limits hold for any action, and the robot is stopped on every way out."""

from __future__ import annotations

import socket
import sys
import threading
import time

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from serving import Echo, config
from websockets.sync.server import serve as listen

from examples import robot_loop
from examples.robot_loop import FakeRobot, Gripper, Limits, Observation, Stop, actions_of, limited_motion, run
from vla.serving.client import PolicyClient, ServerError
from vla.serving.server import serve
from vla.serving.wire import pack

LIMITS = Limits()
LOW, HIGH = np.array(LIMITS.low), np.array(LIMITS.high)
NUMBERS = st.floats(-1e300, 1e300) | st.floats(-0.05, 0.05)


class Told:
    """A client that says the same actions every time, or raises."""

    metadata = {"cameras": {"static": "image"}, "state": None, "prompt": "prompt"}  # noqa: RUF012

    def __init__(self, actions, error: Exception | None = None) -> None:
        self.actions, self.error, self.asked = np.asarray(actions, dtype=np.float32), error, []

    def infer(self, observation: dict) -> dict:
        self.asked.append(observation)
        if self.error:
            raise self.error
        return {"actions": self.actions}


def robot(**kwargs) -> FakeRobot:
    return FakeRobot(["static"], hz=1e6, **kwargs)


def go(client, machine, steps: int = 6, execute_steps: int = 2, limits: Limits = LIMITS, **kwargs) -> str:
    return run(client, machine, "go", steps, execute_steps, limits, **kwargs)


@given(arrays(float, 6, elements=NUMBERS), arrays(float, 3, elements=st.floats(0, 1)))
def test_no_step_leaves_the_box_or_is_longer_than_allowed(motion, share):
    position = LOW + share * (HIGH - LOW)
    allowed = limited_motion(motion, position, LIMITS)
    assert np.linalg.norm(allowed[:3]) <= LIMITS.translation * (1 + 1e-9)
    assert np.linalg.norm(allowed[3:]) <= LIMITS.rotation * (1 + 1e-9)
    assert (position + allowed[:3] >= LOW - 1e-12).all() and (position + allowed[:3] <= HIGH + 1e-12).all()


@given(arrays(float, 6, elements=NUMBERS), arrays(float, 3, elements=st.floats(-3, 3)))
def test_from_outside_the_box_it_only_comes_nearer(motion, position):
    allowed = limited_motion(motion, position, LIMITS)
    before, after = (np.linalg.norm(p - np.clip(p, LOW, HIGH)) for p in (position, position + allowed[:3]))
    assert after <= before + 1e-12 and np.linalg.norm(allowed[:3]) <= LIMITS.translation * (1 + 1e-9)


def test_what_is_allowed_is_not_changed_and_the_rest_keeps_its_direction():
    middle = (LOW + HIGH) / 2
    small = np.array([0.01, -0.01, 0.01, 0.05, -0.05, 0.05])
    np.testing.assert_allclose(limited_motion(small, middle, LIMITS), small, rtol=1e-12)
    np.testing.assert_array_equal(limited_motion(np.zeros(6), middle, LIMITS), np.zeros(6))
    long = limited_motion(np.array([0.03, 0.04, 0, 0, 0, 2.0]), middle, LIMITS)
    np.testing.assert_allclose(long, [0.012, 0.016, 0, 0, 0, 0.1], rtol=1e-12)


@pytest.mark.parametrize("motion", [np.full(6, np.nan), np.array([0, 0, 0, 0, 0, np.inf]), np.zeros(7)])
def test_no_motion_is_made_of_no_number(motion):
    with pytest.raises(Stop):
        limited_motion(motion, LOW, LIMITS)
    with pytest.raises(Stop):
        limited_motion(np.zeros(6), np.array([0, 0, np.nan]), LIMITS)


def test_gripper_hysteresis():
    """Open at first; between the thresholds it stays, and one command alone does not turn it."""
    commands = [1, 0, 1, 0, 0, 0.5, 1, 0.5, 1, 1, 0.31, float("nan"), 0]
    states = [True, True, True, True, False, False, False, False, False, True, True, True, True]
    gripper = Gripper(LIMITS)
    assert [gripper.update(command) for command in commands] == states


def test_the_loop_executes_the_first_actions_of_each_chunk():
    chunk = np.zeros((4, 7))
    chunk[:, 0] = [0.001, 0.002, 0.003, 0.004]
    client, machine = Told(chunk), robot()
    assert go(client, machine, units=(2.0, 1.0)) == "6 steps done"
    np.testing.assert_allclose([m[0] for m in machine.moves], [0.002, 0.004] * 3, rtol=1e-6)
    assert len(client.asked) == 3 and machine.stops == 1
    assert client.asked[0]["prompt"] == "go" and client.asked[0]["image"].dtype == np.uint8


@pytest.mark.parametrize(
    ("client", "why"),
    [
        (Told(np.full((4, 7), np.nan)), "no motion can be made of"),
        (Told(np.zeros((4, 6))), "holds no actions"),
        (Told(np.zeros((0, 7))), "holds no actions"),
        (Told([], ServerError("no answer within 0.4 s")), "no answer within"),
    ],
)
def test_what_cannot_be_executed_stops_the_robot(client, why):
    machine = robot()
    assert why in go(client, machine) and machine.stops == 1 and not machine.moves


def test_an_answer_without_actions_is_none():
    with pytest.raises(Stop, match="server_timing"):
        actions_of({"server_timing": {}})


class Stale(FakeRobot):
    def observe(self) -> Observation:
        seen = super().observe()
        return Observation(seen.images, seen.state, seen.position, seen.taken_at - 0.6 * (len(self.moves) >= 3))


def test_a_stale_observation_stops_the_robot():
    machine = Stale(["static"], hz=1e6)
    assert "0.60 s old" in go(Told(np.zeros((4, 7))), machine) and (machine.stops, len(machine.moves)) == (1, 3)


def test_the_wait_for_the_server_makes_an_observation_stale():
    class Late(Told):
        def infer(self, observation: dict) -> dict:
            time.sleep(0.1)
            return super().infer(observation)

    machine = robot()
    why = go(Late(np.zeros((4, 7))), machine, limits=Limits(stale_after_s=0.05))
    assert "old, more than 0.05 s" in why and machine.stops == 1 and not machine.moves


def test_a_bug_stops_the_robot_too():
    machine = robot()
    machine.move = lambda motion, gripper_open: 1 / 0
    with pytest.raises(ZeroDivisionError):
        go(Told(np.zeros((4, 7))), machine)
    assert machine.stops == 1


class Wild(Echo):
    """Wants to be somewhere else at once; slow from the third call on (two warm it up)."""

    def predict(self, observation: dict) -> torch.Tensor:
        self.batches.append(len(observation["instruction"]))
        if len(self.batches) > 4:
            time.sleep(0.5)
        return torch.full((len(observation["instruction"]), 3, 7), 1e3)


def test_with_a_server_that_becomes_slow(monkeypatch, capsys):
    with serve(Wild(), config(), {}) as port:
        url = f"ws://127.0.0.1:{port}"
        options = ["--url", url, "--steps", "50", "--timeout", "0.2", "--execute-steps", "2"]
        monkeypatch.setattr(sys, "argv", ["robot_loop.py", *options])
        robot_loop.main()
        told = capsys.readouterr().out
        assert "no answer within 0.2 s; 4 moves, 0.08 m travelled" in told  # two calls of two steps of 2 cm


def test_a_server_that_does_not_read_does_not_hold_the_robot():
    """As one that was stopped: its socket takes what fits into the buffers, and no more."""

    def handle(connection) -> None:
        connection.send(pack(Told.metadata))
        over.wait(30)

    over = threading.Event()
    with listen(handle, "127.0.0.1", 0, max_size=None, max_queue=1, close_timeout=0.5) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        client = PolicyClient(f"ws://127.0.0.1:{server.socket.getsockname()[1]}", timeout_s=0.5)
        for _ in range(5):
            client._socket.send(bytes(10))  # as many as the server reads ahead, and more
        start = time.monotonic()
        with pytest.raises(ServerError, match="the connection is gone"):
            client.infer({"image": np.zeros((3000, 3000, 3), np.uint8)})  # more than the buffers of both sides
        took = time.monotonic() - start
        over.set()
        client.close()
    assert took < 5


def test_a_late_answer_is_never_taken_for_the_next_one():
    with serve(Echo(), config(), {}) as port:
        client = PolicyClient(f"ws://127.0.0.1:{port}", timeout_s=0.1)
        message = {
            "observation/image": np.zeros((8, 8, 3), np.uint8),
            "observation/state": np.ones(3),
            "prompt": "wait",
        }
        with pytest.raises(ServerError, match="no answer"):
            client.infer(message)
        time.sleep(0.4)  # now the answer is there
        with pytest.raises(ServerError, match="make a new client"):
            client.infer(message | {"prompt": "go"})
        client.close()


def test_no_server_is_one_line(monkeypatch):
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    monkeypatch.setattr(sys, "argv", ["robot_loop.py", "--url", f"ws://127.0.0.1:{port}"])
    with pytest.raises(SystemExit, match=r"no policy server at .*; start it with scripts/serve\.py"):
        robot_loop.main()
