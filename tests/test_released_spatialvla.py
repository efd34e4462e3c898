"""SpatialVLA's released folder (fact sheet §5.8), a small random one in its authors' names: the same actions."""

from __future__ import annotations

import json
import re

import pytest
import safetensors.torch
import torch

from data.normalization import ActionStatistics
from tests.spatialvla_reference import BINS, DEPTH, INTRINSICS, TEXT, VISION, actions, build, observation
from vla.baselines.spatialvla import SpatialVLA
from vla.checkpoint import initial_policy, load_policy
from vla.config import ConvertWeightsConfig
from vla.errors import UserError
from vla.released.convert import convert_weights
from vla.training import policy_arguments

NAMES = ("theta", "phi", "r", "roll", "pitch", "yaw")
CAMERA = {"intrinsic": [[623.588, 0, 319.501], [0, 623.588, 239.545], [0, 0, 1]], "height": 480, "width": 640}


def source_name(key: str) -> str:
    """The authors' name of one of our weights (transformers 4.47's, for BEiT)."""
    layer = re.fullmatch(r"depth_model\.backbone\.beit\.layers\.(\d+)\.(.*)", key)
    if layer:
        index, rest = layer.groups()
        for ours, theirs in {
            "relative_position_bias.": "attention.attention.relative_position_bias.",
            "attention.q_proj": "attention.attention.query", "attention.k_proj": "attention.attention.key",
            "attention.v_proj": "attention.attention.value", "attention.o_proj": "attention.output.dense",
            "mlp.fc1": "intermediate.dense", "mlp.fc2": "output.dense",
        }.items():  # fmt: skip
            if rest.startswith(ours):
                rest = theirs + rest.removeprefix(ours)
                break
        return f"vision_zoe_model.backbone.encoder.layer.{index}.{rest}"
    for ours, theirs in {
        "vision_tower.": "vision_tower.vision_model.", "projector.": "multi_modal_projector.linear.",
        "language_model.": "language_model.model.", "lm_head.": "language_model.lm_head.",
        "action_embedding.": "spatial_embed_tokens.", "ego3d.mlp.": "position_embedding_3d.position_embedding_head.",
        "depth_model.backbone.beit.embeddings.": "vision_zoe_model.backbone.embeddings.",
        "depth_model.": "vision_zoe_model.",
    }.items():  # fmt: skip
        if key.startswith(ours):
            return theirs + key.removeprefix(ours)
    raise AssertionError(key)


@pytest.fixture(scope="module")
def policy() -> SpatialVLA:
    return build(chunk=3)


def source_tensors(policy: SpatialVLA) -> dict[str, torch.Tensor]:
    tensors = {source_name(k): v.clone() for k, v in policy.state_dict().items() if not k.startswith("grid.")}
    text = tensors["language_model.model.embed_tokens.weight"]
    stale = torch.full((policy.grid.size, text.shape[1]), 1e6)  # rows that the authors overwrite on loading
    tensors["language_model.model.embed_tokens.weight"] = torch.cat([text, stale])
    tensors["vision_tower.vision_model.head.probe"] = torch.zeros(1, 1, 16)
    index = (
        "vision_zoe_model.backbone.encoder.layer.0.attention.attention.relative_position_bias.relative_position_index"
    )
    return tensors | {index: torch.zeros(5, 5)}


def source_config(policy: SpatialVLA) -> dict:
    """With what only the authors' transformers knew, as its to_dict() leaves it there."""
    old = {"torch_dtype": "bfloat16", "top_k": 50, "is_decoder": False, "_attn_implementation_autoset": True}
    backbone = (
        DEPTH["backbone_config"] | old | {"model_type": "beit", "stage_names": ["stem"], "use_mean_pooling": True}
    )
    vocabulary = policy.first_action + policy.grid.size
    return {
        "model_type": "spatialvla", "architectures": ["SpatialVLAForConditionalGeneration"],
        "auto_map": {"AutoModel": "modeling_spatialvla.SpatialVLAForConditionalGeneration"},
        "action_token_begin_idx": policy.first_action, "spatial_token_num": policy.grid.size,
        "vision_config": VISION | old | {"model_type": "siglip_vision_model", "image_size": 28, "projection_dim": 24},
        "text_config": TEXT | old | {"model_type": "gemma2", "vocab_size": vocabulary, "rope_theta": 10000.0,
                                     "num_image_tokens": 4, "tie_word_embeddings": False},
        "vision_zoe_config": DEPTH | old | {"model_type": "zoedepth", "backbone": None, "backbone_config": backbone},
    }  # fmt: skip


