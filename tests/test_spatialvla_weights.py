"""SpatialVLA's grid, weights and sizes against the fact sheet (§5.3, §13), IDL table 9 and transformers' PaliGemma2."""

from __future__ import annotations

import pytest
import torch
from transformers import Gemma2Config, PaliGemmaConfig, PaliGemmaForConditionalGeneration, SiglipVisionConfig

from data.normalization import ActionStatistics
from tests.spatialvla_reference import (
    BINS,
    DEPTH,
    INSTRUCTIONS,
    TEXT,
    VISION,
    actions,
    arguments,
    batch,
    build,
    encoded,
    frames,
    normalizer,
    observation,
    plain_ids,
    suffix_of,
)
from vla.action_tokens.grid import SpatialGrid, adapt_embeddings
from vla.baselines.spatialvla import SpatialVLA
from vla.build import build_policy
from vla.checkpoint import export_policy, load_policy
from vla.cli import compose_config
from vla.ego3d import random_depth
from vla.errors import UserError
from vla.tokenizer import byte_tokenizer
from vla.training import policy_arguments


@pytest.fixture(scope="module")
def policy() -> SpatialVLA:
    return build()


def test_a_fresh_policy_fits_its_grid_to_the_normalised_actions():
    torch.manual_seed(0)
    policy = SpatialVLA.build(normalizer(), **arguments())
    assert not policy.grid.fitted
    policy.fit_to(actions())
    expected = SpatialGrid(BINS)
    expected.fit(policy.normalizer.normalize(actions()))
    for got, want in zip(policy.grid.edges(), expected.edges(), strict=True):
        assert torch.equal(got, want)
    assert policy.grid.fitted


def test_a_grid_that_came_with_the_weights_is_kept_or_adapted(policy):
    """init_from (§5.3): the released grid stays; adapt_grid refits it and moves the embeddings, not the head."""
    wider = actions() * 0.3
    kept, moved = (SpatialVLA.build(normalizer(), **arguments(adapt_grid=adapt)) for adapt in (False, True))
    for other in (kept, moved):
        other.load_state_dict(policy.state_dict())
        other.fit_to(wider)
    for got, want in zip(kept.grid.edges(), policy.grid.edges(), strict=True):
        assert torch.equal(got, want)
    assert torch.equal(kept.action_embedding.weight, policy.action_embedding.weight)
    expected = SpatialGrid(BINS)
    expected.fit(normalizer().normalize(wider))
    for got, want in zip(moved.grid.edges(), expected.edges(), strict=True):
        assert torch.equal(got, want)
    adapted = adapt_embeddings(policy.action_embedding.weight.data, policy.grid.edges(), expected.edges())
    assert torch.equal(moved.action_embedding.weight, adapted)
    assert not torch.allclose(adapted, policy.action_embedding.weight, atol=1e-2)
    assert torch.equal(moved.lm_head.weight, policy.lm_head.weight) and moved.action_embedding.weight.requires_grad


def test_export_round_trip(policy, tmp_path):
    """Grid, tokenizer with its action tokens and ensembling travel along; the actions are the same bits."""
    export_policy(policy, tmp_path / "policy", name="spatialvla", arguments=arguments(), about={})
    again, _ = load_policy(tmp_path / "policy")
    assert again.grid.fitted and again.ensemble == -0.8 and again.first_action == policy.first_action
    assert again.tokenizer.convert_tokens_to_ids("<ACTION00000>") == again.first_action
    assert torch.equal(again.predict(observation()), policy.predict(observation()))


def saved_paligemma(folder, **text) -> PaliGemmaForConditionalGeneration:
    tokenizer = byte_tokenizer()
    tokenizer.bos_token, tokenizer.eos_token = "<|im_start|>", "<|im_end|>"
    config = PaliGemmaConfig(
        vision_config=SiglipVisionConfig(**VISION, image_size=28, vision_use_head=False),
        text_config=Gemma2Config(**TEXT | {"vocab_size": len(tokenizer) + 7} | text),
        projection_dim=TEXT["hidden_size"],
    )  # fmt: skip
    torch.manual_seed(3)
    paligemma = PaliGemmaForConditionalGeneration(config)
    paligemma.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return paligemma


