"""π0 small enough for tests, what it is given, and a plain forward pass that it is held against."""

from __future__ import annotations

import math

import numpy as np
import torch

from data.normalization import ActionNormalizer, ActionStatistics
from vla.baselines.pi0 import Pi0

VISION = dict(hidden_size=24, intermediate_size=40, num_hidden_layers=3, num_attention_heads=2, patch_size=14)
TEXT = dict(
    hidden_size=32, intermediate_size=48, num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=1, head_dim=8
)  # fmt: skip
EXPERT = dict(hidden_size=16, intermediate_size=24)


def normalizer(scheme: str = "zscore") -> ActionNormalizer:
    rng = np.random.default_rng(0)
    actions = rng.uniform(-1, 1, (400, 7))
    actions[:, 6] = actions[:, 6] > 0
    return ActionNormalizer(ActionStatistics.of(actions, rng.normal(1, 2, (400, 8))), scheme)


def arguments(**changes) -> dict:
    return dict(
        vision_config=VISION, text_config=TEXT, expert_config=EXPERT, chunk=5, cameras=["static", "wrist"],
        image_size=28, state_dim=10, action_dim=9, flow_steps=10, max_text_tokens=40, tap="pre_projector",
        gripper=[0.5, 0.5],
    ) | changes  # fmt: skip


def build(scheme: str = "zscore", **changes) -> Pi0:
    torch.manual_seed(0)
    policy = Pi0.build(normalizer(scheme), **arguments(**changes)).eval()
    for parameter in policy.parameters():  # initial weights of 0.02 and norms of 0 would hide most mistakes
        parameter.data += 0.2 * torch.randn_like(parameter)
    return policy


def frames(count: int = 2, size: int = 28, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (count, 3, size, size), dtype=torch.uint8, generator=generator)


def observation(instructions=("open", "put the bowl on the plate"), size: int = 28) -> dict:
    count = len(instructions)
    return {
        "images": {"static": frames(count, size, 1), "wrist": frames(count, size, 2)},
        "state": torch.randn(count, 8, generator=torch.Generator().manual_seed(3)),
        "instruction": list(instructions),
        "seed": torch.arange(count),
        "step": torch.full((count,), 4),
    }


def batch(valid=((1, 1, 1, 1, 1), (1, 1, 0, 0, 0))) -> dict:
    actions = torch.rand(2, 5, 7, generator=torch.Generator().manual_seed(4))
    actions[..., 6] = actions[..., 6].round()
    return observation() | {"actions": actions, "action_valid": torch.tensor(valid) > 0}


# The model once more, plainly: one row at a time, no padding, no cache, one joint attention over both sets of weights.


def linear(w: dict, name: str, x):
    return x @ w[f"{name}.weight"].T + w.get(f"{name}.bias", 0)


def layer_norm(w: dict, name: str, x):
    x = (x - x.mean(-1, keepdim=True)) / (x.var(-1, keepdim=True, unbiased=False) + 1e-6).sqrt()
    return x * w[f"{name}.weight"] + w[f"{name}.bias"]


def gelu(x):
    return 0.5 * x * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))


def rms_norm(w: dict, name: str, x):
    return x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt() * (1 + w[f"{name}.weight"])


def rotate(x, positions):
    """x (L, heads, d): halves (a, b) turned by position · 10000^(−2i/d)."""
    half = x.shape[-1] // 2
    angle = positions[:, None, None] * 10000.0 ** (-torch.arange(half) / half)
    a, b = x[..., :half], x[..., half:]
    return torch.cat([a * angle.cos() - b * angle.sin(), b * angle.cos() + a * angle.sin()], -1)


