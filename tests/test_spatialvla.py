"""SpatialVLA against the fact sheet (§0a.5, §5, §14) and a plain Gemma2 written here."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from transformers import Gemma2Config, PaliGemmaConfig, PaliGemmaForConditionalGeneration, SiglipVisionConfig

from data.normalization import ActionNormalizer, ActionStatistics
from vla.action_tokens.grid import SpatialGrid, adapt_embeddings
from vla.baselines import spatialvla
from vla.baselines.spatialvla import SpatialVLA
from vla.build import build_policy
from vla.checkpoint import export_policy, load_policy
from vla.cli import compose_config
from vla.ego3d import encode_points, estimate_depth, patch_points, random_depth
from vla.errors import UserError
from vla.prefix_lm import places_of, visible
from vla.tokenizer import byte_tokenizer
from vla.training import policy_arguments

VISION = dict(hidden_size=16, intermediate_size=24, num_hidden_layers=3, num_attention_heads=2, patch_size=14)
TEXT = dict(
    hidden_size=24, intermediate_size=32, num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=2, head_dim=6,
    query_pre_attn_scalar=8, attn_logit_softcapping=2.0, final_logit_softcapping=3.0,
)  # fmt: skip
DEPTH = dict(
    neck_hidden_sizes=[8] * 4, fusion_hidden_size=8, bottleneck_features=8, num_relative_features=8,
    bin_embedding_dim=8, num_attractors=[2, 2, 2, 1],
    bin_configurations=[dict(n_bins=8, min_depth=0.001, max_depth=10.0)],
    backbone_config=dict(
        image_size=32, hidden_size=16, intermediate_size=32, num_hidden_layers=4, num_attention_heads=2,
        use_relative_position_bias=True, reshape_hidden_states=False, out_features=[f"stage{i}" for i in range(1, 5)],
    ),
)  # fmt: skip
INTRINSICS = dict(fx=623.588, fy=623.588, cx=319.501, cy=239.545, width=640, height=480)
BINS = [4, 5, 3, 4, 3, 5]
INSTRUCTIONS = ["Open it", "put the Bowl on the plate!"]


def actions(count: int = 400) -> torch.Tensor:
    rng = np.random.default_rng(0)
    values = rng.normal(0, [0.3, 0.2, 0.1, 0.3, 0.3, 0.3, 1], (count, 7))
    values[:, 6] = values[:, 6] > 0
    return torch.tensor(values, dtype=torch.float32)


def normalizer(scheme: str = "q99") -> ActionNormalizer:
    return ActionNormalizer(ActionStatistics.of(actions().numpy()), scheme)


def arguments(**changes) -> dict:
    return dict(
        vision_config=VISION, text_config=TEXT, depth_config=DEPTH, chunk=3, cameras=["static"], image_size=28,
        tap="pre_projector", intrinsics=INTRINSICS, bins=BINS, min_sigma=0.0, adapt_grid=False, mask="prefix_lm",
        ensemble=-0.8,
    ) | changes  # fmt: skip


def build(**changes) -> SpatialVLA:
    torch.manual_seed(0)
    policy = SpatialVLA.build(normalizer(), **arguments(**changes)).eval()
    for parameter in policy.parameters():  # initial weights of 0.02 and norms of 0 would hide most mistakes
        parameter.data += 0.2 * torch.randn_like(parameter)
    policy.lm_head.weight.data[: policy.first_action] *= 0.3  # so that most of what is generated are actions
    policy.fit_to(actions())
    return policy


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """Tensors this small only lose by being shared out."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def policy() -> SpatialVLA:
    return build()


def frames(count: int = 2, size: int = 28, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (count, 3, size, size), dtype=torch.uint8, generator=generator)


def batch(valid=((1, 1, 1), (1, 1, 0))) -> dict:
    return {
        "actions": actions()[:6].reshape(2, 3, 7), "action_valid": torch.tensor(valid) > 0, "instruction": INSTRUCTIONS,
    }  # fmt: skip


def encoded(policy: SpatialVLA, images: torch.Tensor):
    return policy.encode_images({"static": images})


def observation(rows=slice(None)) -> dict:
    return {"images": {"static": frames(2, 40)[rows]}, "state": torch.zeros(2, 8)[rows],
            "instruction": INSTRUCTIONS[rows]}  # fmt: skip


# --- a plain Gemma2, one unpadded sequence at a time ------------------------------------------------------------------


def rms(x, weight):
    return x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt() * (1 + weight)


def rotate(x, places):
    """Rotary embedding of (L, heads, d) at `places`, halves paired."""
    half = x.shape[-1] // 2
    angle = places[:, None, None] * 10000.0 ** (-torch.arange(half) / half)
    a, b = x[..., :half], x[..., half:]
    return torch.cat([a * angle.cos() - b * angle.sin(), b * angle.cos() + a * angle.sin()], -1)


