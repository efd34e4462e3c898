"""Each baseline can learn: one batch by heart, and the actions come back out of `predict`."""

from __future__ import annotations

import pytest
import torch

from tests.test_contract import batch_of, build, observation_of
from vla.build import BASELINES

STEPS = {"flower": 500}
# Mean absolute error of motion that is normalised to [-1, 1], where the batch's own mean is about 0.5. The flows are
# sampled in few Euler steps; SpatialVLA's grid is coarse, so it is held to what its tokens can say.
TOLERANCE = {"vlm4vla": 0.05, "flower": 0.1, "spatialvla": 0.02, "openvla": 0.02, "pi0": 0.1}


def best_possible(policy, actions: torch.Tensor) -> torch.Tensor:
    """Normalised motion (B, H, 6) after a trip through the policy's action tokens, where it has such."""
    normalized = policy.normalizer.normalize(actions)
    grid = getattr(policy, "grid", None)
    return (normalized if grid is None else grid.decode(grid.encode(normalized)))[..., :6]


@pytest.mark.parametrize(  # 15 to 30 s each
    "baseline", [b if b == "vlm4vla" else pytest.param(b, marks=pytest.mark.slow) for b in BASELINES]
)
def test_one_batch_is_learnt_by_heart(baseline, store):
    module, cfg = build(baseline, "vanilla", store)
    batch = batch_of(store, cfg, size=6, pairs=None)
    module.policy.fit_to(torch.from_numpy(store.actions))
    parameters = [p for p in module.parameters() if p.requires_grad]
    steps, lr = STEPS.get(baseline, 400), max(2e-3, cfg.optim.lr)
    optimizer = torch.optim.AdamW(parameters, lr=lr, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, lr, total_steps=steps)
    images = module.policy.prepare(batch["images"])
    losses = []
    for step in range(steps):
        torch.manual_seed(step)
        loss = module.policy.loss(batch, module.policy.encode_images(images))["loss"]
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        schedule.step()
        losses.append(loss.item())
    first, last = sum(losses[:5]) / 5, sum(losses[-20:]) / 20
    assert last < first / 10, f"{first:.3f} → {last:.3f}"
    policy = module.eval().policy
    predicted = policy.predict(observation_of(batch))
    error = (policy.normalizer.normalize(predicted)[..., :6] - best_possible(policy, batch["actions"])).abs()
    valid = batch["action_valid"]
    assert error[valid].mean() < TOLERANCE[baseline], error[valid].mean().item()
    assert torch.equal(predicted[..., 6][valid], batch["actions"][..., 6][valid])
