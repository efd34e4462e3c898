"""scripts/bench.py latency: figures for what the device can hold, a reason for what it cannot."""

from __future__ import annotations

import copy
import json
import subprocess
import sys

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from vla.bench import latency
from vla.build import BASELINES
from vla.cli import CONF
from vla.compiled import compile_policy


@pytest.mark.slow
def test_the_command_prints_a_row_per_baseline_and_size(tmp_path):
    arguments = ("latency", "--baseline", "vlm4vla", "--size", "tiny", "full", "--repeats", "2", "--json", "out.json")
    done = subprocess.run(
        [sys.executable, str(CONF.parent / "scripts" / "bench.py"), *arguments],
        cwd=tmp_path, capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    tiny, full = json.loads((tmp_path / "out.json").read_text())["rows"]
    assert 0 < tiny["fastest"] <= tiny["ms_per_chunk"] <= tiny["slowest"]
    assert full["parameters"] > 8e9
    assert "vlm4vla" in done.stdout and f"{tiny['ms_per_chunk']:.1f}" in done.stdout


def test_what_does_not_fit_is_said_to_be_unmeasured(monkeypatch):
    monkeypatch.setattr(latency, "free_bytes", lambda device: 2**20)
    (row,) = latency.measure(["vlm4vla"], ["tiny"], "cpu", "float32", 1)["rows"]
    assert "needs" in row["unmeasured"] and "ms_per_chunk" not in row


@pytest.mark.parametrize("baseline", BASELINES)
def test_every_baseline_has_a_tiny_latency_and_a_countable_full_size(baseline):
    (row,) = latency.measure([baseline], ["tiny"], "cpu", "float32", 2)["rows"]
    assert row["ms_per_chunk"] < 2000 and row["parameters"] < 5e6
    assert 0 < row["limit_ms"] < row["ms_per_chunk"]


@pytest.mark.parametrize("baseline", latency.STRAIGHTFORWARD)
def test_the_straightforward_way_gives_the_same_actions_another_way(baseline):
    """Else its column would time something else, or the same thing twice."""
    torch.manual_seed(0)
    policy, cfg = latency.random_policy(baseline, "tiny")
    sample = latency.observation(cfg.cameras, cfg.benchmark.resolution, "cpu")
    plain = copy.copy(policy.eval())
    plain.fast = False
    with CountCalls() as own, torch.inference_mode():
        expected = policy.predict(sample)
    with CountCalls() as others, torch.inference_mode():
        torch.testing.assert_close(plain.predict(sample), expected, atol=1e-5, rtol=1e-4)
    assert policy.fast and others.count > 1.1 * own.count


class CountCalls(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.count += 1
        return function(*args, **kwargs or {})


@pytest.mark.slow
@pytest.mark.parametrize("baseline", ["flower", "vlm4vla"])
def test_a_compiled_policy_acts_as_the_plain_one(baseline):
    torch.manual_seed(0)
    policy, cfg = latency.random_policy(baseline, "tiny")
    compiled = compile_policy(copy.copy(policy.eval()), "cpu", cfg.benchmark.resolution)
    sample = latency.observation(cfg.cameras, cfg.benchmark.resolution, "cpu")
    two = {name: torch.cat([value, value]) for name, value in sample.items() if isinstance(value, torch.Tensor)}
    two |= {"images": {c: torch.cat([f, f.flip(-1)]) for c, f in sample["images"].items()}}
    two |= {"instruction": ["open the drawer", "put the wine bottle on top of the cabinet"]}
    with torch.inference_mode():
        for observation in (sample, two):
            torch.testing.assert_close(compiled.predict(observation), policy.predict(observation), atol=1e-5, rtol=1e-4)
    assert "encode_images" not in vars(policy)  # and the plain one was not compiled with it


@pytest.mark.parametrize(
    ("baseline", "low", "high"),
    [
        ("vlm4vla", 8.0e9, 8.3e9),  # 8.8 B less the language head (fact sheet §13)
        ("flower", 0.90e9, 1.0e9),
        ("spatialvla", 2.7e9, 4.1e9),  # the lower one with the byte tokeniser's vocabulary
        ("openvla", 7.4e9, 7.6e9),
        ("pi0", 3.1e9, 3.3e9),
    ],
)
def test_full_sizes_are_the_published_ones(baseline, low, high):
    with torch.device("meta"):
        policy, _ = latency.random_policy(baseline, "full")
    assert low < sum(p.numel() for p in policy.parameters()) < high
