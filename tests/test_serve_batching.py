"""Who shares a call of the policy server, when it is ready, how it ends, what it refuses to start with."""

from __future__ import annotations

import asyncio
import socket
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import numpy as np
import pytest
import torch
from serving import Echo, client, config, frame, get, said, works
from vla_eval.connection import Connection
from websockets.exceptions import ConnectionClosed

from vla.errors import UserError
from vla.serving.batching import Batcher
from vla.serving.client import PolicyClient, ServerError
from vla.serving.server import PolicyService, serve

pytestmark = pytest.mark.xdist_group("serve")


@pytest.fixture
def echo():
    policy = Echo()
    with serve(policy, config(), {}) as port:
        policy.batches.clear()
        yield policy, port


def test_a_lone_client_does_not_wait_for_others():
    with serve(Echo(), config("window_ms=60000"), {}) as port:
        works(port)


def test_clients_of_both_protocols_share_a_call():
    policy = Echo()

    async def harness(port: int) -> float:
        async with Connection(f"ws://127.0.0.1:{port}/vla-eval", timeout=20, max_retries=1) as connection:
            await connection.start_episode({})
            there.set()
            observation = {"images": {"static": frame()}, "state": np.array([4.0, 0, 0]), "task_description": "go"}
            return (await connection.act(observation))["actions"][0]

    there = threading.Event()
    with serve(policy, config("window_ms=10000"), {}) as port, ThreadPoolExecutor(1) as other:
        policy.batches.clear()
        with client(port, timeout_s=20) as robot:
            acting = other.submit(asyncio.run, harness(port))
            assert there.wait(20)
            assert robot.infer(said(3.0))["actions"][0, 0] == 3 and acting.result() == 4
    assert policy.batches == [2]


def test_pictures_of_other_sizes_are_computed_apart():
    """And everybody gets his own answer."""

    def ask(index: int, robot: PolicyClient) -> float:
        return robot.infer(said(float(index), size=16 + index % 2))["actions"][0, 0]

    policy = Echo()
    with serve(policy, config("window_ms=5000"), {}) as port, ThreadPoolExecutor(8) as threads:
        robots = [client(port) for _ in range(8)]
        policy.batches.clear()
        assert list(threads.map(ask, range(8), robots)) == list(range(8))
        for robot in robots:
            robot.close()
    assert policy.batches == [4, 4]


def test_only_the_one_at_fault_is_told_so(echo):
    policy, _ = echo

    def ask(robot: PolicyClient, number: float) -> str:
        try:
            return str(robot.infer(said(number, "wait"))["actions"][0, 0])
        except ServerError as error:
            return str(error)

    with serve(policy, config("window_ms=1000"), {}) as port, ThreadPoolExecutor(3) as threads:
        robots = [client(port) for _ in range(3)]
        policy.batches.clear()
        answers = list(threads.map(ask, robots, (1.0, -1.0, 2.0)))
        assert (answers[0], answers[2]) == ("1.0", "2.0")
        assert answers[1] == "error: the policy failed: ZeroDivisionError; the server's log has more"  # and no path
        assert policy.batches == [3, 1, 1, 1]
        with pytest.raises(ConnectionClosed) as closed:
            robots[1]._socket.recv()
        assert closed.value.rcvd.code == 1011
        for robot in robots:
            robot.close()
        works(port)


def test_health_is_told_after_the_warm_up_and_requests_wait_for_it():
    gate, started, port = threading.Event(), threading.Event(), []

    class Slow(Echo):
        def predict(self, observation: dict) -> torch.Tensor:
            assert gate.wait(30)
            return super().predict(observation)

    policy = Slow()
    service = PolicyService(policy, config("max_batch=4"), {})

    async def main() -> None:
        await service.run(lambda n: (port.append(n), started.set()))

    loop = asyncio.new_event_loop()
    task = loop.create_task(main())
    thread = threading.Thread(target=lambda: loop.run_until_complete(asyncio.gather(task, return_exceptions=True)))
    thread.start()
    assert started.wait(10)
    try:
        assert get(port[0], "/healthz") == (503, "warming up\n") and get(port[0], "/health")[0] == 503
        with client(port[0], timeout_s=30) as early, ThreadPoolExecutor(1) as other:
            answer = other.submit(early.infer, said(2.0))
            time.sleep(0.2)
            assert not answer.done() and policy.batches == []
            gate.set()
            assert answer.result(30)["actions"][0, 0] == 2.0
        assert policy.batches == [1, 4, 1]
        assert get(port[0], "/healthz") == (200, "OK\n") and get(port[0], "/health")[0] == 200
    finally:
        gate.set()
        loop.call_soon_threadsafe(task.cancel)
        thread.join(20)
    assert not thread.is_alive()