def source_processor(policy: SpatialVLA) -> dict:
    edges = {name: edge.tolist() for name, edge in zip(NAMES, policy.grid.edges(), strict=True)}
    statistics = policy.normalizer.statistics
    action = {n: getattr(statistics, n) for n in ("q01", "q99", "mean", "std", "min", "max")}
    other = {name: [2 * x for x in values] for name, values in action.items()}
    return {
        "processor_class": "SpatialVLAProcessor", "action_chunk_size": 3, "num_obs_steps": 1,
        "action_config": {"use_spherical": True, "distribution": "gaussian"},
        "bin_policy": {
            "translation": {f"{n}_bins": edges[n] for n in NAMES[:3]},
            "rotation": {f"{n}_bins": edges[n] for n in NAMES[3:]},
        },
        "intrinsic_config": {"default": CAMERA, "other/1.0.0": CAMERA | {"width": 320}},
        "statistics": {
            "bridge_orig/1.0.0": {"action": action | {"mask": [True] * 6 + [False]}, "num_transitions": 400},
            "other/1.0.0": {"action": other, "num_transitions": 7},
        },
    }  # fmt: skip


@pytest.fixture
def source(tmp_path, policy):
    folder = tmp_path / "source"
    policy.tokenizer.save_pretrained(folder)
    write(folder, source_tensors(policy))
    (folder / "config.json").write_text(json.dumps(source_config(policy)))
    (folder / "processor_config.json").write_text(json.dumps(source_processor(policy)))
    (folder / "modeling_spatialvla.py").write_text("raise SystemExit('executed')")
    return folder


def write(folder, tensors, shards: int = 1) -> None:
    for old in folder.glob("*.safetensors*"):
        old.unlink()
    if shards == 1:
        safetensors.torch.save_file(tensors, folder / "model.safetensors")
        return
    names, keys = [f"model-{i + 1:05d}-of-{shards:05d}.safetensors" for i in range(shards)], sorted(tensors)
    for index, name in enumerate(names):
        safetensors.torch.save_file({k: tensors[k] for k in keys[index::shards]}, folder / name)
    weight_map = {key: names[i % shards] for i, key in enumerate(keys)}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))


def convert(source, out, dataset="bridge_orig/1.0.0", **changes):
    arguments = dict(baseline="spatialvla", source=str(source), out=str(out), dataset=dataset)
    return convert_weights(ConvertWeightsConfig(**arguments | changes))


@pytest.mark.parametrize("container", ["one file", "shards", "the file itself"])
def test_converted_policy_acts_as_the_original(source, policy, tmp_path, container):
    if container == "shards":
        write(source, source_tensors(policy), shards=3)
    path = source / "model.safetensors" if container == "the file itself" else source
    out, notes = convert(path, tmp_path / "out")
    loaded, config = load_policy(out)
    assert torch.equal(loaded.predict(observation()), policy.predict(observation()))
    assert loaded.grid.fitted and loaded.grid.bins == BINS and loaded.chunk == 3 and loaded.image_size == 28
    for got, want in zip(loaded.grid.edges(), policy.grid.edges(), strict=True):
        assert torch.equal(got, want)
    assert config["arguments"]["intrinsics"] == INTRINSICS and config["arguments"]["pretrained"] is None
    assert config["about"]["arm"] == "released" and "bridge_orig" in notes[0]
    assert (loaded.ensemble, loaded.normalizer.scheme, loaded.mask) == (-0.8, "q99", "prefix_lm")


def test_a_data_set_brings_its_statistics_and_its_camera(source, policy, tmp_path):
    loaded, config = load_policy(convert(source, tmp_path / "out", dataset="other/1.0.0")[0])
    assert config["arguments"]["intrinsics"]["width"] == 320
    assert loaded.normalizer.statistics.q99 == [2 * x for x in policy.normalizer.statistics.q99]
    assert loaded.normalizer.statistics.count == 7


def test_fine_tuning_keeps_the_released_grid(source, policy, tmp_path):
    """init_from (§5.3) on data of another spread."""
    from vla.cli import compose_config

    out, _ = convert(source, tmp_path / "out")
    cfg = compose_config("train", "baseline=spatialvla", "size=full")
    statistics = ActionStatistics.of((actions() * 0.2).numpy())
    tuned = initial_policy(out, "spatialvla", statistics, "q99", policy_arguments(cfg))
    tuned.fit_to(actions() * 0.2)
    for got, want in zip(tuned.grid.edges(), policy.grid.edges(), strict=True):
        assert torch.equal(got, want)
    assert tuned.chunk == 4 and torch.equal(tuned.action_embedding.weight, policy.action_embedding.weight)


def test_rope_and_softcaps_are_read(source, policy, tmp_path):
    """What is not Gemma2's default: a null softcap (its weights then ran without), another RoPE base."""
    config = source_config(policy)
    config["text_config"] |= {"attn_logit_softcapping": None, "rope_theta": 500.0}
    (source / "config.json").write_text(json.dumps(config))
    loaded, _ = load_policy(convert(source, tmp_path / "out")[0])
    assert loaded.language_model.config.attn_logit_softcapping is None
    assert loaded.language_model.config.rope_parameters["rope_theta"] == 500.0
    plain = build(chunk=3, text_config=TEXT | {"attn_logit_softcapping": None,
                  "rope_parameters": {"rope_type": "default", "rope_theta": 500.0}})  # fmt: skip
    assert torch.equal(loaded.predict(observation()), plain.predict(observation()))


