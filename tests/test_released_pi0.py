"""π0's public checkpoints, small random ones in their authors' names and containers, against a plain forward pass."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch

from data.normalization import ActionNormalizer, ActionStatistics
from tests.pi0_reference import frames, naive_velocity
from vla.baselines.pi0 import Pi0
from vla.checkpoint import initial_policy, load_policy
from vla.config import ConvertWeightsConfig
from vla.errors import UserError
from vla.released.convert import convert_weights
from vla.released.pi0 import RULES, action_statistics, convert
from vla.released.source import rename
from vla.tokenizer import byte_tokenizer

WIDTH, EXPERT, VISION, LAYERS, HEADS, HEAD = 32, 16, 32, 3, 4, 8
STATISTICS = {"mean": [0.1 * i for i in range(6)] + [0.2], "std": [1.0 + i for i in range(6)] + [0.9]}
STATISTICS |= {"q01": [-1.0] * 7, "q99": [1.0] * 6 + [0.99], "min": [-2.0] * 7, "max": [2.0] * 7}
STATE = {"mean": [0.5] * 8, "std": [2.0] * 8, "q01": [-1.0] * 8, "q99": [1.0] * 8, "min": [-2.0] * 8, "max": [2.0] * 8}


def released(seed: int = 0) -> dict[str, torch.Tensor]:
    """openpi's names (PaliGemmaWithExpertModel of its PyTorch port), its shapes at toy width, both language heads."""
    generator = torch.Generator().manual_seed(seed)
    tensors: dict[str, torch.Tensor] = {}

    def linear(name: str, wide: int, narrow: int, bias: bool = True) -> None:
        tensors[f"{name}.weight"] = 0.2 * torch.randn(wide, narrow, generator=generator)
        if bias:
            tensors[f"{name}.bias"] = 0.2 * torch.randn(wide, generator=generator)

    def norm(name: str, width: int, bias: bool = False) -> None:
        tensors[f"{name}.weight"] = 0.2 * torch.randn(width, generator=generator) + (1 if bias else 0)
        if bias:
            tensors[f"{name}.bias"] = 0.2 * torch.randn(width, generator=generator)

    at = "paligemma_with_expert.paligemma.model."
    tower = at + "vision_tower.vision_model."
    linear(tower + "embeddings.patch_embedding", VISION, 3 * 14 * 14)
    tensors[tower + "embeddings.patch_embedding.weight"] = tensors[tower + "embeddings.patch_embedding.weight"].reshape(
        VISION, 3, 14, 14
    )
    linear(tower + "embeddings.position_embedding", 4, VISION, bias=False)
    for index in range(LAYERS):
        layer = f"{tower}encoder.layers.{index}."
        for name in ("q_proj", "k_proj", "v_proj", "out_proj"):
            linear(f"{layer}self_attn.{name}", VISION, VISION)
        for name in ("layer_norm1", "layer_norm2"):
            norm(layer + name, VISION, bias=True)
        linear(layer + "mlp.fc1", 40, VISION)
        linear(layer + "mlp.fc2", VISION, 40)
    norm(tower + "post_layernorm", VISION, bias=True)
    linear(at + "multi_modal_projector.linear", WIDTH, VISION)
    linear(at + "language_model.embed_tokens", len(byte_tokenizer()), WIDTH, bias=False)
    for prefix, width, inner in (
        (at + "language_model.", WIDTH, 48),
        ("paligemma_with_expert.gemma_expert.model.", EXPERT, 24),
    ):
        for index in range(LAYERS):
            layer = f"{prefix}layers.{index}."
            linear(layer + "self_attn.q_proj", HEADS * HEAD, width, bias=False)
            linear(layer + "self_attn.k_proj", HEAD, width, bias=False)
            linear(layer + "self_attn.v_proj", HEAD, width, bias=False)
            linear(layer + "self_attn.o_proj", width, HEADS * HEAD, bias=False)
            linear(layer + "mlp.gate_proj", inner, width, bias=False)
            linear(layer + "mlp.up_proj", inner, width, bias=False)
            linear(layer + "mlp.down_proj", width, inner, bias=False)
            norm(layer + "input_layernorm", width)
            norm(layer + "post_attention_layernorm", width)
        norm(prefix + "norm", width)
    tensors["paligemma_with_expert.paligemma.lm_head.weight"] = tensors[at + "language_model.embed_tokens.weight"]
    linear("paligemma_with_expert.gemma_expert.lm_head", 50, EXPERT, bias=False)
    linear("state_proj", EXPERT, 12)
    linear("action_in_proj", EXPERT, 9)
    linear("action_time_mlp_in", EXPERT, 2 * EXPERT)
    linear("action_time_mlp_out", EXPERT, EXPERT)
    linear("action_out_proj", 9, EXPERT)
    return tensors


