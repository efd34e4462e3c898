"""Whether a run fits is known before its weights are made."""

from __future__ import annotations

import time

import pytest
from transformers.models.qwen3_vl.configuration_qwen3_vl import (
    Qwen3VLConfig,
    Qwen3VLTextConfig,
    Qwen3VLVisionConfig,
)

from tests.conftest import train_config
from train import train
from vla import memory
from vla.errors import UserError
from vla.memory import Sizes, need, sizes_of, sketch
from vla.training import initial, policy_arguments, statistics_of


def test_bytes_by_hand():
    """16 bytes a parameter in fp32 with AdamW (baselines fact sheet §13), shared by the devices of FSDP."""
    cfg = train_config("unread", "unread", "optim.ema=0.0")
    sizes = Sizes(held=1000, trained=900, outside=100, largest=50)
    assert need(cfg, sizes).total == 4 * 1000 + 4 * 900 + 8 * 900
    spread = ("trainer.strategy=fsdp", "trainer.devices=4", "trainer.num_nodes=2")
    assert need(train_config("unread", "unread", *spread, "optim.ema=0.0"), sizes).total == (
        (4 * 1000 + 4 * 900 + 8 * 900) / 8 + 4 * (100 + 2 * 50)
    )
    mixed = need(train_config("unread", "unread", *spread, "trainer.precision=bf16-mixed", "optim.ema=0.9"), sizes)
    assert (mixed.gathered, mixed.average, mixed.weights) == (4 * 200, 4 * 900 / 8, 500)
    half = need(train_config("unread", "unread", "trainer.precision=bf16-true", "optim.ema=0.9"), sizes)
    assert (half.total, half.average) == (2 * 1000 + 2 * 900 + 4 * 900 + 2 * 1000, 2000)


def test_a_sketch_is_the_policy(store, tmp_path):
    """Of a run from the start, and of one from another policy, whose dimensions are not the configuration's."""
    first = train(train_config(store.path, tmp_path, "max_steps=1", "policy.head_width=64"))
    for overrides in ((), (f"init_from={first}",)):
        cfg = train_config(store.path, tmp_path, *overrides)
        policy = initial(cfg, store, policy_arguments(cfg))
        drawn = sketch(cfg, statistics_of(store))
        assert {p.device.type for p in drawn.parameters()} == {"meta"}
        assert sizes_of(drawn) == sizes_of(policy)


@pytest.mark.parametrize(
    ("baseline", "held"),
    # Fact sheet §13 and §3.1: VLM4VLA 8.8 B with the lm_head (151936 × 4096) that it has no use for.
    [("vlm4vla", 8.8e9 - 151936 * 4096), ("flower", 0.95e9), ("openvla", 7.5e9), ("pi0", 3.2e9)],
)
def test_full_sizes_are_those_of_the_fact_sheet(baseline, held, store, tmp_path):
    cfg = train_config(store.path, tmp_path, f"baseline={baseline}", "size=full")
    assert sizes_of(sketch(cfg, statistics_of(store))).held == pytest.approx(held, rel=0.04)


def test_another_release_has_its_own_size(store, tmp_path):
    """The 4 B model (fact sheet §3.1): 4.4 B, whatever the configuration says of the 8 B one."""
    heads = dict(num_attention_heads=32, num_key_value_heads=8, head_dim=128)
    text = Qwen3VLTextConfig(vocab_size=151936, hidden_size=2560, num_hidden_layers=36, intermediate_size=9728, **heads)
    vision = Qwen3VLVisionConfig(depth=24, hidden_size=1024, intermediate_size=4096, out_hidden_size=2560)
    whole = Qwen3VLConfig(text_config=text.to_dict(), vision_config=vision.to_dict())
    whole.save_pretrained(tmp_path / "release")
    cfg = train_config(store.path, tmp_path, "size=full", f"policy.pretrained={tmp_path / 'release'}")
    assert sizes_of(sketch(cfg, statistics_of(store))).held == pytest.approx(4.4e9, rel=0.03)


def test_what_cannot_fit_is_refused_at_once_and_nothing_is_written(store, tmp_path, monkeypatch):
    """The 8 B model on a machine of 24 GB: 8.16 B × 16 bytes."""
    monkeypatch.setattr(memory, "free_bytes", lambda: 24e9)
    started = time.monotonic()
    with pytest.raises(UserError, match=r"8\.16 B parameters; .* needs 131 GB a device before activations .* 24; "):
        train(train_config(store.path, tmp_path / "runs", "baseline=vlm4vla", "size=full"))
    assert time.monotonic() - started < 60 and not (tmp_path / "runs").exists()


def test_the_remedy_is_the_fewest_devices_that_hold_it(store):
    """130.5 GB in shares beside 4.3 GB gathered: two of 80 GB hold it, three of 50."""
    cfg = train_config(store.path, "unread", "baseline=vlm4vla", "size=full", "trainer=gpu")
    sizes = sizes_of(sketch(cfg, statistics_of(store)))
    assert memory.remedy(cfg, sizes, 80e9).startswith("shard it over 2 or more")
    assert memory.remedy(cfg, sizes, 50e9).startswith("shard it over 3 or more")
    assert memory.remedy(cfg, sizes, 1e9).startswith("take a device with more memory")
