"""Optimiser groups, schedules and averages against the fact sheet's numbers and naive formulas."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import safetensors.torch
import torch
from torch import nn

from tests.conftest import train_config
from train import train
from vla.cli import compose_config
from vla.config import OptimConfig
from vla.errors import UserError
from vla.optim import cosine_floor, ema_decay, make_optimizer, make_schedule, tristage, weight_average
from vla.run_identity import run_dir
from vla.saving import STATE


def rates(cfg: OptimConfig, warmup: int, steps: int, count: int) -> list[float]:
    optimizer = torch.optim.AdamW([nn.Parameter(torch.zeros(1))], lr=cfg.lr)
    schedule = make_schedule(optimizer, cfg, warmup, steps)
    found = []
    for _ in range(count):
        found.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        schedule.step()
    return found


def flower() -> OptimConfig:
    return compose_config("train", "baseline=flower", "size=full").optim


def test_tristage_golden_numbers():
    """§10: 2e-6 at step 0, 2e-5 from 2,500 to 7,500, 1e-5 at 50,000; the phases of IDL table 7."""
    cfg = flower()
    found = {
        step: cfg.lr * tristage(step, cfg.schedule_steps, cfg.min_lr_ratio) for step in (0, 2500, 5000, 7500, 50000)
    }
    expected = {0: 2e-6, 2500: 2e-5, 5000: 2e-5, 7500: 2e-5, 50000: 1e-5}
    assert found == {step: pytest.approx(rate) for step, rate in expected.items()}
    halfway = 7500 + 42500 // 2
    assert cfg.lr * tristage(halfway, 50000, 0.5) == pytest.approx(1.5e-5)
    assert tristage(1250, 50000, 0.5) == pytest.approx(0.55)
    assert tristage(60000, 50000, 0.5) == pytest.approx(0.5), "it stays at its end"


def test_tristage_against_a_naive_loop_and_its_late_twin():
    cfg = replace(flower(), lr=1.0, schedule_steps=200)
    expected = []
    for step in range(200):
        if step < 10:
            expected.append(0.1 + (1 - 0.1) * step / 10)
        elif step < 30:
            expected.append(1.0)
        else:
            expected.append(0.5 + 0.5 * (1 + math.cos(math.pi * (step - 30) / 170)) / 2)
    assert rates(cfg, 0, 999, 200) == pytest.approx(expected)
    late = rates(replace(cfg, tristage_late=True), 0, 999, 200)
    assert late == pytest.approx([1.0, *expected[:199]]), "the public code's first step is at the peak (§0a.2)"


def test_cosine_floor_is_openpis():
    """§7.3: from lr/1001 over 1,000 steps to 2.5e-5, then cosine to 2.5e-6 at 30,000."""
    cfg = compose_config("train", "baseline=pi0", "size=full")
    peak, end, warm, total = 2.5e-5, 2.5e-6, 1000, 30000
    assert (cfg.optim.lr, cfg.optim.min_lr_ratio, cfg.optim.warmup_steps, cfg.max_steps) == (peak, 0.1, warm, total)
    for step in (0, 1, 500, 1000, 1001, 15500, 29999, 30000, 40000):
        if step < warm:
            start = peak / (warm + 1)
            expected = start + (peak - start) * step / warm
        else:
            progress = min((step - warm) / (total - warm), 1)
            expected = end + (peak - end) * 0.5 * (1 + math.cos(math.pi * progress))
        assert peak * cosine_floor(step, warm, total, 0.1) == pytest.approx(expected)


@pytest.mark.parametrize(
    ("name", "at"),
    [
        ("constant", lambda p: 1.0),
        ("linear", lambda p: 1 - p),
        ("cosine", lambda p: 0.5 * (1 + math.cos(math.pi * p))),
    ],
)
def test_plain_schedules(name, at):
    found = rates(OptimConfig(lr=2.0, schedule=name), 10, 110, 110)
    expected = [2.0 * step / 10 if step < 10 else 2.0 * at((step - 10) / 100) for step in range(110)]
    assert found == pytest.approx(expected)


def test_unknown_schedules_and_two_averages_are_named():
    with pytest.raises(UserError, match=r"optim\.schedule=steps.*tristage"):
        rates(OptimConfig(lr=1.0, schedule="steps"), 0, 10, 1)
    with pytest.raises(UserError, match=r"optim\.ema=0\.9 and optim\.ema_power=0\.5"):
        weight_average(OptimConfig(lr=1.0, ema=0.9, ema_power=0.5))


def test_no_decay_is_by_substring():
    """§14: names with bias, ln or norm, wherever in the name."""
    module = nn.ModuleDict(
        {"proj": nn.Linear(2, 2), "cond_norm": nn.Linear(2, 2), "adaln": nn.Linear(2, 2), "frozen": nn.Linear(2, 2)}
    )
    module["frozen"].requires_grad_(False)
    optimizer = make_optimizer(module, flower())
    decay, plain = ({id(p) for p in group["params"]} for group in optimizer.param_groups)
    assert decay == {id(module["proj"].weight)}
    assert plain == {id(p) for n in ("cond_norm", "adaln") for p in module[n].parameters()} | {id(module["proj"].bias)}
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.05, 0.0]
    assert optimizer.defaults["betas"] == (0.9, 0.95)


def test_ema_decay_golden_numbers():
    """§10: at the steps 1, 2, 10, 100, 1000 about 0, .370, .785, .954, .990; never above .9999."""
    found = [ema_decay(step - 1, 2 / 3).item() for step in (1, 2, 10, 100, 1000)]
    assert found == pytest.approx([0, 0.370, 0.785, 0.954, 0.990], abs=1e-3)
    assert ema_decay(10**9, 2 / 3).item() == 0.9999


def test_the_average_is_exported_and_training_is_untouched(store, tmp_path):
    """Checkpoints of every step give the weights that training went through; their average, taken here, is exported."""
    options = ("trainer.checkpoint_every=1", "trainer.keep_checkpoints=9", "max_steps=5", "optim.ema=0")
    plain = train_config(store.path, tmp_path / "plain", *options)
    train(plain)
    key = "policy.head.trunk.0.weight"
    trail = []
    for step in range(1, 6):
        state = torch.load(run_dir(plain) / "checkpoints" / f"step={step}" / STATE, weights_only=True)["state_dict"]
        trail.append(state[key].double())
    averaged = train_config(store.path, tmp_path / "averaged", *options, "optim.ema_power=0.6666666666666666")
    policy = train(averaged)
    last = torch.load(run_dir(averaged) / "checkpoints" / "step=5" / STATE, weights_only=True)["current_model_state"]
    assert last.keys() == state.keys() and all(torch.equal(value, last[name]) for name, value in state.items())
    average = trail[0]
    for step, weights in enumerate(trail[1:], 2):
        decay = min(1 - (1 + max(0, step - 1)) ** (-2 / 3), 0.9999)
        average = decay * average + (1 - decay) * weights
    exported = safetensors.torch.load_file(policy / "model.safetensors")[key.removeprefix("policy.")].double()
    torch.testing.assert_close(exported, average, atol=1e-6, rtol=1e-5)
    assert (exported - trail[-1]).abs().max() > 1e-4, "the average is not the last weights"
