"""FLOWER against the fact sheet (§4, checklist of §14): a naive flow transformer, masks, gradients, export."""

from __future__ import annotations

import math
from dataclasses import asdict

import numpy as np
import pytest
import torch
from transformers import Florence2Config, Florence2ForConditionalGeneration

from data.normalization import ActionNormalizer, ActionStatistics
from vla.baselines.flower import MEAN, STD, Flower
from vla.build import of_build
from vla.checkpoint import export_policy, load_policy
from vla.cli import compose_config
from vla.dit import FlowTransformer, RMSNorm, SwiGLU
from vla.errors import UserError
from vla.flow import initial_noise
from vla.tokenizer import byte_tokenizer

VISION = dict(depths=[1, 1, 1, 1], embed_dim=[16, 16, 32, 48], num_heads=[1, 1, 2, 3], num_groups=[1, 1, 2, 3])
TEXT = dict(
    d_model=48, encoder_layers=1, encoder_attention_heads=4, encoder_ffn_dim=64, max_position_embeddings=300
)  # fmt: skip
DIT = dict(dim=64, heads=4, layers=2, low_rank=16)


def normalizer(scheme: str = "none") -> ActionNormalizer:
    actions = np.random.default_rng(0).uniform(-1, 1, (200, 7))
    return ActionNormalizer(ActionStatistics.of(actions), scheme)


def arguments(**changes) -> dict:
    full = asdict(compose_config("train", "baseline=flower", "size=full").policy)
    own = {k: v for k, v in of_build(full).items() if k not in ("name", "pretrained")}
    dims = {"vision_config": VISION, "text_config": TEXT, "dit_config": DIT, "max_text_tokens": 200}
    return own | dims | {"chunk": 10, "cameras": ["static", "wrist"], "tap": "post_projector"} | changes


@pytest.fixture(scope="module")
def policy() -> Flower:
    torch.manual_seed(0)
    policy = Flower.build(normalizer(), **arguments()).eval()
    with torch.no_grad():
        policy.dit.adaln.weight.normal_(std=0.1)
    return policy


def images(count: int, size: int = 224) -> dict[str, torch.Tensor]:
    frames = torch.randint(
        0, 256, (2, count, 3, size, size), dtype=torch.uint8, generator=torch.Generator().manual_seed(0)
    )
    return {"static": frames[0], "wrist": frames[1]}


def observation(instructions: list[str], first: int = 0) -> dict:
    rows = slice(first, first + len(instructions))
    return {
        "images": {camera: frames[rows] for camera, frames in images(3).items()},
        "instruction": instructions,
        "state": torch.zeros(len(instructions), 15),
        "seed": torch.arange(3)[rows],
        "step": torch.zeros(len(instructions), dtype=torch.long),
    }


# --- the flow transformer, written out with loops in float64


def naive_rms(x, weight, true_rms=True):
    power = (x**2).mean(-1, keepdims=True) if true_rms else x.var(-1, ddof=1, keepdims=True)
    return x / np.sqrt(power + 1e-6) * weight


def silu(x):
    return x / (1 + np.exp(-x))


def gelu(x):
    return 0.5 * x * (1 + np.vectorize(math.erf)(x / math.sqrt(2)))


def standard(x):
    return (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-6)