def test_stopping_does_not_wait_for_ever_and_tells_who_is_waiting():
    answers = []

    def ask(port: int) -> None:
        with client(port, timeout_s=20) as robot:
            try:
                robot.infer(said(1.0, "wait"))
            except ServerError as error:
                answers.append(str(error))

    start = time.monotonic()
    with serve(Echo(), config("max_batch=1"), {}) as port:
        threads = [threading.Thread(target=ask, args=(port,)) for _ in range(5)]
        for thread in threads:
            thread.start()
        time.sleep(0.2)
    for thread in threads:
        thread.join(20)
    assert time.monotonic() - start < 10 and len(answers) >= 3
    assert all("stopping" in told or "connection is gone" in told for told in answers)


def test_a_request_that_was_given_up_does_not_end_the_batches():
    """Its future is cancelled while the policy computes."""
    observation = {"images": {"static": frame()}, "state": np.ones(3, np.float32), "seed": 0, "step": 0}

    async def main() -> np.ndarray:
        batcher = Batcher(Echo(), 4, 0.0, lambda: 1)
        running = asyncio.create_task(batcher.run(observation | {"task_description": "go"}, lambda: None))
        given_up = asyncio.create_task(batcher.predict(observation | {"task_description": "wait"}))
        await asyncio.sleep(0.15)
        given_up.cancel()
        answer = await asyncio.wait_for(batcher.predict(observation | {"task_description": "go"}), 10)
        running.cancel()
        return answer

    assert asyncio.run(main()).sum() == 3 * 7


def test_the_policy_gets_tensors_on_its_device():
    class OnDevice(Echo):
        def predict(self, observation: dict) -> torch.Tensor:
            assert observation["images"]["static"].device.type == observation["state"].device.type == "meta"
            return torch.zeros(len(observation["instruction"]), 3, 7)

    with serve(OnDevice(), config("device=meta"), {}) as port, client(port) as robot:
        assert robot.infer(said())["actions"].sum() == 0


@pytest.mark.parametrize("bad", [torch.full((1, 3, 7), torch.nan), torch.zeros(1, 2, 7)])
def test_a_policy_that_gives_nonsense_does_not_get_warm(bad):
    policy = Echo()
    policy.predict = lambda observation: bad
    with pytest.raises(ValueError, match=r"finite actions \(1, 3, 7\)"), serve(policy, config(), {}):
        pass


@pytest.mark.parametrize(
    ("overrides", "told"),
    [
        (["execute_steps=4"], "not in 1..3"),
        (["max_batch=0"], "max_batch=0"),
        (["gripper=open"], "choose one of open_01"),
        (["+openpi.cameras.front=x"], "camera 'front'"),
    ],
)
def test_a_configuration_that_cannot_be(overrides, told):
    policy = Echo()
    policy.cameras = ("static", "front") if "front" in overrides[0] else policy.cameras
    with pytest.raises(UserError, match=told):
        PolicyService(policy, config(*overrides), {})


def test_a_client_gives_up_in_time(echo):
    _, port = echo
    with client(port, timeout_s=0.1) as robot, pytest.raises(ServerError, match=r"no answer within 0\.1 s"):
        robot.infer(said(1.0, "wait"))
    with pytest.raises(ServerError, match="no policy server"):
        PolicyClient("ws://127.0.0.1:9")


def test_a_taken_port_is_named():
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with (
            pytest.raises(UserError, match=f"{port} cannot be listened on.*try port="),
            serve(Echo(), replace(config(), port=port), {}),
        ):
            pass
