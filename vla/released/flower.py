"""FLOWER's checkpoints (fact sheet §4.7-4.8), three of them:

- the pretraining's state dict, `360000_model_weights.pt` of mbreuss/flower_vla_pret, perhaps with an `agent.` prefix;
- a Lightning checkpoint of the CALVIN code: where its EMA callback kept an average (a bare list of tensors in the order
  of the state dict), the average is taken;
- a folder with `model.safetensors`, as mbreuss/flower_calvin_abc.

Florence-2 is named in them as in Microsoft's code for old transformers; every dimension is read from the shapes.
Neither a tokenizer nor action statistics are in them: the former comes from the base (base=…, by default
florence-community/Florence-2-large), and FLOWER's actions are not normalised. The other action spaces' encoders, the
embedding of the action space and what of the shared modulation nothing reads are left out.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from torch import Tensor
from transformers import AutoTokenizer

from vla.errors import UserError
from vla.released.source import (
    PICKLED,
    Converted,
    drop,
    flatten,
    no_statistics,
    read_pickle,
    read_tensors,
    rename,
    take,
    weight_files,
)

SPACE = "eef_delta"
"""FLOWER's action space of end-effector deltas and a gripper, the one of CALVIN and LIBERO."""
BLOCK = r"^(vision_tower\.blocks\.\d+\.\d+\.(?:spatial|channel)_block\.)"
RULES = [
    (r"^(state_dict\.)?(agent\.)?", ""),
    (r"\.mlp\.c_(fc1|fc2|proj)\.", r".mlp.\1."),
    (r"^vlm\.language_encoder\.", "encoder."),
    (r"^vlm\.language_model\.model\.encoder\.", "encoder."),
    (r"^vlm\.language_model\.model\.shared\.", "encoder.shared."),
    (r"^vlm\.vision_tower\.", "vision_tower."),
    (r"^vlm\.image_projection$", "projector.image_projection.weight"),
    (r"^vlm\.image_proj_norm\.", "projector.image_proj_norm."),
    (r"^vlm\.image_pos_embed\.", "projector.image_position_embed."),
    (r"^vlm\.visual_temporal_embed\.", "projector.visual_temporal_embed."),
    (r"^(vision_tower\.convs\.\d+\.)proj\.", r"\1conv."),
    (BLOCK + r"conv(\d)\.fn\.dw\.", r"\1conv\2."),
    (BLOCK + r"(window|channel)_attn\.norm\.", r"\1norm1."),
    (BLOCK + r"(window|channel)_attn\.fn\.", r"\1\2_attn."),
    (BLOCK + r"ffn\.norm\.", r"\1norm2."),
    (BLOCK + r"ffn\.fn\.net\.", r"\1ffn."),
    (r"^(cond_linear|cond_norm|t_embedder|frequency_embedder)\.", r"dit.\1."),
    (r"^dit\.(\d+)\.", r"dit.blocks.\1."),
    (r"^(dit\.blocks\.\d+\.)adaLN_modulation\.1\.", r"\1adaln.0."),
    (r"^(dit\.blocks\.\d+\.)adaLN_modulation\.2\.", r"\1adaln.1."),
    (rf"^action_encoders\.{SPACE}\.fc1\.", "dit.action_encoder.0."),
    (rf"^action_encoders\.{SPACE}\.fc2\.", "dit.action_encoder.2."),
    (rf"^action_decoders\.{SPACE}\.", "dit.action_decoder."),
    (rf"^adaln\.{SPACE}\.modCX\.1\.", "dit.adaln."),
]
UNNEEDED = [
    r"^(action_encoders|action_decoders|adaln)\.",  # of the other action spaces
    r"^action_space_embedder\.",  # computed and never used
    r"^proprio_encoders\.",  # proprioception is off in every released configuration of CALVIN and LIBERO
    r"^encoder\.shared\.",  # the same tensor as encoder.embed_tokens
    r"^vlm\.language_model\.(model\.decoder\.|lm_head\.|final_logits_bias$)",  # deleted by the authors' code
    r"^vlm\.language_(shared\.weight|final_logits_bias)$",  # as their exporter, which cuts every "model.", leaves them
    r"^vision_tower\.(norms|head)\.",  # of DaViT's classifier
]


def convert(path: Path, arguments: dict, dataset: str | None) -> Converted:
    """See vla/released/source.py; `arguments["pretrained"]` names the base with the tokenizer."""
    tensors, note = read(path)
    weights = convert_weights(tensors)
    base = arguments["pretrained"]
    try:
        tokenizer = AutoTokenizer.from_pretrained(base, trust_remote_code=False)
    except (OSError, ValueError) as error:
        raise UserError(f"base={base} gives no tokenizer of Florence-2: {error}") from error
    notes = [note, "<Flow> is the last row of the token embeddings", "actions are not normalised"]
    found = {"pretrained": None, **dimensions(weights, arguments)}
    return Converted(found, weights, no_statistics(), "none", tokenizer, notes)


