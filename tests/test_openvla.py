"""OpenVLA against the fact sheet: §6, §0a.8, golden numbers of §10, checklist of §14; naive references in the tests."""

from __future__ import annotations

import math
import string

import numpy as np
import pytest
import torch
from transformers import Dinov2WithRegistersModel, LlamaTokenizer, SiglipVisionModel

from data.augment import centre_crop
from data.normalization import ActionNormalizer, ActionStatistics
from vla.action_tokens.bins import UniformBins
from vla.baselines.openvla import OpenVLA
from vla.bench.latency import random_policy
from vla.checkpoint import export_policy, load_policy
from vla.cli import compose_config
from vla.errors import UserError

DINO = dict(hidden_size=24, num_hidden_layers=3, num_attention_heads=2, mlp_ratio=2, patch_size=14)
SIGLIP = dict(hidden_size=16, intermediate_size=40, num_hidden_layers=4, num_attention_heads=2, patch_size=14)
TEXT = dict(hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4)
PROMPT = compose_config("train", "baseline=openvla", "size=full").policy.prompt
SHORT, LONG = "open it", "put the bowl on the plate"


def normalizer() -> ActionNormalizer:
    actions = np.random.default_rng(0).uniform(-1, 1, (400, 7)) * np.linspace(0.01, 0.4, 7)
    actions[:, 6] = actions[:, 6] > 0
    return ActionNormalizer(ActionStatistics.of(actions), "q99")


def arguments(**changes) -> dict:
    return dict(
        dino_config=DINO, siglip_config=SIGLIP, text_config=TEXT, image_size=42, chunk=1, cameras=["static"],
        tap="pre_projector", prompt=PROMPT, space_id=None, bins_end=None, center_crop=False,
    ) | changes  # fmt: skip


