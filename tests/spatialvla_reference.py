"""SpatialVLA small enough for tests, what it is given, and a plain Gemma2 that its forward pass is held against."""

from __future__ import annotations

import math

import numpy as np
import torch
import torch.nn.functional as F

from data.normalization import ActionNormalizer, ActionStatistics
from vla.baselines.spatialvla import SpatialVLA
from vla.ego3d import encode_points, estimate_depth, patch_points

VISION = dict(hidden_size=16, intermediate_size=24, num_hidden_layers=3, num_attention_heads=2, patch_size=14)
TEXT = dict(
    hidden_size=24, intermediate_size=32, num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=2, head_dim=6,
    query_pre_attn_scalar=8, attn_logit_softcapping=2.0, final_logit_softcapping=3.0,
)  # fmt: skip
DEPTH = dict(
    neck_hidden_sizes=[8] * 4, fusion_hidden_size=8, bottleneck_features=8, num_relative_features=8,
    bin_embedding_dim=8, num_attractors=[2, 2, 2, 1],
    bin_configurations=[dict(n_bins=8, min_depth=0.001, max_depth=10.0)],
    backbone_config=dict(
        image_size=32, hidden_size=16, intermediate_size=32, num_hidden_layers=4, num_attention_heads=2,
        use_relative_position_bias=True, reshape_hidden_states=False, out_features=[f"stage{i}" for i in range(1, 5)],
    ),
)  # fmt: skip
INTRINSICS = dict(fx=623.588, fy=623.588, cx=319.501, cy=239.545, width=640, height=480)
BINS = [4, 5, 3, 4, 3, 5]
INSTRUCTIONS = ["Open it", "put the Bowl on the plate!"]


def actions(count: int = 400) -> torch.Tensor:
    rng = np.random.default_rng(0)
    values = rng.normal(0, [0.3, 0.2, 0.1, 0.3, 0.3, 0.3, 1], (count, 7))
    values[:, 6] = values[:, 6] > 0
    return torch.tensor(values, dtype=torch.float32)


def normalizer(scheme: str = "q99") -> ActionNormalizer:
    return ActionNormalizer(ActionStatistics.of(actions().numpy()), scheme)


def arguments(**changes) -> dict:
    return dict(
        vision_config=VISION, text_config=TEXT, depth_config=DEPTH, chunk=3, cameras=["static"], image_size=28,
        tap="pre_projector", intrinsics=INTRINSICS, bins=BINS, min_sigma=0.0, adapt_grid=False, mask="prefix_lm",
        ensemble=-0.8,
    ) | changes  # fmt: skip


def build(**changes) -> SpatialVLA:
    torch.manual_seed(0)
    policy = SpatialVLA.build(normalizer(), **arguments(**changes)).eval()
    for parameter in policy.parameters():  # initial weights of 0.02 and norms of 0 would hide most mistakes
        parameter.data += 0.2 * torch.randn_like(parameter)
    policy.lm_head.weight.data[: policy.first_action] *= 0.3  # so that most of what is generated are actions
    policy.fit_to(actions())
    return policy


def frames(count: int = 2, size: int = 28, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (count, 3, size, size), dtype=torch.uint8, generator=generator)


def batch(valid=((1, 1, 1), (1, 1, 0))) -> dict:
    return {
        "actions": actions()[:6].reshape(2, 3, 7), "action_valid": torch.tensor(valid) > 0, "instruction": INSTRUCTIONS,
    }  # fmt: skip


def encoded(policy: SpatialVLA, images: torch.Tensor):
    return policy.encode_images({"static": images})


def observation(rows=slice(None)) -> dict:
    return {"images": {"static": frames(2, 40)[rows]}, "state": torch.zeros(2, 8)[rows],
            "instruction": INSTRUCTIONS[rows]}  # fmt: skip


# --- a plain Gemma2, one unpadded sequence at a time ------------------------------------------------------------------


def rms(x, weight):
    return x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt() * (1 + weight)


def rotate(x, places):
    """Rotary embedding of (L, heads, d) at `places`, halves paired."""
    half = x.shape[-1] // 2
    angle = places[:, None, None] * 10000.0 ** (-torch.arange(half) / half)
    a, b = x[..., :half], x[..., half:]
    return torch.cat([a * angle.cos() - b * angle.sin(), b * angle.cos() + a * angle.sin()], -1)


