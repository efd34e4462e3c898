"""What every baseline must do, whichever it is (vla/policy.py)."""

from __future__ import annotations

import pytest
import torch

from data.sampler import PairDataset
from vla.build import BASELINES, build_inverse_dynamics, build_policy
from vla.cli import compose_config
from vla.errors import UserError
from vla.module import VLAModule
from vla.training import policy_arguments, statistics_of

ARMS = ("vanilla", "aux", "ptr")


def build(baseline: str, arm: str, store, *overrides: str):
    cfg = compose_config("train", f"baseline={baseline}", "size=tiny", f"ablation={arm}", *overrides)
    torch.manual_seed(0)
    policy = build_policy(baseline, statistics_of(store), cfg.normalization, policy_arguments(cfg))
    inverse = build_inverse_dynamics(policy, cfg.inverse_dynamics)
    return VLAModule(policy, inverse, cfg.optim, cfg.augment, max_steps=10, warmup_steps=1, seed=0), cfg


def batch_of(store, cfg, size: int = 4, pairs: str | None = "separate"):
    return PairDataset(store, cfg.chunk, cfg.cameras, pairs).__getitems__(range(0, 5 * size, 5))


def observation_of(batch):
    """As a rollout sends it: with the episode's seed and step, from which noise is drawn."""
    rows = torch.arange(len(batch["instruction"]))
    return {name: batch[name] for name in ("images", "state", "instruction")} | {"seed": rows, "step": 10 * rows}


@pytest.mark.parametrize("arm", ARMS)
@pytest.mark.parametrize("baseline", BASELINES)
def test_one_step_trains_and_predicts(baseline, arm, store):
    module, cfg = build(baseline, arm, store)
    batch = batch_of(store, cfg)
    losses = module.losses(batch)
    losses["total"].backward()
    without = [name for name, p in module.named_parameters() if p.requires_grad and p.grad is None]
    assert not without, "parameters that never get a gradient break DDP: " + ", ".join(without)
    module.eval()
    actions = module.policy.predict(observation_of(batch))
    assert actions.shape == (4, cfg.chunk, 7) and actions.isfinite().all()
    assert set(actions[..., 6].unique().tolist()) <= {0.0, 1.0}


@pytest.mark.parametrize("baseline", BASELINES)
def test_actions_stay_within_the_data(baseline, store):
    module, cfg = build(baseline, "vanilla", store)
    actions = module.eval().policy.predict(observation_of(batch_of(store, cfg)))[..., :6]
    statistics = statistics_of(store)
    low, high = torch.tensor(statistics.q01[:6]), torch.tensor(statistics.q99[:6])
    assert (actions >= low - 1e-5).all() and (actions <= high + 1e-5).all()


@pytest.mark.parametrize("baseline", BASELINES)
def test_inference_is_bit_equal_with_and_without_the_head(baseline, store):
    with_head, cfg = build(baseline, "ptr", store)
    without, _ = build(baseline, "vanilla", store)
    without.policy.load_state_dict(with_head.policy.state_dict(), strict=True)
    observation = observation_of(batch_of(store, cfg))
    a, b = with_head.eval().policy.predict(observation), without.eval().policy.predict(observation)
    assert torch.equal(a, b)
    assert not any("inverse" in name for name in with_head.policy.state_dict())


@pytest.mark.parametrize("baseline", BASELINES)
def test_inverse_loss_reaches_the_encoder_and_nothing_else_of_the_policy(baseline, store):
    module, cfg = build(baseline, "ptr", store)
    module.losses(batch_of(store, cfg))["inverse_loss"].backward()
    vision = {id(p) for m in module.policy.vision_modules() for p in m.parameters()}
    touched = {name for name, p in module.policy.named_parameters() if p.grad is not None and p.grad.abs().sum() > 0}
    assert touched and touched == {n for n, p in module.policy.named_parameters() if id(p) in vision}
    assert all(p.grad is not None for p in module.inverse_dynamics.parameters())


@pytest.mark.parametrize("baseline", BASELINES)
def test_policy_loss_does_not_see_the_future(baseline, store):
    module, cfg = build(baseline, "aux", store)
    module.eval()  # a batch norm (the tiny tower's) sees the whole batch while it trains
    batch = batch_of(store, cfg)
    torch.manual_seed(0)
    before = module.losses(batch)
    batch["future_images"] = {camera: 255 - frames for camera, frames in batch["future_images"].items()}
    torch.manual_seed(0)
    after = module.losses(batch)
    assert torch.equal(before["loss"], after["loss"]) and not torch.equal(before["inverse_loss"], after["inverse_loss"])


@pytest.mark.parametrize("baseline", BASELINES)
def test_zero_weight_is_the_baseline_bit_for_bit(baseline, store):
    plain, cfg = build(baseline, "vanilla", store)
    module, _ = build(baseline, "ptr", store, "inverse_dynamics.weight=0.0")
    module.policy.load_state_dict(plain.policy.state_dict())
    batch = batch_of(store, cfg)
    torch.manual_seed(1)
    expected = plain.losses(batch)["total"]
    torch.manual_seed(1)
    assert torch.equal(module.losses(batch)["total"], expected)


@pytest.mark.parametrize("tap", ["pre_projector", "post_projector", "layer:0"])
@pytest.mark.parametrize("baseline", BASELINES)
def test_taps(baseline, tap, store):
    module, cfg = build(baseline, "ptr", store, f"inverse_dynamics.tap={tap}")
    assert module.losses(batch_of(store, cfg))["inverse_loss"].isfinite()


@pytest.mark.parametrize("baseline", BASELINES)
def test_bad_taps_are_named(baseline, store):
    with pytest.raises(UserError, match=r"inverse_dynamics\.tap=layer:99"):
        build(baseline, "ptr", store, "inverse_dynamics.tap=layer:99")
    module, _cfg = build(baseline, "vanilla", store)
    for vision in module.policy.vision_modules():
        vision.requires_grad_(False)
    enabled = compose_config("train", "ablation=ptr").inverse_dynamics
    with pytest.raises(UserError, match="no trainable parameter"):
        build_inverse_dynamics(module.policy, enabled)


@pytest.mark.parametrize("baseline", BASELINES)
def test_masked_steps_do_not_count(baseline, store):
    module, cfg = build(baseline, "vanilla", store)
    module.eval()
    batch = batch_of(store, cfg)
    batch["action_valid"][:, 1:] = False
    visual = module.policy.encode_images(module.policy.prepare(batch["images"]))
    torch.manual_seed(0)
    before = module.policy.loss(batch, visual)["loss"]
    batch["actions"][:, 1:] += 1
    torch.manual_seed(0)
    assert torch.equal(module.policy.loss(batch, visual)["loss"], before)


@pytest.mark.parametrize("baseline", ["flower", "pi0"])
def test_one_camera_is_encoded_alone(baseline, store):
    """The probes read the static view only (IDL A.6); a policy of two cameras must not ask for the other."""
    module, _ = build(baseline, "vanilla", store, "cameras=[static,wrist]")
    policy = module.policy.eval()
    size = policy.image_size
    images = {
        camera: torch.randint(256, (2, 3, size, size), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
        for camera in policy.cameras
    }
    with torch.inference_mode():
        both = policy.encode_images(images)
        alone = policy.encode_images({"static": images["static"]})
    assert set(alone) == {"static"}
    torch.testing.assert_close(alone["static"].tap, both["static"].tap, rtol=0, atol=0)
