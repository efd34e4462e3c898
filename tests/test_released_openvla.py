"""OpenVLA's three checkpoint layouts (fact sheet §6.3, §9) → policy directory → the actions of the policy they hold."""

from __future__ import annotations

import json
import math
import shutil

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from data.normalization import ActionNormalizer, ActionStatistics
from tests.openvla_reference import as_timm, frames, llama_tokenizer, naive_vit, randomised
from vla.baselines.openvla import OpenVLA
from vla.build import of_build
from vla.checkpoint import load_policy
from vla.cli import compose_config
from vla.config import ConvertWeightsConfig
from vla.errors import UserError
from vla.released.convert import convert_weights
from vla.training import policy_arguments

# Narrow, but with the numbers of heads and the vocabulary of the released models, which no file tells.
DINO = dict(hidden_size=32, num_hidden_layers=3, num_attention_heads=16, mlp_ratio=2, patch_size=14)
SIGLIP = dict(hidden_size=48, intermediate_size=40, num_hidden_layers=3, num_attention_heads=16, patch_size=14)
TEXT = dict(
    vocab_size=32064, hidden_size=64, intermediate_size=48, num_hidden_layers=2, num_attention_heads=32,
    max_position_embeddings=4096, rms_norm_eps=1e-5,
)  # fmt: skip
INSTRUCTIONS = ["open it", "put the bowl on the plate"]


def statistics(seed: int) -> dict:
    actions = np.random.default_rng(seed).uniform(-1, 1, (200, 7))
    actions[:, 6] = actions[:, 6] > 0
    return ActionStatistics.of(actions).to_dict()


def entry(seed: int) -> dict:
    numbers = {name: statistics(seed)[name] for name in ("q01", "q99", "mean", "std", "min", "max")}
    return {"action": numbers | {"mask": [True] * 6 + [False]}, "num_transitions": 200, "num_trajectories": 2}


@pytest.fixture(scope="module")
def policy() -> OpenVLA:
    arguments = policy_arguments(compose_config("train", "baseline=openvla", "size=full"))
    arguments |= dict(pretrained=None, dino_config=DINO, siglip_config=SIGLIP, text_config=TEXT, image_size=42)
    normalizer = ActionNormalizer(ActionStatistics(**statistics(1)), "q99")
    policy = randomised(OpenVLA.build(normalizer, **of_build(arguments), tokenizer=llama_tokenizer()))
    policy.dino.embeddings.position_embeddings.data[:, 0] = 0
    for parameter in policy.parameters():  # the released weights are in bf16
        parameter.data = parameter.data.bfloat16().float()
    return policy.eval()


def observation():
    return {"images": {"static": frames(2)}, "state": torch.zeros(2, 8), "instruction": INSTRUCTIONS}


def pooling(width: int) -> dict:
    return {f"attn_pool.{name}": torch.randn(width, width) for name in ("q.weight", "kv.weight", "latent")}


def transformers_state(policy: OpenVLA) -> dict[str, torch.Tensor]:
    dino = {key.replace("gamma", "scale_factor"): value for key, value in as_timm(policy, "dino").items()}
    siglip = as_timm(policy, "siglip") | pooling(48)
    state = {f"vision_backbone.featurizer.{key}": value for key, value in dino.items()}
    state |= {f"vision_backbone.fused_featurizer.{key}": value for key, value in siglip.items()}
    for index in (1, 2, 3):
        for kind in ("weight", "bias"):
            state[f"projector.fc{index}.{kind}"] = policy.projector.state_dict()[f"{2 * index - 2}.{kind}"]
    state |= {f"language_model.{key}": value for key, value in policy.language_model.state_dict().items()}
    return {key: value.bfloat16().contiguous() for key, value in state.items()}


def native_state(policy: OpenVLA, vision: bool) -> dict[str, dict[str, torch.Tensor]]:
    model = {
        "projector": {f"projector.{key}": value for key, value in policy.projector.state_dict().items()},
        "llm_backbone": {f"llm.{key}": value for key, value in policy.language_model.state_dict().items()},
    }
    if vision:
        model["vision_backbone"] = {f"dino_featurizer.{k}": v for k, v in as_timm(policy, "dino").items()}
        siglip = as_timm(policy, "siglip") | pooling(48)
        model["vision_backbone"] |= {f"siglip_featurizer.{k}": v for k, v in siglip.items()}
    return model