def test_from_pretrained(tmp_path):
    """PaliGemma2 and ZoeDepth saved here: every weight arrives, action tokens start as the mean of the text's."""
    paligemma = saved_paligemma(tmp_path / "paligemma")
    depth = random_depth(DEPTH)
    depth.save_pretrained(tmp_path / "depth")
    built = arguments(pretrained=str(tmp_path / "paligemma"), pretrained_depth=str(tmp_path / "depth"))
    policy = SpatialVLA.build(normalizer(), **built | {"vision_config": None, "text_config": None}).eval()
    count = len(byte_tokenizer())
    assert policy.first_action == count and policy.lm_head.weight.shape == (count + policy.grid.size, 24)
    embeds = paligemma.model.language_model.embed_tokens.weight.data[:count]
    assert torch.equal(policy.language_model.embed_tokens.weight, embeds)
    assert torch.equal(policy.lm_head.weight[:count], embeds)
    torch.testing.assert_close(policy.lm_head.weight[count:], embeds.mean(0).expand(policy.grid.size, -1))
    torch.testing.assert_close(policy.action_embedding.weight, embeds.mean(0).expand(policy.grid.size, -1))
    assert torch.equal(policy.projector.weight, paligemma.model.multi_modal_projector.linear.weight)
    for key, value in depth.state_dict().items():
        assert torch.equal(policy.depth_model.state_dict()[key], value)
    for key, value in paligemma.model.vision_tower.state_dict().items():
        assert torch.equal(policy.vision_tower.state_dict()[key], value)
    policy.fit_to(actions())
    export_policy(policy, tmp_path / "policy", name="spatialvla", arguments=built, about={})
    for folder in ("paligemma", "depth"):
        (tmp_path / folder).rename(tmp_path / f"{folder}-gone")
    again, _ = load_policy(tmp_path / "policy")
    assert torch.equal(again.predict(observation()), policy.predict(observation()))


def test_prefix_lm_is_transformers_paligemma2(tmp_path, policy):
    """The public model class on the same weights: no 3D embedding there, so it is switched off here."""
    paligemma = saved_paligemma(tmp_path / "p", vocab_size=policy.first_action + policy.grid.size + 1)
    model, image_id = paligemma.model, policy.first_action + policy.grid.size
    model.config.image_token_id = image_id
    bare = build()
    bare.ego3d.mlp[3].weight.data.zero_(), bare.ego3d.mlp[3].bias.data.zero_()
    model.vision_tower.load_state_dict(bare.vision_tower.state_dict())
    model.multi_modal_projector.linear.load_state_dict(bare.projector.state_dict())
    language = {k: v for k, v in bare.language_model.state_dict().items() if "embed_tokens" not in k}
    model.language_model.load_state_dict(language, strict=False)
    table = torch.cat([bare.language_model.embed_tokens.weight, bare.action_embedding.weight])
    model.language_model.embed_tokens.weight.data[:image_id] = table
    suffix = suffix_of(bare, batch()["actions"][0])
    text = plain_ids(bare, INSTRUCTIONS[0])
    ids = torch.tensor([[image_id] * 4 + text + suffix])
    types = torch.tensor([[0] * (4 + len(text)) + [1] * len(suffix)])
    with torch.no_grad():
        hidden = model(
            input_ids=ids, pixel_values=frames()[:1].float() / 127.5 - 1, token_type_ids=types,
            attention_mask=torch.ones_like(ids),
        ).last_hidden_state[:, 3 + len(text) : -1]  # fmt: skip
        got = bare.suffix_logits(encoded(bare, frames()[:1])["static"], INSTRUCTIONS[:1], torch.tensor([suffix]))
    torch.testing.assert_close(got, bare.logits(hidden), atol=2e-5, rtol=0)


