"""π0's checkpoints in PyTorch: lerobot's (`lerobot/pi0_base`, fine-tuned ones) and openpi's own port (fact sheet §7.3).

Both hold `model.safetensors` with openpi's names, lerobot's behind a leading `model.`; dimensions come from the shapes.
Statistics: lerobot's stand in the normaliser's file that `policy_preprocessor.json` names, openpi's in
`assets/<dataset>/norm_stats.json`. A base model has none of an arm with seven-dimensional actions: without any, or with
dataset=none, it becomes a policy to start from (init_from=), whose statistics the training data will give.

Not read: π0.5 and π0-FAST (other models), openpi's JAX checkpoints (openpi's own script makes PyTorch ones of them),
open-pi-zero (its expert turns with another RoPE base and its time embedding has other periods).
"""

from __future__ import annotations

import math
from pathlib import Path

from torch import Tensor
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from vla.errors import UserError
from vla.policy import GRIPPER
from vla.released.source import (
    Converted,
    choose_dataset,
    count_layers,
    drop,
    no_statistics,
    read_json,
    read_tensors,
    rename,
    take,
)

PALIGEMMA = r"^(?:model\.)?paligemma_with_expert\.paligemma\.(?:model\.)?"
VLM, EXPERT, EMBED = "pi0.model.vlm.", "pi0.model.dit.", "pi0.embed_action_time."
RULES = [
    (PALIGEMMA + r"vision_tower\.(?:vision_model\.)?", VLM + "vision_tower."),
    (PALIGEMMA + r"multi_modal_projector\.", VLM + "multi_modal_projector."),
    (PALIGEMMA + r"language_model\.", VLM + "language_model."),
    (PALIGEMMA + r"lm_head\.", "lm_head."),
    (r"^(?:model\.)?paligemma_with_expert\.gemma_expert\.model\.", EXPERT),
    (r"^(?:model\.)?paligemma_with_expert\.gemma_expert\.lm_head\.", "expert_lm_head."),
    (r"^(?:model\.)?(state_proj|action_in_proj|action_time_mlp_in|action_time_mlp_out)\.", EMBED + r"\1."),
    (r"^(?:model\.)?action_out_proj\.", "pi0.action_out_proj."),
]
# Neither language head gets a gradient; the language model's is tied to its embedding, the expert's to one π0 lacks.
UNNEEDED = [r"^lm_head\.", r"^expert_lm_head\."]
VISION_HEADS = 16  # of SigLIP so400m, the only tower there is; shapes do not tell
SCHEMES = {"MEAN_STD": "zscore", "QUANTILES": "q99"}
CAMERAS = ("static", "wrist")


def convert(path: Path, arguments: dict, dataset: str | None) -> Converted:
    """See vla/released/source.py; `arguments["pretrained"]` names a PaliGemma for its tokenizer.

    Raises:
        UserError: another model's checkpoint, unusable statistics, no tokenizer, or as the readers do.
    """
    folder = path if path.is_dir() else path.parent
    config = read_json(folder / "config.json") if (folder / "config.json").exists() else {}
    if (kind := config.get("type", "pi0")) != "pi0":
        raise UserError(f"{folder}/config.json is of a {kind} policy; only pi0 can be converted")
    tensors = read_tensors(path)
    if foreign := sorted(key for key in tensors if ".dense." in key or "time_mlp_in" in key.split(".")):
        raise UserError(f"{path} holds {foreign[0]}, which π0.5 has and π0 has not; only pi0 can be converted")
    weights = convert_weights(tensors)
    converted, notes = {"pretrained": None, **dimensions(weights)}, []
    if length := config.get("chunk_size", config.get("action_horizon")):
        converted["chunk"] = length
    if steps := config.get("num_inference_steps"):
        converted["flow_steps"] = steps
    if cameras := camera_names(config, notes):
        converted["cameras"] = cameras
    scheme, entries = statistics_of(folder, config)
    if dataset == "none" or not entries:
        statistics = no_statistics()
        notes.append("no action statistics taken: a policy to start from (init_from=), not one to roll out")
    else:
        name, entry = choose_dataset(entries, dataset)
        statistics, converted["gripper"] = action_statistics(name, entry)
        notes.append(f"statistics of {name}; its gripper read as openpi's: open at the lower end, closed at the upper")
    return Converted(converted, weights, statistics, scheme, tokenizer_of(folder, arguments), notes)


