"""OpenVLA small enough for tests, what it is given, and naive towers, logits and loss that it is held against."""

from __future__ import annotations

import math
import string

import numpy as np
import torch
from transformers import LlamaTokenizer

from data.normalization import ActionNormalizer, ActionStatistics
from vla.baselines.openvla import OpenVLA
from vla.cli import compose_config

DINO = dict(hidden_size=24, num_hidden_layers=3, num_attention_heads=2, mlp_ratio=2, patch_size=14)
SIGLIP = dict(hidden_size=16, intermediate_size=40, num_hidden_layers=4, num_attention_heads=2, patch_size=14)
TEXT = dict(hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4)
PROMPT = compose_config("train", "baseline=openvla", "size=full").policy.prompt
SHORT, LONG = "open it", "put the bowl on the plate"


def normalizer() -> ActionNormalizer:
    actions = np.random.default_rng(0).uniform(-1, 1, (400, 7)) * np.linspace(0.01, 0.4, 7)
    actions[:, 6] = actions[:, 6] > 0
    return ActionNormalizer(ActionStatistics.of(actions), "q99")


def arguments(**changes) -> dict:
    return dict(
        dino_config=DINO, siglip_config=SIGLIP, text_config=TEXT, image_size=42, chunk=1, cameras=["static"],
        tap="pre_projector", prompt=PROMPT, space_id=None, bins_end=None, center_crop=False,
    ) | changes  # fmt: skip


