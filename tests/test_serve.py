"""The policy server with its real peers, openpi's client and vla-eval's: they get what the policy predicts."""

from __future__ import annotations

import asyncio
import functools
import json
import signal
import socket
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from serving import Echo, client, config, frame
from vla_eval.connection import Connection

from evaluate import evaluate
from vla.bench.latency import random_policy
from vla.checkpoint import export_policy, load_policy
from vla.cli import CONF, compose_config
from vla.errors import UserError
from vla.serving.client import PolicyClient, ServerError
from vla.serving.server import serve
from vla.training import policy_arguments

pytestmark = pytest.mark.xdist_group("serve")  # one environment for openpi's client, one exported policy
ROOT = CONF.parent
OPENPI = ROOT / ".venv" / "openpi-client"
"""An environment of its own, since openpi-client wants numpy < 2; it imports typing_extensions and does not say so."""
OPENPI_PACKAGES = ["openpi-client==0.1.2", "numpy==1.26.4", "websockets==17.4", "typing_extensions==4.16.0"]


@pytest.fixture(scope="module")
def exported(tmp_path_factory) -> Path:
    """π0, which reads the state and draws noise."""
    torch.manual_seed(0)
    policy, cfg = random_policy("pi0", "tiny")
    path = tmp_path_factory.mktemp("policy") / "policy"
    about = {"arm": "vanilla", "train_seed": 0, "image_rotation": "rotate180", "config_hash": "k"}
    export_policy(policy, path, name="pi0", arguments=policy_arguments(cfg), about=about)
    return path


def random_observation(seed: int) -> dict:
    rng = np.random.default_rng(seed)
    image, state = rng.integers(0, 256, (48, 64, 3), dtype=np.uint8), rng.normal(size=8).astype(np.float32)
    return {"image": image, "state": state, "prompt": f"put bowl {seed} on the plate"}


@torch.inference_mode()
def own_answer(policy, observation: dict, step: int) -> np.ndarray:
    """policy.predict by itself."""
    image = torch.from_numpy(observation["image"]).permute(2, 0, 1)[None]
    batch = {"images": {"static": image}, "state": torch.from_numpy(observation["state"])[None]}
    batch |= {"instruction": [observation["prompt"]], "seed": torch.tensor([0]), "step": torch.tensor([step])}
    return policy.predict(batch)[0].numpy()


@functools.cache
def openpi_python() -> Path:
    """The interpreter of an environment with the published openpi-client, made the first time."""
    python = OPENPI / "bin" / "python"
    check = [str(python), "-c", "import openpi_client.websocket_client_policy"]
    if not python.exists() or subprocess.run(check, capture_output=True).returncode:
        subprocess.run([sys.executable, "-m", "venv", str(OPENPI)], check=True, capture_output=True)
        install = [str(python), "-m", "pip", "install", "-q", "--disable-pip-version-check", *OPENPI_PACKAGES]
        done = subprocess.run(install, capture_output=True, text=True, timeout=240)
        if done.returncode:
            pytest.skip(f"openpi-client cannot be installed here: {done.stderr.strip().splitlines()[-1]}")
    return python


OPENPI_CLIENT = """
import sys, numpy as np
from openpi_client.websocket_client_policy import WebsocketClientPolicy
file, port = sys.argv[1], int(sys.argv[2])
given, client, out = dict(np.load(file)), WebsocketClientPolicy("127.0.0.1", port), {}
for i in range(2):
    answer = client.infer({"observation/image": given[f"image{i}"], "observation/state": given[f"state{i}"],
                           "prompt": str(given[f"prompt{i}"])})
    out[f"actions{i}"], out[f"timing{i}"] = answer["actions"], sorted(answer["server_timing"])
np.savez(file, keys=client.get_server_metadata()["cameras"]["static"], **out)
try:
    client.infer({"observation/image": given["image0"], "prompt": "no state"})
except RuntimeError as error:
    print(error)
"""


