"""OpenVLA against the fact sheet (§6, §0a.8, §10, §14) and the naive references of tests/openvla_reference.py."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from transformers import Dinov2WithRegistersModel, SiglipVisionModel

from data.augment import centre_crop
from tests.openvla_reference import (
    LONG,
    PROMPT,
    SHORT,
    TEXT,
    arguments,
    batch,
    frames,
    llama_tokenizer,
    naive_fused,
    naive_logits,
    naive_loss,
    normalizer,
    observation,
    prompt_ids,
    randomised,
)
from vla.action_tokens.bins import UniformBins
from vla.baselines.openvla import OpenVLA


@pytest.fixture(scope="module")
def policy() -> OpenVLA:
    return randomised(OpenVLA.build(normalizer(), **arguments())).eval()


@pytest.fixture(scope="module")
def chunked() -> OpenVLA:
    return randomised(OpenVLA.build(normalizer(), **arguments(chunk=3))).eval()


def test_bins_golden_numbers():
    """§10."""
    bins = UniformBins(32000)
    actions = torch.tensor([-1.0, 1.0, 0.0])
    assert bins.encode(actions).tolist() == [31999, 31744, 31872]
    values = bins.decode(bins.encode(actions))
    torch.testing.assert_close(values, torch.tensor([-0.99608, 0.99608, 0.0]), atol=5e-6, rtol=0)
    assert values[2] == 0


def test_bins_round_trip_and_range():
    bins = UniformBins(32000)
    actions = torch.linspace(-1, 1, 20001)
    ids = bins.encode(actions)
    assert (ids.min(), ids.max()) == (31744, 31999)
    assert (bins.decode(ids) - actions).abs().max() <= 1 / 255 + 1e-7
    assert bins.encode(torch.tensor([-3.0, 7.0])).tolist() == [31999, 31744]
    centres = bins.decode(torch.arange(31745, 32000))  # of the 255 intervals: saying a centre gives its own token
    assert bins.encode(centres).tolist() == list(range(31745, 32000))


def test_bins_are_digitised_in_float64():
    """A float32 action beside an edge is on the side it is on, which comparing with float32 edges would forget."""
    edges = np.linspace(-1, 1, 256)
    actions = edges.astype(np.float32)
    expected = []
    for action in actions:
        expected.append(32000 - sum(1 for edge in edges if edge <= float(action)))
    assert UniformBins(32000).encode(torch.from_numpy(actions)).tolist() == expected
    single = 32000 - np.searchsorted(edges.astype(np.float32), actions, side="right")
    assert (single != expected).any()


def test_bins_decode_foreign_ids_as_the_reference_does():
    edges = np.linspace(-1, 1, 256)
    centres = (edges[:-1] + edges[1:]) / 2
    ids = np.array([0, 5, 29871, 31743, 31744, 31999, 32000, 32063])
    expected = [centres[min(max(32000 - i - 1, 0), 254)] for i in ids]
    np.testing.assert_allclose(UniformBins(32000).decode(torch.from_numpy(ids)), expected, atol=1e-7)


def test_edges_stay_in_float64_whatever_the_policy_is_in():
    policy = OpenVLA.build(normalizer(), **arguments()).bfloat16()
    assert policy.bins.edges.dtype == torch.float64
    tokens = policy.encode_images({"static": frames(1)})["static"]
    assert tokens.embeds.dtype == torch.bfloat16
    assert policy.predict(observation(SHORT)).isfinite().all()


def test_prompt_is_the_references():
    assert PROMPT == "In: What action should the robot take to {instruction}?\nOut:"


def test_tokens_of_the_prompt(policy):
    """BOS first, instruction in lower case, right-padded; no space token where the tokeniser has none."""
    ids, lengths = policy.tokenize(["Open IT", LONG], torch.device("cpu"))
    assert ids[0, : lengths[0]].tolist() == prompt_ids(policy, SHORT)
    assert ids[1].tolist() == prompt_ids(policy, LONG) and (ids[0, lengths[0] :] == 0).all()
    assert policy.tokenizer.decode(ids[0, 1 : lengths[0]]).endswith("take to open it?\nOut:")


def test_space_token_before_the_actions_in_training_and_inference(policy):
    """§14.3: the ids we build are those of the reference's training text; a prompt alone would lack the space."""
    tokenizer = llama_tokenizer()
    end = tokenizer.convert_tokens_to_ids(chr(0x4E00 + 255)) + 1
    space = tokenizer.convert_tokens_to_ids("▁")
    text = TEXT | {"vocab_size": len(tokenizer)}
    policy = OpenVLA.build(
        normalizer(), **arguments(tokenizer=tokenizer, text_config=text, space_id=space, bins_end=end)
    )
    actions = UniformBins(end).encode(torch.linspace(-1, 1, 7))
    said = tokenizer.decode(actions)
    prompt = "In: What action should the robot take to open it?\nOut:"
    trained = tokenizer(f"{prompt} {said}</s>", add_special_tokens=False).input_ids
    ids, lengths = policy.tokenize([SHORT], torch.device("cpu"))
    assert [tokenizer.bos_token_id, *trained] == [*ids[0].tolist(), *actions.tolist(), tokenizer.eos_token_id]
    assert ids[0, -1] == space and tokenizer(prompt, add_special_tokens=False).input_ids[-1] != space
    assert lengths.tolist() == [ids.shape[1]]