def read(path: Path) -> tuple[dict[str, Tensor], str]:
    """The tensors to take, under the checkpoint's own names, and which they are."""
    file = weight_files(path)[0] if path.is_dir() else path
    if file.suffix not in PICKLED:
        return read_tensors(path), "the weights as they are"
    content = read_pickle(file)
    callbacks = content.get("callbacks") if isinstance(content, dict) else None
    average = next((c for name, c in (callbacks or {}).items() if name.startswith("EMA")), None)
    if not isinstance(average, dict) or not average.get("ema_weights"):
        return flatten(content), "the weights as they are (no EMA in the checkpoint)"
    state, kept = content["state_dict"], average["ema_weights"]
    if len(kept) != len(state):
        raise UserError(
            f"{file}: the EMA holds {len(kept)} tensors, the state dict {len(state)}; they do not belong together"
        )
    for (name, now), mean in zip(state.items(), kept, strict=True):
        if now.shape != mean.shape:
            raise UserError(
                f"{file}: the EMA's tensor for {name} has shape {tuple(mean.shape)}, not {tuple(now.shape)}"
            )
    return dict(zip(state, kept, strict=True)), "the EMA's average"


def convert_weights(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The checkpoint's tensors in this project's names and layout."""
    weights = rename(tensors, RULES)
    if "encoder.embed_tokens.weight" not in weights and "encoder.shared.weight" in weights:
        weights["encoder.embed_tokens.weight"] = weights["encoder.shared.weight"]
    weights = drop(weights, UNNEEDED)
    dim = take(weights, "dit.cond_linear.weight", (None, None)).shape[0]
    # A bare parameter there, applied from the right; three of the nine parts of the modulation are read by nothing.
    weights["projector.image_projection.weight"] = take(weights, "projector.image_projection.weight").T
    weights["dit.adaln.weight"] = take(weights, "dit.adaln.weight", (None, dim))[: 6 * dim]
    weights["flow"] = take(weights, "encoder.embed_tokens.weight", (None, None))[-1].clone()
    return weights


def dimensions(weights: dict[str, Tensor], arguments: dict) -> dict[str, Any]:
    """`build`'s arguments as the shapes have them; what they do not tell is as in `arguments`."""

    def count(pattern: str) -> int:
        found = {int(m.group(1)) for key in weights if (m := re.match(pattern, key))}
        if not found:
            raise UserError(f"the checkpoint has no weight like {pattern}; it is incomplete or of another layout")
        return len(found)

    widths = [
        take(weights, f"vision_tower.convs.{i}.conv.weight").shape for i in range(count(r"vision_tower\.convs\.(\d+)"))
    ]
    embed = [shape[0] for shape in widths]
    ffn = take(weights, "vision_tower.blocks.0.0.spatial_block.ffn.fc1.weight", (None, embed[0]))
    vision = {
        "depths": [count(rf"vision_tower\.blocks\.{i}\.(\d+)\.") for i in range(len(embed))],
        "embed_dim": embed,
        "num_heads": [width // 32 for width in embed],  # Florence-2's, base and large
        "num_groups": [width // 32 for width in embed],
        "patch_size": [shape[-1] for shape in widths],
        "mlp_ratio": ffn.shape[0] / embed[0],
    }
    vocabulary, width = take(weights, "encoder.embed_tokens.weight", (None, None)).shape
    text = {
        "vocab_size": vocabulary,
        "d_model": width,
        "encoder_layers": count(r"encoder\.layers\.(\d+)\."),
        "encoder_attention_heads": width // 64,
        "encoder_ffn_dim": take(weights, "encoder.layers.0.fc1.weight", (None, width)).shape[0],
        "max_position_embeddings": take(weights, "encoder.embed_positions.weight", (None, width)).shape[0] - 2,
    }
    dim = weights["dit.cond_linear.weight"].shape[0]
    dit = {
        "dim": dim,
        "heads": dim // take(weights, "dit.blocks.0.self_attn.q_norm.weight", (None,)).shape[0],
        "layers": count(r"dit\.blocks\.(\d+)\."),
        "low_rank": take(weights, "dit.blocks.0.adaln.0.weight", (None, dim)).shape[0],
        "max_length": take(weights, "dit.blocks.0.self_attn.cos", (None, None)).shape[0],
    }
    return {
        "vision_config": (arguments.get("vision_config") or {}) | vision,
        "text_config": (arguments.get("text_config") or {}) | text,
        "dit_config": (arguments.get("dit_config") or {}) | dit,
    }