def naive_siglip(w: dict, frame) -> torch.Tensor:
    """(tokens, hidden) of one uint8 frame, last norm included."""
    w = {k.removeprefix("model.vlm.vision_tower."): v for k, v in w.items()}
    kernel = w["embeddings.patch_embedding.weight"].flatten(1)
    pixels, tokens, size = frame.to(kernel.dtype) / 127.5 - 1, [], 14
    for row in range(frame.shape[1] // size):
        for col in range(frame.shape[2] // size):
            patch = pixels[:, row * size : (row + 1) * size, col * size : (col + 1) * size]
            tokens.append(kernel @ patch.flatten() + w["embeddings.patch_embedding.bias"])
    x = torch.stack(tokens) + w["embeddings.position_embedding.weight"]
    for index in range(3):
        at = f"encoder.layers.{index}."
        y = layer_norm(w, at + "layer_norm1", x)
        q, k, v = (linear(w, f"{at}self_attn.{n}_proj", y).unflatten(-1, (2, -1)) for n in "qkv")
        weights = torch.einsum("qhd,khd->hqk", q, k).div(math.sqrt(q.shape[-1])).softmax(-1)
        x = x + linear(w, at + "self_attn.out_proj", torch.einsum("hqk,khd->qhd", weights, v).flatten(1))
        y = gelu(linear(w, at + "mlp.fc1", layer_norm(w, at + "layer_norm2", x)))
        x = x + linear(w, at + "mlp.fc2", y)
    return layer_norm(w, "post_layernorm", x)


def naive_velocity(policy: Pi0, images: list, ids: list[int], state, x, t: float) -> torch.Tensor:
    """(H, action_dim) for one sample: frames in the cameras' order, padded state (S,), x (H, action_dim)."""
    w = {k: v.double() for k, v in policy.pi0.state_dict().items()}
    state, x = state.double(), x.double()
    prefix = [linear(w, "model.vlm.multi_modal_projector.linear", naive_siglip(w, image)) for image in images]
    prefix.append(w["model.vlm.language_model.embed_tokens.weight"][ids] * math.sqrt(32))
    prefix = torch.cat(prefix)

    at, time = "embed_action_time.", time_embedding(policy, t).double().expand(len(x), -1)
    hidden = linear(w, at + "action_time_mlp_in", torch.cat([linear(w, at + "action_in_proj", x), time], -1))
    actions = linear(w, at + "action_time_mlp_out", hidden * hidden.sigmoid())
    streams = [prefix, torch.cat([linear(w, at + "state_proj", state)[None], actions])]

    p, total = len(prefix), len(prefix) + 1 + len(x)
    block = torch.tensor([0] * p + [1] + [2] * len(x))
    sees = block[:, None] >= block[None, :]
    positions = torch.arange(total)
    for index in range(3):
        names = [f"model.vlm.language_model.layers.{index}.", f"model.dit.layers.{index}."]
        normed = [rms_norm(w, n + "input_layernorm", s) for n, s in zip(names, streams, strict=True)]
        q, k, v = (
            torch.cat([linear(w, f"{n}self_attn.{kind}_proj", y) for n, y in zip(names, normed, strict=True)])
            for kind in "qkv"
        )
        q, k = rotate(q.unflatten(-1, (4, 8)), positions), rotate(k.unflatten(-1, (1, 8)), positions)
        scores = torch.einsum("qhd,kd->hqk", q, k[:, 0]) / math.sqrt(8)
        mixed = torch.einsum("hqk,kd->qhd", scores.masked_fill(~sees, -math.inf).softmax(-1), v).flatten(1)
        parts = [mixed[:p], mixed[p:]]
        streams = [s + linear(w, n + "self_attn.o_proj", m) for n, s, m in zip(names, streams, parts, strict=True)]
        for i, n in enumerate(names):
            y = rms_norm(w, n + "post_attention_layernorm", streams[i])
            y = gelu(linear(w, n + "mlp.gate_proj", y)) * linear(w, n + "mlp.up_proj", y)
            streams[i] = streams[i] + linear(w, n + "mlp.down_proj", y)
    return linear(w, "action_out_proj", rms_norm(w, "model.dit.norm", streams[1])[1:])


def time_embedding(policy: Pi0, t: float) -> torch.Tensor:
    return policy.pi0.embed_action_time.sinusoid_embeds(torch.tensor([t], dtype=torch.float32))[0]


def naive_of_row(policy: Pi0, seen: dict, row: int, state, x, t: float) -> torch.Tensor:
    ids, valid = policy.tokenize([seen["instruction"][row]], torch.device("cpu"))
    assert valid.all()
    images = [seen["images"][camera][row] for camera in policy.cameras]
    return naive_velocity(policy, images, ids[0].tolist(), state, x, t)
