"""SpatialVLA's checkpoints: a hub folder of safetensors shards for code that came with it (fact sheet §5.8).

Read are `config.json`, the weights, `processor_config.json` (the grid's boundaries, action statistics, intrinsics,
chunk) and the tokenizer with its action tokens; the code in the folder is not. The text embedding's rows of action
tokens are dropped: the authors overwrite them with `spatial_embed_tokens` on loading, and so nothing ever reads them.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from transformers import (
    BeitConfig,
    Gemma2Config,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
    SiglipVisionConfig,
    ZoeDepthConfig,
)

from vla.action_tokens.grid import RANGES, SpatialGrid
from vla.errors import UserError
from vla.released.source import Converted, choose_dataset, drop, read_json, read_tensors, rename, rlds_statistics, take

BEIT = r"^(depth_model\.backbone\.beit\.layers\.\d+\.)"
RULES = [
    (r"^vision_tower\.vision_model\.", "vision_tower."),
    (r"^multi_modal_projector\.linear\.", "projector."),
    (r"^language_model\.model\.", "language_model."),
    (r"^language_model\.lm_head\.", "lm_head."),
    (r"^spatial_embed_tokens\.", "action_embedding."),
    (r"^position_embedding_3d\.position_embedding_head\.", "ego3d.mlp."),
    (r"^vision_zoe_model\.", "depth_model."),
    (r"^depth_model\.backbone\.embeddings\.", "depth_model.backbone.beit.embeddings."),
    (r"^depth_model\.backbone\.encoder\.layer\.", "depth_model.backbone.beit.layers."),
    (BEIT + r"attention\.attention\.relative_position_bias\.", r"\1relative_position_bias."),
    (BEIT + r"attention\.attention\.query\.", r"\1attention.q_proj."),
    (BEIT + r"attention\.attention\.key\.", r"\1attention.k_proj."),
    (BEIT + r"attention\.attention\.value\.", r"\1attention.v_proj."),
    (BEIT + r"attention\.output\.dense\.", r"\1attention.o_proj."),
    (BEIT + r"intermediate\.dense\.", r"\1mlp.fc1."),
    (BEIT + r"output\.dense\.", r"\1mlp.fc2."),
]
UNNEEDED = [
    r"\.relative_position_index$",  # a table that BEiT makes itself
    r"^vision_tower\.head\.",  # SigLIP's pooling, which nothing reads
]
EMBEDDING = "language_model.embed_tokens.weight"


def convert(path: Path, arguments: dict, dataset: str | None) -> Converted:
    """See vla/released/source.py; `path` is the folder, or a weight file in it.

    Raises:
        UserError: a file is missing or of another model, or statistics or grid cannot be used.
    """
    folder = path if path.is_dir() else path.parent
    config, processor = read_json(folder / "config.json"), read_json(folder / "processor_config.json")
    if (kind := config.get("model_type")) != "spatialvla":
        raise UserError(f"{folder}/config.json is of a {kind} model; only spatialvla can be converted")
    grid = released_grid(processor, folder)
    name, entry = choose_dataset(processor.get("statistics") or {}, dataset)
    mask = entry.get("action", {}).get("mask", [True] * 6 + [False])
    if list(mask) != [True] * 6 + [False]:
        raise UserError(f"dataset={name} normalises {mask}; only six motion dims and a plain gripper can be converted")
    weights = convert_weights(read_tensors(path), config.get("action_token_begin_idx"), grid.size)
    weights |= {f"grid.{key}": value for key, value in grid.state_dict().items()}
    dims = dimensions(config, folder)
    converted = {
        "pretrained": None,
        "pretrained_depth": None,
        **dims,
        "image_size": SiglipVisionConfig(**dims["vision_config"]).image_size,
        "bins": grid.bins,
        "intrinsics": intrinsics(processor.get("intrinsic_config") or {}, name, folder),
        "chunk": processor.get("action_chunk_size", 1),
    }
    notes = [f"action statistics of {name}; the grid is the checkpoint's own"]
    return Converted(converted, weights, rlds_statistics(entry), "q99", released_tokenizer(folder), notes)


def convert_weights(tensors: dict[str, Tensor], first_action: int | None, actions: int) -> dict[str, Tensor]:
    """The checkpoint's tensors in this project's names; `first_action` is the id of the first of `actions` tokens."""
    weights = drop(rename(tensors, RULES), UNNEEDED)
    rows = len(take(weights, EMBEDDING, (None, None)))
    if first_action is None or first_action + actions != rows:
        raise UserError(
            f"config.json has the {actions} action tokens begin at {first_action}, but there are {rows} embeddings: "
            "they are not the last ones"
        )
    return weights | {EMBEDDING: weights[EMBEDDING][:first_action]}


def released_grid(processor: dict, folder: Path) -> SpatialGrid:
    """The grid of `bin_policy`, with as many cells as that has."""
    policy = processor.get("bin_policy") or {}
    found = {**policy.get("translation", {}), **policy.get("rotation", {})}
    edges = [np.asarray(found.get(f"{name}_bins", []), dtype=np.float64) for name in RANGES]
    if not all(len(e) > 1 and np.isfinite(e).all() and (np.diff(e) > 0).all() for e in edges):
        raise UserError(f"{folder}/processor_config.json has no usable bin_policy; download it again")
    if not (processor.get("action_config") or {}).get("use_spherical", True):
        raise UserError(
            f"{folder}/processor_config.json cuts translations in x, y, z; only spherical grids can be read"
        )
    grid = SpatialGrid([len(e) - 1 for e in edges])
    values = dict(zip(RANGES, map(torch.from_numpy, edges), strict=True))
    grid.load_state_dict(values | {"fitted": torch.ones_like(grid.fitted)})
    return grid


def intrinsics(cameras: dict, dataset: str, folder: Path) -> dict[str, float]:
    """The data set's camera, or the default one."""
    camera = cameras.get(dataset) or cameras.get("default")
    try:
        (fx, skew, cx), (_, fy, cy), _ = camera["intrinsic"]
        values = dict(fx=fx, fy=fy, cx=cx, cy=cy, width=camera["width"], height=camera["height"])
    except (TypeError, KeyError, ValueError) as error:
        raise UserError(f"{folder}/processor_config.json has no intrinsics of {dataset}; download it again") from error
    if skew:
        raise UserError(f"the intrinsics of {dataset} are skewed, which cannot be converted")
    return {key: float(value) for key, value in values.items()}


