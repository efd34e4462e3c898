"""π0 against the fact sheet (§7, golden numbers of §10, checklist of §14) and a plain forward pass written here."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from transformers import GemmaConfig, PaliGemmaConfig, PaliGemmaForConditionalGeneration, SiglipVisionConfig

from data.normalization import ActionNormalizer, ActionStatistics
from vla.baselines.pi0 import Pi0, resize_with_pad
from vla.build import of_build
from vla.checkpoint import export_policy, load_policy
from vla.cli import compose_config
from vla.errors import UserError
from vla.flow import beta_times, interpolate
from vla.optim import cosine_floor
from vla.tokenizer import byte_tokenizer
from vla.training import policy_arguments

VISION = dict(hidden_size=24, intermediate_size=40, num_hidden_layers=3, num_attention_heads=2, patch_size=14)
TEXT = dict(
    hidden_size=32, intermediate_size=48, num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=1, head_dim=8
)  # fmt: skip
EXPERT = dict(hidden_size=16, intermediate_size=24)


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """Two threads on tensors of a few kilobytes wait for each other, and for whoever else uses the machine."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def normalizer(scheme: str = "zscore") -> ActionNormalizer:
    rng = np.random.default_rng(0)
    actions = rng.uniform(-1, 1, (400, 7))
    actions[:, 6] = actions[:, 6] > 0
    return ActionNormalizer(ActionStatistics.of(actions, rng.normal(1, 2, (400, 8))), scheme)


def arguments(**changes) -> dict:
    return dict(
        vision_config=VISION, text_config=TEXT, expert_config=EXPERT, chunk=5, cameras=["static", "wrist"],
        image_size=28, state_dim=10, action_dim=9, flow_steps=10, max_text_tokens=40, tap="pre_projector",
        gripper=[0.5, 0.5],
    ) | changes  # fmt: skip


def build(scheme: str = "zscore", **changes) -> Pi0:
    torch.manual_seed(0)
    policy = Pi0.build(normalizer(scheme), **arguments(**changes)).eval()
    for parameter in policy.parameters():  # initial weights of 0.02 and norms of 0 would hide most mistakes
        parameter.data += 0.2 * torch.randn_like(parameter)
    return policy


@pytest.fixture(scope="module")
def policy() -> Pi0:
    return build()


def frames(count: int = 2, size: int = 28, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (count, 3, size, size), dtype=torch.uint8, generator=generator)


def observation(instructions=("open", "put the bowl on the plate"), size: int = 28) -> dict:
    count = len(instructions)
    return {
        "images": {"static": frames(count, size, 1), "wrist": frames(count, size, 2)},
        "state": torch.randn(count, 8, generator=torch.Generator().manual_seed(3)),
        "instruction": list(instructions),
        "seed": torch.arange(count),
        "step": torch.full((count,), 4),
    }


def batch(valid=((1, 1, 1, 1, 1), (1, 1, 0, 0, 0))) -> dict:
    actions = torch.rand(2, 5, 7, generator=torch.Generator().manual_seed(4))
    actions[..., 6] = actions[..., 6].round()
    return observation() | {"actions": actions, "action_valid": torch.tensor(valid) > 0}


# The model once more, plainly: one row at a time, no padding, no cache, one joint attention over both sets of weights.


def linear(w: dict, name: str, x):
    return x @ w[f"{name}.weight"].T + w.get(f"{name}.bias", 0)


def layer_norm(w: dict, name: str, x):
    x = (x - x.mean(-1, keepdim=True)) / (x.var(-1, keepdim=True, unbiased=False) + 1e-6).sqrt()
    return x * w[f"{name}.weight"] + w[f"{name}.bias"]


def gelu(x):
    return 0.5 * x * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))


def rms_norm(w: dict, name: str, x):
    return x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt() * (1 + w[f"{name}.weight"])