def randomised(policy: OpenVLA, seed: int = 0) -> OpenVLA:
    """Every parameter drawn anew, so that none is a neutral zero or one."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in policy.named_parameters():
        scale = 1.0 if "lm_head" in name else 0.2
        parameter.data = scale * torch.randn(parameter.shape, generator=generator)
        if "norm" in name and name.endswith("weight"):
            parameter.data += 1
    return policy


@pytest.fixture(scope="module")
def policy() -> OpenVLA:
    return randomised(OpenVLA.build(normalizer(), **arguments())).eval()


@pytest.fixture(scope="module")
def chunked() -> OpenVLA:
    return randomised(OpenVLA.build(normalizer(), **arguments(chunk=3))).eval()


def frames(count: int = 2, size: int = 42, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (count, 3, size, size), dtype=torch.uint8, generator=generator)


def observation(*instructions: str, size: int = 42) -> dict:
    count = len(instructions)
    images = {"static": frames(count, size)}
    return {"images": images, "state": torch.zeros(count, 8), "instruction": list(instructions)}


def batch(policy: OpenVLA, valid: list[list[int]], seed: int = 0) -> dict:
    statistics, rng = policy.normalizer.statistics, np.random.default_rng(seed)
    actions = rng.uniform(statistics.q01, statistics.q99, (2, policy.chunk, 7))
    actions[..., 6] = [[1] * policy.chunk, [0] * policy.chunk]
    return {
        "actions": torch.tensor(actions, dtype=torch.float32),
        "action_valid": torch.tensor(valid) > 0,
        "instruction": [SHORT, LONG],
    }


def as_timm(policy: OpenVLA, tower: str) -> dict[str, torch.Tensor]:
    """A tower's weights under the names of timm's VisionTransformer, its last block and final norm random."""
    model = getattr(policy, tower)
    state = model.state_dict()
    if tower == "dino":
        patch, blocks, attention, output = "embeddings.patch_embeddings.projection", "encoder.layer", "attention", "o"
        norms, positions = ("norm1", "norm2"), state["embeddings.position_embeddings"][:, 1:]
    else:
        patch, blocks, attention, output = "embeddings.patch_embedding", "encoder.layers", "self_attn", "out"
        norms = ("layer_norm1", "layer_norm2")
        positions = state["embeddings.position_embedding.weight"][None]
    timm = {"pos_embed": positions}
    if tower == "dino":
        cls = state["embeddings.cls_token"] + state["embeddings.position_embeddings"][:, :1]
        timm |= {"cls_token": cls, "reg_token": state["embeddings.register_tokens"]}
    depth = model.config.num_hidden_layers
    for kind in ("weight", "bias"):
        timm[f"patch_embed.proj.{kind}"] = state[f"{patch}.{kind}"]
        timm[f"norm.{kind}"] = torch.randn(model.config.hidden_size)
        for n in range(depth - 1):
            ours, theirs = f"{blocks}.{n}", f"blocks.{n}"
            qkv = [state[f"{ours}.{attention}.{name}_proj.{kind}"] for name in "qkv"]
            timm[f"{theirs}.attn.qkv.{kind}"] = torch.cat(qkv)
            timm[f"{theirs}.attn.proj.{kind}"] = state[f"{ours}.{attention}.{output}_proj.{kind}"]
            for index in (1, 2):
                timm[f"{theirs}.norm{index}.{kind}"] = state[f"{ours}.{norms[index - 1]}.{kind}"]
                timm[f"{theirs}.mlp.fc{index}.{kind}"] = state[f"{ours}.mlp.fc{index}.{kind}"]
                if tower == "dino":
                    timm[f"{theirs}.ls{index}.gamma"] = state[f"{ours}.layer_scale{index}.lambda1"]
    last = {k.replace("blocks.0.", f"blocks.{depth - 1}."): v for k, v in timm.items() if k.startswith("blocks.0.")}
    return timm | {key: torch.randn_like(value) for key, value in last.items()}


def naive_vit(weights: dict, pixels: torch.Tensor, heads: int, patch: int, blocks: int) -> torch.Tensor:
    """Patch tokens of one image (3, S, S) after so many blocks of a pre-norm ViT, plainly, in float64."""
    w = {key: value.double() for key, value in weights.items()}
    pixels, grid = pixels.double(), pixels.shape[-1] // patch
    tokens = []
    for row in range(grid):
        for col in range(grid):
            window = pixels[:, row * patch : (row + 1) * patch, col * patch : (col + 1) * patch]
            flat = (w["patch_embed.proj.weight"] * window).sum((1, 2, 3)) + w["patch_embed.proj.bias"]
            tokens.append(flat + w["pos_embed"][0, len(tokens)])
    prefix = [*w["cls_token"][0], *w["reg_token"][0]] if "cls_token" in w else []
    x = torch.stack(prefix + tokens)

    def norm(x, name):
        centred = x - x.mean(-1, keepdim=True)
        scaled = centred / (centred.square().mean(-1, keepdim=True) + 1e-6).sqrt()
        return scaled * w[f"{name}.weight"] + w[f"{name}.bias"]

    def linear(x, name):
        return x @ w[f"{name}.weight"].T + w[f"{name}.bias"]

    for n in range(blocks):
        scale = [w.get(f"blocks.{n}.ls{index}.gamma", torch.tensor(1.0)) for index in (1, 2)]
        q, k, v = linear(norm(x, f"blocks.{n}.norm1"), f"blocks.{n}.attn.qkv").chunk(3, -1)
        width = q.shape[-1] // heads
        out = []
        for h in range(heads):
            part = slice(h * width, (h + 1) * width)
            score = torch.softmax(q[:, part] @ k[:, part].T / math.sqrt(width), -1)
            out.append(score @ v[:, part])
        x = x + scale[0] * linear(torch.cat(out, -1), f"blocks.{n}.attn.proj")
        inner = linear(norm(x, f"blocks.{n}.norm2"), f"blocks.{n}.mlp.fc1")
        inner = inner * 0.5 * (1 + torch.erf(inner / math.sqrt(2)))
        x = x + scale[1] * linear(inner, f"blocks.{n}.mlp.fc2")
    return x[len(prefix) :].float()


def naive_fused(policy: OpenVLA, image: torch.Tensor, blocks: tuple[int, int]) -> torch.Tensor:
    pixels = image.float() / 255
    mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    dino = (pixels - mean[:, None, None]) / std[:, None, None]
    return torch.cat(
        [
            naive_vit(as_timm(policy, "dino"), dino, 2, 14, blocks[0]),
            naive_vit(as_timm(policy, "siglip"), (pixels - 0.5) / 0.5, 2, 14, blocks[1]),
        ],
        dim=-1,
    )


def naive_logits(policy: OpenVLA, tokens: torch.Tensor, ids: list[int]) -> torch.Tensor:
    """(1 + P + T - 1, V) of one sequence with the visual tokens behind BOS, without cache, mask or padding."""
    text = policy.language_model.model.embed_tokens(torch.tensor([ids]))
    embeds = torch.cat([text[:, :1], tokens[None], text[:, 1:]], dim=1)
    return policy.language_model(inputs_embeds=embeds).logits[0]


def prompt_ids(policy: OpenVLA, instruction: str) -> list[int]:
    text = f"In: What action should the robot take to {instruction.lower()}?\nOut:"
    return [policy.tokenizer.bos_token_id, *policy.tokenizer(text, add_special_tokens=False).input_ids]


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


def llama_tokenizer() -> LlamaTokenizer:
    """Llama-2's kind of tokeniser: SentencePiece BPE with byte fallback, a space before the text, rare signs last."""
    pieces = ["<unk>", "<s>", "</s>"] + [f"<0x{byte:02X}>" for byte in range(256)]
    pieces += ["In", ":", "Out", "▁In", "▁", *string.ascii_letters, "?", "."]
    pieces += [chr(0x4E00 + n) for n in range(256)]  # 256 signs that start no word
    merges = [("I", "n"), ("▁", "In"), ("O", "u"), ("Ou", "t")]
    return LlamaTokenizer(vocab={piece: n for n, piece in enumerate([*pieces, "Ou"])}, merges=merges)


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


def test_tap_beyond_the_shallower_tower_is_refused():
    with pytest.raises(UserError, match=r"tap=layer:2.*layer:0 … layer:1"):
        OpenVLA.build(normalizer(), **arguments(tap="layer:2"))  # DINO's third block is its last, which is gone


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


def naive_loss(policy: OpenVLA, batch: dict, tokens: torch.Tensor) -> torch.Tensor:
    """Mean cross-entropy where the labels are not -100, sequence by sequence, labels as the reference makes them."""
    losses = []
    for b, instruction in enumerate(batch["instruction"]):
        actions = policy.normalizer.normalize(batch["actions"])[b].clone()
        valid = batch["action_valid"][b]
        for h in range(1, policy.chunk):
            actions[h] = actions[h] if valid[h] else actions[h - 1]
        said = [policy.bins.end - int(np.digitize(float(a), np.linspace(-1, 1, 256))) for a in actions.flatten()]
        ids = prompt_ids(policy, instruction) + said + [policy.tokenizer.eos_token_id]
        labels = [-100] * (len(ids) - len(said) - 1) + said + [policy.tokenizer.eos_token_id]
        for h in range(policy.chunk):
            if not valid[h]:
                start = len(ids) - 1 - 7 * (policy.chunk - h)
                labels[start : start + 7] = [-100] * 7
        logits = naive_logits(policy, tokens[b], ids)
        for place, label in enumerate(labels):
            if label != -100:
                losses.append(-logits[place + tokens.shape[1] - 1].log_softmax(-1)[label])
    return torch.stack(losses)


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