@pytest.fixture(scope="module")
def transformers_folder(policy, tmp_path_factory):
    """openvla-7b's layout: two shards and an index, statistics of several data sets in config.json."""
    folder = tmp_path_factory.mktemp("transformers")
    state = transformers_state(policy)
    names = sorted(state)
    shards = {"model-00001-of-00002.safetensors": names[::2], "model-00002-of-00002.safetensors": names[1::2]}
    for shard, keys in shards.items():
        save_file({key: state[key] for key in keys}, folder / shard)
    index = {key: shard for shard, keys in shards.items() for key in keys}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": index}))
    config = {
        "model_type": "openvla",
        "architectures": ["OpenVLAForActionPrediction"],
        "auto_map": {"AutoConfig": "configuration_prismatic.OpenVLAConfig"},
        "vision_backbone_id": "dinosiglip-vit-so-224px",
        "pad_to_multiple_of": 64,
        "text_config": TEXT | {"model_type": "llama", "pad_token_id": 32000, "torch_dtype": "bfloat16"},
        "norm_stats": {"bridge_orig": entry(1), "fractal20220817_data": entry(2)},
    }
    llama_tokenizer().save_pretrained(folder)
    (folder / "config.json").write_text(json.dumps(config))
    return folder


@pytest.fixture(scope="module")
def native_folder(policy, tmp_path_factory):
    """openvla-7b-prismatic's layout."""
    folder = tmp_path_factory.mktemp("native")
    (folder / "checkpoints").mkdir()
    file = folder / "checkpoints" / "step-295000-epoch-40-loss=0.2200.pt"
    torch.save({"model": native_state(policy, vision=True)}, file)
    (folder / "config.json").write_text(json.dumps({"vla": {"base_vlm": "prism-dinosiglip-224px+7b"}}))
    (folder / "dataset_statistics.json").write_text(json.dumps({"bridge_orig": entry(1)}))
    return folder


@pytest.fixture(scope="module")
def base_folder(policy, tmp_path_factory):
    """The base VLM's layout, timm's towers beside it; SigLIP's as open_clip keeps it, with a text tower."""
    folder = tmp_path_factory.mktemp("base")
    for name in ("checkpoints", "dinov2", "siglip"):
        (folder / name).mkdir()
    torch.save({"model": native_state(policy, vision=False)}, folder / "checkpoints" / "latest-checkpoint.pt")
    config = {"vision_backbone_id": "dinosiglip-vit-so-224px", "llm_backbone_id": "llama2-7b-pure"}
    (folder / "config.json").write_text(json.dumps({"model": config, "run_id": "prism"}))
    dino = {key: value.contiguous() for key, value in as_timm(policy, "dino").items()}
    save_file(dino, folder / "dinov2" / "model.safetensors")
    siglip = {f"visual.trunk.{key}": value.clone() for key, value in as_timm(policy, "siglip").items()}
    siglip |= {"logit_scale": torch.ones(1), "logit_bias": torch.ones(1), "text.positional_embedding": torch.ones(4, 4)}
    torch.save(siglip, folder / "siglip" / "open_clip_pytorch_model.bin")
    llama_tokenizer().save_pretrained(folder)
    return folder


def convert(source, out, **changes):
    return convert_weights(ConvertWeightsConfig(baseline="openvla", source=str(source), out=str(out), **changes))


def assert_same(out, policy):
    loaded, config = load_policy(out)
    assert torch.equal(loaded.predict(observation()), policy.predict(observation()))
    assert config["about"]["arm"] == "released" and config["arguments"]["chunk"] == 1
    for key, value in policy.state_dict().items():
        assert torch.equal(loaded.state_dict()[key], value), key
    assert (loaded.bins.end, loaded.space_id, loaded.prompt) == (32000, 29871, policy.prompt)
    return loaded


def test_transformers_layout(transformers_folder, policy, tmp_path, capfd):
    out, notes = convert(transformers_folder, tmp_path / "out", dataset="bridge_orig")
    loaded = assert_same(out, policy)
    assert notes == ["action statistics of bridge_orig"] and loaded.tokenizer.pad_token == "<PAD>"
    out, _ = convert(transformers_folder, tmp_path / "other", dataset="fractal20220817_data")
    assert load_policy(out)[0].normalizer.statistics.q99 == statistics(2)["q99"]
    assert "custom code" not in capfd.readouterr().out  # of the code that config.json names nothing is asked for or run


def test_visual_tokens_equal_a_naive_forward_of_the_source(transformers_folder, tmp_path):
    """The source's own tensors, through a ViT written out, against the converted policy."""
    out, _ = convert(transformers_folder, tmp_path / "out", dataset="bridge_orig")
    loaded, _ = load_policy(out)
    tensors = {}
    for shard in transformers_folder.glob("*.safetensors"):
        tensors |= load_file(shard)
    towers = {}
    for name, prefix in (("dino", "vision_backbone.featurizer."), ("siglip", "vision_backbone.fused_featurizer.")):
        towers[name] = {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}
    towers["dino"] = {key.replace("scale_factor", "gamma"): value for key, value in towers["dino"].items()}
    pixels = frames(1)[0].float() / 255
    mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    dino = naive_vit(towers["dino"], (pixels - mean[:, None, None]) / std[:, None, None], 16, 14, 2)
    siglip = naive_vit(towers["siglip"], (pixels - 0.5) / 0.5, 16, 14, 2)
    tap = loaded.encode_images({"static": frames(1)})["static"].tap[0]
    torch.testing.assert_close(tap, torch.cat([dino, siglip], -1), atol=3e-5, rtol=1e-4)