def rotate(x, positions):
    """x (L, heads, d): halves (a, b) turned by position · 10000^(−2i/d)."""
    half = x.shape[-1] // 2
    angle = positions[:, None, None] * 10000.0 ** (-torch.arange(half) / half)
    a, b = x[..., :half], x[..., half:]
    return torch.cat([a * angle.cos() - b * angle.sin(), b * angle.cos() + a * angle.sin()], -1)


def naive_siglip(w: dict, frame) -> torch.Tensor:
    """(tokens, hidden) of one uint8 frame, last norm included."""
    w = {k.removeprefix("model.vlm.vision_tower."): v for k, v in w.items()}
    kernel = w["embeddings.patch_embedding.weight"].flatten(1)
    pixels, tokens, size = frame.to(kernel.dtype) / 127.5 - 1, [], 14
    for row in range(frame.shape[1] // size):
        for col in range(frame.shape[2] // size):
            patch = pixels[:, row * size : (row + 1) * size, col * size : (col + 1) * size]
            tokens.append(kernel @ patch.flatten() + w["embeddings.patch_embedding.bias"])
    x = torch.stack(tokens) + w["embeddings.position_embedding.weight"]
    for index in range(3):
        at = f"encoder.layers.{index}."
        y = layer_norm(w, at + "layer_norm1", x)
        q, k, v = (linear(w, f"{at}self_attn.{n}_proj", y).unflatten(-1, (2, -1)) for n in "qkv")
        weights = torch.einsum("qhd,khd->hqk", q, k).div(math.sqrt(q.shape[-1])).softmax(-1)
        x = x + linear(w, at + "self_attn.out_proj", torch.einsum("hqk,khd->qhd", weights, v).flatten(1))
        y = gelu(linear(w, at + "mlp.fc1", layer_norm(w, at + "layer_norm2", x)))
        x = x + linear(w, at + "mlp.fc2", y)
    return layer_norm(w, "post_layernorm", x)


def naive_velocity(policy: Pi0, images: list, ids: list[int], state, x, t: float) -> torch.Tensor:
    """(H, action_dim) for one sample: frames in the cameras' order, padded state (S,), x (H, action_dim)."""
    w = {k: v.double() for k, v in policy.pi0.state_dict().items()}
    state, x = state.double(), x.double()
    prefix = [linear(w, "model.vlm.multi_modal_projector.linear", naive_siglip(w, image)) for image in images]
    prefix.append(w["model.vlm.language_model.embed_tokens.weight"][ids] * math.sqrt(32))
    prefix = torch.cat(prefix)

    at, time = "embed_action_time.", time_embedding(policy, t).double().expand(len(x), -1)
    hidden = linear(w, at + "action_time_mlp_in", torch.cat([linear(w, at + "action_in_proj", x), time], -1))
    actions = linear(w, at + "action_time_mlp_out", hidden * hidden.sigmoid())
    streams = [prefix, torch.cat([linear(w, at + "state_proj", state)[None], actions])]

    p, total = len(prefix), len(prefix) + 1 + len(x)
    block = torch.tensor([0] * p + [1] + [2] * len(x))
    sees = block[:, None] >= block[None, :]
    positions = torch.arange(total)
    for index in range(3):
        names = [f"model.vlm.language_model.layers.{index}.", f"model.dit.layers.{index}."]
        normed = [rms_norm(w, n + "input_layernorm", s) for n, s in zip(names, streams, strict=True)]
        q, k, v = (
            torch.cat([linear(w, f"{n}self_attn.{kind}_proj", y) for n, y in zip(names, normed, strict=True)])
            for kind in "qkv"
        )
        q, k = rotate(q.unflatten(-1, (4, 8)), positions), rotate(k.unflatten(-1, (1, 8)), positions)
        scores = torch.einsum("qhd,kd->hqk", q, k[:, 0]) / math.sqrt(8)
        mixed = torch.einsum("hqk,kd->qhd", scores.masked_fill(~sees, -math.inf).softmax(-1), v).flatten(1)
        parts = [mixed[:p], mixed[p:]]
        streams = [s + linear(w, n + "self_attn.o_proj", m) for n, s, m in zip(names, streams, parts, strict=True)]
        for i, n in enumerate(names):
            y = rms_norm(w, n + "post_attention_layernorm", streams[i])
            y = gelu(linear(w, n + "mlp.gate_proj", y)) * linear(w, n + "mlp.up_proj", y)
            streams[i] = streams[i] + linear(w, n + "mlp.down_proj", y)
    return linear(w, "action_out_proj", rms_norm(w, "model.dit.norm", streams[1])[1:])


def time_embedding(policy: Pi0, t: float) -> torch.Tensor:
    return policy.pi0.embed_action_time.sinusoid_embeds(torch.tensor([t], dtype=torch.float32))[0]


def naive_of_row(policy: Pi0, seen: dict, row: int, state, x, t: float) -> torch.Tensor:
    ids, valid = policy.tokenize([seen["instruction"][row]], torch.device("cpu"))
    assert valid.all()
    images = [seen["images"][camera][row] for camera in policy.cameras]
    return naive_velocity(policy, images, ids[0].tolist(), state, x, t)


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_velocity_equals_a_plain_joint_forward(policy, attention):
    """§14: prefix rows see the prefix, the state prefix and state, actions all; pads do not exist; cache = no cache."""
    policy.pi0.set_attn_implementation(attention)
    seen = observation()
    state, x, t = torch.randn(2, 10), torch.randn(2, 5, 9), torch.tensor([0.25, 0.9])
    with torch.no_grad():
        prefix = policy.prefix(policy.encode_images(seen["images"]), seen["instruction"])
        got = policy.velocity(prefix, state, x, t)
        again = policy.velocity(prefix, state, x, t)
        for row in range(2):
            expected = naive_of_row(policy, seen, row, state[row], x[row], t[row].item())
            assert expected.abs().mean() > 0.05
            torch.testing.assert_close(got[row].double(), expected, atol=1e-5, rtol=1e-5)
    assert torch.equal(got, again), "a call leaves its own keys in the cache"


def test_sampling_equals_plain_euler_without_a_cache(policy):
    """Ten steps of −0.1 from t = 1 through the plain forward, and the way back to physical units."""
    seen = observation()
    noise = []
    policy.sampler, kept = lambda prefix, state: lambda x, t: noise.append(x) or torch.zeros_like(x), policy.sampler
    policy.predict(seen)
    del policy.sampler
    assert policy.sampler == kept
    actions = policy.predict(seen)
    mean, std = (np.array(getattr(policy.normalizer.statistics, name)) for name in ("mean", "std"))
    state = torch.zeros(2, 10)
    described = policy.normalizer.statistics.state
    state[:, :8] = (seen["state"] - torch.tensor(described["mean"])) / (torch.tensor(described["std"]) + 1e-6)
    for row in range(2):
        x = noise[0][row].double()
        with torch.no_grad():
            for step in range(10):
                x = x - 0.1 * naive_of_row(policy, seen, row, state[row], x, 1 - step / 10)
        motion = x[:, :6].numpy() * (std[:6] + 1e-6) + mean[:6]
        np.testing.assert_allclose(actions[row, :, :6].numpy(), motion, atol=1e-4)
        assert actions[row, :, 6].tolist() == (x[:, 6] > 0).float().tolist()


def test_ten_steps_of_a_constant_velocity(policy, monkeypatch):
    velocity = torch.linspace(-2, 2, 45).reshape(1, 5, 9)
    starts, times = [], []

    def constant(x, t):
        starts.append(x)
        times.append(t)
        return velocity.expand_as(x)

    monkeypatch.setattr(policy, "sampler", lambda prefix, state: constant)
    actions = policy.predict(observation())
    assert [t.tolist() for t in times] == [pytest.approx([1 - i / 10] * 2) for i in range(10)]
    end = starts[0] - velocity
    torch.testing.assert_close(policy.normalizer.normalize(actions)[..., :6], end[..., :6], atol=1e-4, rtol=1e-4)
    assert torch.equal(actions[..., 6] > 0, end[..., 6] > 0)


def test_time_embedding(policy):
    """§7.1: [sin | cos] of 2πt/period, periods 4e-3 … 4, geometric; in float32, of angles up to 1571 (§0a.10)."""
    periods = [4e-3 * (4.0 / 4e-3) ** (i / 7) for i in range(8)]
    for t in (0.001, 0.37, 1.0):
        expected = [f(2 * math.pi * t / period) for f in (math.sin, math.cos) for period in periods]
        assert time_embedding(policy, t).tolist() == pytest.approx(expected, abs=3e-4)


def test_times_are_beta():
    torch.manual_seed(0)
    t = beta_times(200_000).double().sort().values
    assert t.min() >= 0.001 and t.max() <= 1.0
    assert t.mean().item() == pytest.approx(0.6 * 0.999 + 0.001, abs=2e-3)
    quantiles = (torch.arange(len(t)) + 0.5) / len(t)  # of Beta(1.5, 1), whose distribution function is u^1.5
    assert (((t - 0.001) / 0.999) ** 1.5 - quantiles).abs().max() < 0.005


def test_state_does_not_see_actions_and_actions_see_each_other(policy):
    seen, hidden = observation(), []
    handle = policy.pi0.model.dit.register_forward_hook(lambda _, __, out: hidden.append(out.last_hidden_state))
    prefix = policy.prefix(policy.encode_images(seen["images"]), seen["instruction"])
    state, x, t = torch.randn(2, 10), torch.randn(2, 5, 9), torch.tensor([0.5, 0.5])
    other = x.clone()
    other[:, -1] += 1
    for step in (x, other):
        policy.velocity(prefix, state, step, t)
    policy.velocity(prefix, state + 1, x, t)
    handle.remove()
    before, moved, stated = hidden
    assert before.shape == (2, 6, 16)
    assert torch.equal(before[:, 0], moved[:, 0]) and not torch.isclose(before[:, 1], moved[:, 1]).all(-1).any()
    assert not torch.isclose(before, stated).all(-1).any()


def test_pads_do_not_count(policy):
    """Neither what a pad token's embedding holds nor a longer neighbour in the batch."""
    seen = observation()
    visual = policy.encode_images(seen["images"])
    ids, valid = policy.tokenize(seen["instruction"], torch.device("cpu"))
    assert not valid[0].all() and valid[1].all() and (ids[0][valid[0] == 0] == 0).all()
    state, x, t = torch.randn(2, 10), torch.randn(2, 5, 9), torch.tensor([0.3, 0.8])
    embedding = policy.pi0.model.vlm.language_model.embed_tokens.weight
    with torch.no_grad():
        before = policy.velocity(policy.prefix(visual, seen["instruction"]), state, x, t)
        kept = embedding[0].clone()
        embedding[0] += 50
        after = policy.velocity(policy.prefix(visual, seen["instruction"]), state, x, t)
        embedding[0] = kept
        first = {camera: tokens.rows(slice(0, 1)) for camera, tokens in visual.items()}
        alone = policy.velocity(policy.prefix(first, seen["instruction"][:1]), state[:1], x[:1], t[:1])
    assert torch.equal(before, after)
    torch.testing.assert_close(alone, before[:1], atol=1e-5, rtol=1e-5)


def test_predict_alone_and_in_a_batch(policy):
    seen = observation(size=40)
    together = policy.predict(seen)
    assert torch.equal(together, policy.predict(seen))
    for row in range(2):
        one = {k: v[row : row + 1] for k, v in seen.items() if k != "images"}
        one["images"] = {camera: image[row : row + 1] for camera, image in seen["images"].items()}
        torch.testing.assert_close(policy.predict(one), together[row : row + 1], atol=1e-4, rtol=1e-4)
    later = policy.predict(seen | {"step": seen["step"] + 1})
    assert not torch.allclose(together[..., :6], later[..., :6])


def test_cameras_stand_in_their_order(policy):
    seen = observation(("open", "open"))
    swapped = seen | {"images": {"static": seen["images"]["wrist"], "wrist": seen["images"]["static"]}}
    assert not torch.allclose(policy.predict(seen)[..., :6], policy.predict(swapped)[..., :6])
    single = build(cameras=["static"])
    _cache, valid = single.prefix(single.encode_images(seen["images"]), ["open"] * 2)
    assert valid.shape[1] == 4 + len(single.tokenize(["open"], torch.device("cpu"))[0][0])


def test_loss_is_the_mean_square_over_valid_steps_and_all_dims(policy):
    """Padded dims count, as in openpi; steps past the end do not, and the last valid action stands in them."""
    data = batch()
    visual = policy.encode_images(data["images"])
    torch.manual_seed(5)
    got = policy.loss(data, visual)["loss"]
    torch.manual_seed(5)
    t, noise = beta_times(2), torch.randn(2, 5, 9)
    statistics = policy.normalizer.statistics
    errors = []
    for row in range(2):
        actions = torch.zeros(5, 9)
        for step in range(5):
            held = data["actions"][row, min(step, 4 if row == 0 else 1)]
            actions[step, :6] = (held[:6] - torch.tensor(statistics.mean[:6])) / torch.tensor(statistics.std[:6])
            actions[step, 6] = 2 * held[6] - 1
        x, target = t[row] * noise[row] + (1 - t[row]) * actions, noise[row] - actions
        state = (data["state"][row] - torch.tensor(statistics.state["mean"])) / torch.tensor(statistics.state["std"])
        state = torch.cat([state, torch.zeros(2)])
        velocity = naive_of_row(policy, data, row, state, x, t[row].item())
        errors += [(velocity - target)[step] ** 2 for step in range(5 if row == 0 else 2)]
    assert got.item() == pytest.approx(torch.stack(errors).mean().item(), rel=1e-4)


def test_actions_past_the_end_cannot_leak(policy):
    data = batch()
    visual = policy.encode_images(data["images"])
    torch.manual_seed(0)
    before = policy.loss(data, visual)["loss"]
    data["actions"][1, 2:] = 9.0
    torch.manual_seed(0)
    assert torch.equal(policy.loss(data, visual)["loss"], before)
    data["actions"][1, 1] += 0.5
    torch.manual_seed(0)
    assert not torch.equal(policy.loss(data, visual)["loss"], before)


def test_gradients_reach_everything_that_is_trained(policy):
    """Through the cached keys and values into language model and vision; nothing after the last keys is trained."""
    policy.zero_grad()
    data = batch()
    policy.loss(data, policy.encode_images(data["images"]))["loss"].backward()
    trained = {name for name, p in policy.named_parameters() if p.requires_grad}
    assert trained == {name for name, p in policy.named_parameters() if p.grad is not None and p.grad.abs().sum() > 0}
    last = "pi0.model.vlm.language_model.layers.2."
    frozen = {name for name, p in policy.named_parameters() if not p.requires_grad}
    assert frozen == {
        "pi0.model.vlm.language_model.norm.weight", last + "post_attention_layernorm.weight",
        *(f"{last}self_attn.{kind}_proj.weight" for kind in "qo"),
        *(f"{last}mlp.{kind}_proj.weight" for kind in ("gate", "up", "down")),
    }  # fmt: skip
    policy.zero_grad()


def test_prompt(policy):
    """BOS, the instruction cleaned, one newline token; cut to the given length, as the reference does."""
    ids, valid = policy.tokenize([" put_the\nbowl ", "open"], torch.device("cpu"))
    tokenizer = policy.tokenizer
    assert tokenizer.decode(ids[0]) == "<|im_start|>put the bowl\n" and valid[0].all()
    assert tokenizer.decode(ids[1][valid[1].bool()]) == "<|im_start|>open\n"
    assert valid[1].tolist() == sorted(valid[1].tolist(), reverse=True)
    long, _ = policy.tokenize(["z" * 100], torch.device("cpu"))
    assert long.shape == (1, 40) and tokenizer.decode(long[0]) == "<|im_start|>" + "z" * 39


@pytest.mark.parametrize(
    ("height", "width", "inner"), [(480, 640, (168, 224)), (256, 320, (179, 224)), (300, 200, (224, 149))]
)
def test_resize_keeps_the_aspect_and_pads_black(height, width, inner):
    """§7.3: the remainder of an odd bar goes below or to the right; a bar is −1 to the encoder."""
    padded = resize_with_pad(torch.full((2, 3, height, width), 200, dtype=torch.uint8), 224)
    assert padded.shape == (2, 3, 224, 224)
    top, left = (224 - inner[0]) // 2, (224 - inner[1]) // 2
    expected = torch.zeros(224, 224, dtype=torch.uint8)
    expected[top : top + inner[0], left : left + inner[1]] = 200
    assert (padded == expected).all()


def test_resize_leaves_a_frame_of_the_right_size_alone(policy):
    image = frames(1)
    assert torch.equal(resize_with_pad(image, 28), image)
    assert set(policy.prepare({"static": image, "top": image})) == {"static"}


@pytest.mark.parametrize("tap", ["pre_projector", "post_projector", "layer:0", "layer:2"])
def test_taps_are_what_they_say(tap):
    policy = build(tap=tap, cameras=["static"])
    tower, outputs = policy.pi0.model.vlm.vision_tower, {}
    for name, module in tower.named_modules():
        if name == "post_layernorm" or (name.startswith("encoder.layers.") and name.count(".") == 2):
            module.register_forward_hook(lambda _, __, output, name=name: outputs.__setitem__(name, output))
    with torch.no_grad():
        tokens = policy.encode_images({"static": frames(1)})["static"]
        naive = naive_siglip(policy.pi0.state_dict(), frames(1)[0])
    torch.testing.assert_close(outputs["post_layernorm"][0], naive, atol=1e-4, rtol=1e-4)
    expected = {
        "pre_projector": outputs["post_layernorm"],
        "post_projector": tokens.embeds,
        "layer:0": outputs["encoder.layers.0"],
        "layer:2": outputs["encoder.layers.2"],
    }[tap]
    assert torch.equal(tokens.tap, expected) and policy.tap_shape() == tuple(expected.shape[1:])
    trained = {id(p) for module in policy.vision_modules() for p in module.parameters()}
    projector = policy.pi0.model.vlm.multi_modal_projector.linear.weight
    assert (id(projector) in trained) == (tap == "post_projector")


@pytest.mark.parametrize(("gripper", "opened", "closed"), [([0.5, 0.5], 1.0, -1.0), ([0.6, -0.4], -1.0, 1.5)])
def test_gripper_centre_and_scale(monkeypatch, gripper, opened, closed):
    """The default is ±1, open above 0; a converted policy's may be turned round (scale < 0)."""
    policy = build(gripper=gripper)
    actions = torch.zeros(1, 5, 7)
    actions[0, 0, 6] = 1
    regressed = policy.padded_actions(actions)
    assert regressed.shape == (1, 5, 9) and (regressed[..., 7:] == 0).all()
    torch.testing.assert_close(regressed[0, :2, 6], torch.tensor([opened, closed]))
    monkeypatch.setattr("vla.baselines.pi0.initial_noise", lambda *_: regressed.expand(2, -1, -1).clone())
    monkeypatch.setattr(policy, "sampler", lambda prefix, state: lambda x, t: torch.zeros_like(x))
    assert policy.predict(observation())[..., 6].tolist() == [[1, 0, 0, 0, 0]] * 2


def test_quantile_normalisation_clips_and_zscore_does_not(monkeypatch):
    monkeypatch.setattr("vla.baselines.pi0.initial_noise", lambda *_: torch.full((2, 5, 9), 3.0))
    for scheme in ("q99", "zscore"):
        policy = build(scheme)
        monkeypatch.setattr(policy, "sampler", lambda prefix, state: lambda x, t: torch.zeros_like(x))
        motion, statistics = policy.predict(observation())[0, 0, :6], policy.normalizer.statistics
        top = statistics.q99 if scheme == "q99" else np.array(statistics.mean) + 3 * np.array(statistics.std)
        torch.testing.assert_close(motion, torch.tensor(top[:6]).float(), atol=1e-4, rtol=1e-4)


def test_too_wide_a_state_is_named():
    policy = build(state_dim=6)
    with pytest.raises(UserError, match=r"policy\.state_dim=6"):
        policy.predict(observation())


def test_full_size_is_the_papers():
    """§7.1: SigLIP 27 × 1152, Gemma 18 × 2048, expert 18 × 1024 with about 311 M weights, 256 tokens a camera."""
    cfg = compose_config("train", "baseline=pi0", "size=full")
    assert cfg.policy.pretrained == "google/paligemma-3b-pt-224"
    vision = dict(hidden_size=1152, intermediate_size=4304, num_hidden_layers=27, num_attention_heads=16, patch_size=14)
    text = dict(
        hidden_size=2048, intermediate_size=16384, num_hidden_layers=18, num_attention_heads=8, num_key_value_heads=1,
        vocab_size=257152,
    )  # fmt: skip
    given = of_build(policy_arguments(cfg)) | {"pretrained": None, "vision_config": vision, "text_config": text}
    with torch.device("meta"):
        policy = Pi0.build(normalizer(), **given)
    pi0 = policy.pi0

    def count(module) -> int:
        return sum(p.numel() for p in module.parameters())

    assert count(pi0.model.dit) == 18 * (1024 * 2048 * 2 + 2 * 1024 * 256 + 3 * 1024 * 4096 + 2 * 1024) + 1024
    assert count(pi0.model.dit) == pytest.approx(311e6, rel=0.01)
    assert count(pi0.model.vlm) == pytest.approx(2.923e9, rel=0.001)
    tower = pi0.model.vlm.vision_tower
    assert tower.embeddings.num_positions == 256 and len(tower.encoder.layers) == 27 and not hasattr(tower, "head")
    shapes = {name: tuple(p.shape) for name, p in pi0.named_parameters() if not name.startswith("model.")}
    assert {name: shape for name, shape in shapes.items() if name.endswith("weight")} == {
        "embed_action_time.action_in_proj.weight": (1024, 32), "embed_action_time.state_proj.weight": (1024, 32),
        "embed_action_time.action_time_mlp_in.weight": (1024, 2048), "action_out_proj.weight": (32, 1024),
        "embed_action_time.action_time_mlp_out.weight": (1024, 1024),
    }  # fmt: skip


def test_hyperparameters_are_openpis():
    cfg = compose_config("train", "baseline=pi0", "size=full", "ablation=ptr")
    optim = cfg.optim
    assert (optim.lr, tuple(optim.betas), optim.weight_decay, optim.ema) == (2.5e-5, (0.9, 0.95), 1e-10, 0.99)
    assert (cfg.batch_size, cfg.max_steps, cfg.normalization) == (32, 30000, "zscore")
    rate = [optim.lr * cosine_floor(s, optim.warmup_steps, cfg.max_steps, optim.min_lr_ratio) for s in (0, 1000, 30000)]
    assert rate == pytest.approx([2.5e-5 / 1001, 2.5e-5, 2.5e-6])
    assert cfg.augment.crop == {"static": pytest.approx(0.95**2)} and cfg.augment.rotation == {"static": 5}
    assert (cfg.policy.flow_steps, cfg.policy.max_text_tokens, cfg.policy.action_dim) == (10, 48, 32)


def test_tiny_learns_a_batch_by_heart():
    """Seconds of training on four samples: the loss falls and the sampled actions come near the batch's."""
    cfg = compose_config("train", "baseline=pi0", "size=tiny")
    torch.manual_seed(0)
    policy = Pi0.build(normalizer("q99"), **of_build(policy_arguments(cfg)) | {"chunk": 2})
    data = observation(("open", "close", "put the bowl on the plate", "push"), size=56)
    actions = torch.rand(4, 2, 7) * 1.6 - 0.8
    actions[..., 6] = (actions[..., 6] > 0).float()
    data |= {"actions": actions, "action_valid": torch.ones(4, 2, dtype=torch.bool)}
    optimizer = torch.optim.AdamW(policy.parameters(), lr=2e-3, betas=(0.9, 0.95))
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, total_steps=240, pct_start=0.1)
    losses = []
    for _ in range(240):
        loss = policy.loss(data, policy.encode_images(data["images"]))["loss"]
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(policy.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        losses.append(loss.item())
    assert np.mean(losses[-10:]) < np.mean(losses[:5]) / 10
    predicted = policy.eval().predict(data)
    assert (predicted - actions)[..., :6].abs().mean() < 0.35 * actions[..., :6].abs().mean()
    assert torch.equal(predicted[..., 6], actions[..., 6])


def test_from_pretrained_and_export_round_trip(tmp_path):
    """The released-weights path, on a small PaliGemma saved here: load, export, load again without the source."""
    tokenizer = byte_tokenizer()
    tokenizer.bos_token = "<|im_start|>"
    text = GemmaConfig(**TEXT, vocab_size=len(tokenizer))
    vision = SiglipVisionConfig(**VISION, image_size=28, vision_use_head=False)
    config = PaliGemmaConfig(vision_config=vision, text_config=text, projection_dim=32)
    torch.manual_seed(1)
    vlm = PaliGemmaForConditionalGeneration(config)
    vlm.save_pretrained(tmp_path / "released")
    tokenizer.save_pretrained(tmp_path / "released")
    given = arguments(pretrained=str(tmp_path / "released"), vision_config={}, text_config={})
    policy = Pi0.build(normalizer(), **given).eval()
    loaded = policy.pi0.model.vlm.state_dict()
    assert {k: v.shape for k, v in loaded.items()} == {k: v.shape for k, v in vlm.model.state_dict().items()}
    assert all(torch.equal(value, loaded[key]) for key, value in vlm.model.state_dict().items())
    assert policy.pi0.embed_action_time.action_in_proj.weight.std().item() == pytest.approx(1 / math.sqrt(27), rel=0.2)
    assert all(p.device.type == "cpu" for p in policy.parameters()) and policy.tokenizer.bos_token_id is not None
    assert policy.pi0.model.dit.config._attn_implementation == "sdpa"
    export_policy(policy, tmp_path / "policy", name="pi0", arguments=given, about={})
    (tmp_path / "released").rename(tmp_path / "gone")
    again, _ = load_policy(tmp_path / "policy")
    seen = observation()
    assert torch.equal(policy.predict(seen), again.predict(seen))


def test_bad_sources_are_named(tmp_path):
    with pytest.raises(UserError, match=r"policy\.pretrained="):
        Pi0.build(normalizer(), **arguments(pretrained=str(tmp_path / "nothing")))


def test_interpolation_runs_from_actions_to_noise():
    actions, noise = torch.randn(2, 5, 9), torch.randn(2, 5, 9)
    for t, end in ((0.0, actions), (1.0, noise)):
        x, velocity = interpolate(actions, noise, torch.full((2,), t))
        assert torch.equal(x, end) and torch.equal(velocity, noise - actions)
