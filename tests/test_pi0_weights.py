"""π0's sizes, hyperparameters and weights against the fact sheet (§7), openpi's numbers and transformers' PaliGemma."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from transformers import GemmaConfig, PaliGemmaConfig, PaliGemmaForConditionalGeneration, SiglipVisionConfig

from tests.pi0_reference import TEXT, VISION, arguments, normalizer, observation
from vla.baselines.pi0 import Pi0
from vla.build import of_build
from vla.checkpoint import export_policy, load_policy
from vla.cli import compose_config
from vla.errors import UserError
from vla.optim import cosine_floor
from vla.tokenizer import byte_tokenizer
from vla.training import policy_arguments


def test_full_size_is_the_papers():
    """§7.1: SigLIP 27 × 1152, Gemma 18 × 2048, expert 18 × 1024 with about 311 M weights, 256 tokens a camera."""
    cfg = compose_config("train", "baseline=pi0", "size=full")
    assert cfg.policy.pretrained == "google/paligemma-3b-pt-224"
    vision = dict(hidden_size=1152, intermediate_size=4304, num_hidden_layers=27, num_attention_heads=16, patch_size=14)
    text = dict(
        hidden_size=2048, intermediate_size=16384, num_hidden_layers=18, num_attention_heads=8, num_key_value_heads=1,
        vocab_size=257152,
    )  # fmt: skip
    given = of_build(policy_arguments(cfg)) | {"pretrained": None, "vision_config": vision, "text_config": text}
    with torch.device("meta"):
        policy = Pi0.build(normalizer(), **given)
    pi0 = policy.pi0

    def count(module) -> int:
        return sum(p.numel() for p in module.parameters())

    assert count(pi0.model.dit) == 18 * (1024 * 2048 * 2 + 2 * 1024 * 256 + 3 * 1024 * 4096 + 2 * 1024) + 1024
    assert count(pi0.model.dit) == pytest.approx(311e6, rel=0.01)
    assert count(pi0.model.vlm) == pytest.approx(2.923e9, rel=0.001)
    tower = pi0.model.vlm.vision_tower
    assert tower.embeddings.num_positions == 256 and len(tower.encoder.layers) == 27 and not hasattr(tower, "head")
    shapes = {name: tuple(p.shape) for name, p in pi0.named_parameters() if not name.startswith("model.")}
    assert {name: shape for name, shape in shapes.items() if name.endswith("weight")} == {
        "embed_action_time.action_in_proj.weight": (1024, 32), "embed_action_time.state_proj.weight": (1024, 32),
        "embed_action_time.action_time_mlp_in.weight": (1024, 2048), "action_out_proj.weight": (32, 1024),
        "embed_action_time.action_time_mlp_out.weight": (1024, 1024),
    }  # fmt: skip


def test_hyperparameters_are_openpis():
    cfg = compose_config("train", "baseline=pi0", "size=full", "ablation=ptr")
    optim = cfg.optim
    assert (optim.lr, tuple(optim.betas), optim.weight_decay, optim.ema) == (2.5e-5, (0.9, 0.95), 1e-10, 0.99)
    assert (cfg.batch_size, cfg.max_steps, cfg.normalization) == (32, 30000, "zscore")
    rate = [optim.lr * cosine_floor(s, optim.warmup_steps, cfg.max_steps, optim.min_lr_ratio) for s in (0, 1000, 30000)]
    assert rate == pytest.approx([2.5e-5 / 1001, 2.5e-5, 2.5e-6])
    assert cfg.augment.crop == {"static": pytest.approx(0.95**2)} and cfg.augment.rotation == {"static": 5}
    assert (cfg.policy.flow_steps, cfg.policy.max_text_tokens, cfg.policy.action_dim) == (10, 48, 32)


def test_tiny_learns_a_batch_by_heart():
    """Seconds of training on four samples: the loss falls and the sampled actions come near the batch's."""
    cfg = compose_config("train", "baseline=pi0", "size=tiny")
    torch.manual_seed(0)
    policy = Pi0.build(normalizer("q99"), **of_build(policy_arguments(cfg)) | {"chunk": 2})
    data = observation(("open", "close", "put the bowl on the plate", "push"), size=56)
    actions = torch.rand(4, 2, 7) * 1.6 - 0.8
    actions[..., 6] = (actions[..., 6] > 0).float()
    data |= {"actions": actions, "action_valid": torch.ones(4, 2, dtype=torch.bool)}
    optimizer = torch.optim.AdamW(policy.parameters(), lr=2e-3, betas=(0.9, 0.95))
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, total_steps=240, pct_start=0.1)
    losses = []
    for _ in range(240):
        loss = policy.loss(data, policy.encode_images(data["images"]))["loss"]
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(policy.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        losses.append(loss.item())
    assert np.mean(losses[-10:]) < np.mean(losses[:5]) / 10
    predicted = policy.eval().predict(data)
    assert (predicted - actions)[..., :6].abs().mean() < 0.35 * actions[..., :6].abs().mean()
    assert torch.equal(predicted[..., 6], actions[..., 6])


def test_from_pretrained_and_export_round_trip(tmp_path):
    """The released-weights path, on a small PaliGemma saved here: load, export, load again without the source."""
    tokenizer = byte_tokenizer()
    tokenizer.bos_token = "<|im_start|>"
    text = GemmaConfig(**TEXT, vocab_size=len(tokenizer))
    vision = SiglipVisionConfig(**VISION, image_size=28, vision_use_head=False)
    config = PaliGemmaConfig(vision_config=vision, text_config=text, projection_dim=32)
    torch.manual_seed(1)
    vlm = PaliGemmaForConditionalGeneration(config)
    vlm.save_pretrained(tmp_path / "released")
    tokenizer.save_pretrained(tmp_path / "released")
    given = arguments(pretrained=str(tmp_path / "released"), vision_config={}, text_config={})
    policy = Pi0.build(normalizer(), **given).eval()
    loaded = policy.pi0.model.vlm.state_dict()
    assert {k: v.shape for k, v in loaded.items()} == {k: v.shape for k, v in vlm.model.state_dict().items()}
    assert all(torch.equal(value, loaded[key]) for key, value in vlm.model.state_dict().items())
    assert policy.pi0.embed_action_time.action_in_proj.weight.std().item() == pytest.approx(1 / math.sqrt(27), rel=0.2)
    assert all(p.device.type == "cpu" for p in policy.parameters()) and policy.tokenizer.bos_token_id is not None
    assert policy.pi0.model.dit.config._attn_implementation == "sdpa"
    export_policy(policy, tmp_path / "policy", name="pi0", arguments=given, about={})
    (tmp_path / "released").rename(tmp_path / "gone")
    again, _ = load_policy(tmp_path / "policy")
    seen = observation()
    assert torch.equal(policy.predict(seen), again.predict(seen))


def test_bad_sources_are_named(tmp_path):
    with pytest.raises(UserError, match=r"policy\.pretrained="):
        Pi0.build(normalizer(), **arguments(pretrained=str(tmp_path / "nothing")))
