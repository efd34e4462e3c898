"""OpenVLA's checkpoints (fact sheet §6.3), three of them:

- transformers' layout, as openvla/openvla-7b: shards and config.json, whose `norm_stats` are the statistics of all its
  data sets; a dataset_statistics.json beside it, as fine-tuning writes it, comes first.
- the authors' own, as openvla/openvla-7b-prismatic: RUN/checkpoints/*.pt with RUN/config.json and
  RUN/dataset_statistics.json. The source is RUN, or the file where there are several.
- the base VLM, as prism-dinosiglip-224px+7b of TRI-ML/prismatic-vlms (the folder; the whole repository holds dozens of
  models): the same without statistics and without vision towers, which were frozen. They are those of timm, to be put
  into its folders dinov2/ (timm/vit_large_patch14_reg4_dinov2.lvd142m) and siglip/ (timm/ViT-SO400M-14-SigLIP).

The last two name no tokeniser: Llama-2's files go beside config.json, or base=… names a place that has them.
Numbers of heads stand in no file: they are those of size=full. The last blocks of both towers, their final norms,
SigLIP's pooling and its text tower are not used by the model and left out.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import torch.nn.functional as F
from torch import Tensor
from transformers import LlamaConfig, LlamaTokenizer

from vla.errors import UserError
from vla.released.source import (
    Converted,
    choose_dataset,
    count_layers,
    drop,
    no_statistics,
    read_json,
    read_tensors,
    rename,
    rlds_statistics,
    take,
)

PARTS = [
    (r"^model\.(?=vision_backbone|projector|llm_backbone)", ""),
    (r"^vision_backbone\.(dino_)?featurizer\.", "dino."),
    (r"^vision_backbone\.(siglip|fused)_featurizer\.", "siglip."),
    (r"^projector\.projector\.", "projector."),
    (r"^projector\.fc1\.", "projector.0."),
    (r"^projector\.fc2\.", "projector.2."),
    (r"^projector\.fc3\.", "projector.4."),
    (r"^llm_backbone\.llm\.", "language_model."),
]
TOWERS = [
    (r"^dino\.cls_token$", "dino.embeddings.cls_token"),
    (r"^dino\.reg_token$", "dino.embeddings.register_tokens"),
    (r"^dino\.pos_embed$", "dino.embeddings.position_embeddings"),
    (r"^dino\.patch_embed\.proj\.", "dino.embeddings.patch_embeddings.projection."),
    (r"^dino\.blocks\.(\d+)\.attn\.proj\.", r"dino.blocks.\1.attn.o_proj."),
    (r"^dino\.blocks\.(\d+)\.attn\.", r"dino.blocks.\1.attention."),
    (r"^dino\.blocks\.(\d+)\.ls(\d)\.(gamma|scale_factor)$", r"dino.blocks.\1.layer_scale\2.lambda1"),
    (r"^dino\.blocks\.", "dino.encoder.layer."),
    (r"^siglip\.pos_embed$", "siglip.embeddings.position_embedding.weight"),
    (r"^siglip\.patch_embed\.proj\.", "siglip.embeddings.patch_embedding."),
    (r"^siglip\.blocks\.(\d+)\.attn\.proj\.", r"siglip.blocks.\1.attn.out_proj."),
    (r"^siglip\.blocks\.(\d+)\.attn\.", r"siglip.blocks.\1.self_attn."),
    (r"^siglip\.blocks\.(\d+)\.norm", r"siglip.blocks.\1.layer_norm"),
    (r"^siglip\.blocks\.", "siglip.encoder.layers."),
]
UNNEEDED = [
    r"^(dino|siglip)\.norm\.",  # the second-to-last block is read before any final norm
    r"^siglip\.attn_pool\.",
    r"^language_model\..*rotary_emb\.inv_freq$",  # a buffer that older transformers saved
    r"^optimizer\.",
]


def convert(path: Path, arguments: dict, dataset: str | None) -> Converted:
    """See vla/released/source.py; `arguments["pretrained"]` names a place with Llama-2's tokeniser."""
    found, weights, tokenizer = read(path, arguments, arguments["pretrained"])
    folder = run_folder(path)
    file = folder / "dataset_statistics.json"
    norm_stats = read_json(file) if file.exists() else read_json(folder / "config.json").get("norm_stats") or {}
    if not norm_stats and dataset is None:
        note = "no action statistics: only to start training from (init_from), which takes those of its data"
        return Converted(found, weights, no_statistics(), "q99", tokenizer, [note])
    name, entry = choose_dataset(norm_stats, dataset)
    note = f"action statistics of {name}"
    return Converted(found, weights, rlds_statistics(entry), "q99", tokenizer, [note])


def read(path: Path, arguments: dict, base: str | None) -> tuple[dict[str, Any], dict[str, Tensor], Any]:
    """(arguments of `OpenVLA.build` that the source determines, weights in its names, tokenizer).

    Args:
        arguments: those of `build`; numbers of heads come from their configs.
        base: a folder or hub id with Llama-2's tokeniser, where the source has none.

    Raises:
        UserError: something is missing, damaged or of another model, each named.
    """
    folder = run_folder(path)
    config = read_json(folder / "config.json")
    names = config.get("vla") or config.get("model") or config
    model = str(names.get("base_vlm") or names.get("vision_backbone_id"))
    if "dinosiglip" not in model or "224" not in model:
        raise UserError(f"{folder}/config.json is of {model}; only dinosiglip at 224 pixels can be converted")
    tensors = rename(read_tensors(_checkpoint(path)), PARTS)
    if not any(key.startswith(("dino.", "siglip.")) for key in tensors):
        tensors |= _timm_towers(folder)
    found = dimensions(tensors, arguments)
    if "text_config" in config:  # what its authors run it with, defaults included
        found["text_config"] = LlamaConfig(**config["text_config"]).to_diff_dict()
        found["bins_end"] = found["text_config"]["vocab_size"] - config.get("pad_to_multiple_of", 64)
    return found, convert_weights(tensors), load_tokenizer(folder, base)