def test_openpis_own_client_gets_what_the_policy_predicts(exported, tmp_path):
    python, file = openpi_python(), tmp_path / "exchange.npz"
    observations = [random_observation(seed) for seed in (1, 2)]
    np.savez(file, **{f"{key}{i}": value for i, o in enumerate(observations) for key, value in o.items()})
    policy, _ = load_policy(exported)
    with serve(policy, config(), {}) as port:
        done = subprocess.run(
            [str(python), "-c", OPENPI_CLIENT, str(file), str(port)], capture_output=True, text=True, timeout=60
        )
        assert done.returncode == 0, done.stderr
    answers = np.load(file)
    for i, observation in enumerate(observations):
        assert answers[f"actions{i}"].dtype == np.float32
        np.testing.assert_array_equal(answers[f"actions{i}"], own_answer(policy, observation, step=i))
    assert not np.array_equal(answers["actions0"], answers["actions1"])
    assert (list(answers["timing0"]), list(answers["timing1"])) == (["infer_ms"], ["infer_ms", "prev_total_ms"])
    assert str(answers["keys"]) == "observation/image"
    assert "'observation/state' is missing; there is 'observation/image', 'prompt'" in done.stdout


def test_vla_evals_own_client_executes_the_chunk(exported):
    policy, _ = load_policy(exported)
    observations = [random_observation(seed) for seed in range(5)]

    def wire(o: dict) -> dict:
        return {"images": {"static": o["image"]}, "state": o["state"], "task_description": o["prompt"]}

    async def episode(port: int) -> tuple[dict, list[np.ndarray], str]:
        async with Connection(f"ws://127.0.0.1:{port}/vla-eval", timeout=10, max_retries=1) as connection:
            await connection.start_episode({})
            actions = [(await connection.act(wire(o)))["actions"] for o in observations[:4]]
            await connection.end_episode({})
            await connection.start_episode({})
            with pytest.raises(RuntimeError) as refused:
                await connection.act(wire(observations[4]) | {"state": np.full(8, np.nan)})
            actions.append((await connection.act(wire(observations[4])))["actions"])  # it stays connected
            return connection.server_info, actions, str(refused.value)

    with serve(policy, config("execute_steps=3"), {}) as port:
        info, actions, refused = asyncio.run(episode(port))
    first, second, third = (own_answer(policy, observations[i], step) for i, step in ((0, 0), (3, 3), (4, 0)))
    for got, expected in zip(actions, [*first[:3], second[0], third[0]], strict=True):
        np.testing.assert_array_equal(got, expected)
    assert info["action_spec"]["gripper"]["format"] == "binary_open_01"
    assert "'state' holds NaN or infinity at index 0" in refused


@pytest.mark.parametrize(
    ("gripper", "form", "numbers"),
    [
        ("open_01", "binary_open_01", (0, 1)),
        ("close_positive", "binary_close_positive", (1, -1)),
        ("close_negative", "binary_close_negative", (-1, 1)),
    ],
)
def test_the_gripper_in_a_benchmarks_own_numbers(gripper, form, numbers):
    """Echo says 0 (closed) or 1 (open) as the state's first number."""

    async def episode(port: int) -> tuple[str, tuple[float, ...]]:
        async with Connection(f"ws://127.0.0.1:{port}/vla-eval", timeout=10, max_retries=1) as connection:
            actions = []
            for state in (0.0, 1.0):
                await connection.start_episode({})
                told = {"state": np.array([state, 0, 0]), "images": {"static": frame()}, "task_description": "go"}
                actions.append((await connection.act(told))["actions"])
            assert [a.dtype for a in actions] == [np.float32] * 2 and actions[1][0] == 1
            return connection.server_info["action_spec"]["gripper"]["format"], tuple(float(a[6]) for a in actions)

    with serve(Echo(), config(f"gripper={gripper}"), {}) as port:
        assert asyncio.run(episode(port)) == (form, numbers)