def test_bad_input_is_named(tmp_path):
    cases = [
        (dict(cameras=["static", "wrist"]), "one camera"),
        (dict(mask="causal"), r"policy\.mask=causal"),
        (dict(bins=[1, 2]), r"policy\.bins"),
        (dict(tap="layer:3"), r"inverse_dynamics\.tap=layer:3"),
        (dict(pretrained=str(tmp_path / "nothing")), r"policy\.pretrained=.*nothing"),
        (dict(pretrained_depth=str(tmp_path / "nothing")), r"policy\.pretrained_depth=.*nothing"),
    ]
    for change, named in cases:
        with pytest.raises(UserError, match=named):
            SpatialVLA.build(normalizer(), **arguments(**change))
    with pytest.raises(UserError, match="normalization=zscore"):
        SpatialVLA.build(normalizer("zscore"), **arguments())
    saved_paligemma(tmp_path / "p")
    with pytest.raises(UserError, match="sees 28 pixels"):
        SpatialVLA.build(normalizer(), **arguments(pretrained=str(tmp_path / "p"), image_size=56))
    saved_paligemma(tmp_path / "q", vocab_size=300)
    with pytest.raises(UserError, match="embeds 300 tokens"):
        SpatialVLA.build(normalizer(), **arguments(pretrained=str(tmp_path / "q")))


def test_idl_table_9_as_it_reaches_the_program():
    cfg = compose_config("train", "baseline=spatialvla", "size=full", "ablation=ptr", "benchmark=libero_goal")
    inverse, optim = cfg.inverse_dynamics, cfg.optim
    assert (inverse.weight, inverse.gripper_weight, inverse.reverse_prob, inverse.dim) == (0.2, 0.01, 0.5, 512)
    assert (optim.lr, optim.weight_decay, optim.warmup_ratio, optim.schedule) == (2e-5, 0.0, 0.005, "linear")
    assert (cfg.batch_size, cfg.max_steps, cfg.chunk, cfg.cameras) == (256, 30000, 4, ["static"])
    assert (cfg.normalization, cfg.policy.ensemble, cfg.policy.mask) == ("q99", -0.8, "prefix_lm")
    assert cfg.policy.pretrained == "google/paligemma2-3b-pt-224"


def test_full_size_has_the_papers_shapes():
    cfg = compose_config("train", "baseline=spatialvla", "size=full")
    changes = dict(pretrained=None, pretrained_depth=None)
    statistics = ActionStatistics.of(actions().numpy())
    with torch.device("meta"):
        policy = build_policy("spatialvla", statistics, cfg.normalization, policy_arguments(cfg) | changes)
    assert policy.ego3d.mlp[0].weight.shape == (1152, 204) and policy.ego3d.rays.shape == (3, 32, 32)
    assert policy.action_embedding.weight.shape == (8194, 2304)
    assert policy.lm_head.weight.shape == (policy.first_action + 8194, 2304)
    assert len(policy.vision_tower.encoder.layers) == 27 and len(policy.language_model.layers) == 26
    depth = sum(p.numel() for p in policy.depth_model.parameters())
    assert 0.33e9 < depth < 0.36e9  # §13: 0.34 B


def test_tiny_overfits_a_batch():
    cfg = compose_config("train", "baseline=spatialvla", "size=tiny")
    torch.manual_seed(0)
    statistics = ActionStatistics.of(actions().numpy())
    policy = build_policy("spatialvla", statistics, cfg.normalization, policy_arguments(cfg))
    policy.fit_to(actions())
    sample = {
        "actions": actions()[:16].reshape(4, 4, 7), "action_valid": torch.ones(4, 4, dtype=torch.bool),
        "instruction": ["open it", "close it"] * 2,
    }  # fmt: skip
    images = {"static": frames(4, 8).repeat_interleave(7, 2).repeat_interleave(7, 3)}
    optimizer = torch.optim.AdamW([p for p in policy.parameters() if p.requires_grad], 2e-3)
    losses = []
    for _ in range(80):
        losses.append(policy.loss(sample, policy.encode_images(images))["loss"])
        losses[-1].backward()
        torch.nn.utils.clip_grad_norm_(policy.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
    assert losses[-1] < losses[0] / 10
    predicted = policy.eval().predict({"images": images, "instruction": sample["instruction"]})
    cells = policy.grid.encode(policy.normalizer.normalize(sample["actions"]))
    assert torch.equal(predicted, policy.normalizer.unnormalize(policy.grid.decode(cells)))