def gemma2(model, x, places, allowed, window=4096):
    """(L, D) → (L, D); `allowed[i][j]`: may i look at j."""
    config = model.config
    for index, layer in enumerate(model.layers):
        h = rms(x, layer.input_layernorm.weight)
        attention = layer.self_attn
        q = rotate((h @ attention.q_proj.weight.T).unflatten(-1, (4, 6)), places)
        k = rotate((h @ attention.k_proj.weight.T).unflatten(-1, (2, 6)), places)
        v = (h @ attention.v_proj.weight.T).unflatten(-1, (2, 6))
        heads = []
        for head in range(4):
            scores = q[:, head] @ k[:, head // 2].T / math.sqrt(config.query_pre_attn_scalar)
            scores = config.attn_logit_softcapping * torch.tanh(scores / config.attn_logit_softcapping)
            ok = allowed.clone()
            if index % 2 == 0:  # every other layer looks back no further than the window
                ok &= places[:, None] - places[None] < window
            heads.append(torch.softmax(scores.masked_fill(~ok, -torch.inf), -1) @ v[:, head // 2])
        x = x + rms(torch.cat(heads, -1) @ attention.o_proj.weight.T, layer.post_attention_layernorm.weight)
        h = rms(x, layer.pre_feedforward_layernorm.weight)
        gate = F.gelu(h @ layer.mlp.gate_proj.weight.T, approximate="tanh")
        h = (gate * (h @ layer.mlp.up_proj.weight.T)) @ layer.mlp.down_proj.weight.T
        x = x + rms(h, layer.post_feedforward_layernorm.weight)
    return rms(x, model.norm.weight)


def plain_features(policy, frame):
    """(P, D) of one frame: SigLIP + MLP of the 3D encoding, projected."""
    with torch.no_grad():
        tokens = policy.vision_tower((frame[None].float() / 255 - 0.5) / 0.5).last_hidden_state[0]
        points = patch_points(estimate_depth(policy.depth_model, frame[None]), policy.ego3d.rays, 2)
        position = policy.ego3d.mlp(encode_points(points))[0]
        return (tokens + position) @ policy.projector.weight.T + policy.projector.bias


def plain_embed(policy, ids):
    first, root = policy.first_action, math.sqrt(TEXT["hidden_size"])
    rows = [
        policy.action_embedding.weight[i - first] if i >= first else policy.language_model.embed_tokens.weight[i]
        for i in ids
    ]
    return torch.stack(rows) * root


def plain_ids(policy, instruction):
    text = policy.tokenizer.encode(instruction.lower() + "\n", add_special_tokens=False)
    return [policy.tokenizer.bos_token_id, *text]


@torch.no_grad()
def plain_logits(policy, frame, instruction, suffix, pads=0, mask="prefix_lm", window=4096):
    """Logits of every suffix token in the public code's layout: image, text, suffix, then `pads` pads."""
    ids = plain_ids(policy, instruction)
    features = plain_features(policy, frame)
    after = plain_embed(policy, [*suffix, *[policy.tokenizer.pad_token_id] * pads])
    x = torch.cat([features, plain_embed(policy, ids), after])
    prefix = len(features) + len(ids)
    end = prefix + len(suffix)
    allowed = torch.zeros(len(x), len(x), dtype=torch.bool)
    for i in range(len(x)):
        for j in range(len(x)):
            is_prefix, is_pad = j < prefix, j >= end
            if mask == "prefix_lm":
                allowed[i, j] = (is_prefix or j <= i) and not is_pad
            elif mask == "released_flash":
                allowed[i, j] = j <= i and not is_pad
            else:
                allowed[i, j] = is_prefix or is_pad or j <= i
    hidden = gemma2(policy.language_model, x, torch.arange(1, len(x) + 1), allowed, window)
    logits = hidden[prefix - 1 : end - 1] @ policy.lm_head.weight.T
    return policy.language_model.config.final_logit_softcapping * torch.tanh(
        logits / policy.language_model.config.final_logit_softcapping
    )


def suffix_of(policy, chunk):
    ids = policy.grid.encode(policy.normalizer.normalize(chunk)).flatten() + policy.first_action
    return [*ids.tolist(), policy.tokenizer.eos_token_id]


def plain_generate(policy, frame, instruction, window=4096):
    """Greedy decoding without a cache: the whole sequence again for every token."""
    ids = []
    for _ in range(3 * policy.chunk):
        ids.append(plain_logits(policy, frame, instruction, [*ids, 0], window=window)[-1].argmax().item())
    return torch.tensor(ids)