ZOE = "vision_zoe_model.backbone.encoder.layer.1.attention.attention.key.weight"


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (lambda t: t.pop(ZOE), r"1 weights missing.*depth_model\.backbone\.beit\.layers\.1\.attention\.k_proj\.weight"),
        (lambda t: t.pop("spatial_embed_tokens.weight"), r"missing.*action_embedding\.weight"),
        (lambda t: t.update({"language_model.extra": torch.zeros(1)}), r"1 weights unexpected.*language_model\.extra"),
        (
            lambda t: t.update({"multi_modal_projector.linear.bias": torch.zeros(5)}),
            r"projector\.bias \(5,\) for \(24,\)",
        ),
        (lambda t: t.pop("language_model.model.embed_tokens.weight"), r"no weight language_model\.embed_tokens"),
        (
            lambda t: t.update({"language_model.model.embed_tokens.weight": torch.zeros(9, 24)}),
            r"action tokens begin at 457, but there are 9 embeddings",
        ),
    ],
)
def test_weights_that_do_not_fit_are_named_and_nothing_is_written(source, policy, tmp_path, change, named):
    tensors = source_tensors(policy)
    change(tensors)
    write(source, tensors)
    with pytest.raises(UserError, match=named):
        convert(source, tmp_path / "out")
    assert not list(tmp_path.glob("*out*"))


def skew(processor: dict) -> None:
    processor["intrinsic_config"]["default"]["intrinsic"][0][1] = 0.1


@pytest.mark.parametrize(
    ("file", "change", "named"),
    [
        ("config.json", lambda c: c.update(model_type="paligemma"), "is of a paligemma model"),
        ("config.json", lambda c: c.pop("vision_zoe_config"), r"config\.json has no vision_zoe_config"),
        ("config.json", lambda c: c["vision_zoe_config"].pop("backbone_config"), "backbone_config"),
        ("config.json", lambda c: c.update(action_token_begin_idx=400), "begin at 400"),
        ("processor_config.json", lambda p: p.pop("bin_policy"), "bin_policy"),
        ("processor_config.json", lambda p: p["bin_policy"]["rotation"]["yaw_bins"].reverse(), "bin_policy"),
        ("processor_config.json", lambda p: p["action_config"].update(use_spherical=False), "spherical"),
        ("processor_config.json", lambda p: p["bin_policy"]["rotation"]["yaw_bins"].pop(), "begin at 457"),
        ("processor_config.json", lambda p: p.pop("intrinsic_config"), "no intrinsics of bridge_orig"),
        ("processor_config.json", skew, "skewed"),
        (
            "processor_config.json",
            lambda p: p["statistics"]["bridge_orig/1.0.0"]["action"].update(mask=[True] * 7),
            "dataset=bridge_orig/1.0.0 normalises",
        ),
        (
            "processor_config.json",
            lambda p: p["statistics"]["bridge_orig/1.0.0"]["action"].pop("q01"),
            "lack seven numbers for q01",
        ),
    ],
)
def test_descriptions_that_do_not_fit_are_named(source, tmp_path, file, change, named):
    content = json.loads((source / file).read_text())
    change(content)
    (source / file).write_text(json.dumps(content))
    with pytest.raises(UserError, match=named):
        convert(source, tmp_path / "out")


@pytest.mark.parametrize("file", ["config.json", "processor_config.json", "tokenizer.json", "model.safetensors"])
@pytest.mark.parametrize("damage", ["missing", "truncated"])
def test_missing_and_truncated_files_are_named(source, tmp_path, file, damage):
    content = (source / file).read_bytes()
    (source / file).unlink()
    if damage == "truncated":
        (source / file).write_bytes(content[: len(content) // 2])
    with pytest.raises(
        UserError, match=re.escape(file) if (file, damage) != ("model.safetensors", "missing") else "none"
    ):
        convert(source, tmp_path / "out")


def test_the_data_set_must_be_chosen(source, tmp_path):
    with pytest.raises(UserError, match=r"bridge_orig/1\.0\.0, other/1\.0\.0"):
        convert(source, tmp_path / "out", dataset=None)
    with pytest.raises(UserError, match="dataset=fractal is not in the checkpoint"):
        convert(source, tmp_path / "out", dataset="fractal")


def test_a_tokenizer_of_another_grid_is_named(source, policy, tmp_path):
    tokenizer = json.loads((source / "tokenizer.json").read_text())
    last = f"<ACTION{policy.grid.size - 1:05d}>"
    tokenizer["added_tokens"] = [token for token in tokenizer["added_tokens"] if token["content"] != last]
    (source / "tokenizer.json").write_text(json.dumps(tokenizer))
    config = json.loads((source / "tokenizer_config.json").read_text())
    config.pop("added_tokens_decoder", None)
    (source / "tokenizer_config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match=r"policy\.bins"):
        convert(source, tmp_path / "out")
