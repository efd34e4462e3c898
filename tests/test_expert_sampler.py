"""π0's sampler against its velocity, which tests/test_pi0.py holds against the plain formula, and transformers' own."""

from __future__ import annotations

import pytest
import torch

from tests.pi0_reference import build, observation
from vla.baselines.pi0 import Pi0
from vla.expert_sampler import ExpertSampler
from vla.flow import euler


@pytest.fixture(scope="module")
def policy() -> Pi0:
    return build()


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@torch.no_grad()
def test_every_step_is_the_velocity(policy, attention):
    """At several times from one sampler, rows of different lengths in a batch, and the prefix's cache as it was."""
    policy.pi0.set_attn_implementation(attention)
    seen = observation()
    prefix = policy.prefix(policy.encode_images(seen["images"]), seen["instruction"])
    state, length = torch.randn(2, policy.state_dim), prefix[0].get_seq_length()
    sampler = ExpertSampler(policy.pi0, *prefix, state)
    for t in (1.0, 0.37, 0.1):
        x, times = torch.randn(2, policy.chunk, policy.action_dim), torch.full((2,), t)
        expected = policy.velocity(prefix, state, x, times)
        torch.testing.assert_close(sampler(x, times), expected, atol=2e-6, rtol=2e-6)
    assert prefix[0].get_seq_length() == length


@torch.no_grad()
def test_ten_steps_are_transformers_sample_actions(policy):
    """The library's own loop on the same pixels, prompt and noise: the straightforward implementation."""
    seen = observation()
    pixels = torch.stack([seen["images"][c].float() / 127.5 - 1 for c in policy.cameras], dim=1)
    ids, valid = policy.tokenize(seen["instruction"], torch.device("cpu"))
    config = policy.pi0.config.vlm_config
    count = len(policy.cameras) * (config.vision_config.image_size // config.vision_config.patch_size) ** 2
    images = torch.full((2, count), config.image_token_id)
    noise, state = torch.randn(2, policy.chunk, policy.action_dim), torch.randn(2, policy.state_dim)
    expected = policy.pi0.sample_actions(
        state=state,
        input_ids=torch.cat([images, ids], dim=1),
        pixel_values=pixels,
        noise=noise,
        attention_mask=torch.cat([torch.ones_like(images), valid], dim=1),
        pixel_attention_mask=torch.ones(2, len(policy.cameras), dtype=torch.bool),
        num_steps=10,
    )
    prefix = policy.prefix(policy.encode_images(seen["images"]), seen["instruction"])
    torch.testing.assert_close(euler(policy.sampler(prefix, state), noise, 10), expected, atol=1e-5, rtol=1e-5)
