"""VLM4VLA against the fact sheet: §3, golden numbers of §10, checklist of §14."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import Qwen3VLConfig, Qwen3VLForConditionalGeneration
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil
from transformers.models.qwen3_vl.configuration_qwen3_vl import Qwen3VLVisionConfig

from data.normalization import ActionNormalizer, ActionStatistics
from vla.baselines.vlm4vla import VLM4VLA
from vla.checkpoint import export_policy, load_policy
from vla.cli import compose_config
from vla.errors import UserError
from vla.policy import resize
from vla.tokenizer import byte_tokenizer
from vla.vision import QwenVision

VISION = dict(
    depth=3, hidden_size=32, intermediate_size=48, num_heads=2, out_hidden_size=24, deepstack_visual_indexes=[0, 1]
)
TEXT = dict(
    hidden_size=24, intermediate_size=32, num_hidden_layers=3, num_attention_heads=2, num_key_value_heads=1,
    head_dim=12,
    rope_parameters=dict(rope_type="default", rope_theta=5e6, mrope_section=[2, 2, 2], mrope_interleaved=True),
)  # fmt: skip
PROMPT = compose_config("train", "size=full").policy.prompt


def normalizer(scheme: str = "q99_clip065") -> ActionNormalizer:
    actions = np.random.default_rng(0).uniform(-1, 1, (400, 7))
    actions[:, 6] = actions[:, 6] > 0
    return ActionNormalizer(ActionStatistics.of(actions), scheme)


def arguments(**changes) -> dict:
    return dict(
        vision_config=VISION, text_config=TEXT, chunk=4, cameras=["static"], image_size=224, vision_size=448,
        tap="post_projector", prompt=PROMPT, deepstack=True, head_width=64, huber_delta=1.0, gripper_weight=0.01,
    ) | changes  # fmt: skip


@pytest.fixture(scope="module")
def policy() -> VLM4VLA:
    torch.manual_seed(0)
    return VLM4VLA.build(normalizer(), **arguments()).eval()


def frames(count: int = 2, size: int = 224) -> torch.Tensor:
    return torch.randint(0, 256, (count, 3, size, size), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


def test_image_path_gives_196_tokens(policy):
    """§10: 224² → 448² → grid (1, 28, 28), 784 patches, 196 tokens; DeepStack as many as the config names."""
    patches = policy.visual.patches(frames())
    assert patches.shape == (2 * 784, 1536)
    tokens = policy.encode_images({"static": frames()})["static"]
    assert tokens.embeds.shape == (2, 196, 24) and tokens.tap.shape == (2, 196, 24)
    assert [layer.shape for layer in tokens.deepstack] == [(2, 196, 24)] * 2


def test_patches_equal_the_released_processors_layout():
    """transformers' own processor, told the reference's pixel bounds (§3.2), on a frame of 448 and on one of 224."""
    processor = Qwen2VLImageProcessorPil(
        size={"shortest_edge": 28 * 28 * 256, "longest_edge": 1280 * 28 * 28}, patch_size=16,
        image_mean=[0.5] * 3, image_std=[0.5] * 3,
    )  # fmt: skip
    tower = QwenVision(Qwen3VLVisionConfig(**VISION), 448, "post_projector")
    for size, tolerance in ((448, 1e-6), (224, 2.1 / 255)):
        image = resize(frames(1, 32), (size, size))
        reference = processor(Image.fromarray(image[0].permute(1, 2, 0).numpy()), return_tensors="pt")
        assert reference["image_grid_thw"].tolist() == [[1, 28, 28]]
        torch.testing.assert_close(tower.patches(image), reference["pixel_values"], atol=tolerance, rtol=0)
    plain = Qwen2VLImageProcessorPil(patch_size=16, size={"shortest_edge": 65536, "longest_edge": 16777216})
    grid = plain(Image.new("RGB", (224, 224)), return_tensors="pt")["image_grid_thw"]
    assert grid.prod().item() // 4 == 64  # the released default is another model: 64 tokens


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_frames_attended_together_are_attended_apart(attention):
    """transformers' own path takes one frame after the other."""
    torch.manual_seed(0)
    tower = QwenVision(Qwen3VLVisionConfig(**VISION), 64, "post_projector")
    tower.set_attention(attention)
    seen = []
    for name in (attention, None):
        tower.zero_grad()
        if name is None:
            tower.model.set_attn_implementation(attention)
            grid = torch.tensor([[1, 4, 4]] * 3)
            tokens = tower.model(tower.patches(frames(3, 64)), grid_thw=grid).pooler_output
        else:
            tokens = tower(frames(3, 64)).embeds.flatten(0, 1)
        tokens.square().sum().backward()
        seen.append((tokens, tower.model.blocks[0].attn.qkv.weight.grad.clone()))
    torch.testing.assert_close(*seen, atol=1e-6, rtol=1e-5)