def convert_weights(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The checkpoint's tensors in this project's names."""
    weights, embedding = rename(tensors, RULES), VLM + "language_model.embed_tokens.weight"
    if embedding not in weights:  # of two tied tensors safetensors keeps one, and that one is the head
        weights[embedding] = take(weights, "lm_head.weight", (None, None))
    return drop(weights, UNNEEDED)


def dimensions(weights: dict[str, Tensor]) -> dict:
    """`build`'s dims from shapes. Every π0 has one key-value head, so the keys' width is that of a head."""

    def shape(key: str, dims: int = 2) -> tuple[int, ...]:
        return tuple(take(weights, key, (None,) * dims).shape)

    tower, text, expert = VLM + "vision_tower.", VLM + "language_model.", EXPERT
    vocabulary, width = shape(text + "embed_tokens.weight")
    head_dim = shape(text + "layers.0.self_attn.k_proj.weight")[0]
    positions, vision_width = shape(tower + "embeddings.position_embedding.weight")
    patch = shape(tower + "embeddings.patch_embedding.weight", 4)[-1]
    expert_width, action_dim = shape(EMBED + "action_in_proj.weight")
    return {
        "vision_config": {
            "hidden_size": vision_width,
            "intermediate_size": shape(tower + "encoder.layers.0.mlp.fc1.weight")[0],
            "num_hidden_layers": count_layers(weights, tower + "encoder.layers."),
            "num_attention_heads": VISION_HEADS,
            "patch_size": patch,
        },
        "text_config": {
            "vocab_size": vocabulary,
            "hidden_size": width,
            "intermediate_size": shape(text + "layers.0.mlp.gate_proj.weight")[0],
            "num_hidden_layers": count_layers(weights, text + "layers."),
            "num_attention_heads": shape(text + "layers.0.self_attn.q_proj.weight")[0] // head_dim,
            "num_key_value_heads": 1,
            "head_dim": head_dim,
        },
        "expert_config": {
            "hidden_size": expert_width,
            "intermediate_size": shape(expert + "layers.0.mlp.gate_proj.weight")[0],
        },
        "image_size": math.isqrt(positions) * patch,
        "state_dim": shape(EMBED + "state_proj.weight")[1],
        "action_dim": action_dim,
    }


def camera_names(config: dict, notes: list[str]) -> list[str]:
    """This project's names of lerobot's cameras: static is the first, wrist the second (openpi's order)."""
    features = config.get("input_features") or {}
    names = [n for n, f in features.items() if f.get("type") == "VISUAL" and "empty_camera" not in n]
    if names:
        read = dict(zip(names, CAMERAS, strict=False))
        notes.append("cameras: " + ", ".join(f"{name} → {read.get(name, 'not read')}" for name in names))
    return list(CAMERAS[: len(names)])


def statistics_of(folder: Path, config: dict) -> tuple[str, dict[str, dict]]:
    """Normalisation scheme, and name → {"actions": {mean, std, …}, "state": {…}} of every statistics there is."""
    found = {}
    for file in sorted(folder.glob("assets/**/norm_stats.json")):
        found[file.parent.relative_to(folder / "assets").as_posix()] = read_json(file).get("norm_stats", {})
    processor = folder / "policy_preprocessor.json"
    for step in read_json(processor).get("steps", []) if processor.exists() else []:
        if step.get("registry_name") == "normalizer_processor" and (name := step.get("state_file")):
            values = {key: tensor.flatten().tolist() for key, tensor in read_tensors(folder / Path(name).name).items()}
            parts = {
                kind: {key.removeprefix(feature): value for key, value in values.items() if key.startswith(feature)}
                for kind, feature in (("actions", "action."), ("state", "observation.state."))
            }
            if parts["actions"]:
                found["lerobot"] = parts
    modes = config.get("normalization_mapping") or {}
    pair = {modes.get(kind, "MEAN_STD") for kind in ("ACTION", "STATE")}
    if len(pair) > 1 or not pair <= set(SCHEMES):
        raise UserError(
            f"{folder}/config.json normalises by {sorted(pair)}; known: one of {', '.join(SCHEMES)} for both"
        )
    return SCHEMES[pair.pop()], found


def action_statistics(name: str, entry: dict) -> tuple[dict, list[float]]:
    """Fields of ActionStatistics, and the gripper's [centre, scale] in terms of this project's g (1 = open).

    openpi's gripper is open at 0 or −1 and closed at 1 (docs/norm_stats.md), its LIBERO one the simulator's ±1.
    """
    action, state = complete(entry.get("actions"), name), entry.get("state")
    if len(action["mean"]) < 7 or any(action["std"][7:]):
        width = sum(1 for value in action["std"] if value)
        raise UserError(f"statistics of {name} describe {width} action dims, not 7; dataset=none converts without them")
    lowest = -1 if action["q01"][GRIPPER] < -0.5 else 0
    centre, scale = (1 - action["mean"][GRIPPER]) / (1 - lowest), -action["std"][GRIPPER] / (1 - lowest)
    fields = {key: [float(v) for v in values[:7]] for key, values in action.items()}
    return fields | {"count": 0, "state": complete(state, name) if state else None}, [centre, scale]


def complete(entry: dict | None, name: str) -> dict[str, list[float]]:
    """The six lists of ActionStatistics; extremes stand in for missing quantiles and the other way round."""
    given = {key: value for key, value in (entry or {}).items() if value is not None}
    for key, other in (("q01", "min"), ("q99", "max"), ("min", "q01"), ("max", "q99")):
        if other in given:
            given.setdefault(key, given[other])
    names = ("q01", "q99", "mean", "std", "min", "max")
    if missing := [key for key in names if key not in given]:
        raise UserError(f"statistics of {name} lack {', '.join(missing)}; dataset=none converts without them")
    return {key: list(given[key]) for key in names}


def tokenizer_of(folder: Path, arguments: dict) -> PreTrainedTokenizerBase:
    """From the checkpoint's own folder where it has one, else PaliGemma's."""
    own = (folder / "tokenizer_config.json").exists()
    source = str(folder) if own else arguments["pretrained"]
    try:
        return AutoTokenizer.from_pretrained(source, trust_remote_code=False)
    except (OSError, ValueError) as error:
        raise UserError(f"base={source} gives no tokenizer: {error}") from error
