"""FLOWER's Florence-2 side (fact sheet §4.1, §4.2, §4.5, §4.9) and what its configuration builds (IDL table 7)."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import nn
from transformers import Florence2Config, Florence2ForConditionalGeneration

from data.normalization import ActionNormalizer, ActionStatistics
from vla.baselines.flower import Flower, resize_bilinear
from vla.build import of_build
from vla.cli import compose_config
from vla.errors import UserError
from vla.optim import make_optimizer
from vla.tokenizer import byte_tokenizer
from vla.training import policy_arguments

VISION = dict(
    depths=[1, 1, 2, 1], embed_dim=[8, 12, 16, 24], num_heads=[1, 2, 2, 3], num_groups=[2, 3, 4, 4],
    initializer_range=0.2,
)  # fmt: skip
TEXT = dict(d_model=20, encoder_layers=2, encoder_attention_heads=2, encoder_ffn_dim=24, init_std=0.2)
DIT = dict(dim=24, heads=2, layers=2, low_rank=6, max_length=12)
FULL = compose_config("train", "baseline=flower", "size=full")
INSTRUCTIONS = ["open it", "put the bowl on the plate"]


def normalizer() -> ActionNormalizer:
    return ActionNormalizer(ActionStatistics.of(np.random.default_rng(0).uniform(-1, 1, (400, 7))), "none")


def build(**changes) -> Flower:
    torch.manual_seed(0)
    own = dict(pretrained=None, vision_config=VISION, text_config=TEXT, dit_config=DIT, max_text_tokens=192)
    return Flower.build(normalizer(), **of_build(policy_arguments(FULL)) | own | changes)


@pytest.fixture(scope="module")
def policy() -> Flower:
    return build().eval()


def images(count: int = 2, size: int = 224) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    static, wrist = torch.randint(0, 256, (2, count, 3, size, size), dtype=torch.uint8, generator=generator)
    return {"static": static, "wrist": wrist}


def test_florence_s_part_equals_transformers_own_model(policy):
    """The same weights in Florence2Model: its image features, and its encoder on tokens it embeds itself."""
    text = policy.encoder.config.to_dict() | {"vocab_size": len(policy.tokenizer)}
    image_id, flow_id = (policy.tokenizer.convert_tokens_to_ids(f"<|{name}|>") for name in ("image_pad", "vision_end"))
    config = Florence2Config(
        vision_config=policy.vision_tower.config.to_dict(), text_config=text, image_token_id=image_id
    )
    reference = Florence2ForConditionalGeneration(config).eval().model
    reference.vision_tower.load_state_dict(policy.vision_tower.state_dict())
    reference.multi_modal_projector.load_state_dict(policy.projector.state_dict())
    reference.language_model.encoder.load_state_dict(policy.encoder.state_dict())
    mean, std = [0.48145466, 0.4578275, 0.40821073], [0.26862954, 0.26130258, 0.27577711]
    ids, valid = policy.tokenize(INSTRUCTIONS, torch.device("cpu"))
    head = torch.tensor([image_id] * 100 + [flow_id]).expand(2, -1)
    with torch.no_grad():
        reference.language_model.shared.weight[flow_id] = policy.flow  # `<Flow>`, smuggled in as a token
        pooled = []
        for image in images().values():
            pixels = torch.stack([(image[:, c] / 255 - mean[c]) / std[c] for c in range(3)], dim=1)
            pooled.append(reference.get_image_features(pixels).pooler_output)
        visual = policy.encode_images(policy.prepare(images()))
        for camera, expected in zip(("static", "wrist"), pooled, strict=True):
            assert expected.shape == (2, 50, 20)
            torch.testing.assert_close(visual[camera].embeds, expected, atol=1e-5, rtol=1e-5)
        embeds = reference.language_model.shared(torch.cat([head, ids], dim=1))
        embeds[:, :100] = torch.cat(pooled, dim=1)
        for attend, mask in ((True, torch.ones_like(ids)), (False, valid.long())):
            mask = nn.functional.pad(mask, (101, 0), value=1)
            expected = reference.language_model.encoder(inputs_embeds=embeds, attention_mask=mask).last_hidden_state
            rows, (got, _) = mask.bool(), policy.context(visual, INSTRUCTIONS, attend)
            torch.testing.assert_close(got[rows], policy.dit.context(expected)[rows], atol=1e-5, rtol=1e-4)


def test_one_camera_will_do():
    policy = build(cameras=["static"]).eval()
    visual = policy.encode_images(policy.prepare(images()))
    assert list(visual) == ["static"]
    ids, _ = policy.tokenize(INSTRUCTIONS, torch.device("cpu"))
    assert policy.context(visual, INSTRUCTIONS, True)[0].shape == (2, 51 + ids.shape[1], 24)


def test_prompt_is_the_reference_s_and_cut_to_77_tokens():
    """§4.2: two spaces before "Task"."""
    assert FULL.policy.prompt == (
        "Agent Type: 1-arm Franka Panda, Action Space: Delta End-Effector,  Task Instruction: {instruction}"
    )
    assert FULL.policy.max_text_tokens == 77
    ids, valid = build(max_text_tokens=77).tokenize([" open it\n", "put it " * 40], torch.device("cpu"))
    assert ids.shape == (2, 77) and valid[1].all()


def test_flow_vector_is_the_mean_embedding_and_stays():
    """§0a.3, §14.1: the same after an optimiser step that moves the embeddings."""
    policy = build()
    embeddings, before = policy.encoder.embed_tokens.weight.detach().clone(), policy.flow.clone()
    torch.testing.assert_close(before, embeddings.mean(0))
    batch = {"actions": torch.zeros(2, 10, 7), "action_valid": torch.ones(2, 10) > 0, "instruction": INSTRUCTIONS}
    policy.loss(batch, policy.encode_images(policy.prepare(images())))["loss"].backward()
    make_optimizer(policy, FULL.optim).step()
    assert torch.equal(policy.flow, before) and "flow" not in dict(policy.named_parameters())
    assert not torch.equal(policy.encoder.embed_tokens.weight, embeddings)


def test_rope_tables_are_saved_and_used(policy):
    """§4.7: θ = 32 here, but what the state dict holds counts, for a released checkpoint brings its own."""
    state = policy.state_dict()
    cos, sin = state["dit.blocks.1.self_attn.cos"], state["dit.blocks.1.self_attn.sin"]
    assert cos.shape == sin.shape == (12, 6)
    for k in range(6):
        angle = 7 * 32 ** (-2 * k / 12)
        assert cos[7, k].item() == pytest.approx(math.cos(angle), abs=1e-6)
        assert sin[7, k].item() == pytest.approx(math.sin(angle), abs=1e-6)
    other = build(dit_config=DIT | {"rope_theta": 1000.0}).eval()
    inputs = torch.randn(1, 10, 7), torch.tensor([0.5]), torch.randn(1, 9, 24)
    before = other.dit(*inputs)
    other.load_state_dict(state)
    assert torch.equal(other.dit(*inputs), policy.dit(*inputs)) and not torch.allclose(other.dit(*inputs), before)


def test_frames_are_resized_bilinearly():
    """Enlarged: plain bilinear interpolation between pixel centres; halved: the triangle filter over four pixels."""
    frame = images(1, 20)["static"]
    source, got = frame[0, 0].double().numpy(), resize_bilinear(frame, (24, 24))[0, 0].double().numpy()
    for i in range(24):
        for j in range(24):
            y, x = (min(max((k + 0.5) * 20 / 24 - 0.5, 0), 19) for k in (i, j))
            top, left = int(y), int(x)
            below, right, dy, dx = min(top + 1, 19), min(left + 1, 19), y - top, x - left
            upper = source[top, left] * (1 - dx) + source[top, right] * dx
            lower = source[below, left] * (1 - dx) + source[below, right] * dx
            assert abs(got[i, j] - (upper * (1 - dy) + lower * dy)) <= 0.5001
    weights = np.array([1, 3, 3, 1]) / 8
    small = resize_bilinear(frame, (10, 10))[0, 0, 3, 3].item()
    assert abs(small - weights @ source[5:9, 5:9] @ weights) <= 0.5001


@pytest.mark.parametrize("tap", ["pre_projector", "post_projector", "layer:0", "layer:4"])
def test_taps_are_what_they_say(tap):
    """§4.9: 49 tokens before the projector, 50 after it, at 224 pixels."""
    policy, blocks = build(tap=tap).eval(), []
    for stage in policy.vision_tower.blocks:
        for block in stage:
            block.register_forward_hook(lambda _, __, output: blocks.append(output))
    with torch.no_grad():
        cameras = policy.encode_images(images(1))
    for row, tokens in enumerate(cameras.values()):  # both cameras go through the tower in one pass
        if tap == "post_projector":
            assert torch.equal(tokens.tap, tokens.embeds)
        else:
            index = 0 if tap == "layer:0" else 4
            assert torch.equal(tokens.tap, blocks[index][row : row + 1].flatten(2).transpose(1, 2))
            assert tokens.tap.shape[1] == (49 if index == 4 else 56 * 56)
    assert policy.tap_shape() == tuple(tokens.tap.shape[1:])
    expected = {policy.vision_tower, policy.projector} if tap == "post_projector" else {policy.vision_tower}
    assert set(policy.vision_modules()) == expected


def test_dropout_is_of_single_features(policy):
    """§4.2: element-wise on the encoder's output, in training only."""
    visual, seen = policy.encode_images(policy.prepare(images())), []
    assert torch.equal(*(policy.context(visual, INSTRUCTIONS, True)[0] for _ in range(2)))
    handle = policy.token_dropout.register_forward_hook(lambda _, args, out: seen.extend((args[0], out)))
    policy.token_dropout.train()
    policy.context(visual, INSTRUCTIONS, True)
    policy.token_dropout.eval()
    handle.remove()
    given, out = seen
    dropped = out == 0
    assert dropped.float().mean().item() == pytest.approx(0.1, abs=0.03)
    assert dropped.any(-1).float().mean() > 0.5 and not dropped.all(-1).any()
    torch.testing.assert_close(out[~dropped], given[~dropped] / 0.9)


