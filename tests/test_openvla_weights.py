"""OpenVLA's sizes, training values, export and errors against the fact sheet (§6, §8.3)."""

from __future__ import annotations

import pytest
import torch

from tests.openvla_reference import DINO, LONG, SHORT, arguments, normalizer, observation, randomised
from vla.baselines.openvla import OpenVLA
from vla.bench.latency import random_policy
from vla.checkpoint import export_policy, load_policy
from vla.cli import compose_config
from vla.errors import UserError


@pytest.fixture(scope="module")
def policy() -> OpenVLA:
    return randomised(OpenVLA.build(normalizer(), **arguments())).eval()


def test_full_size_is_the_papers():
    """256 patches, 2176 channels, projector 2176 → 8704 → 4096 → 4096, vocabulary 32064; 7.5 B parameters."""
    with torch.device("meta"):
        policy, cfg = random_policy("openvla", "full")
        assert policy.tap_shape() == (256, 2176)
        tokens = policy.encode_images({"static": torch.zeros(1, 3, 224, 224, dtype=torch.uint8)})["static"]
    assert tokens.embeds.shape == (1, 256, 4096)
    assert [policy.projector[n].out_features for n in (0, 2, 4)] == [8704, 4096, 4096]
    assert policy.language_model.lm_head.weight.shape == (32064, 4096)
    assert (len(policy.dino.encoder.layer), len(policy.siglip.encoder.layers)) == (23, 26)
    parameters = sum(p.numel() for p in policy.parameters())
    last_dino, last_siglip = 12 * 1024**2 + 15 * 1024, 2 * 4304 * 1152 + 4304 + 4 * 1152**2 + 9 * 1152
    assert abs(parameters + last_dino + last_siglip - 7.526e9) < 1e6  # 7.541 B less SigLIP's pooling, 15.4 M
    assert cfg.chunk == 1 and policy.bins.end == 32000 and policy.space_id == 29871


def test_tap_beyond_the_shallower_tower_is_refused():
    with pytest.raises(UserError, match=r"tap=layer:2.*layer:0 … layer:1"):
        OpenVLA.build(normalizer(), **arguments(tap="layer:2"))  # DINO's third block is its last, which is gone


def test_action_ids_are_beyond_the_words():
    """At the sizes without a released tokeniser the vocabulary ends with 256 ids for the actions."""
    policy = OpenVLA.build(normalizer(), **arguments())
    assert policy.bins.end == policy.language_model.config.vocab_size == len(policy.tokenizer) + 256


def test_export_round_trip(policy, tmp_path):
    export_policy(policy, tmp_path / "policy", name="openvla", arguments=arguments(), about={})
    again, _ = load_policy(tmp_path / "policy")
    assert torch.equal(policy.predict(observation(SHORT, LONG)), again.predict(observation(SHORT, LONG)))


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"cameras": ["static", "wrist"]}, "one camera"),
        ({"prompt": "In: do it"}, r"policy\.prompt"),
        ({"bins_end": 5000}, r"policy\.bins_end=5000"),
        ({"bins_end": 200}, r"policy\.bins_end=200"),
        ({"dino_config": DINO | {"num_hidden_layers": 1}}, "second-to-last"),
        ({"pretrained": "nowhere/at-all/x"}, r"policy\.pretrained=nowhere/at-all/x .*init_from=DIR"),
    ],
)
def test_bad_arguments_are_named(changes, named):
    with pytest.raises(UserError, match=named) as caught:
        OpenVLA.build(normalizer(), **arguments(**changes))
    assert "\n" not in str(caught.value)


def test_papers_values_reach_the_program():
    """§6.3, §8.3."""
    cfg = compose_config("train", "baseline=openvla", "size=full")
    optim = cfg.optim
    assert (optim.lr, optim.weight_decay, optim.clip, optim.schedule, optim.warmup_ratio) == (2e-5, 0, 1, "cosine", 0)
    assert (cfg.batch_size, cfg.chunk, cfg.normalization, cfg.cameras) == (256, 1, "q99", ["static"])
    assert abs(cfg.max_steps - 10 * 3_786_400 / 256) < 10
    assert not cfg.augment.crop and not cfg.policy.center_crop