def test_statistics_of_fine_tuning_come_first(transformers_folder, tmp_path):
    folder = shutil.copytree(transformers_folder, tmp_path / "source")
    (folder / "dataset_statistics.json").write_text(json.dumps({"libero_goal_no_noops": entry(3)}))
    out, notes = convert(folder, tmp_path / "out")
    assert notes == ["action statistics of libero_goal_no_noops"]
    assert load_policy(out)[0].normalizer.statistics.q01 == statistics(3)["q01"]


def test_epsilon_is_that_of_the_sources_config(transformers_folder, tmp_path):
    """A config.json that names none is run by its authors with LlamaConfig's default, not with Llama-2's."""
    folder = shutil.copytree(transformers_folder, tmp_path / "source")
    config = json.loads((folder / "config.json").read_text())
    del config["text_config"]["rms_norm_eps"]
    (folder / "config.json").write_text(json.dumps(config))
    out, _ = convert(folder, tmp_path / "out", dataset="bridge_orig")
    assert load_policy(out)[0].language_model.config.rms_norm_eps == 1e-6
    out, _ = convert(transformers_folder, tmp_path / "out5", dataset="bridge_orig")
    assert load_policy(out)[0].language_model.config.rms_norm_eps == 1e-5


@pytest.mark.parametrize("as_file", [False, True])
def test_native_layout(native_folder, policy, tmp_path, as_file):
    llama_tokenizer().save_pretrained(tmp_path / "llama")
    source = next((native_folder / "checkpoints").iterdir()) if as_file else native_folder
    out, notes = convert(source, tmp_path / "out", base=str(tmp_path / "llama"))
    assert_same(out, policy)
    assert notes == ["action statistics of bridge_orig"]


def test_base_layout(base_folder, policy, tmp_path):
    out, notes = convert(base_folder, tmp_path / "out")
    loaded, _ = load_policy(out)
    for key, value in policy.state_dict().items():
        torch.testing.assert_close(loaded.state_dict()[key], value, atol=1e-6, rtol=0)
    assert "no action statistics" in notes[0] and loaded.normalizer.statistics.count == 0


def test_positions_of_a_larger_dino_are_resampled(base_folder, policy, tmp_path):
    """timm's DINOv2 is for 518 pixels: bicubic with antialiasing, which keeps a ramp a ramp away from the border."""
    folder = shutil.copytree(base_folder, tmp_path / "source")
    file = folder / "dinov2" / "model.safetensors"
    tensors = load_file(file)
    ramp = torch.arange(9.0)[:, None] + 10 * torch.arange(9.0)
    tensors["pos_embed"] = ramp.reshape(1, 81, 1).expand(1, 81, 32).contiguous()
    save_file(tensors, file)
    out, _ = convert(folder, tmp_path / "out")
    positions = load_policy(out)[0].dino.embeddings.position_embeddings[0]
    assert (positions[0] == 0).all()
    square = positions[1:].unflatten(0, (3, 3))
    torch.testing.assert_close(square[1, 1], torch.full((32,), 44.0), atol=1e-4, rtol=0)
    assert (square.diff(dim=0) > 0).all() and (square.diff(dim=1) > 0).all()
    naive = antialiased_bicubic(ramp.numpy(), 3)
    torch.testing.assert_close(square[..., 0], torch.tensor(naive, dtype=torch.float32), atol=1e-4, rtol=0)


def antialiased_bicubic(image: np.ndarray, size: int) -> np.ndarray:
    """Separable Keys cubic (a = -0.5), widened by the scale, weights normalised, as Pillow and timm resample."""
    scale = len(image) / size
    weights = np.zeros((size, len(image)))
    for row in range(size):
        for col in range(len(image)):
            x = abs(col + 0.5 - (row + 0.5) * scale) / scale
            if x < 1:
                weights[row, col] = 1.5 * x**3 - 2.5 * x**2 + 1
            elif x < 2:
                weights[row, col] = -0.5 * x**3 + 2.5 * x**2 - 4 * x + 2
    weights /= weights.sum(1, keepdims=True)
    return weights @ image @ weights.T


def test_pretrained_takes_any_of_them(policy, base_folder, transformers_folder):
    """`policy.pretrained` is a source of the converter: the same weights, the run's own statistics."""
    arguments = policy_arguments(compose_config("train", "baseline=openvla", "size=full"))
    for folder in (base_folder, transformers_folder):
        built = OpenVLA.build(policy.normalizer, **of_build(arguments) | {"pretrained": str(folder)}).eval()
        for key, value in policy.state_dict().items():
            torch.testing.assert_close(built.state_dict()[key], value, atol=1e-6, rtol=0)
        assert built.architecture()["pretrained"] is None and built.image_size == 42
    assert torch.equal(built.predict(observation()), policy.predict(observation()))