def test_no_decay_group_is_the_reference_s():
    """§0a.4: biases, every norm, and, for "ln" is in "adaln", every modulation weight; embeddings do decay."""
    policy = build()
    groups = make_optimizer(policy, FULL.optim).param_groups
    assert [group["weight_decay"] for group in groups] == [0.05, 0.0]
    names = {id(p): name for name, p in policy.named_parameters()}
    matrices = {name for name, p in policy.named_parameters() if p.dim() > 1}
    assert {names[id(p)] for p in groups[0]["params"]} == {name for name in matrices if "adaln" not in name}
    assert {"dit.adaln.weight", "dit.blocks.1.adaln.0.weight", "encoder.embed_tokens.weight"} < matrices


def test_full_size_has_the_sheet_s_dimensions():
    """§4.1, §4.3, on the meta device."""
    with torch.device("meta"):
        policy = Flower.build(normalizer(), **of_build(policy_arguments(FULL)) | {"pretrained": None})
    shapes = {name: tuple(value.shape) for name, value in policy.state_dict().items()}
    assert shapes["projector.image_projection.weight"] == (1024, 2048)
    assert shapes["projector.image_position_embed.row_embeddings.weight"] == (50, 1024)
    assert len(policy.encoder.layers) == 12 and shapes["encoder.layers.0.fc1.weight"] == (4096, 1024)
    assert shapes["encoder.embed_tokens.weight"] == (51289, 1024)
    assert [len(stage) for stage in policy.vision_tower.blocks] == [1, 1, 9, 1]
    assert len(policy.dit.blocks) == 18 and shapes["dit.blocks.0.mlp.fc1.weight"] == (2816, 1024)
    assert shapes["dit.blocks.0.self_attn.cos"] == (100, 32) and shapes["dit.blocks.0.self_attn.q_norm.weight"] == (64,)
    assert shapes["dit.blocks.0.adaln.0.weight"] == (256, 1024) and shapes["dit.adaln.weight"] == (6144, 1024)
    assert policy.chunk == 10 and policy.flow_steps == 4 and policy.attend_padding and policy.draws == 1