def randomised(policy: OpenVLA, seed: int = 0) -> OpenVLA:
    """Every parameter drawn anew, so that none is a neutral zero or one."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in policy.named_parameters():
        scale = 1.0 if "lm_head" in name else 0.2
        parameter.data = scale * torch.randn(parameter.shape, generator=generator)
        if "norm" in name and name.endswith("weight"):
            parameter.data += 1
    return policy


def frames(count: int = 2, size: int = 42, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (count, 3, size, size), dtype=torch.uint8, generator=generator)


def observation(*instructions: str, size: int = 42) -> dict:
    count = len(instructions)
    images = {"static": frames(count, size)}
    return {"images": images, "state": torch.zeros(count, 8), "instruction": list(instructions)}


def batch(policy: OpenVLA, valid: list[list[int]], seed: int = 0) -> dict:
    statistics, rng = policy.normalizer.statistics, np.random.default_rng(seed)
    actions = rng.uniform(statistics.q01, statistics.q99, (2, policy.chunk, 7))
    actions[..., 6] = [[1] * policy.chunk, [0] * policy.chunk]
    return {
        "actions": torch.tensor(actions, dtype=torch.float32),
        "action_valid": torch.tensor(valid) > 0,
        "instruction": [SHORT, LONG],
    }


def as_timm(policy: OpenVLA, tower: str) -> dict[str, torch.Tensor]:
    """A tower's weights under the names of timm's VisionTransformer, its last block and final norm random."""
    model = getattr(policy, tower)
    state = model.state_dict()
    if tower == "dino":
        patch, blocks, attention, output = "embeddings.patch_embeddings.projection", "encoder.layer", "attention", "o"
        norms, positions = ("norm1", "norm2"), state["embeddings.position_embeddings"][:, 1:]
    else:
        patch, blocks, attention, output = "embeddings.patch_embedding", "encoder.layers", "self_attn", "out"
        norms = ("layer_norm1", "layer_norm2")
        positions = state["embeddings.position_embedding.weight"][None]
    timm = {"pos_embed": positions}
    if tower == "dino":
        cls = state["embeddings.cls_token"] + state["embeddings.position_embeddings"][:, :1]
        timm |= {"cls_token": cls, "reg_token": state["embeddings.register_tokens"]}
    depth = model.config.num_hidden_layers
    for kind in ("weight", "bias"):
        timm[f"patch_embed.proj.{kind}"] = state[f"{patch}.{kind}"]
        timm[f"norm.{kind}"] = torch.randn(model.config.hidden_size)
        for n in range(depth - 1):
            ours, theirs = f"{blocks}.{n}", f"blocks.{n}"
            qkv = [state[f"{ours}.{attention}.{name}_proj.{kind}"] for name in "qkv"]
            timm[f"{theirs}.attn.qkv.{kind}"] = torch.cat(qkv)
            timm[f"{theirs}.attn.proj.{kind}"] = state[f"{ours}.{attention}.{output}_proj.{kind}"]
            for index in (1, 2):
                timm[f"{theirs}.norm{index}.{kind}"] = state[f"{ours}.{norms[index - 1]}.{kind}"]
                timm[f"{theirs}.mlp.fc{index}.{kind}"] = state[f"{ours}.mlp.fc{index}.{kind}"]
                if tower == "dino":
                    timm[f"{theirs}.ls{index}.gamma"] = state[f"{ours}.layer_scale{index}.lambda1"]
    last = {k.replace("blocks.0.", f"blocks.{depth - 1}."): v for k, v in timm.items() if k.startswith("blocks.0.")}
    return timm | {key: torch.randn_like(value) for key, value in last.items()}


def naive_vit(weights: dict, pixels: torch.Tensor, heads: int, patch: int, blocks: int) -> torch.Tensor:
    """Patch tokens of one image (3, S, S) after so many blocks of a pre-norm ViT, plainly, in float64."""
    w = {key: value.double() for key, value in weights.items()}
    pixels, grid = pixels.double(), pixels.shape[-1] // patch
    tokens = []
    for row in range(grid):
        for col in range(grid):
            window = pixels[:, row * patch : (row + 1) * patch, col * patch : (col + 1) * patch]
            flat = (w["patch_embed.proj.weight"] * window).sum((1, 2, 3)) + w["patch_embed.proj.bias"]
            tokens.append(flat + w["pos_embed"][0, len(tokens)])
    prefix = [*w["cls_token"][0], *w["reg_token"][0]] if "cls_token" in w else []
    x = torch.stack(prefix + tokens)

    def norm(x, name):
        centred = x - x.mean(-1, keepdim=True)
        scaled = centred / (centred.square().mean(-1, keepdim=True) + 1e-6).sqrt()
        return scaled * w[f"{name}.weight"] + w[f"{name}.bias"]

    def linear(x, name):
        return x @ w[f"{name}.weight"].T + w[f"{name}.bias"]

    for n in range(blocks):
        scale = [w.get(f"blocks.{n}.ls{index}.gamma", torch.tensor(1.0)) for index in (1, 2)]
        q, k, v = linear(norm(x, f"blocks.{n}.norm1"), f"blocks.{n}.attn.qkv").chunk(3, -1)
        width = q.shape[-1] // heads
        out = []
        for h in range(heads):
            part = slice(h * width, (h + 1) * width)
            score = torch.softmax(q[:, part] @ k[:, part].T / math.sqrt(width), -1)
            out.append(score @ v[:, part])
        x = x + scale[0] * linear(torch.cat(out, -1), f"blocks.{n}.attn.proj")
        inner = linear(norm(x, f"blocks.{n}.norm2"), f"blocks.{n}.mlp.fc1")
        inner = inner * 0.5 * (1 + torch.erf(inner / math.sqrt(2)))
        x = x + scale[1] * linear(inner, f"blocks.{n}.mlp.fc2")
    return x[len(prefix) :].float()


def naive_fused(policy: OpenVLA, image: torch.Tensor, blocks: tuple[int, int]) -> torch.Tensor:
    pixels = image.float() / 255
    mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    dino = (pixels - mean[:, None, None]) / std[:, None, None]
    return torch.cat(
        [
            naive_vit(as_timm(policy, "dino"), dino, 2, 14, blocks[0]),
            naive_vit(as_timm(policy, "siglip"), (pixels - 0.5) / 0.5, 2, 14, blocks[1]),
        ],
        dim=-1,
    )


def naive_logits(policy: OpenVLA, tokens: torch.Tensor, ids: list[int]) -> torch.Tensor:
    """(1 + P + T - 1, V) of one sequence with the visual tokens behind BOS, without cache, mask or padding."""
    text = policy.language_model.model.embed_tokens(torch.tensor([ids]))
    embeds = torch.cat([text[:, :1], tokens[None], text[:, 1:]], dim=1)
    return policy.language_model(inputs_embeds=embeds).logits[0]


def prompt_ids(policy: OpenVLA, instruction: str) -> list[int]:
    text = f"In: What action should the robot take to {instruction.lower()}?\nOut:"
    return [policy.tokenizer.bos_token_id, *policy.tokenizer(text, add_special_tokens=False).input_ids]


def llama_tokenizer() -> LlamaTokenizer:
    """Llama-2's kind of tokeniser: SentencePiece BPE with byte fallback, a space before the text, rare signs last."""
    pieces = ["<unk>", "<s>", "</s>"] + [f"<0x{byte:02X}>" for byte in range(256)]
    pieces += ["In", ":", "Out", "▁In", "▁", *string.ascii_letters, "?", "."]
    pieces += [chr(0x4E00 + n) for n in range(256)]  # 256 signs that start no word
    merges = [("I", "n"), ("▁", "In"), ("O", "u"), ("Ou", "t")]
    return LlamaTokenizer(vocab={piece: n for n, piece in enumerate([*pieces, "Ou"])}, merges=merges)


def naive_loss(policy: OpenVLA, batch: dict, tokens: torch.Tensor) -> torch.Tensor:
    """Mean cross-entropy where the labels are not -100, sequence by sequence, labels as the reference makes them."""
    losses = []
    for b, instruction in enumerate(batch["instruction"]):
        actions = policy.normalizer.normalize(batch["actions"])[b].clone()
        valid = batch["action_valid"][b]
        for h in range(1, policy.chunk):
            actions[h] = actions[h] if valid[h] else actions[h - 1]
        said = [policy.bins.end - int(np.digitize(float(a), np.linspace(-1, 1, 256))) for a in actions.flatten()]
        ids = prompt_ids(policy, instruction) + said + [policy.tokenizer.eos_token_id]
        labels = [-100] * (len(ids) - len(said) - 1) + said + [policy.tokenizer.eos_token_id]
        for h in range(policy.chunk):
            if not valid[h]:
                start = len(ids) - 1 - 7 * (policy.chunk - h)
                labels[start : start + 7] = [-100] * 7
        logits = naive_logits(policy, tokens[b], ids)
        for place, label in enumerate(labels):
            if label != -100:
                losses.append(-logits[place + tokens.shape[1] - 1].log_softmax(-1)[label])
    return torch.stack(losses)