def test_whole_forward_equals_transformers_own_model(policy):
    """The query's hidden state, against Qwen3VLModel's forward on the same weights with the reference's positions."""
    config = Qwen3VLConfig(
        vision_config=policy.visual.model.config.to_dict(), text_config=policy.language_model.config.to_dict(),
        image_token_id=policy.image_id,
    )  # fmt: skip
    reference = Qwen3VLForConditionalGeneration(config).eval().model
    reference.visual.load_state_dict(policy.visual.model.state_dict())
    reference.language_model.load_state_dict(policy.language_model.state_dict())
    policy.query.data.normal_()
    image, instructions = frames(2), ["open the drawer", "put it down"]
    ids, mask = policy.tokenize(instructions, 196, image.device)
    unused = policy.tokenizer.convert_tokens_to_ids("<|pad|>")
    reference.language_model.embed_tokens.weight.data[unused] = policy.query  # the query, smuggled in as a token
    ids, mask = torch.cat([ids, torch.full((2, 1), unused)], 1), torch.nn.functional.pad(mask, (0, 1), value=1)
    with torch.no_grad():
        hidden = reference(
            input_ids=ids, attention_mask=mask, pixel_values=policy.visual.patches(image),
            image_grid_thw=torch.tensor([[1, 28, 28]] * 2), position_ids=torch.arange(ids.shape[1]).expand(3, 2, -1),
        ).last_hidden_state[:, -1]  # fmt: skip
        expected = policy.head(hidden)
        got = policy.decode(policy.encode_images({"static": image}), instructions)
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a, b, atol=1e-6, rtol=1e-5)


def test_prompt_is_the_references():
    assert PROMPT == (
        "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n<|im_start|>user\n<|vision_start|><|image_pad|>"
        "<|vision_end|>What action should the robotic arm take to {instruction}<|im_end|>\n<|im_start|>assistant\n"
    )


def test_tokens_and_padding(policy):
    """196 image tokens, right padding, instruction stripped."""
    ids, mask = policy.tokenize([" open ", "put the bowl on the plate"], 196, torch.device("cpu"))
    assert (ids == policy.image_id).sum(1).tolist() == [196, 196]
    assert mask[0].tolist() == sorted(mask[0].tolist(), reverse=True) and mask[1].all()
    text = policy.tokenizer.decode(ids[0][mask[0].bool()])
    assert "take to open<|im_end|>\n<|im_start|>assistant\n" in text


def test_query_counts_and_pads_do_not(policy):
    visual = policy.encode_images({"static": frames(2)})
    short, long = ["open", "put the bowl on the plate"]
    with torch.no_grad():
        before = policy.decode(visual, [short, long])[0]
        pad = policy.tokenizer.pad_token_id
        kept = policy.language_model.embed_tokens.weight[pad].clone()
        policy.language_model.embed_tokens.weight[pad] += 100
        after = policy.decode(visual, [short, long])[0]
        policy.language_model.embed_tokens.weight[pad] = kept
        assert torch.equal(before, after)
        policy.query += 1
        changed = policy.decode(visual, [short, long])[0]
        policy.query -= 1
    assert not torch.allclose(before, changed)


def test_query_starts_at_zero():
    assert (VLM4VLA.build(normalizer(), **arguments()).query == 0).all()


def test_deepstack_flag(policy):
    visual = policy.encode_images({"static": frames(2)})
    with torch.no_grad():
        on = policy.decode(visual, ["open"] * 2)[0]
        policy.deepstack = False
        off = policy.decode(visual, ["open"] * 2)[0]
        policy.deepstack = True
    assert not torch.allclose(on, off)