def test_idl_table_7_reaches_the_program():
    cfg = compose_config("train", "baseline=flower", "size=full", "ablation=ptr", "benchmark=calvin_abc_d")
    inverse, optim = cfg.inverse_dynamics, cfg.optim
    assert (inverse.weight, inverse.gripper_weight, inverse.reverse_prob, inverse.dim) == (0.3, 0.01, 0.5, 1024)
    assert (cfg.max_steps, cfg.batch_size, cfg.chunk, cfg.cameras) == (40_000, 32, 10, ["static", "wrist"])
    assert (optim.lr, optim.weight_decay, optim.schedule, optim.schedule_steps) == (2e-5, 0.05, "tristage", 50_000)
    assert (optim.clip, list(optim.betas), cfg.normalization, cfg.data.tail) == (0.0, [0.9, 0.95], "none", "whole")
    assert optim.ema_power == pytest.approx(2 / 3) and cfg.policy.token_dropout == 0.1


def test_remote_code_weights_are_not_taken_for_a_model(tmp_path):
    """microsoft/Florence-2-large has other names for its weights; transformers alone would go on with random ones."""
    tokenizer = byte_tokenizer()
    text = TEXT | {"model_type": "bart", "vocab_size": len(tokenizer), "decoder_layers": 1}
    text |= {"decoder_attention_heads": 2, "decoder_ffn_dim": 24}
    config = Florence2Config(vision_config=VISION | {"projection_dim": 20}, text_config=text)
    florence = Florence2ForConditionalGeneration(config)
    state = {key.replace(".conv.", ".proj."): value.clone() for key, value in florence.state_dict().items()}
    florence.save_pretrained(tmp_path, state_dict=state)
    tokenizer.save_pretrained(tmp_path)
    with pytest.raises(UserError, match=r"policy\.pretrained=.*florence-community"):
        build(pretrained=str(tmp_path))
