"""FLOWER's own checkpoint layouts (fact sheet §4.8) → policy directory → the same actions."""

from __future__ import annotations

import re
from collections import OrderedDict
from dataclasses import asdict

import numpy as np
import pytest
import safetensors.torch
import torch

from data.normalization import ActionNormalizer, ActionStatistics
from vla.baselines.flower import Flower
from vla.build import of_build
from vla.checkpoint import load_policy
from vla.cli import compose_config
from vla.config import ConvertWeightsConfig
from vla.errors import UserError
from vla.released.convert import convert_weights
from vla.tokenizer import byte_tokenizer

VISION = dict(depths=[1, 1, 2, 1], embed_dim=[32, 32, 64, 96], num_heads=[1, 1, 2, 3], num_groups=[1, 1, 2, 3])
TEXT = dict(d_model=128, encoder_layers=2, encoder_attention_heads=2, encoder_ffn_dim=96, max_position_embeddings=512)
DIT = dict(dim=64, heads=4, layers=2, low_rank=16, max_length=20, rope_theta=1000.0)


def normalizer() -> ActionNormalizer:
    actions = np.random.default_rng(0).uniform(-1, 1, (100, 7))
    return ActionNormalizer(ActionStatistics.of(actions), "none")


@pytest.fixture(scope="module")
def policy() -> Flower:
    torch.manual_seed(0)
    torch.set_num_threads(1)
    full = compose_config("train", "baseline=flower", "size=full").policy
    own = {k: v for k, v in asdict(full).items() if k not in ("name", "pretrained", "dit_config")}
    own |= {"vision_config": VISION, "text_config": TEXT | {"vocab_size": 460, "pad_token_id": 1}, "dit_config": DIT}
    own |= {"chunk": 10, "cameras": ["static", "wrist"], "tap": "post_projector"}
    policy = Flower.build(normalizer(), **of_build(own)).eval()
    with torch.no_grad():
        policy.dit.adaln.weight.normal_(std=0.1)
        policy.flow.copy_(policy.encoder.embed_tokens.weight[-1])
    return policy


def released(policy: Flower) -> OrderedDict[str, torch.Tensor]:
    """The state dict as the authors' code names it, with what they have and we do not."""
    dim = DIT["dim"]
    out: OrderedDict[str, torch.Tensor] = OrderedDict()
    for key, value in policy.state_dict().items():
        if key == "flow":
            continue
        if key.startswith("vision_tower.") or key.startswith("projector."):
            key = f"vlm.{key}"
            key = re.sub(r"(convs\.\d+)\.conv\.", r"\1.proj.", key)
            key = re.sub(r"_block\.conv(\d)\.", r"_block.conv\1.fn.dw.", key)
            kind = "window" if "spatial_block" in key else "channel"
            key = key.replace(".norm1.", f".{kind}_attn.norm.").replace(".norm2.", ".ffn.norm.")
            key = re.sub(r"_attn\.(qkv|proj)\.", r"_attn.fn.\1.", key)
            key = re.sub(r"\.ffn\.(fc\d)\.", r".ffn.fn.net.\1.", key)
            if key == "vlm.projector.image_projection.weight":
                key, value = "vlm.image_projection", value.T.contiguous()
            key = key.replace("vlm.projector.image_position_embed.", "vlm.image_pos_embed.")
            key = key.replace("vlm.projector.", "vlm.")
        elif key.startswith("encoder."):
            key = f"vlm.language_model.model.{key}"
        else:
            key = key.removeprefix("dit.")
            key = re.sub(r"^blocks\.", "dit.", key)
            key = re.sub(r"^(dit\.\d+)\.adaln\.(\d)", lambda m: f"{m[1]}.adaLN_modulation.{int(m[2]) + 1}", key)
            if key == "adaln.weight":
                key, value = "adaln.eef_delta.modCX.1.weight", torch.cat([value, torch.ones(3 * dim, dim)])
            key = key.replace("action_encoder.0.", "action_encoders.eef_delta.fc1.")
            key = key.replace("action_encoder.2.", "action_encoders.eef_delta.fc2.")
            key = key.replace("action_decoder.", "action_decoders.eef_delta.")
        out[key] = value.clone()
    out["vlm.language_model.model.shared.weight"] = out["vlm.language_model.model.encoder.embed_tokens.weight"]
    out["vlm.language_model.final_logits_bias"] = torch.zeros(1, 460)
    out["action_encoders.joint_single.fc1.weight"] = torch.zeros(dim, 8)
    out["action_space_embedder.action_embeddings"] = torch.zeros(3, 256)
    return out