def test_head_has_the_references_shape_and_ranges():
    """§3.4 at 8 B width: hidden → hidden/2 → 1024, then 1024, 512, 256, 6H; motion in (-1, 1)."""
    from vla.baselines.vlm4vla import FCDecoder

    head = FCDecoder(4096, 1024, 10)
    linear = [tuple(m.weight.shape) for m in head.trunk if isinstance(m, torch.nn.Linear)]
    assert linear == [(2048, 4096), (1024, 2048)]
    widths = [m.weight.shape[0] for m in head.motion if isinstance(m, torch.nn.Linear)]
    assert widths == [1024, 512, 256, 60]
    assert [m.weight.shape[0] for m in head.gripper if isinstance(m, torch.nn.Linear)] == [1024, 512, 256, 10]
    motion, gripper = head(100 * torch.randn(3, 4096))
    assert (
        motion.shape == (3, 10, 6) and motion.abs().max() <= 1 and gripper.shape == (3, 10) and gripper.abs().max() > 1
    )


def test_loss_is_huber_plus_weighted_bce_over_valid_steps(policy):
    batch = {
        "actions": torch.rand(2, 4, 7).round(decimals=1),
        "action_valid": torch.tensor([[1, 1, 1, 0], [1, 0, 0, 0]]) > 0,
        "instruction": ["open", "close"],
    }  # fmt: skip
    batch["actions"][..., 6] = batch["actions"][..., 6].round()
    visual = policy.encode_images({"static": frames(2)})
    with torch.no_grad():
        out = policy.loss(batch, visual)
        motion, gripper = policy.decode(visual, batch["instruction"])
    target = policy.normalizer.normalize(batch["actions"])
    huber, bce = [], []
    for b, h in [(0, 0), (0, 1), (0, 2), (1, 0)]:
        error = (motion[b, h] - target[b, h, :6]).abs()
        huber.append(torch.where(error < 1, 0.5 * error**2, error - 0.5).mean())
        p, g = torch.sigmoid(gripper[b, h]), target[b, h, 6]
        bce.append(-(g * p.log() + (1 - g) * (1 - p).log()))
    expected = sum(huber) / 4 + 0.01 * sum(bce) / 4
    torch.testing.assert_close(out["loss"], expected)


@pytest.mark.parametrize("tap", ["pre_projector", "post_projector", "layer:0", "layer:2"])
def test_taps_are_what_they_say(tap):
    torch.manual_seed(0)
    policy = VLM4VLA.build(normalizer(), **arguments(tap=tap)).eval()
    blocks = {}
    for index, block in enumerate(policy.visual.model.blocks):
        block.register_forward_hook(lambda _, __, output, index=index: blocks.__setitem__(index, output))
    with torch.no_grad():
        tokens = policy.encode_images({"static": frames(1)})["static"]
    if tap == "post_projector":
        assert torch.equal(tokens.tap, tokens.embeds)
    else:
        index = 2 if tap == "pre_projector" else int(tap[-1])
        assert tokens.tap.shape == (1, 784, 32) and torch.equal(tokens.tap[0], blocks[index].reshape(784, 32))
    assert policy.tap_shape() == tuple(tokens.tap.shape[1:])


def test_from_pretrained_and_export_round_trip(tmp_path):
    """The released-weights path, on a small Qwen3-VL saved here: load, export, load again without the source."""
    tokenizer = byte_tokenizer()
    text = TEXT | {"vocab_size": len(tokenizer)}
    config = Qwen3VLConfig(vision_config=VISION, text_config=text, tie_word_embeddings=True)
    torch.manual_seed(1)
    vlm = Qwen3VLForConditionalGeneration(config)
    vlm.save_pretrained(tmp_path / "released")
    tokenizer.save_pretrained(tmp_path / "released")
    built = arguments(pretrained=str(tmp_path / "released"))
    policy = VLM4VLA.build(normalizer(), **built).eval()
    assert torch.equal(policy.visual.model.patch_embed.proj.weight, vlm.model.visual.patch_embed.proj.weight)
    assert torch.equal(policy.language_model.embed_tokens.weight, vlm.model.language_model.embed_tokens.weight)
    export_policy(policy, tmp_path / "policy", name="vlm4vla", arguments=built, about={})
    (tmp_path / "released").rename(tmp_path / "gone")
    again, _ = load_policy(tmp_path / "policy")
    observation = {"images": {"static": frames(1)}, "state": torch.zeros(1, 8), "instruction": ["open"]}
    assert torch.equal(policy.predict(observation), again.predict(observation))


def test_missing_weights_and_wrong_cameras_are_named(tmp_path):
    with pytest.raises(UserError, match=r"policy\.pretrained="):
        VLM4VLA.build(normalizer(), **arguments(pretrained=str(tmp_path / "nothing")))
    with pytest.raises(UserError, match="static camera only"):
        VLM4VLA.build(normalizer(), **arguments(cameras=["static", "wrist"]))