def test_temporal_ensembling_of_the_policy_is_kept_for_vla_eval():
    policy = Echo()
    policy.ensemble = -1.0

    async def episode(port: int) -> list[float]:
        async with Connection(f"ws://127.0.0.1:{port}/vla-eval", timeout=10, max_retries=1) as connection:
            await connection.start_episode({})
            observation = {"images": {"static": frame()}, "task_description": "go"}
            states = [np.array([x, 0, 0]) for x in (1.0, 0.0)]
            return [(await connection.act(observation | {"state": s}))["actions"][0] for s in states]

    with serve(policy, config(), {}) as port:
        first, second = asyncio.run(episode(port))
    assert first == 1 and second == pytest.approx(1 / (1 + np.e))  # weights 1 for the older, e for the newer


def test_sixteen_concurrent_clients_share_one_call(exported):
    policy, _ = load_policy(exported)
    batches, predict = [], policy.predict
    policy.predict = lambda observation: batches.append(len(observation["seed"])) or predict(observation)
    observations = [random_observation(seed) for seed in range(16)]

    def ask(robot: PolicyClient, o: dict) -> np.ndarray:
        message = {"observation/image": o["image"], "observation/state": o["state"], "prompt": o["prompt"]}
        return robot.infer(message)["actions"]

    with serve(policy, config("window_ms=5000"), {}) as port, ThreadPoolExecutor(16) as threads:
        assert batches == [1, 16]  # the warm-up
        robots = [client(port, timeout_s=30) for _ in range(16)]
        for step in range(2):
            answers = list(threads.map(ask, robots, observations))
            for o, answer in zip(observations, answers, strict=True):
                np.testing.assert_allclose(answer, own_answer(policy, o, step), atol=1e-5)
        for robot in robots:
            robot.close()
    served = [n for n in batches if n > 1][1:]
    assert served == [16, 16]


def test_keys_of_another_robot():
    """ALOHA's: a map of images, channels first; a robot that sends no state."""
    cfg = config("openpi.cameras.static=images/cam_high", "openpi.state=null")
    policy = Echo()
    seen = []
    policy.predict = lambda o: seen.append(o["images"]["static"]) or torch.zeros(len(o["seed"]), 3, 7)
    image = np.random.default_rng(0).integers(0, 256, (3, 20, 30), dtype=np.uint8)
    with serve(policy, cfg, {}) as port, client(port) as robot:
        assert robot.metadata["cameras"] == {"static": "images/cam_high"} and robot.metadata["state"] is None
        robot.infer({"images": {"cam_high": image}, "prompt": "go"})
        with pytest.raises(ServerError, match="'cam_high' is missing; there is 'cam_low'"):
            robot.infer({"images": {"cam_low": image}, "prompt": "go"})
    assert torch.equal(seen[-1][0], torch.from_numpy(image))


def test_the_command(exported):
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    command = [sys.executable, "scripts/serve.py", f"policy={exported}", f"port={port}", "threads=1"]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) as server:
        try:
            lines = [server.stdout.readline() for _ in range(2)]
            assert "warming up" in lines[0] and "ready" in lines[1]
            with client(port) as robot:
                served = robot.metadata["policy"]
                assert served["arm"] == "vanilla" and len(served["checkpoint"]) == 64
        finally:
            server.send_signal(signal.SIGTERM)
        assert "stopped" in server.stdout.read()
    assert server.returncode == 0


def test_latency_is_recorded(exported, tmp_path, capsys):
    cfg = compose_config("evaluate", f"policy={exported}", "evaluation=latency", "evaluation.repeats=5")
    result = evaluate(replace(cfg, results_root=str(tmp_path)))
    (file,) = tmp_path.rglob("latency.json")
    assert json.loads(file.read_text()) == result
    for way in ("predict", "server"):
        times = result[way]
        assert 0 < times["p50_ms"] <= times["p90_ms"] <= times["p99_ms"]
        assert times["p50_ms_per_action"] == pytest.approx(times["p50_ms"] / result["chunk"])
    assert f"{result['server']['p99_ms']:.1f} per chunk" in capsys.readouterr().out
    with pytest.raises(UserError, match="repeats"):
        evaluate(compose_config("evaluate", f"policy={exported}", "evaluation=latency", "evaluation.repeats=0"))