def test_visual_tokens_equal_a_naive_forward_of_both_towers(policy):
    """DINO first, its own normalisation, exact GELU, LayerScale, prefix tokens gone, second-to-last block, no norm."""
    image = frames(2)
    tokens = policy.encode_images({"static": image})["static"]
    assert tokens.tap.shape == (2, 9, 24 + 16)
    for b in range(2):
        expected = naive_fused(policy, image[b], (2, 3))
        torch.testing.assert_close(tokens.tap[b], expected, atol=2e-5, rtol=1e-4)
    x = tokens.tap
    for index in (0, 2, 4):
        layer = policy.projector[index]
        x = x @ layer.weight.T + layer.bias
        x = x * 0.5 * (1 + torch.erf(x / math.sqrt(2))) if index < 4 else x
    torch.testing.assert_close(tokens.embeds, x, atol=1e-4, rtol=1e-4)
    widths = [tuple(policy.projector[index].weight.shape) for index in (0, 2, 4)]
    assert widths == [(160, 40), (32, 160), (32, 32)]


def test_last_blocks_and_norms_do_not_matter(policy):
    """transformers' whole models with these weights, and anything in the deleted ones: one block early, our tokens."""
    image = frames(1)
    fused = policy.encode_images({"static": image})["static"].tap
    inputs = {"dino": image.float() / 255, "siglip": image.float() / 127.5 - 1}
    mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    inputs["dino"] = (inputs["dino"] - mean[:, None, None]) / std[:, None, None]
    parts = []
    for name, whole in (("dino", Dinov2WithRegistersModel), ("siglip", SiglipVisionModel)):
        ours = getattr(policy, name)
        model = whole(ours.config).eval()
        for parameter in model.parameters():
            parameter.data.normal_()
        result = model.load_state_dict(ours.state_dict(), strict=False)
        assert result.missing_keys and not result.unexpected_keys
        last = f".{ours.config.num_hidden_layers - 1}."
        assert all(last in key or "norm." in key or "mask_token" in key for key in result.missing_keys)
        with torch.no_grad():
            hidden = model(inputs[name], output_hidden_states=True).hidden_states[-2]
        parts.append(hidden[:, 5:] if name == "dino" else hidden)
    torch.testing.assert_close(fused, torch.cat(parts, -1), atol=1e-5, rtol=1e-5)


def test_gelu_is_exact(policy):
    """§0a.8: transformers' own default for SigLIP is the tanh approximation."""
    assert policy.siglip.config.hidden_act == "gelu" and SiglipVisionModel.config_class().hidden_act != "gelu"