def write_tokenizer(folder: Path) -> Path:
    tokenizer = byte_tokenizer()
    tokenizer.bos_token = "<|im_start|>"
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture
def base(tmp_path) -> Path:
    return write_tokenizer(tmp_path / "paligemma")


def save(folder: Path, tensors: dict, config: dict) -> Path:
    folder.mkdir(parents=True)
    safetensors.torch.save_file({k: v.clone().contiguous() for k, v in tensors.items()}, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def lerobot(folder: Path, tensors: dict, prefix: str = "model.", **config) -> Path:
    """A folder as `PI0Policy.save_pretrained` and its processors' leave it."""
    features = {
        "observation.images.image": {"type": "VISUAL", "shape": [3, 256, 256]},
        "observation.state": {"type": "STATE", "shape": [8]},
        "observation.images.image2": {"type": "VISUAL", "shape": [3, 256, 256]},
        "observation.images.empty_camera_0": {"type": "VISUAL", "shape": [3, 224, 224]},
    }
    mapping = {"VISUAL": "IDENTITY", "STATE": "MEAN_STD", "ACTION": "MEAN_STD"}
    defaults = dict(
        type="pi0", chunk_size=6, num_inference_steps=5, input_features=features, normalization_mapping=mapping
    )
    save(folder, {prefix + key: value for key, value in tensors.items()}, defaults | config)
    state_file = "policy_preprocessor_step_5_normalizer_processor.safetensors"
    statistics = {f"action.{k}": torch.tensor(v) for k, v in STATISTICS.items()}
    statistics |= {f"observation.state.{k}": torch.tensor(v) for k, v in STATE.items()}
    statistics["observation.images.image.mean"] = torch.zeros(3, 1, 1)
    safetensors.torch.save_file(statistics, folder / state_file)
    steps = [{"registry_name": "rename_observations_processor", "config": {}}]
    steps.append({"registry_name": "normalizer_processor", "config": {"eps": 1e-8}, "state_file": state_file})
    (folder / "policy_preprocessor.json").write_text(json.dumps({"name": "policy_preprocessor", "steps": steps}))
    return folder


def openpi(folder: Path, tensors: dict, assets: dict[str, dict]) -> Path:
    """A folder as examples/convert_jax_model_to_pytorch.py leaves it."""
    save(folder, tensors, dict(action_dim=9, action_horizon=6, paligemma_variant="dummy", precision="float32"))
    for name, entry in assets.items():
        (folder / "assets" / name).mkdir(parents=True)
        (folder / "assets" / name / "norm_stats.json").write_text(json.dumps({"norm_stats": entry}))
    return folder


def run(source: Path, out: Path, base: Path, **changes) -> tuple[Pi0, list[str]]:
    cfg = ConvertWeightsConfig(baseline="pi0", source=str(source), out=str(out), base=str(base), **changes)
    path, notes = convert_weights(cfg)
    policy, _ = load_policy(path)
    return policy, notes


def check_forward(policy: Pi0, tensors: dict) -> None:
    """The converted policy's velocity is the plain forward's on the source's weights."""

    names = {
        "paligemma_with_expert.paligemma.model.vision_tower.vision_model.": "model.vlm.vision_tower.",
        "paligemma_with_expert.paligemma.model.": "model.vlm.",
        "paligemma_with_expert.gemma_expert.model.": "model.dit.",
        "state_proj.": "embed_action_time.state_proj.",
        "action_in_proj.": "embed_action_time.action_in_proj.",
        "action_time_mlp": "embed_action_time.action_time_mlp",
    }

    class Source:
        """What `naive_velocity` reads of a policy, with the source's own tensors."""

        embed_action_time = policy.pi0.embed_action_time  # its sinusoids only

        def state_dict(self) -> dict:
            renamed = {}
            for key, value in tensors.items():
                old = next((prefix for prefix in names if key.startswith(prefix)), "")
                renamed[names.get(old, "") + key.removeprefix(old)] = value
            return renamed

    class Naive:
        pi0 = Source()

    image, instruction = {"static": frames(1, seed=1), "wrist": frames(1, seed=2)}, "open it"
    state, x, t = torch.randn(1, 12), torch.randn(1, 6, 9), torch.tensor([0.3])
    ids = policy.tokenize([instruction], torch.device("cpu"))[0][0].tolist()
    with torch.no_grad():
        got = policy.velocity(policy.prefix(policy.encode_images(image), [instruction]), state, x, t)[0]
        expected = naive_velocity(Naive, [image[c][0] for c in policy.cameras], ids, state[0], x[0], 0.3)
    torch.testing.assert_close(got.double(), expected, atol=1e-4, rtol=1e-4)


@pytest.fixture
def two_heads(monkeypatch) -> None:
    """The plain forward's tower has two heads, not so400m's sixteen."""
    monkeypatch.setattr("vla.released.pi0.VISION_HEADS", 2)


@pytest.mark.parametrize("prefix", ["model.", ""])
def test_lerobot_folder(tmp_path, base, two_heads, prefix):
    tensors = released()
    source = lerobot(tmp_path / "lerobot", tensors, prefix)
    policy, notes = run(source, tmp_path / "out", base)
    assert (policy.chunk, policy.cameras, policy.flow_steps, policy.image_size) == (6, ["static", "wrist"], 5, 28)
    assert (policy.state_dim, policy.action_dim, policy.normalizer.scheme) == (12, 9, "zscore")
    assert policy.normalizer.statistics.mean == pytest.approx(STATISTICS["mean"])
    assert policy.normalizer.statistics.state["std"] == STATE["std"]
    assert any("image2 → wrist" in note for note in notes) and not any("empty" in note for note in notes)
    check_forward(policy, tensors)


def test_openpi_folder_and_its_datasets(tmp_path, base, two_heads):
    tensors = released(1)
    entry = {"actions": STATISTICS | {"min": None, "max": None}, "state": STATE}
    arms = {"trossen": {"actions": {k: v * 2 for k, v in STATISTICS.items()}, "state": STATE}}
    source = openpi(tmp_path / "openpi", tensors, {"physical-intelligence/libero": entry} | arms)
    with pytest.raises(UserError, match="physical-intelligence/libero, trossen"):
        run(source, tmp_path / "out", base)
    with pytest.raises(UserError, match="trossen describe 14 action dims"):
        run(source, tmp_path / "out", base, dataset="trossen")
    policy, _ = run(source, tmp_path / "out", base, dataset="physical-intelligence/libero")
    assert policy.normalizer.statistics.min == STATISTICS["q01"], "quantiles stand in for missing extremes"
    policy.cameras = ["static", "wrist"]
    check_forward(policy, tensors)


def test_without_statistics_it_is_a_start_for_training(tmp_path, base, two_heads):
    source = openpi(tmp_path / "openpi", released(), {})
    policy, notes = run(source, tmp_path / "out", base, dataset="none")
    assert any("init_from=" in note for note in notes)
    assert (policy.gripper_centre, policy.gripper_scale) == (0.5, 0.5)
    rng = np.random.default_rng(0)
    statistics = ActionStatistics.of(rng.normal(size=(50, 7)), rng.normal(size=(50, 8)))
    own = dict(chunk=3, cameras=["static"], tap="pre_projector")
    fresh = initial_policy(tmp_path / "out", "pi0", statistics, "q99", own)
    assert (fresh.chunk, fresh.cameras, fresh.normalizer.scheme) == (3, ["static"], "q99")
    assert torch.equal(fresh.pi0.action_out_proj.weight, policy.pi0.action_out_proj.weight)


def test_tied_embedding_under_either_name(tmp_path, base, two_heads):
    """safetensors' save_model keeps one of two tied tensors: the head's name."""
    tensors = released()
    embedding = tensors.pop("paligemma_with_expert.paligemma.model.language_model.embed_tokens.weight")
    policy, _ = run(lerobot(tmp_path / "lerobot", tensors), tmp_path / "out", base)
    assert torch.equal(policy.pi0.model.vlm.language_model.embed_tokens.weight, embedding)


def test_older_vision_names_and_half_precision(tmp_path, base, two_heads):
    """Without `vision_model.` and the inner `model.`, in bfloat16: the same policy, rounded."""
    tensors = released()
    older = {
        key.replace("paligemma.model.", "paligemma.").replace("vision_model.", ""): value.bfloat16()
        for key, value in tensors.items()
    }
    policy, _ = run(lerobot(tmp_path / "lerobot", older), tmp_path / "out", base)
    assert next(policy.parameters()).dtype == torch.float32
    check_forward(policy, {key: value.bfloat16().float() for key, value in tensors.items()})


def test_a_lone_file_and_its_own_tokenizer(tmp_path, two_heads):
    source = openpi(tmp_path / "openpi", released(), {"libero": {"actions": STATISTICS, "state": STATE}})
    write_tokenizer(source)
    policy, _ = run(source / "model.safetensors", tmp_path / "out", tmp_path / "nowhere")
    assert policy.tokenizer.bos_token == "<|im_start|>" and policy.chunk == 6


def test_heads_of_the_only_tower():
    """At full width the shapes alone would leave the number of heads open; so400m has 16."""
    from vla.released.pi0 import VISION_HEADS, dimensions

    found = dimensions(rename(released(), RULES))
    assert VISION_HEADS == 16 and found["vision_config"]["num_attention_heads"] == 16
    assert found["text_config"] == dict(
        vocab_size=len(byte_tokenizer()), hidden_size=32, intermediate_size=48, num_hidden_layers=3,
        num_attention_heads=4, num_key_value_heads=1, head_dim=8,
    )  # fmt: skip
    assert found["expert_config"] == dict(hidden_size=16, intermediate_size=24)


@pytest.mark.parametrize(("low", "raw"), [(-1.0, {1: -1.0, 0: 1.0}), (0.0, {1: 0.0, 0: 1.0})])
def test_gripper_means_the_same_number_to_the_network(low, raw):
    """Our (g − centre) / scale is the source's (r − μ) / σ, with r its own gripper: lower end open, upper closed."""
    entry = {"actions": STATISTICS | {"q01": [-1.0] * 6 + [low]}, "state": STATE}
    _, (centre, scale) = action_statistics("x", entry)
    for g in (0, 1):
        assert (g - centre) / scale == pytest.approx((raw[g] - STATISTICS["mean"][6]) / STATISTICS["std"][6])


def test_released_libero_policy_acts_in_physical_units(tmp_path, base, two_heads, monkeypatch):
    """Sampled numbers reach the arm as the source's own un-normalisation has it: z σ + μ, gripper closed above 0."""
    policy, _ = run(lerobot(tmp_path / "lerobot", released()), tmp_path / "out", base)
    z = torch.linspace(-1, 1, 6)[None, :, None].expand(1, 6, 9).clone()
    monkeypatch.setattr("vla.baselines.pi0.initial_noise", lambda *_: z)
    monkeypatch.setattr(policy, "sampler", lambda prefix, state: lambda x, t: torch.zeros_like(x))
    seen = {"images": {c: frames(1) for c in policy.cameras}, "state": torch.zeros(1, 8), "instruction": ["open"]}
    actions = policy.predict(seen)[0]
    mean, std = np.array(STATISTICS["mean"]), np.array(STATISTICS["std"])
    raw = z[0, :, :7].numpy() * (std + 1e-6) + mean
    np.testing.assert_allclose(actions[:, :6].numpy(), raw[:, :6], rtol=1e-5, atol=1e-5)
    assert actions[:, 6].tolist() == (raw[:, 6] < 0).astype(float).tolist() and 0 < actions[:, 6].sum() < 6


def test_mistakes_are_named(tmp_path, base, two_heads):
    tensors = released()
    key = "paligemma_with_expert.gemma_expert.model.layers.1.mlp.up_proj.weight"

    def refuse(name: str, changed: dict, match: str, **config) -> None:
        with pytest.raises(UserError, match=match):
            run(lerobot(tmp_path / name, changed, **config), tmp_path / "out", base)

    refuse("missing", {k: v for k, v in tensors.items() if k != key}, r"missing.*dit\.layers\.1\.mlp\.up_proj")
    refuse("shape", tensors | {key: torch.zeros(24, 17)}, r"dit\.layers\.1\.mlp\.up_proj\.weight \(24, 17\)")
    refuse("extra", tensors | {"value_head.weight": torch.zeros(1)}, r"unexpected.*value_head")
    refuse("none", {"something.weight": torch.zeros(1)}, "no weight lm_head.weight")
    refuse("pi05", tensors | {"time_mlp_in.weight": torch.zeros(1)}, "π0.5")
    refuse("other", tensors, "is of a pi05 policy", type="pi05")
    mapping = {"STATE": "MEAN_STD", "ACTION": "MIN_MAX"}
    refuse("scheme", tensors, "MIN_MAX", normalization_mapping=mapping)
    assert not (tmp_path / "out").exists()


def test_damage_is_named(tmp_path, base, two_heads):
    source = lerobot(tmp_path / "lerobot", released())
    for name in ("model.safetensors", "config.json", "policy_preprocessor_step_5_normalizer_processor.safetensors"):
        whole = (source / name).read_bytes()
        (source / name).write_bytes(whole[: len(whole) // 2])
        with pytest.raises(UserError, match=name):
            run(source, tmp_path / "out", base)
        (source / name).write_bytes(whole)
    with pytest.raises(UserError, match="gives no tokenizer"):
        run(source, tmp_path / "out", tmp_path / "nowhere")


def test_quantile_statistics_set_the_scheme(tmp_path, base):
    mapping = {"STATE": "QUANTILES", "ACTION": "QUANTILES"}
    source = lerobot(tmp_path / "lerobot", released(), normalization_mapping=mapping)
    converted = convert(source, {"pretrained": str(base)}, None)
    assert converted.scheme == "q99"
    ActionNormalizer(ActionStatistics(**converted.statistics), converted.scheme)
    assert math.isclose(converted.statistics["q99"][6], 0.99, rel_tol=1e-6)
