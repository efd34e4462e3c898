"""Servers: the policy's, killed while a robot waits; the evaluation's own, with strangers and bad workers on its port.

What hostile clients can send to the policy server: tests/test_serve_hostile.py.
"""

import http.client
import os
import re
import socket
import struct
import threading
import time
from contextlib import contextmanager
from pathlib import Path

import msgpack
import pytest
from evaluating import CONTEXT, PATHS, roll
from serving import Echo, client, config, said
from test_rollout import Seeker, outcome
from vla_eval.protocol.messages import Message, MessageType, pack_message, unpack_message
from websockets.exceptions import ConnectionClosed, InvalidStatus
from websockets.sync.client import connect

import envs.rollout
import envs.server
from envs.server import PolicyServer
from vla.serving.client import ServerError
from vla.serving.server import serve

pytestmark = pytest.mark.xdist_group("evaluating")


def _serve_slowly(where: Path, port: int) -> None:
    with serve(Echo(), config(f"port={port}"), {}) as bound:
        where.with_suffix(".tmp").write_text(str(bound))
        where.with_suffix(".tmp").rename(where)
        time.sleep(600)


def started(where: Path, port: int = 0) -> tuple:
    where.unlink(missing_ok=True)
    os.environ["PYTHONPATH"] = os.pathsep.join(PATHS)
    process = CONTEXT.Process(target=_serve_slowly, args=(where, port))
    process.start()
    deadline = time.monotonic() + 60
    while not where.exists():
        assert time.monotonic() < deadline and process.is_alive()
        time.sleep(0.02)
    return process, int(where.read_text())


def test_a_policy_server_killed_while_a_robot_waits(tmp_path, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", "")
    process, port = started(tmp_path / "port")
    with client(port, timeout_s=30) as robot:
        assert robot.infer(said(2.0))["actions"][0, 0] == 2.0
        threading.Timer(0.1, process.kill).start()  # the answer takes 0.3 s
        begun = time.monotonic()
        with pytest.raises(ServerError, match="the connection is gone"):
            robot.infer(said(3.0, "wait"))
        assert time.monotonic() - begun < 5, "told at once, not after the limit"
        with pytest.raises(ServerError, match="the connection is gone"):
            robot.infer(said(3.0))
    process.join()
    process, _ = started(tmp_path / "port", port)
    with client(port) as robot:
        assert robot.infer(said(4.0))["actions"][0, 0] == 4.0, "a new server on the same port, a new client"
    process.kill()
    process.join()


@pytest.fixture
def evaluation():
    """(url, policy) of a running evaluation's server."""
    policy = Seeker()
    with envs.server.serve(PolicyServer(policy, execute_steps=3)) as url:
        yield url, policy


def parts(url: str) -> tuple[int, str]:
    port, secret = re.fullmatch(r"ws://127\.0\.0\.1:(\d+)(/[\w-]{22})", url).groups()
    return int(port), secret


def worker(url: str):
    return connect(url, compression=None, max_size=None)


def hello(connection) -> bool:
    connection.send(pack_message(Message(MessageType.HELLO, {"harness_version": "0"}, 1)))
    return unpack_message(connection.recv(timeout=10)).type is MessageType.HELLO


def test_who_does_not_know_the_secret_is_refused(evaluation):
    url, _ = evaluation
    port, secret = parts(url)
    for path in ("", "/", "/wrong", secret[:-1], f"{secret}/"):
        with pytest.raises(InvalidStatus, match="403"):
            worker(f"ws://127.0.0.1:{port}{path}")
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=5)
    connection.request("GET", "/config?max_batch_size=64")  # vla-eval's own server would obey
    assert connection.getresponse().status == 403
    with worker(url) as good:
        assert hello(good)


@pytest.mark.parametrize("data", [b"\xc1", b"", b"\x81\xa4type", msgpack.packb({"type": "?"}), msgpack.packb([1] * 9)])
def test_malformed_messages_end_their_own_connection(evaluation, data):
    url, policy = evaluation
    with worker(url) as good, worker(url) as bad:
        bad.send(data)
        with pytest.raises(ConnectionClosed):
            bad.recv(timeout=10)
        assert hello(good) and policy.batches == []


def test_ten_gigabytes_are_refused_before_they_are_read_and_half_a_frame_harms_nobody(evaluation):
    url, _ = evaluation
    with worker(url) as good:
        with worker(url) as bad:
            bad.socket.sendall(b"\x82\xff" + struct.pack(">Q", 10 * 2**30) + bytes(4))
            with pytest.raises(ConnectionClosed) as closed:
                bad.recv(timeout=10)
        assert closed.value.rcvd.code == 1009 and hello(good)
        with worker(url) as bad:
            bad.socket.sendall(b"\x82\xfe\x01\x00" + bytes(4) + b"half")
            bad.socket.shutdown(socket.SHUT_RDWR)
        assert hello(good)


def test_a_run_with_strangers_on_its_port_leaves_the_same_records(tmp_path, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(PATHS))
    roll(tmp_path, 3, out="calm")
    real, met = envs.rollout.serve, []

    @contextmanager
    def beset(server):
        with real(server) as url:
            attack = threading.Thread(target=strangers, args=(url,))
            attack.start()
            yield url
            attack.join()

    def strangers(url: str) -> None:
        for data in (b"\xc1", b"\x00" * 1000):
            with worker(url) as bad:
                bad.send(data)
                with pytest.raises(ConnectionClosed):
                    bad.recv(timeout=10)
                met.append(data)

    monkeypatch.setattr(envs.rollout, "serve", beset)
    assert roll(tmp_path, 3).failures == 0
    assert outcome(tmp_path / "out") == outcome(tmp_path / "calm") and len(met) == 2