def edit(folder, change):
    """Apply `change` to the flat state dict of a transformers layout, kept in one file from then on."""
    state = {}
    for shard in folder.glob("*.safetensors"):
        state |= load_file(shard)
        shard.unlink()
    (folder / "model.safetensors.index.json").unlink()
    change(state)
    save_file(state, folder / "model.safetensors")


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (lambda s: s.pop("projector.fc3.bias"), r"1 weights missing.*projector\.4\.bias"),
        (lambda s: s.pop("vision_backbone.featurizer.blocks.1.ls1.scale_factor"), r"missing.*layer_scale1\.lambda1"),
        (lambda s: s.pop("vision_backbone.featurizer.pos_embed"), r"no weight dino\.embeddings\.position_embeddings"),
        (lambda s: s.pop("vision_backbone.fused_featurizer.pos_embed"), r"no weight siglip\.pos_embed"),
        (lambda s: s.update({"extra.weight": torch.zeros(1)}), r"1 weights unexpected.*extra\.weight"),
        (lambda s: s.update({"projector.fc1.bias": torch.zeros(5)}), r"projector\.0\.bias \(5,\) for \(320,\)"),
        (lambda s: s.update({"vision_backbone.fused_featurizer.pos_embed": torch.zeros(1, 7, 48)}), "7 rows"),
        (lambda s: s.pop("language_model.model.embed_tokens.weight"), r"no weight language_model\.model\.embed_tokens"),
    ],
)
def test_what_does_not_fit_is_listed(transformers_folder, tmp_path, change, named):
    folder = shutil.copytree(transformers_folder, tmp_path / "source")
    edit(folder, change)
    with pytest.raises(UserError, match=named):
        convert(folder, tmp_path / "out", dataset="bridge_orig")
    assert not (tmp_path / "out").exists()


def test_what_is_missing_or_damaged_is_named(transformers_folder, native_folder, base_folder, tmp_path):
    with pytest.raises(UserError, match="choose one of bridge_orig, fractal20220817_data"):
        convert(transformers_folder, tmp_path / "out")
    with pytest.raises(UserError, match="no tokenizer"):
        convert(native_folder, tmp_path / "out", base=str(tmp_path / "nowhere"))
    folder = shutil.copytree(base_folder, tmp_path / "blind")
    shutil.rmtree(folder / "siglip")
    with pytest.raises(UserError, match=r"no vision weights.*siglip"):
        convert(folder, tmp_path / "out")
    arguments = policy_arguments(compose_config("train", "baseline=openvla", "size=full"))
    with pytest.raises(UserError, match=r"policy\.pretrained=.*no vision weights.*init_from") as caught:
        OpenVLA.build(None, **of_build(arguments) | {"pretrained": str(folder)})
    assert "\n" not in str(caught.value)
    folder = shutil.copytree(native_folder, tmp_path / "torn")
    file = next((folder / "checkpoints").iterdir())
    file.write_bytes(file.read_bytes()[:-2000])
    with pytest.raises(UserError, match=r"step-295000.*damaged"):
        convert(folder, tmp_path / "out", base=str(base_folder))
    (folder / "config.json").write_text(json.dumps({"vla": {"base_vlm": "siglip-224px+7b"}}))
    with pytest.raises(UserError, match=r"siglip-224px\+7b; only dinosiglip"):
        convert(folder, tmp_path / "out", base=str(base_folder))


def test_missing_weights_behind_pretrained_are_one_line(transformers_folder, tmp_path, policy):
    folder = shutil.copytree(transformers_folder, tmp_path / "source")
    edit(folder, lambda s: s.pop("projector.fc3.bias"))
    arguments = policy_arguments(compose_config("train", "baseline=openvla", "size=full"))
    with pytest.raises(UserError, match=r"policy\.pretrained=.*projector\.4\.bias") as caught:
        OpenVLA.build(policy.normalizer, **of_build(arguments) | {"pretrained": str(folder)})
    assert "\n" not in str(caught.value)


def test_pooling_and_last_blocks_are_of_no_consequence(transformers_folder, policy, tmp_path):
    folder = shutil.copytree(transformers_folder, tmp_path / "source")

    def scramble(state):
        for key in state:
            if "attn_pool" in key or "featurizer.blocks.2." in key or "featurizer.norm." in key:
                state[key] = state[key] * math.pi

    edit(folder, scramble)
    out, _ = convert(folder, tmp_path / "out", dataset="bridge_orig")
    assert_same(out, policy)