def dimensions(config: dict, folder: Path) -> dict[str, dict]:
    """The arguments of the three models' configurations, without what only the authors' transformers knew."""
    sections = {}
    for name in ("vision_config", "text_config", "vision_zoe_config"):
        if not isinstance(sections.setdefault(name, config.get(name)), dict):
            raise UserError(f"{folder}/config.json has no {name}; download it again")
    depth = sections["vision_zoe_config"]
    if not isinstance(depth.get("backbone_config"), dict):
        raise UserError(f"{folder}/config.json has no vision_zoe_config.backbone_config; download it again")
    text = known(Gemma2Config, sections["text_config"])
    if theta := sections["text_config"].get("rope_theta"):  # transformers' name before 5.0
        text["rope_parameters"] = {"rope_type": "default", "rope_theta": float(theta)}
    return {
        "vision_config": known(SiglipVisionConfig, sections["vision_config"]),
        "text_config": text,
        "depth_config": known(ZoeDepthConfig, depth)
        | {"backbone_config": known(BeitConfig, depth["backbone_config"], "out_features")},
    }


def known(kind: type, section: dict, *more: str) -> dict:
    """The entries of a configuration that `kind` declares, or that are named."""
    return {key: value for key, value in section.items() if key in kind.__annotations__ or key in more}


def released_tokenizer(folder: Path) -> PreTrainedTokenizerBase:
    """As its file describes it, whichever class it was saved from."""
    if not (folder / "tokenizer.json").exists():
        raise UserError(f"{folder} has no tokenizer.json; download the checkpoint's folder whole")
    try:
        return PreTrainedTokenizerFast.from_pretrained(folder)
    except (OSError, ValueError) as error:
        raise UserError(f"{folder}/tokenizer.json cannot be read ({error}); download it again") from error
