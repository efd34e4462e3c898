"""SpatialVLA against the fact sheet (§0a.5, §5, §14) and the plain Gemma2 of tests/spatialvla_reference.py."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from tests.spatialvla_reference import (
    INSTRUCTIONS,
    TEXT,
    batch,
    build,
    encoded,
    frames,
    observation,
    plain_features,
    plain_generate,
    plain_ids,
    plain_logits,
    suffix_of,
)
from vla.baselines import spatialvla
from vla.baselines.spatialvla import SpatialVLA
from vla.ego3d import estimate_depth
from vla.prefix_lm import places_of, visible


@pytest.fixture(scope="module")
def policy() -> SpatialVLA:
    return build()


# --- sequence, mask, forward ------------------------------------------------------------------------------------------


def test_prompt_is_bos_and_the_lower_case_instruction_with_a_newline(policy):
    ids, valid = policy.tokenize(INSTRUCTIONS, torch.device("cpu"))
    for row, keep, instruction in zip(ids, valid, INSTRUCTIONS, strict=True):
        assert keep.tolist() == sorted(keep.tolist(), reverse=True)
        kept = row[keep]
        assert kept[0] == policy.tokenizer.bos_token_id
        assert policy.tokenizer.decode(kept[1:]) == instruction.lower() + "\n"
    assert not valid.all()


def test_prefix_sees_itself_and_the_suffix_is_causal():
    """§14.4, on a padded batch of two: 2 image + 3 text positions, of which the first row uses 4, and 3 actions."""
    valid = torch.tensor([[1, 1, 1, 1, 0, 1, 1, 1], [1, 1, 1, 1, 1, 1, 1, 1]]) > 0
    places = places_of(valid)
    assert places.tolist() == [[1, 2, 3, 4, 8, 5, 6, 7], [1, 2, 3, 4, 5, 6, 7, 8]]
    seen = visible("prefix_lm", valid, places, 5)
    for b, row in enumerate(valid):
        for i in range(8):
            for j in range(8):
                assert seen[b, i, j] == (bool(row[j]) and (j < 5 or (i >= 5 and j <= i) or (not row[i])))
    causal = visible("released_flash", valid, places, 5)
    assert causal[1].tolist() == torch.ones(8, 8).tril().bool().tolist() and not causal[0, :, 4].any()
    loose = visible("released_eager", valid, places, 5)
    assert loose[:, :, :5].all() and torch.equal(loose[1], seen[1]) and not loose[0, 5, 6]


@pytest.mark.parametrize("mask", ["prefix_lm", "released_flash", "released_eager"])
def test_forward_equals_a_plain_one(mask):
    """A padded batch of two, against each alone, with as many pads behind it as the public collator puts there."""
    policy = build(mask=mask)
    chunks = batch()["actions"]
    suffixes = torch.tensor([suffix_of(policy, chunk) for chunk in chunks])
    lengths = [len(plain_ids(policy, instruction)) for instruction in INSTRUCTIONS]
    assert lengths[0] < lengths[1]
    with torch.no_grad():
        got = policy.suffix_logits(encoded(policy, frames())["static"], INSTRUCTIONS, suffixes)
    for b in range(2):
        pads = max(lengths) - lengths[b]
        expected = plain_logits(policy, frames()[b], INSTRUCTIONS[b], suffixes[b].tolist(), pads, mask)
        torch.testing.assert_close(got[b], expected, atol=2e-5, rtol=0)
        alone = plain_logits(policy, frames()[b], INSTRUCTIONS[b], suffixes[b].tolist(), 0, "prefix_lm")
        differs = mask == "released_flash" or (mask == "released_eager" and pads > 0)
        assert torch.allclose(got[b], alone, atol=1e-3) == (not differs)


def test_sliding_window_is_gemmas():
    policy = build(text_config=TEXT | {"sliding_window": 7})
    suffix = suffix_of(policy, batch()["actions"][0])
    expected = plain_logits(policy, frames()[0], INSTRUCTIONS[0], suffix, window=7)
    with torch.no_grad():
        tokens = encoded(policy, frames())["static"]
        got = policy.suffix_logits(tokens, [INSTRUCTIONS[0]] * 2, torch.tensor([suffix] * 2))[0]
        torch.testing.assert_close(got, expected, atol=2e-5, rtol=0)
        wide = plain_logits(policy, frames()[0], INSTRUCTIONS[0], suffix)
        assert not torch.allclose(got, wide, atol=1e-3)
        ids = policy.generate(tokens, INSTRUCTIONS)
    assert torch.equal(ids[0], plain_generate(policy, frames()[0], INSTRUCTIONS[0], window=7))


def test_generation_with_a_cache_equals_one_without(policy):
    with torch.no_grad():
        ids = policy.generate(encoded(policy, frames())["static"], INSTRUCTIONS)
    for b in range(2):
        assert torch.equal(ids[b], plain_generate(policy, frames()[b], INSTRUCTIONS[b]))
    assert len(ids.unique()) > 3 and (ids >= policy.first_action).float().mean() > 0.5


def test_predict_is_the_same_alone_and_in_a_batch(policy):
    together = policy.predict(observation())
    for row in range(2):
        assert torch.equal(policy.predict(observation(slice(row, row + 1)))[0], together[row])
    assert not torch.equal(together[0], together[1])


def test_predict_decodes_and_unnormalizes(policy):
    with torch.no_grad():
        tokens = policy.encode_images(policy.prepare(observation()["images"]))["static"]
        ids = policy.generate(tokens, INSTRUCTIONS) - policy.first_action
    out = policy.predict(observation())
    assert out.shape == (2, 3, 7)
    decoded = policy.grid.decode(ids.reshape(2, 3, 3)).numpy()
    q01, q99 = (np.array(getattr(policy.normalizer.statistics, name)[:6]) for name in ("q01", "q99"))
    np.testing.assert_allclose(out[..., :6], 0.5 * (decoded[..., :6] + 1) * (q99 - q01) + q01, atol=1e-5)
    np.testing.assert_array_equal(out[..., 6], decoded[..., 6])


def test_words_for_actions_are_clipped_into_range(policy):
    kept = policy.lm_head.weight.data.clone()
    with torch.no_grad():
        policy.lm_head.weight[policy.first_action :] = 0
        ids = policy.generate(encoded(policy, frames())["static"], INSTRUCTIONS)
        assert (ids < policy.first_action).all()
        out = policy.predict(observation())
        policy.lm_head.weight.copy_(kept)
    first = torch.tensor([0, policy.grid.translations, policy.grid.size - 2]).expand(1, 1, 3)
    lowest = policy.normalizer.unnormalize(policy.grid.decode(first))
    torch.testing.assert_close(out, lowest.expand(2, 3, 7))


# --- loss, gradients, what is frozen ----------------------------------------------------------------------------------


def test_loss_is_cross_entropy_over_valid_steps_and_eos(policy):
    with torch.no_grad():
        out = policy.loss(batch(), encoded(policy, frames()))
    held = batch()["actions"].clone()
    held[1, 2] = held[1, 1]  # what later tokens read in the place of the invalid step
    terms, right = [], []
    for b in range(2):
        suffix = suffix_of(policy, held[b])
        logits = plain_logits(policy, frames()[b], INSTRUCTIONS[b], suffix)
        for s, token in enumerate(suffix):
            if b == 0 or s < 6 or s == 9:
                terms.append(logits[s].logsumexp(0) - logits[s, token])
                right.append(float(logits[s].argmax() == token))
    torch.testing.assert_close(out["loss"], sum(terms) / 17, atol=1e-5, rtol=0)
    assert out["token_accuracy"] == pytest.approx(sum(right) / 17)


def test_what_is_frozen_gets_no_gradient():
    """§14.5."""
    policy = build().train()
    policy.loss(batch(), encoded(policy, frames()))["loss"].backward()
    frozen = [name for name, p in policy.named_parameters() if p.grad is None]
    assert frozen and all(name.startswith("depth_model.") or "embed_tokens" in name for name in frozen)
    assert frozen == [name for name, p in policy.named_parameters() if not p.requires_grad]
    for name in ("action_embedding.weight", "lm_head.weight", "projector.weight", "ego3d.mlp.0.weight",
                 "ego3d.mlp.3.bias", "vision_tower.embeddings.patch_embedding.weight"):  # fmt: skip
        assert policy.get_parameter(name).grad.abs().sum() > 0, name
    assert policy.training and not any(module.training for module in policy.depth_model.modules())


def test_depth_is_estimated_only_where_it_is_needed(policy, monkeypatch):
    calls = []

    def counted(model, images):
        calls.append(images)
        return estimate_depth(model, images)

    monkeypatch.setattr(spatialvla, "estimate_depth", counted)
    visual = policy.encode_images({"static": frames(4)})
    assert not calls and visual["static"].frames is not None
    with torch.no_grad():
        current = {"static": visual["static"].rows(slice(0, 2))}
        expected = policy.loss(batch(), current)["loss"]
    assert len(calls) == 1 and torch.equal(calls[0], frames(4)[:2])
    other = build(tap="post_projector")
    with torch.no_grad():
        visual = other.encode_images({"static": frames(4)})
        assert len(calls) == 2 and len(calls[1]) == 4
        assert torch.equal(visual["static"].tap, visual["static"].embeds)
        again = other.loss(batch(), {"static": visual["static"].rows(slice(0, 2))})["loss"]
    assert len(calls) == 2
    torch.testing.assert_close(again, expected, atol=1e-5, rtol=0)


def test_depth_reaches_the_actions(policy):
    """The frame counts twice: once through SigLIP, once through its depth."""
    tokens = encoded(policy, frames())["static"]
    with torch.no_grad():
        near = policy.image_features(tokens)
        policy.depth_model.requires_grad_(False)
        for parameter in policy.depth_model.parameters():
            parameter.mul_(2)
        far = policy.image_features(tokens)
        for parameter in policy.depth_model.parameters():
            parameter.div_(2)
    assert not torch.allclose(near, far, atol=1e-2)


@pytest.mark.parametrize("tap", ["pre_projector", "post_projector", "layer:0", "layer:2"])
def test_taps_are_what_they_say(tap):
    policy = build(tap=tap)
    blocks = {}
    for index, layer in enumerate(policy.vision_tower.encoder.layers):

        def keep(_, __, out, index=index):
            blocks.setdefault(index, out)

        layer.register_forward_hook(keep)
    with torch.no_grad():
        tokens = encoded(policy, frames())["static"]
        normed = policy.vision_tower.post_layernorm(blocks[2])
        features = torch.stack([plain_features(policy, frame) for frame in frames()])
    if tap == "post_projector":
        torch.testing.assert_close(tokens.tap, features, atol=1e-5, rtol=0)
    else:
        assert torch.equal(tokens.tap, normed if tap == "pre_projector" else blocks[int(tap[-1])])
        torch.testing.assert_close(policy.image_features(tokens), features, atol=1e-5, rtol=0)
    assert policy.tap_shape() == tuple(tokens.tap.shape[1:])
