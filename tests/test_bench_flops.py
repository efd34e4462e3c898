"""scripts/bench.py flops: what is counted without values is what a real step does, and when a step waits is known."""

from __future__ import annotations

import pytest
import torch

from vla.bench import train as bench
from vla.bench.flops import MetaCounter, count, show
from vla.policy import sent

WAITS = {"vlm4vla": 0, "flower": 0, "spatialvla": 0, "openvla": 1, "pi0": 0}
"""openvla: transformers asks whether the positions are those of packed sequences, where no mask is given."""


@pytest.mark.parametrize("baseline", WAITS)
def test_the_count_is_that_of_a_step_on_the_cpu(baseline, tmp_path):
    """Both arms; and no training step asks the device for more than is known.

    Fused attention, which FLOWER has at size tiny, makes one more product in its backward pass than meta's plain one.
    """
    counted = count(baseline, "tiny", 4)
    cfg = bench.random_policy(baseline, "tiny", "ablation=ptr")[1]
    module, store = bench.build(baseline, "tiny", "cpu", "fp32"), bench.noise(cfg, tmp_path / "store")
    arms = {arm: bench.Arm(module, cfg, arm, store, 4, "cpu", "fp32", True) for arm in ("vanilla", "ptr")}
    done = {name: arm.flops() / 4e12 for name, arm in arms.items()}
    assert done == pytest.approx(counted["tflop"], rel=5e-3 if baseline == "flower" else 1e-12)
    assert counted["ratio"] > 1 and counted["waits"] == WAITS[baseline]


def test_qwens_tower_is_never_waited_for():
    """Size tiny has another tower. Where o_{t+H} is extra, inverse dynamics costs its encoding."""
    row = count("vlm4vla", "small", 2)
    assert row["waits"] == 0 and row["pairs"] == "separate" and row["ratio"] > 1.1


@pytest.mark.slow
def test_the_released_size_costs_what_its_weights_and_tokens_say():
    row = count("vlm4vla", "full", 2)
    assert row["waits"] == 0 and row["pairs"] == "separate" and 1.1 < row["ratio"] < 1.2
    assert 8.1e9 < row["parameters"] < 8.2e9
    # 2 FLOPs a weight and token forward, 4 backward: 7.0 B behind about 220 tokens, 0.4 B behind 784 patches.
    assert row["tflop"]["vanilla"] == pytest.approx(6 * (7.0e9 * 220 + 0.43e9 * 784) / 1e12, rel=0.35)
    table = show({"batch": 2, "rows": [row]})
    assert table.row_count == 1


def test_what_waits_is_seen():
    value = torch.zeros(3)
    with MetaCounter() as counter:
        here = sent(value, torch.device("meta"))
        assert counter.waits == 0
        value.to("meta")
        bool(here.any())
        here.unique()
    assert counter.waits == 3