def run_folder(path: Path) -> Path:
    """The folder with config.json of a checkpoint's folder or file."""
    folder = path if path.is_dir() else path.parent
    return folder.parent if folder.name == "checkpoints" else folder


def _checkpoint(path: Path) -> Path:
    if not (path / "checkpoints").is_dir():
        return path
    latest = path / "checkpoints" / "latest-checkpoint.pt"
    return latest if latest.exists() else path / "checkpoints"


def _timm_towers(folder: Path) -> dict[str, Tensor]:
    """Both towers as timm has them, DINO's positions resampled to SigLIP's grid as timm does it."""
    towers = {}
    for name, place in (("dino", folder / "dinov2"), ("siglip", folder / "siglip")):
        if not place.is_dir():
            raise UserError(f"{folder} has no vision weights; put timm's {place.name} into {place} (§6.3)")
        tensors = rename(drop(read_tensors(place), [r"^text\.", r"^logit_(scale|bias)$"]), [(r"^visual\.trunk\.", "")])
        towers |= {f"{name}.{key}": tensor for key, tensor in tensors.items()}
    positions, grid = take(towers, "dino.pos_embed", (1, None, None)), _grid(towers, "siglip")
    square = positions.float().unflatten(1, (_grid(towers, "dino"), -1)).permute(0, 3, 1, 2)
    square = F.interpolate(square, (grid, grid), mode="bicubic", antialias=True)
    return towers | {"dino.pos_embed": square.flatten(2).transpose(1, 2).to(positions.dtype)}


def dimensions(tensors: dict[str, Tensor], arguments: dict) -> dict[str, Any]:
    """What the shapes tell, beside the configs of `arguments`."""
    shapes = {}
    for name in ("dino", "siglip"):
        width, _, patch, _ = take(tensors, f"{name}.patch_embed.proj.weight", (None, 3, None, None)).shape
        inner = take(tensors, f"{name}.blocks.0.mlp.fc1.weight", (None, width)).shape[0]
        layers = count_layers(tensors, f"{name}.blocks.")
        shapes[name] = dict(hidden_size=width, num_hidden_layers=layers, patch_size=patch)
        shapes[name] |= dict(mlp_ratio=inner // width) if name == "dino" else dict(intermediate_size=inner)
    registers = take(tensors, "dino.reg_token", (1, None, None)).shape[1]
    vocabulary, hidden = take(tensors, "language_model.model.embed_tokens.weight", (None, None)).shape
    inner = take(tensors, "language_model.model.layers.0.mlp.gate_proj.weight", (None, hidden)).shape[0]
    depth = count_layers(tensors, "language_model.model.layers.")
    text = dict(vocab_size=vocabulary, hidden_size=hidden, intermediate_size=inner, num_hidden_layers=depth)
    return {
        "pretrained": None,
        "dino_config": arguments["dino_config"] | shapes["dino"] | {"num_register_tokens": registers},
        "siglip_config": arguments["siglip_config"] | shapes["siglip"],
        "text_config": arguments["text_config"] | text,
        "image_size": _grid(tensors, "siglip") * shapes["siglip"]["patch_size"],
    }


def convert_weights(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """timm's names of the towers (under dino. and siglip.) to transformers', without what the model does not use."""
    last = [rf"^{name}\.blocks\.{count_layers(tensors, f'{name}.blocks.') - 1}\." for name in ("dino", "siglip")]
    split = {}
    for key, tensor in drop(tensors, [*last, *UNNEEDED]).items():
        if ".attn.qkv." in key:
            parts = zip("qkv", tensor.chunk(3), strict=True)
            split |= {key.replace(".qkv.", f".{name}_proj."): part.clone() for name, part in parts}
        else:
            split[key] = tensor
    weights = rename(split, TOWERS)
    positions = "dino.embeddings.position_embeddings"  # transformers has a row for CLS, timm's model has none
    weights[positions] = F.pad(take(weights, positions, (1, None, None)), (0, 0, 1, 0))
    positions = "siglip.embeddings.position_embedding.weight"
    weights[positions] = take(weights, positions, (1, None, None))[0]
    return weights


def load_tokenizer(folder: Path, base: str | None) -> Any:
    """Llama-2's tokeniser with a token for padding, from the source's folder or from `base`."""
    place = folder if (folder / "tokenizer_config.json").exists() else base
    if place is None:
        raise UserError(f"{folder} has no tokenizer_config.json; put Llama-2's tokenizer files there")
    try:
        tokenizer = LlamaTokenizer.from_pretrained(place)  # AutoTokenizer asks to run the code that config.json names
    except (OSError, ValueError) as error:
        first = str(error).strip().splitlines()[0]
        raise UserError(f"{place} gives no tokenizer ({first}); name a place with Llama-2's by base=…") from error
    if tokenizer.pad_token is None:
        tokenizer.add_special_tokens({"pad_token": "<PAD>"})
    return tokenizer


def _grid(tensors: dict[str, Tensor], name: str) -> int:
    patches = take(tensors, f"{name}.pos_embed", (1, None, None)).shape[1]
    if math.isqrt(patches) ** 2 != patches:
        raise UserError(f"the checkpoint's {name}.pos_embed has {patches} rows, which is no square")
    return math.isqrt(patches)