@pytest.mark.parametrize("tap", ["layer:0", "layer:1", "post_projector"])
def test_taps_are_what_they_say(policy, tap):
    tapped = OpenVLA.build(normalizer(), **arguments(tap=tap)).eval()
    tapped.load_state_dict(policy.state_dict())
    tokens = tapped.encode_images({"static": frames(1)})["static"]
    if tap == "post_projector":
        assert torch.equal(tokens.tap, tokens.embeds)
    else:
        k = int(tap[-1])
        expected = naive_fused(policy, frames(1)[0], (k + 1, k + 1))
        torch.testing.assert_close(tokens.tap[0], expected, atol=2e-5, rtol=1e-4)
    assert tapped.tap_shape() == tuple(tokens.tap.shape[1:])


def test_loss_is_that_of_the_last_eight_tokens(policy):
    data = batch(policy, [[1], [1]])
    visual = policy.encode_images({"static": frames(2)})
    with torch.no_grad():
        out = policy.loss(data, visual)
        expected = naive_loss(policy, data, visual["static"].embeds)
    assert len(expected) == 2 * 8
    torch.testing.assert_close(out["loss"], expected.mean(), atol=1e-4, rtol=1e-5)


def test_only_eight_places_get_a_gradient(policy):
    """§14.2, from the loss itself: the logits it reads are those before the 7 action tokens and EOS."""
    seen = []
    handle = policy.language_model.lm_head.register_forward_hook(lambda _, inputs, output: seen.append(output))
    policy.loss(batch(policy, [[1], [1]]), policy.encode_images({"static": frames(2)}))
    handle.remove()
    assert [tuple(logits.shape) for logits in seen] == [(2, 8, policy.language_model.config.vocab_size)]


def test_chunk_of_several_actions_and_the_episodes_end(chunked):
    data = batch(chunked, [[1, 1, 1], [1, 0, 0]])
    visual = chunked.encode_images({"static": frames(2)})
    with torch.no_grad():
        out = chunked.loss(data, visual)
        expected = naive_loss(chunked, data, visual["static"].embeds)
        assert len(expected) == 22 + 8
        torch.testing.assert_close(out["loss"], expected.mean(), atol=1e-4, rtol=1e-5)
        data["actions"][1, 1:] = 9
        assert torch.equal(chunked.loss(data, visual)["loss"], out["loss"])
    assert chunked.predict(observation(SHORT, LONG)).shape == (2, 3, 7)


def test_token_accuracy_is_the_share_of_right_action_tokens(policy):
    """Row 0 is asked for what the policy says, row 1 for the same with two tokens changed; EOS does not count."""
    policy = OpenVLA.build(normalizer(), **arguments()).eval()
    randomised(policy).language_model.lm_head.weight.data[: policy.bins.end - 256] = 0  # it says action tokens only
    data, visual = batch(policy, [[1], [1]]), policy.encode_images({"static": frames(2)})
    ids = policy.generate(visual, data["instruction"])
    ids[1, [2, 5]] -= 9
    data["actions"] = policy.normalizer.unnormalize(policy.bins.decode(ids)[:, None])
    right = []
    for b, instruction in enumerate(data["instruction"]):
        sequence = prompt_ids(policy, instruction) + ids[b].tolist()
        with torch.no_grad():
            said = naive_logits(policy, visual["static"].embeds[b], sequence)[-8:-1].argmax(-1)
        right += (said == ids[b]).tolist()
    assert all(right[:7]) and 0 < sum(right[7:]) < 7
    torch.testing.assert_close(policy.loss(data, visual)["token_accuracy"], torch.tensor(sum(right) / 14))


def test_decoding_with_a_cache_equals_decoding_anew_each_token(chunked):
    visual = chunked.encode_images({"static": frames(2)})
    got = chunked.generate(visual, [SHORT, LONG])
    assert got.shape == (2, 21) and len(got.unique()) > 3
    for b, instruction in enumerate([SHORT, LONG]):
        ids = prompt_ids(chunked, instruction)
        for n in range(21):
            with torch.no_grad():
                ids.append(naive_logits(chunked, visual["static"].embeds[b], ids)[-1].argmax().item())
            assert ids[-1] == got[b, n], f"row {b}, token {n}"


