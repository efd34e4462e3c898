"""VLM4VLA's checkpoints: one fp32 `.pt` with a `state_dict` whose names start with `model.` (fact sheet §3.9).

The file holds neither dimensions nor statistics. The former come from the base VLM's config.json, in the source folder
or named by base=…; the latter from `dataset_statistics.json` in the source folder (RLDS form, as on Bridge and LIBERO).
Without that file the policy is taken for a CALVIN one, whose actions are clipped at ±0.65 and need no statistics.
"""

from __future__ import annotations

from pathlib import Path

from torch import Tensor
from transformers import AutoConfig, AutoTokenizer

from vla.errors import UserError
from vla.released.source import (
    Converted,
    choose_dataset,
    drop,
    no_statistics,
    read_json,
    read_tensors,
    rename,
    rlds_statistics,
    take,
)

RULES = [
    (r"^(state_dict\.)?model\.", ""),
    (r"^backbone\.model\.visual\.", "visual.model."),
    (r"^backbone\.model\.language_model\.", "language_model."),
    (r"^backbone\.lm_head\.", "lm_head."),
    (r"^action_token$", "query"),
    (r"^act_head\.mlp\.", "head.trunk."),
    (r"^act_head\.actions\.mlp\.", "head.motion."),
    (r"^act_head\.gripper\.mlp\.", "head.gripper."),
]
UNNEEDED = [r"^lm_head\."]  # the head reads the query's state; the language head gets no gradient


def convert(path: Path, arguments: dict, dataset: str | None) -> Converted:
    """See vla/released/source.py; `arguments["pretrained"]` names the base VLM."""
    folder = path if path.is_dir() else path.parent
    weights = convert_weights(read_tensors(path))
    base = str(folder) if (folder / "config.json").exists() else arguments["pretrained"]
    try:
        config, tokenizer = (
            kind.from_pretrained(base, trust_remote_code=False) for kind in (AutoConfig, AutoTokenizer)
        )
    except (OSError, ValueError) as error:
        raise UserError(f"base={base} gives no Qwen3-VL config and tokenizer: {error}") from error
    motion = take(weights, "head.motion.6.weight", (None, None))
    converted = {
        "pretrained": None,
        "vision_config": config.vision_config.to_diff_dict(),
        "text_config": config.text_config.to_diff_dict(),
        "chunk": motion.shape[0] // 6,
        "head_width": motion.shape[1] * 4,
    }
    file = folder / "dataset_statistics.json"
    if not file.exists():
        return Converted(converted, weights, no_statistics(), "clip065", tokenizer, ["no statistics: CALVIN's ±0.65"])
    name, entry = choose_dataset(read_json(file), dataset)
    notes = [f"action statistics of {name}"]
    return Converted(converted, weights, rlds_statistics(entry), "q99_clip065", tokenizer, notes)


def convert_weights(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The checkpoint's tensors in this project's names."""
    weights = drop(rename(tensors, RULES), UNNEEDED)
    return weights | {"query": take(weights, "query").flatten()}
