"""The policy server against clients that mean it harm or are killed: an error for them, nothing for anybody else."""

from __future__ import annotations

import os
import socket
import struct

import msgpack
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from serving import Echo, client, config, frame, get, said, websocket, works
from vla_eval.protocol.messages import Message, MessageType, pack_message, unpack_message
from websockets.exceptions import ConnectionClosed, InvalidStatus

from vla.serving.client import ServerError
from vla.serving.server import serve
from vla.serving.wire import WireError, pack, unpack

pytestmark = pytest.mark.xdist_group("serve")


@pytest.fixture
def echo():
    policy = Echo()
    with serve(policy, config(), {}) as port:
        policy.batches.clear()
        yield policy, port


def refusal(port: int, data: bytes | str) -> tuple[str, int]:
    """What an openpi client is told, and the close code."""
    with websocket(port) as socket:
        socket.recv()
        socket.send(data)
        told = socket.recv(timeout=10)
        with pytest.raises(ConnectionClosed) as closed:
            socket.recv(timeout=10)
    assert isinstance(told, str)
    return told, closed.value.rcvd.code


def array(dtype: str, shape: list, data: bytes) -> dict:
    return {b"__ndarray__": True, b"dtype": dtype, b"shape": shape, b"data": data}


@pytest.mark.parametrize(
    ("changed", "told"),
    [
        ({"observation/state": np.array([0, np.inf, 0])}, "'observation/state' holds NaN or infinity at index 1"),
        ({"observation/state": np.zeros((1, 3))}, "'observation/state' must be a vector of numbers, not float64"),
        ({"observation/state": np.zeros(2)}, "the state has 2 numbers"),  # the policy's own words
        ({"observation/image": np.zeros((16, 16), np.uint8)}, "must be an image, uint8 (H, W, 3), not uint8 (16, 16)"),
        ({"observation/image": np.zeros((16, 16, 3))}, "must be an image, uint8 (H, W, 3), not float64 (16, 16, 3)"),
        ({"observation/image": np.zeros((0, 16, 3), np.uint8)}, "not uint8 (0, 16, 3)"),
        ({"observation/image": "a path"}, "not str"),
        ({"prompt": 3}, "'prompt' must be text"),
        ({"prompt": "x" * 2001}, "at most 2000 characters"),
        ({"step": -1}, "'step' must be a whole number"),
        ({"seed": 0.5}, "'seed' must be a whole number"),
        ({"observation/state": array("|O", [1], b"12345678")}, "dtype '|O'; send bool, int or float"),
        ({"observation/state": array("f4,f4", [1], b"12345678")}, "dtype 'f4,f4'"),
        ({"observation/state": array("<f4", [2**40, 2**40], b"")}, "with 0 bytes of data"),
        ({"observation/state": array("<f4", [-1], b"")}, "not a list of up to 8 lengths"),
        ({"observation/state": {b"__npgeneric__": True, b"dtype": "<f4", b"data": "x"}}, "whose data is str"),
    ],
)  # fmt: skip
def test_what_is_wrong_is_named_and_the_connection_closed(echo, changed, told):
    _, port = echo
    answer, code = refusal(port, pack(said() | changed))
    assert told in answer and "Traceback" not in answer and code == 1007
    works(port)


def test_frames_that_are_no_messages(echo):
    _, port = echo
    assert refusal(port, "hello") == ("error: a text frame; send msgpack in a binary frame", 1007)
    assert "not a msgpack message" in refusal(port, b"\xc1")[0]
    assert "more than 1000 lists" in refusal(port, msgpack.packb([[[]] * 2000]))[0]
    assert refusal(port, msgpack.packb(3)) == ("error: an observation must be a map, not int", 1007)
    deep = b"\x91" * 5000 + b"\x00"
    assert "not a msgpack message" in refusal(port, deep)[0]


@settings(max_examples=60)
@given(data=st.binary(max_size=300))
def test_random_bytes_get_an_error(fuzzed, data):
    told, code = refusal(fuzzed, data)
    assert told.startswith("error: ") and code == 1007


@settings(max_examples=60)
@given(data=st.data())
def test_damaged_messages_get_an_answer_or_an_error(fuzzed, data):
    """A valid message with some bytes replaced and its end cut off, of either protocol."""
    observation = {"images": {"static": frame(7)}, "state": np.zeros(3, np.float32), "task_description": "go"}
    good = [pack(said()), pack_message(Message(MessageType.OBSERVATION, observation, 1))]  # the second with a PNG
    path = data.draw(st.sampled_from([0, 1]))
    message = bytearray(good[path])
    for place, byte in data.draw(
        st.lists(st.tuples(st.integers(0, len(message) - 1), st.integers(0, 255)), max_size=8)
    ):
        message[place] = byte
    end = data.draw(st.integers(0, len(message)) | st.just(len(message)))
    with websocket(fuzzed, "/vla-eval" if path else "/") as socket:
        if not path:
            socket.recv()
        socket.send(bytes(message[:end]))
        quiet = bool(path) and needs_no_reply(bytes(message[:end]))  # the type may have become another one
        try:
            answer = socket.recv(timeout=0.2 if quiet else 10)
        except TimeoutError:
            assert quiet
            return
        if path:
            assert unpack_message(answer).type in (MessageType.ACTION, MessageType.ERROR, MessageType.HELLO)
        else:
            assert isinstance(answer, str) or unpack(answer)["actions"].shape == (3, 7)


def needs_no_reply(message: bytes) -> bool:
    try:
        content = unpack(message)
    except WireError:
        return False
    return isinstance(content, dict) and content.get("type") in ("episode_start", "episode_end", "error")


@pytest.fixture(scope="module")
def fuzzed():
    with serve(Echo(), config(), {}) as port:
        yield port
        works(port)