def test_a_batch_says_what_its_samples_say_alone(chunked):
    together = observation(SHORT, LONG, "close the top drawer")
    actions = chunked.predict(together)
    for b in range(3):
        alone = {
            "images": {"static": together["images"]["static"][b : b + 1]},
            "instruction": together["instruction"][b : b + 1],
        }
        assert torch.equal(chunked.predict(alone)[0], actions[b])
    assert not torch.equal(actions[0], actions[1])


def test_padding_is_not_seen(policy):
    """Its id is 0, which no prompt holds: with another embedding there nothing changes."""
    visual, data = policy.encode_images({"static": frames(2)}), batch(policy, [[1], [1]])
    with torch.no_grad():
        before, said = policy.loss(data, visual)["loss"], policy.generate(visual, [SHORT, LONG])
        kept = policy.language_model.model.embed_tokens.weight[0].clone()
        policy.language_model.model.embed_tokens.weight[0] += 100
        assert torch.equal(policy.loss(data, visual)["loss"], before)
        assert torch.equal(policy.generate(visual, [SHORT, LONG]), said)
        policy.language_model.model.embed_tokens.weight[0] = kept


def test_every_part_matters(policy):
    """The answer depends on the image, the instruction and the order of the patches."""
    with torch.no_grad():
        data, tokens = batch(policy, [[1], [1]]), policy.encode_images({"static": frames(2)})
        loss = policy.loss(data, tokens)["loss"]
        others = policy.encode_images({"static": frames(2, seed=1)})
        assert not torch.equal(policy.loss(data, others)["loss"], loss)
        data["instruction"] = [LONG, LONG]
        assert not torch.equal(policy.loss(data, tokens)["loss"], loss)


def test_predict_is_the_tokens_centres_in_physical_units(policy, monkeypatch):
    """Motion un-normalised in float64 as the reference does it; the gripper opens above one half; foreign ids clip."""
    end = policy.bins.end
    ids = torch.tensor([[end - 1, end - 256, end - 128, 3, end - 60, end - 200, end - 200],
                        [end - 2, end - 3, end - 4, end - 5, end - 6, end - 7, end - 170]])  # fmt: skip
    monkeypatch.setattr(OpenVLA, "generate", lambda *_: ids)
    edges = np.linspace(-1, 1, 256)
    centres = (edges[:-1] + edges[1:]) / 2
    statistics = policy.normalizer.statistics
    expected = np.zeros((2, 1, 7))
    for b in range(2):
        for d in range(7):
            value = centres[np.clip(end - int(ids[b, d]) - 1, 0, 254)]
            low, high = statistics.q01[d], statistics.q99[d]
            expected[b, 0, d] = 0.5 * (value + 1) * (high - low) + low if d < 6 else value > 0.5
    np.testing.assert_allclose(policy.predict(observation(SHORT, LONG)), expected, atol=1e-7)
    assert expected[:, 0, 6].tolist() == [1, 0]


def test_center_crop_is_for_predict_only(policy):
    cropped = OpenVLA.build(normalizer(), **arguments(center_crop=True)).eval()
    cropped.load_state_dict(policy.state_dict())
    seen = []
    cropped.dino.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    image = frames(1, size=64)
    cropped.predict(observation(SHORT, size=64))
    prepared = policy.prepare({"static": image})["static"]
    cropped.encode_images({"static": prepared})
    cropped.encode_images({"static": centre_crop(prepared, 0.9)})
    assert torch.equal(seen[0], seen[2]) and not torch.equal(seen[0], seen[1])


def test_everything_is_trained_and_nothing_else_is_there(policy):
    policy.loss(batch(policy, [[1], [1]]), policy.encode_images({"static": frames(2)}))["loss"].backward()
    assert all(p.requires_grad and p.grad is not None for p in policy.parameters())
    assert all(p.grad.abs().sum() > 0 for name, p in policy.named_parameters() if "k_proj.bias" not in name)
    policy.zero_grad(set_to_none=True)
    assert {name.split(".")[0] for name in policy.state_dict()} == {"dino", "siglip", "projector", "language_model"}