@pytest.fixture
def base(tmp_path) -> str:
    byte_tokenizer().save_pretrained(tmp_path / "base")
    return str(tmp_path / "base")


def convert(source, out, base):
    return convert_weights(ConvertWeightsConfig(baseline="flower", source=str(source), out=str(out), base=base))


def observation() -> dict:
    generator = torch.Generator().manual_seed(1)
    frames = torch.randint(0, 256, (2, 3, 96, 96), dtype=torch.uint8, generator=generator)
    return {
        "images": {"static": frames, "wrist": 255 - frames},
        "instruction": ["open the drawer", "push the red block"],
        "state": torch.zeros(2, 15),
        "seed": torch.arange(2),
        "step": torch.zeros(2, dtype=torch.long),
    }


def wrong(state: OrderedDict) -> OrderedDict:
    """The same names, other numbers: what must not be taken where there is an average."""
    return OrderedDict((key, torch.zeros_like(value)) for key, value in state.items())


CONTAINERS = {
    "state dict": lambda state, path: torch.save(state, path / "w.pt"),
    "agent prefix, old names": lambda state, path: torch.save(
        OrderedDict(
            (
                "agent."
                + re.sub(r"\.mlp\.(fc1|fc2|proj)\.", r".mlp.c_\1.", k).replace(
                    "vlm.language_model.model.encoder.", "vlm.language_encoder."
                ),
                v,
            )
            for k, v in state.items()
            if "shared" not in k
        ),
        path / "w.pt",
    ),
    'every "model." cut out': lambda state, path: torch.save(
        OrderedDict((k.replace("model.", ""), v) for k, v in state.items()), path / "w.pt"
    ),
    "lightning": lambda state, path: torch.save({"state_dict": state, "callbacks": {}, "epoch": 3}, path / "w.ckpt"),
    "lightning with EMA": lambda state, path: torch.save(
        {"state_dict": wrong(state), "callbacks": {"EMA": {"ema_weights": list(state.values()), "cur_step": 9}}},
        path / "w.ckpt",
    ),
    "safetensors": lambda state, path: safetensors.torch.save_file(
        {k: v.clone() for k, v in state.items()}, path / "model.safetensors"
    ),
}


@pytest.mark.parametrize("container", CONTAINERS)
def test_every_container_gives_the_original_s_actions(container, policy, base, tmp_path):
    source = tmp_path / "source"
    source.mkdir()
    CONTAINERS[container](released(policy), source)
    out, notes = convert(source, tmp_path / "out", base)
    loaded, config = load_policy(out)
    torch.testing.assert_close(loaded.predict(observation()), policy.predict(observation()), rtol=0, atol=0)
    assert config["arguments"]["dit_config"]["max_length"] == 20, "RoPE's tables are the checkpoint's"
    assert any("average" in note for note in notes) == (container == "lightning with EMA")


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (lambda s: s.pop("dit.1.self_attn.qkv.weight"), r"missing.*dit\.blocks\.1\.self_attn\.qkv\.weight"),
        (lambda s: s.update({"cond_linear.weight": torch.zeros(64)}), r"cond_linear\.weight has shape"),
        (lambda s: s.pop("vlm.image_projection"), "image_projection"),
        (
            lambda s: s.update({"dit.0.norm1.weight": torch.zeros(3)}),
            r"dit\.blocks\.0\.norm1\.weight \(3,\) for \(64,\)",
        ),
        (lambda s: s.update({"surprise": torch.zeros(3)}), r"unexpected.*surprise"),
    ],
)
def test_what_does_not_fit_is_named(change, named, policy, base, tmp_path):
    state = released(policy)
    change(state)
    torch.save(state, tmp_path / "w.pt")
    with pytest.raises(UserError, match=named):
        convert(tmp_path / "w.pt", tmp_path / "out", base)
    assert not (tmp_path / "out").exists()


def test_an_average_of_another_model_is_refused(policy, base, tmp_path):
    state = released(policy)
    for kept, named in ((list(state.values())[1:], "EMA holds"), (list(state.values())[::-1], "EMA's tensor for")):
        torch.save({"state_dict": state, "callbacks": {"EMA": {"ema_weights": kept}}}, tmp_path / "w.ckpt")
        with pytest.raises(UserError, match=named):
            convert(tmp_path / "w.ckpt", tmp_path / "out", base)


def test_a_truncated_file_is_named(policy, base, tmp_path):
    torch.save(released(policy), tmp_path / "w.pt")
    (tmp_path / "w.pt").write_bytes((tmp_path / "w.pt").read_bytes()[:5000])
    with pytest.raises(UserError, match=r"w\.pt is damaged"):
        convert(tmp_path / "w.pt", tmp_path / "out", base)
