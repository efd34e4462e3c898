"""π0 against the fact sheet (§7, golden numbers of §10, checklist of §14) and tests/pi0_reference.py's plain pass."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from tests.pi0_reference import (
    batch,
    build,
    frames,
    naive_of_row,
    naive_siglip,
    observation,
    time_embedding,
)
from vla.baselines.pi0 import Pi0, resize_with_pad
from vla.errors import UserError
from vla.flow import beta_times, interpolate


@pytest.fixture(scope="module")
def policy() -> Pi0:
    return build()


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


def test_interpolation_runs_from_actions_to_noise():
    actions, noise = torch.randn(2, 5, 9), torch.randn(2, 5, 9)
    for t, end in ((0.0, actions), (1.0, noise)):
        x, velocity = interpolate(actions, noise, torch.full((2,), t))
        assert torch.equal(x, end) and torch.equal(velocity, noise - actions)
