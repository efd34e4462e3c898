"""The frozen encoder beside the trained one (GenVLA §III-A)."""

from __future__ import annotations

import pytest
import torch

from tests.test_contract import batch_of, build, observation_of
from vla.build import BASELINES
from vla.checkpoint import export_policy, initial_policy, load_policy
from vla.errors import UserError
from vla.training import policy_arguments, statistics_of

DUAL = "policy.dual=true"


@pytest.mark.parametrize("baseline", BASELINES)
def test_step_zero_is_the_single_encoder_model(baseline, store):
    plain, cfg = build(baseline, "vanilla", store)
    dual, _ = build(baseline, "vanilla", store)
    dual.policy.make_dual()  # the same weights: build() seeds torch
    batch = batch_of(store, cfg)
    losses = []
    for module in (plain, dual):
        module.eval()
        torch.manual_seed(1)
        losses.append(module.losses(batch)["loss"].item())
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
    actions = [module.policy.predict(observation_of(batch)) for module in (plain, dual)]
    torch.testing.assert_close(*actions, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("baseline", BASELINES)
def test_off_is_the_plain_baseline_bit_for_bit(baseline, store):
    plain, _ = build(baseline, "vanilla", store)
    off, _ = build(baseline, "vanilla", store, "policy.dual=false")
    assert plain.state_dict().keys() == off.state_dict().keys()
    assert all(torch.equal(a, b) for a, b in zip(plain.state_dict().values(), off.state_dict().values(), strict=True))


@pytest.mark.parametrize("baseline", BASELINES)
def test_the_frozen_encoder_stays_and_the_trained_one_moves(baseline, store):
    module, cfg = build(baseline, "ptr", store, DUAL)
    policy, batch = module.policy, batch_of(store, cfg)
    frozen = {name: p.detach().clone() for name, p in policy.named_parameters() if not p.requires_grad}
    assert any("frozen" in name or "siglip" in name for name in frozen)
    moving = [(name, p, p.detach().clone()) for name, p in policy.named_parameters() if p.requires_grad]
    optimizer = module.configure_optimizers()["optimizer"]
    assert not {id(p) for g in optimizer.param_groups for p in g["params"]} & {
        id(p) for p in policy.parameters() if not p.requires_grad
    }
    for group in optimizer.param_groups:
        group["lr"] = 1e-3  # the schedule starts at zero
    module.train()
    frozen_modules = [m for name, m in policy.named_modules() if name.startswith(("frozen", "siglip"))]
    assert frozen_modules and not any(m.training for m in frozen_modules)
    for _ in range(2):
        optimizer.zero_grad()
        module.losses(batch)["total"].backward()
        optimizer.step()
    assert all(torch.equal(dict(policy.named_parameters())[name], before) for name, before in frozen.items())
    assert not [name for name, p, _ in moving if p.grad is None]
    tower = [name for name, p, before in moving if "vision" in name or "visual" in name or "dino" in name
             if not torch.equal(p, before)]  # fmt: skip
    assert tower


@pytest.mark.parametrize("baseline", BASELINES)
def test_future_frames_and_probes_never_reach_the_frozen_encoder(baseline, store, monkeypatch):
    module, cfg = build(baseline, "ptr", store, DUAL)
    seen = []
    fused = type(module.policy).fused
    monkeypatch.setattr(type(module.policy), "fused", lambda self, t: seen.append(len(t.embeds)) or fused(self, t))
    batch = batch_of(store, cfg)
    assert len(batch["future_valid"]) == 4
    module.losses(batch)
    assert set(seen) <= {4}  # not the 8 of current and future frames together
    seen.clear()
    module.policy.tap_shape()
    assert not seen


def test_openvla_freezes_the_tower_it_is_told(store):
    module, _ = build("openvla", "ptr", store, DUAL, "policy.frozen_tower=dino")
    assert not any(p.requires_grad for p in module.policy.dino.parameters())
    assert all(p.requires_grad for p in module.policy.siglip.parameters())
    assert module.policy.tap_shape()[1] == module.policy.siglip.config.hidden_size
    with pytest.raises(UserError, match="frozen_tower=clip is not known; choose dino or siglip"):
        build("openvla", "ptr", store, DUAL, "policy.frozen_tower=clip")


@pytest.mark.parametrize("baseline", ["openvla", "pi0", "spatialvla"])
def test_a_tap_behind_both_encoders_is_refused(baseline, store):
    with pytest.raises(UserError, match="post_projector lies behind both encoders"):
        build(baseline, "ptr", store, DUAL, "inverse_dynamics.tap=post_projector")


@pytest.mark.parametrize("baseline", BASELINES)
def test_exported_and_loaded_again(baseline, store, tmp_path):
    module, cfg = build(baseline, "vanilla", store, DUAL)
    arguments = policy_arguments(cfg)
    module.eval()
    export_policy(module.policy, tmp_path / "policy", name=baseline, arguments=arguments, about={})
    again, _ = load_policy(tmp_path / "policy")
    batch = observation_of(batch_of(store, cfg))
    assert torch.equal(again.predict(batch), module.policy.predict(batch))


@pytest.mark.parametrize("baseline", ["openvla", "pi0"])
def test_starting_from_a_single_encoder_adds_the_frozen_one(baseline, store, tmp_path):
    single, cfg = build(baseline, "vanilla", store)
    export_policy(single.eval().policy, tmp_path / "single", name=baseline, arguments=policy_arguments(cfg), about={})
    _, dual_cfg = build(baseline, "vanilla", store, DUAL)
    statistics = statistics_of(store)
    policy = initial_policy(tmp_path / "single", baseline, statistics, cfg.normalization, policy_arguments(dual_cfg))
    assert policy.dual
    observation = observation_of(batch_of(store, cfg))
    torch.testing.assert_close(
        policy.eval().predict(observation), single.policy.predict(observation), rtol=1e-4, atol=1e-5
    )
    export_policy(policy, tmp_path / "dual", name=baseline, arguments=policy_arguments(dual_cfg), about={})
    with pytest.raises(UserError, match=r"two vision encoders \(dual\); set policy\.dual=true"):
        initial_policy(tmp_path / "dual", baseline, statistics, cfg.normalization, policy_arguments(cfg))