def softmax(x):
    e = np.exp(x - x.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


def embed(number, scale, period, w, prefix):
    """Sinusoid [cos | sin] of 256, then Linear, SiLU, Linear."""
    angles = number * scale * np.exp(-np.log(period) * np.arange(128) / 128)
    hidden = silu(np.concatenate([np.cos(angles), np.sin(angles)]) @ w[f"{prefix}.0.weight"].T + w[f"{prefix}.0.bias"])
    return hidden @ w[f"{prefix}.2.weight"].T + w[f"{prefix}.2.bias"]


def naive_velocity(w: dict, actions, t, features, heads: int, layers: int, theta: float, true_rms: bool) -> np.ndarray:
    """One sample: actions (H, 7), t, features (L, D) → velocity (H, 7), as §4.3 says it."""

    def rms(x, weight):
        return naive_rms(x, weight, true_rms)

    context = rms(features, w["cond_norm.weight"]) @ w["cond_linear.weight"].T
    time = standard(embed(t, 1000.0, 1e4, w, "t_embedder.mlp"))
    frequency = standard(embed(3.0, 1.0, 1000.0, w, "frequency_embedder.mlp"))
    condition = time + frequency
    shared = silu(condition) @ w["adaln.weight"].T
    x = gelu(actions @ w["action_encoder.0.weight"].T + w["action_encoder.0.bias"])
    x = x @ w["action_encoder.2.weight"].T + w["action_encoder.2.bias"]
    dim = x.shape[1]
    size = dim // heads

    def attend(q, k, v, rotate: bool):
        out = np.zeros((len(q), dim))
        for head in range(heads):
            part = slice(head * size, (head + 1) * size)
            qh, kh, vh = q[:, part], k[:, part], v[:, part]
            scores = np.zeros((len(q), len(k)))
            for i in range(len(q)):
                for j in range(len(k)):
                    a, b = qh[i].copy(), kh[j].copy()
                    if rotate:
                        a, b = turn(a, i), turn(b, j)
                    scores[i, j] = a @ b / np.sqrt(size) if not rotate or j <= i else -np.inf
            out[:, part] = softmax(scores) @ vh
        return out

    def turn(vector, position):
        half = size // 2
        angle = position * theta ** (-np.arange(0, size, 2) / size)
        first, second = vector[:half], vector[half:]
        return np.concatenate(
            [first * np.cos(angle) - second * np.sin(angle), second * np.cos(angle) + first * np.sin(angle)]
        )

    def per_head(x, weight):
        return np.concatenate([rms(x[:, h * size : (h + 1) * size], weight) for h in range(heads)], axis=-1)

    for n in range(layers):
        b = f"blocks.{n}."
        own = silu(condition) @ w[b + "adaln.0.weight"].T + w[b + "adaln.0.bias"]
        own = own @ w[b + "adaln.1.weight"].T + w[b + "adaln.1.bias"]
        shift_a, scale_a, gate_a, shift_m, scale_m, gate_m = np.split(own + shared, 6)
        h = rms(x, w[b + "norm1.weight"]) * (1 + scale_a) + shift_a
        q, k, v = np.split(h @ w[b + "self_attn.qkv.weight"].T, 3, axis=-1)
        q, k = per_head(q, w[b + "self_attn.q_norm.weight"]), per_head(k, w[b + "self_attn.k_norm.weight"])
        x = x + gate_a * (attend(q, k, v, True) @ w[b + "self_attn.proj.weight"].T)
        h = rms(x, w[b + "norm2.weight"])
        q = per_head(h @ w[b + "cross_attn.q_proj.weight"].T, w[b + "cross_attn.q_norm.weight"])
        k = per_head(context @ w[b + "cross_attn.k_proj.weight"].T, w[b + "cross_attn.k_norm.weight"])
        v = context @ w[b + "cross_attn.v_proj.weight"].T
        x = x + attend(q, k, v, False) @ w[b + "cross_attn.proj.weight"].T
        h = rms(x, w[b + "norm3.weight"]) * (1 + scale_m) + shift_m
        gated = silu(h @ w[b + "mlp.fc1.weight"].T) * (h @ w[b + "mlp.fc2.weight"].T)
        x = x + gate_m * (gated @ w[b + "mlp.proj.weight"].T)
    return x @ w["action_decoder.weight"].T + w["action_decoder.bias"]


@pytest.mark.parametrize("true_rms", [True, False])
def test_velocity_equals_the_naive_transformer(true_rms):
    torch.manual_seed(1)
    dit = FlowTransformer(7, 24, **DIT, true_rms=true_rms).eval()
    with torch.no_grad():
        for parameter in dit.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    w = {key: value.double().numpy() for key, value in dit.state_dict().items()}
    actions, t, features = torch.randn(2, 10, 7), torch.tensor([0.31, 0.97]), torch.randn(2, 6, 24)
    found = dit(actions, t, dit.context(features)).detach().numpy()
    for row in range(2):
        inputs = actions[row].double().numpy(), t[row].item(), features[row].double().numpy()
        expected = naive_velocity(w, *inputs, heads=4, layers=2, theta=32.0, true_rms=true_rms)
        np.testing.assert_allclose(found[row], expected, rtol=3e-5, atol=1e-4)


def test_the_two_rms_norms():
    x = torch.randn(5, 8) + 1
    expected = {
        True: x / (x**2).mean(-1, keepdim=True).add(1e-6).sqrt(),
        False: x / x.var(-1, keepdim=True).add(1e-6).sqrt(),
    }
    for kind, value in expected.items():
        torch.testing.assert_close(RMSNorm(8, kind)(x), value)
    assert (expected[True] - expected[False]).abs().max() > 0.01


def test_swiglu_width():
    assert SwiGLU(1024, 0.0).fc1.out_features == 2816  # §10


def test_a_fresh_transformer_is_no_identity_but_its_shared_modulation_is_zero():
    torch.manual_seed(0)
    dit = FlowTransformer(7, 24, **DIT).eval()
    assert dit.adaln.weight.abs().max() == 0
    context = dit.context(torch.randn(1, 6, 24))
    actions = torch.randn(1, 10, 7)
    a, b = (dit(actions, torch.tensor([t]), context) for t in (0.1, 0.9))
    assert (a - b).abs().max() > 1e-4, "the local modulation sees the time from the first step on"


def test_causal_over_the_action_steps():
    torch.manual_seed(0)
    dit = FlowTransformer(7, 24, **DIT).eval()
    context, actions, t = dit.context(torch.randn(1, 6, 24)), torch.randn(1, 10, 7), torch.tensor([0.5])
    before = dit(actions, t, context)
    for step in (3, 9):
        changed = actions.clone()
        changed[:, step] += 1
        after = dit(changed, t, context)
        assert torch.equal(after[:, :step], before[:, :step])
        assert ((after - before)[:, step:].abs().amax(-1) > 0).all(), "and every later step does change"


def test_encoder_sequence(policy, monkeypatch):
    """50 tokens a camera, <Flow>, the prompt (§4.2); 224 pixels give 7 × 7 positions and their mean."""
    visual = policy.encode_images(images(2))
    assert visual["static"].embeds.shape == (2, 50, 48)
    seen = {}
    forward = policy.encoder.forward

    def spy(**inputs):
        seen.update(inputs)
        return forward(**inputs)

    monkeypatch.setattr(policy.encoder, "forward", spy)
    context, mask = policy.context(visual, ["open it", "push the red block"], attend_padding=True)
    ids, valid = policy.tokenize(["open it", "push the red block"], torch.device("cpu"))
    assert context.shape[:2] == (2, 101 + ids.shape[1]) and mask is None and seen["attention_mask"] is None
    embeds = seen["inputs_embeds"]
    assert torch.equal(embeds[:, :50], visual["static"].embeds) and torch.equal(
        embeds[:, 50:100], visual["wrist"].embeds
    )
    assert torch.equal(embeds[:, 100], policy.flow.expand(2, -1))
    assert torch.equal(embeds[:, 101:], policy.encoder.embed_tokens(ids)) and not valid.all()
    text = policy.tokenizer.decode(ids[1])
    assert text.startswith("Agent Type: 1-arm Franka Panda, Action Space: Delta End-Effector,  Task Instruction: push")


def test_pixels_are_normalised_with_clips_numbers(policy, monkeypatch):
    seen = []
    forward = policy.vision_tower.forward
    monkeypatch.setattr(policy.vision_tower, "forward", lambda pixels, **o: seen.append(pixels) or forward(pixels, **o))
    frames = images(1)
    policy.encode_images(frames)
    for channel in range(3):
        expected = (frames["static"][0, channel].double() / 255 - MEAN[channel]) / STD[channel]
        torch.testing.assert_close(seen[0][0, channel].double(), expected, atol=1e-5, rtol=0)
    assert MEAN[0] == 0.48145466 and STD[2] == 0.27577711


def test_predictions_do_not_depend_on_the_batch(policy):
    instructions = ["open it", "push the red block to the left", "go"]
    together = policy.predict(observation(instructions))
    for row, instruction in enumerate(instructions):
        torch.testing.assert_close(policy.predict(observation([instruction], row))[0], together[row], atol=1e-5, rtol=0)


def test_sampling_is_four_euler_steps_from_the_observations_noise(policy):
    given = observation(["open it"])
    visual = policy.encode_images(given["images"])
    context, _ = policy.context(visual, given["instruction"], attend_padding=False)
    z = initial_noise(given, (10, 7), "cpu")
    with torch.no_grad():
        for t in (1.0, 0.75, 0.5, 0.25):
            z = z - policy.dit(z, torch.tensor([t]), context) / 4
    actions = policy.predict(given)
    torch.testing.assert_close(actions[..., :6], z.clamp(-1, 1)[..., :6])
    assert torch.equal(actions[..., 6], (z[..., 6] > 0).float())


def batch_of(count: int = 3) -> dict:
    actions = torch.rand(count, 10, 7) * 2 - 1
    actions[..., 6] = (actions[..., 6] > 0).float()
    return {
        "actions": actions,
        "action_valid": torch.ones(count, 10, dtype=torch.bool),
        "instruction": ["open it", "push the red block", "go"][:count],
    }


def test_loss_is_the_mean_squared_velocity_error(policy):
    batch = batch_of()
    batch["action_valid"][1, 4:] = False
    visual = policy.encode_images(images(3))
    torch.manual_seed(7)
    loss = policy.loss(batch, visual)["loss"].item()
    torch.manual_seed(7)
    context, mask = policy.context(visual, batch["instruction"], True)
    t = (torch.rand(1) + torch.arange(3) / 3) % (1 - 1e-5)
    noise = torch.randn(3, 10, 7)
    actions = batch["actions"].clone()
    actions[..., 6] = 2 * actions[..., 6] - 1
    x = (1 - t)[:, None, None] * actions + t[:, None, None] * noise
    velocity = policy.dit(x, t, context, mask)
    errors = [
        (velocity[b, h] - (noise - actions)[b, h]).square().mean().item()
        for b in range(3)
        for h in range(10)
        if batch["action_valid"][b, h]
    ]
    assert loss == pytest.approx(np.mean(errors), rel=1e-4)


def test_attended_padding_changes_the_context_and_masked_padding_does_not(policy):
    visual = policy.encode_images(images(2))
    short = {camera: tokens.rows(slice(0, 1)) for camera, tokens in visual.items()}
    for attend in (True, False):
        alone, _ = policy.context(short, ["go"], attend)
        padded, mask = policy.context(visual, ["go", "push the red block to the left"], attend)
        difference = (padded[0, : alone.shape[1]] - alone[0]).abs().max().item()
        assert (difference < 1e-4) != attend
    assert mask[0].sum() == alone.shape[1] and mask[1].all()


def test_gradients_reach_all_parameters_and_not_the_flow_vector():
    torch.manual_seed(0)
    policy = Flower.build(normalizer(), **arguments())
    policy.loss(batch_of(2), policy.encode_images(images(2)))["loss"].backward()
    assert not [name for name, p in policy.named_parameters() if p.grad is None]
    assert not policy.flow.requires_grad and "flow" in policy.state_dict()


def test_more_draws_share_one_encoding():
    torch.manual_seed(0)
    policy = Flower.build(normalizer(), **arguments(draws=3, token_dropout=0.0)).eval()
    batch, visual = batch_of(2), policy.encode_images(images(2))
    torch.manual_seed(1)
    loss = policy.loss(batch, visual)["loss"].item()
    torch.manual_seed(1)
    t, noise = (torch.rand(1) + torch.arange(6) / 6) % (1 - 1e-5), torch.randn(6, 10, 7)
    actions = batch["actions"].repeat(3, 1, 1)
    actions[..., 6] = 2 * actions[..., 6] - 1
    context, _ = policy.context(visual, batch["instruction"], True)
    x = (1 - t)[:, None, None] * actions + t[:, None, None] * noise
    error = policy.dit(x, t, context.repeat(3, 1, 1)) - (noise - actions)
    assert loss == pytest.approx(error.square().mean().item(), rel=1e-5)


def test_export_and_load_are_bit_equal(policy, tmp_path):
    given = observation(["open it", "go"])
    export_policy(policy, tmp_path / "p", name="flower", arguments=arguments(), about={})
    loaded, _ = load_policy(tmp_path / "p")
    assert torch.equal(loaded.predict(given), policy.predict(given))


def test_from_pretrained_takes_florences_weights(tmp_path):
    tokenizer = byte_tokenizer()
    text = {"model_type": "bart", "vocab_size": len(tokenizer), "pad_token_id": tokenizer.pad_token_id, **TEXT}
    text |= {"decoder_layers": 1, "decoder_attention_heads": 4, "decoder_ffn_dim": 64}
    vision = VISION | {"projection_dim": TEXT["d_model"]}
    florence = Florence2ForConditionalGeneration(Florence2Config(vision_config=vision, text_config=text))
    florence.save_pretrained(tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")
    policy = Flower.build(normalizer(), **arguments(pretrained=str(tmp_path / "base")))
    ours, theirs = policy.state_dict(), florence.model.state_dict()
    for key, value in ours.items():
        if key.startswith("vision_tower."):
            assert torch.equal(value, theirs[key])
        if key.startswith("encoder."):
            assert torch.equal(value, theirs[f"language_model.{key}"])
    assert not any("decoder" in key and not key.startswith("dit.") for key in ours)
    with pytest.raises(UserError, match=r"policy\.pretrained=.*nowhere"):
        Flower.build(normalizer(), **arguments(pretrained=str(tmp_path / "nowhere")))


def test_bad_arguments_are_named():
    for changes, named in (
        ({"prompt": "go"}, r"policy\.prompt"),
        ({"times": "uniform"}, r"policy\.times=uniform"),
        ({"tap": "layer:9"}, r"layer:0 … layer:3"),
        ({"dit_config": DIT | {"max_length": 5}}, r"chunk=10 .*max_length=5"),
    ):
        with pytest.raises(UserError, match=named):
            Flower.build(normalizer(), **arguments(**changes))
    with pytest.raises(UserError, match="zscore"):
        Flower.build(normalizer("zscore"), **arguments())