@given(data=st.binary(max_size=200))
def test_unpack_raises_nothing_else(data):
    try:
        unpack(data)
    except WireError as error:
        assert str(error)


SCALARS = (
    st.none() | st.booleans() | st.integers(-(2**63), 2**64 - 1) | st.floats(allow_nan=False) | st.text(max_size=9)
)
ARRAYS = st.sampled_from(["?", "u1", "<i8", ">i2", "<f4", "f2"]).flatmap(
    lambda dtype: st.lists(st.integers(0, 3), max_size=4).map(lambda shape: np.ones(shape, dtype) * np.ones(1, dtype))
)


@given(st.recursive(SCALARS | ARRAYS, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3), max_leaves=8))  # fmt: skip # noqa: E501
def test_round_trip(message):
    def same(a, b) -> bool:
        if isinstance(a, np.ndarray):
            return a.dtype == b.dtype and a.shape == b.shape and np.array_equal(a, b)
        if isinstance(a, dict):
            return list(a) == list(b) and all(same(a[key], b[key]) for key in a)
        return len(a) == len(b) and all(map(same, a, b)) if isinstance(a, list) else a == b

    assert same(message, unpack(pack(message)))


def test_objects_are_not_sent_either():
    for thing in (np.array([object()]), np.array(["text"]), np.float64(1) + 1j, object()):
        with pytest.raises(TypeError):
            pack({"x": thing})


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
def test_vla_eval_frames_that_are_no_messages(echo):
    _, port = echo
    for data, told in ((b"\xc1", "not a msgpack message"), (msgpack.packb({"type": "hello"}), "'payload' is missing")):
        with websocket(port, "/vla-eval") as socket:
            socket.send(data)
            answer = unpack_message(socket.recv(timeout=10))
            with pytest.raises(ConnectionClosed) as closed:
                socket.recv(timeout=10)
        assert answer.type is MessageType.ERROR and told in answer.payload["error"] and closed.value.rcvd.code == 1007
    bomb = {"__image__": True, "format": "png", "shape": [9999, 9999, 3], "data": png(9999, 9999)}
    with pytest.raises(WireError, match="9999 × 9999 pixels"):
        unpack(msgpack.packb(bomb))


def png(width: int, height: int) -> bytes:
    """The beginning of a PNG that claims this size."""
    import zlib

    header = b"IHDR" + struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    chunk = struct.pack(">I", 13) + header + struct.pack(">I", zlib.crc32(header))
    data = struct.pack(">I", 0) + b"IDAT" + struct.pack(">I", zlib.crc32(b"IDAT"))
    return b"\x89PNG\r\n\x1a\n" + chunk + data


def test_oversize_is_refused_before_it_is_read():
    with serve(Echo(), config("max_message_mb=0.1"), {}) as port:
        with websocket(port) as socket:
            socket.recv()
            socket.send(bytes(200_000))
            with pytest.raises(ConnectionClosed) as closed:
                socket.recv(timeout=10)
        assert closed.value.rcvd.code == 1009
        raw = handshaken(port)
        raw.sendall(b"\x82\xff" + struct.pack(">Q", 10 * 2**30) + bytes(4))  # "10 GB follow"
        assert close_code(raw) == 1009
        raw.close()
        works(port)


def handshaken(port: int) -> socket.socket:
    """A raw connection after the websocket handshake and the metadata."""
    raw = socket.create_connection(("127.0.0.1", port), timeout=10)
    raw.sendall(
        b"GET / HTTP/1.1\r\nHost: x\r\nUpgrade: websocket\r\nConnection: Upgrade\r\nSec-WebSocket-Version: 13\r\n"
        b"Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n\r\n"
    )
    seen = b""
    while b"\r\n\r\n" not in seen or b"image_rotation" not in seen:
        seen += raw.recv(4096)
    raw.settimeout(0.2)
    try:
        raw.recv(4096)  # the rest of the metadata
    except TimeoutError:
        raw.settimeout(10)
    return raw


def close_code(raw: socket.socket) -> int:
    raw.settimeout(10)
    answer = raw.recv(4096)
    assert answer[0] == 0x88, answer  # a close frame
    return struct.unpack(">H", answer[2:4])[0]


def test_a_client_killed_mid_message_harms_nobody(echo):
    _, port = echo
    message = pack(said(1.0, "wait"))
    masked = b"\x82\xfe" + struct.pack(">H", len(message)) + bytes(4) + message  # masked with zeros
    with client(port) as robot:
        for cut in (1, 3, 9, len(masked) // 2, len(masked)):  # the last is killed while its answer is computed
            raw = handshaken(port)
            raw.sendall(masked[:cut])
            raw.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            raw.close()  # a reset, as of a killed process
            assert robot.infer(said(3.0))["actions"][0, 0] == 3.0
        works(port)
    assert get(port, "/healthz")[0] == 200


def test_strangers_on_the_port(echo):
    _, port = echo
    for data in (b"\x00" * 50, b"GET / HTTP/1.1\r\n\r\n", b"\x16\x03\x01 TLS?", os.urandom(100) + b"\r\n\r\n"):
        with socket.create_connection(("127.0.0.1", port), timeout=10) as raw:
            raw.sendall(data)
    works(port)
    assert get(port, "/elsewhere")[0] == 404
    with pytest.raises(InvalidStatus, match="403"):
        websocket(port, origin="http://a.page.in.a.browser")


def test_no_more_clients_than_allowed():
    with serve(Echo(), config("max_clients=2"), {}) as port:
        robots = [client(port) for _ in range(2)]
        with pytest.raises(ServerError, match="503"):
            client(port)
        assert get(port, "/healthz")[0] == 200
        robots[0].close()
        works(port)
        robots[1].close()