def gemma2(model, x, places, allowed, window=4096):
    """(L, D) → (L, D); `allowed[i][j]`: may i look at j."""
    config = model.config
    for index, layer in enumerate(model.layers):
        h = rms(x, layer.input_layernorm.weight)
        attention = layer.self_attn
        q = rotate((h @ attention.q_proj.weight.T).unflatten(-1, (4, 6)), places)
        k = rotate((h @ attention.k_proj.weight.T).unflatten(-1, (2, 6)), places)
        v = (h @ attention.v_proj.weight.T).unflatten(-1, (2, 6))
        heads = []
        for head in range(4):
            scores = q[:, head] @ k[:, head // 2].T / math.sqrt(config.query_pre_attn_scalar)
            scores = config.attn_logit_softcapping * torch.tanh(scores / config.attn_logit_softcapping)
            ok = allowed.clone()
            if index % 2 == 0:  # every other layer looks back no further than the window
                ok &= places[:, None] - places[None] < window
            heads.append(torch.softmax(scores.masked_fill(~ok, -torch.inf), -1) @ v[:, head // 2])
        x = x + rms(torch.cat(heads, -1) @ attention.o_proj.weight.T, layer.post_attention_layernorm.weight)
        h = rms(x, layer.pre_feedforward_layernorm.weight)
        gate = F.gelu(h @ layer.mlp.gate_proj.weight.T, approximate="tanh")
        h = (gate * (h @ layer.mlp.up_proj.weight.T)) @ layer.mlp.down_proj.weight.T
        x = x + rms(h, layer.post_feedforward_layernorm.weight)
    return rms(x, model.norm.weight)


def plain_features(policy, frame):
    """(P, D) of one frame: SigLIP + MLP of the 3D encoding, projected."""
    with torch.no_grad():
        tokens = policy.vision_tower((frame[None].float() / 255 - 0.5) / 0.5).last_hidden_state[0]
        points = patch_points(estimate_depth(policy.depth_model, frame[None]), policy.ego3d.rays, 2)
        position = policy.ego3d.mlp(encode_points(points))[0]
        return (tokens + position) @ policy.projector.weight.T + policy.projector.bias


def plain_embed(policy, ids):
    first, root = policy.first_action, math.sqrt(TEXT["hidden_size"])
    rows = [
        policy.action_embedding.weight[i - first] if i >= first else policy.language_model.embed_tokens.weight[i]
        for i in ids
    ]
    return torch.stack(rows) * root


def plain_ids(policy, instruction):
    text = policy.tokenizer.encode(instruction.lower() + "\n", add_special_tokens=False)
    return [policy.tokenizer.bos_token_id, *text]


@torch.no_grad()
def plain_logits(policy, frame, instruction, suffix, pads=0, mask="prefix_lm", window=4096):
    """Logits of every suffix token in the public code's layout: image, text, suffix, then `pads` pads."""
    ids = plain_ids(policy, instruction)
    features = plain_features(policy, frame)
    after = plain_embed(policy, [*suffix, *[policy.tokenizer.pad_token_id] * pads])
    x = torch.cat([features, plain_embed(policy, ids), after])
    prefix = len(features) + len(ids)
    end = prefix + len(suffix)
    allowed = torch.zeros(len(x), len(x), dtype=torch.bool)
    for i in range(len(x)):
        for j in range(len(x)):
            is_prefix, is_pad = j < prefix, j >= end
            if mask == "prefix_lm":
                allowed[i, j] = (is_prefix or j <= i) and not is_pad
            elif mask == "released_flash":
                allowed[i, j] = j <= i and not is_pad
            else:
                allowed[i, j] = is_prefix or is_pad or j <= i
    hidden = gemma2(policy.language_model, x, torch.arange(1, len(x) + 1), allowed, window)
    logits = hidden[prefix - 1 : end - 1] @ policy.lm_head.weight.T
    return policy.language_model.config.final_logit_softcapping * torch.tanh(
        logits / policy.language_model.config.final_logit_softcapping
    )


def suffix_of(policy, chunk):
    ids = policy.grid.encode(policy.normalizer.normalize(chunk)).flatten() + policy.first_action
    return [*ids.tolist(), policy.tokenizer.eos_token_id]


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


def plain_generate(policy, frame, instruction, window=4096):
    """Greedy decoding without a cache: the whole sequence again for every token."""
    ids = []
    for _ in range(3 * policy.chunk):
        ids.append(plain_logits(policy, frame, instruction, [*ids, 0], window=window)[-1].argmax().item())
    return torch.tensor(ids)


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


# --- the grid and the weights around it -------------------------------------------------------------------------------


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
