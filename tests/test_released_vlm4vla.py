"""VLM4VLA's own checkpoint layout (fact sheet §3.9) → policy directory → the same actions."""

from __future__ import annotations

import json
import re

import pytest
import torch
from transformers import Qwen3VLConfig

from tests.test_vlm4vla import TEXT, VISION, arguments, normalizer
from vla.baselines.vlm4vla import VLM4VLA
from vla.checkpoint import load_policy
from vla.config import ConvertWeightsConfig
from vla.errors import UserError
from vla.released.convert import convert_weights
from vla.tokenizer import byte_tokenizer


def source_name(key: str) -> str:
    """The reference's name of one of our weights."""
    if key == "query":
        return "model.action_token"
    key = re.sub(r"^visual\.model\.", "backbone.model.visual.", key)
    key = re.sub(r"^language_model\.", "backbone.model.language_model.", key)
    key = key.replace("head.trunk.", "act_head.mlp.").replace("head.motion.", "act_head.actions.mlp.")
    return "model." + key.replace("head.gripper.", "act_head.gripper.mlp.")


@pytest.fixture
def policy() -> VLM4VLA:
    torch.manual_seed(0)
    policy = VLM4VLA.build(normalizer(), **arguments(head_width=1024)).eval()
    policy.query.data.normal_()
    return policy


@pytest.fixture
def source(tmp_path, policy):
    """A folder as the reference's conversion leaves it, with the base model's config and tokenizer."""
    folder = tmp_path / "source"
    folder.mkdir()
    state = {source_name(key): value for key, value in policy.state_dict().items()}
    state["model.backbone.lm_head.weight"] = torch.zeros(len(byte_tokenizer()), TEXT["hidden_size"])
    torch.save({"state_dict": state, "epoch": 4}, folder / "model.pt")
    text = TEXT | {"vocab_size": len(byte_tokenizer())}
    Qwen3VLConfig(vision_config=VISION, text_config=text).save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    entry = {name: getattr(policy.normalizer.statistics, name) for name in ("q01", "q99", "mean", "std", "min", "max")}
    (folder / "dataset_statistics.json").write_text(json.dumps({"libero": {"action": entry, "num_transitions": 400}}))
    return folder


def convert(source, out, **changes):
    return convert_weights(ConvertWeightsConfig(baseline="vlm4vla", source=str(source), out=str(out), **changes))


def observation():
    images = torch.randint(0, 256, (2, 3, 224, 224), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))
    return {"images": {"static": images}, "instruction": ["open the drawer", "push it"], "state": torch.zeros(2, 8)}


def test_converted_policy_acts_as_the_original(source, policy, tmp_path):
    out, notes = convert(source / "model.pt", tmp_path / "out")
    loaded, config = load_policy(out)
    assert torch.equal(loaded.predict(observation()), policy.predict(observation()))
    assert config["about"]["arm"] == "released" and "libero" in notes[0]
    assert loaded.prompt == policy.prompt and loaded.chunk == policy.chunk


def test_without_statistics_it_is_a_calvin_policy(source, tmp_path):
    (source / "dataset_statistics.json").unlink()
    out, _ = convert(source, tmp_path / "out")
    actions = load_policy(out)[0].predict(observation())
    assert load_policy(out)[0].normalizer.scheme == "clip065" and actions[..., :6].abs().max() <= 0.65


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (lambda s: s.pop("model.act_head.gripper.mlp.2.bias"), r"1 weights missing.*head\.gripper\.2\.bias"),
        (lambda s: s.update({"model.extra": torch.zeros(1)}), r"1 weights unexpected.*extra"),
        (lambda s: s.update({"model.act_head.mlp.0.bias": torch.zeros(5)}), r"head\.trunk\.0\.bias \(5,\) for \(12,\)"),
        (lambda s: s.pop("model.action_token"), "no weight query"),
        (lambda s: s.pop("model.act_head.actions.mlp.6.weight"), r"head\.motion\.6\.weight"),
    ],
)
def test_what_does_not_fit_is_listed_and_nothing_is_written(source, tmp_path, change, named):
    content = torch.load(source / "model.pt", weights_only=True)
    change(content["state_dict"])
    torch.save(content, source / "model.pt")
    with pytest.raises(UserError, match=named):
        convert(source, tmp_path / "out")
    assert not list(tmp_path.glob("*out*"))


def test_what_is_named_as_expected_passes(source, policy, tmp_path):
    content = torch.load(source / "model.pt", weights_only=True)
    del content["state_dict"]["model.act_head.gripper.mlp.2.bias"]
    content["state_dict"]["model.extra"] = torch.zeros(1)
    torch.save(content, source / "model.pt")
    named = dict(allow_missing=[r"gripper\.2\.bias"], allow_unexpected=["^extra$"])
    out, _ = convert(source, tmp_path / "out", **named)
    assert load_policy(out)[0].predict(observation()).isfinite().all()


def test_a_folder_of_something_else_is_not_overwritten(source, tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").write_text("x")
    with pytest.raises(UserError, match="not a policy directory"):
        convert(source, tmp_path / "mine")
    assert (tmp_path / "mine" / "thesis.tex").exists()
