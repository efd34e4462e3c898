"""scripts/bench.py train: that its two arms are what train.py would run, and what it says it measures."""

from __future__ import annotations

import csv

import pytest
import torch
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import _get_current_dispatch_mode

from tests.conftest import train_config
from train import train
from vla.bench import train as bench
from vla.errors import UserError
from vla.flops import FlopCounter
from vla.module import VLAModule


@pytest.fixture(scope="module")
def result():
    return bench.measure("vlm4vla", "tiny", 8, "cpu", "fp32", rounds=2, steps=4, backward_only=False)


def test_arms_loop_and_ratio_are_reported(result):
    assert list(result["rows"]) == ["vanilla", "ptr"] and result["batch"] == 8
    assert result["ratio"]["flops"] > 1, "the head is work"
    assert result["loop"]["steps"] == 3 * 4 and result["loop"]["loop_ms"] > 0
    table = bench.show(result)
    assert [str(cell) for cell in table.columns[0]._cells] == ["vanilla", "ptr"]


def test_flops_are_those_of_the_profiler(tmp_path):
    """Another counter of torch's own, over the forward pass's convolutions and matrix products."""
    with torch.device("meta"):
        _, cfg = bench.random_policy("vlm4vla", "tiny")
    module, store = bench.build("vlm4vla", "tiny", "cpu", "fp32"), bench.noise(cfg, tmp_path / "store")
    arm = bench.Arm(module, cfg, "ptr", store, 8, "cpu", "fp32", True)
    counted = arm.flops()
    with profile(activities=[ProfilerActivity.CPU], with_flops=True) as profiler, torch.no_grad():
        module.losses(arm.batches[0])
    products = ("aten::mm", "aten::addmm", "aten::bmm", "aten::conv2d")
    forward = sum(event.flops for event in profiler.key_averages() if event.key in products)
    assert 2 * forward < counted < 3.3 * forward, "backward costs about twice the forward pass"


def test_what_cannot_fit_is_refused(monkeypatch):
    monkeypatch.setattr(bench, "free_bytes", lambda device: 10 * 2**20)
    with pytest.raises(UserError, match=r"B parameters need .* GB before activations .*--backward-only"):
        bench.measure("vlm4vla", "small", None, "cpu", "fp32", 1, 1, False)


def test_a_counted_step_is_the_same_to_the_bit_and_attention_counts():
    torch.manual_seed(0)
    q, k, v = (torch.randn(2, 3, n, 8, requires_grad=True) for n in (5, 7, 7))
    weight = torch.randn(8, 4, requires_grad=True)

    def step() -> list[torch.Tensor]:
        y = torch.nn.functional.scaled_dot_product_attention(q, k, v) @ weight
        return [y, *torch.autograd.grad(y.square().sum(), (q, k, v, weight))]

    plain = step()
    with FlopCounter() as counter:
        counted = step()
    assert all(torch.equal(a, b) for a, b in zip(plain, counted, strict=True))
    product, scores, values = 2 * 2 * 3 * 5 * 8 * 4, 2 * 2 * 3 * 5 * 7 * 8, 2 * 2 * 3 * 5 * 7 * 8
    # Backward: of the product two; of attention the scores again and the four of q, k, v and the probabilities.
    assert counter.total == 3 * product + (scores + values) + (scores + 2 * scores + 2 * values)


def test_a_run_tells_the_share_of_the_device_it_uses(store, tmp_path):
    run = train(train_config(store.path, tmp_path, "max_steps=3", "trainer.log_every=1")).parent
    with open(run / "metrics.csv", newline="") as file:
        shares = [float(row["mfu"]) for row in csv.DictReader(file)]
    assert len(shares) == 3 and all(0 < share < 1 for share in shares)


def test_a_step_that_fails_leaves_nothing_that_looks_on(store, tmp_path, monkeypatch):
    def fail(*_):
        raise ArithmeticError("in the first step")

    monkeypatch.setattr(VLAModule, "losses", fail)
    with pytest.raises(ArithmeticError):
        train(train_config(store.path, tmp_path, "max_steps=3"))
    assert _get_current_dispatch_mode() is None
