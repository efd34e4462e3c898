"""FLOWER's sampler against its flow transformer, which tests/test_flower.py holds against the plain formulas."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from vla.dit import FlowTransformer
from vla.flow import euler
from vla.flow_sampler import FlowSampler

DIT = dict(dim=48, heads=4, layers=3, low_rank=8)


def transformer(true_rms: bool) -> FlowTransformer:
    torch.manual_seed(0)
    dit = FlowTransformer(7, 24, true_rms=true_rms, **DIT).eval()
    for parameter in dit.parameters():  # norms of weight 1 and a shared modulation of 0 would hide a mistake
        torch.nn.init.normal_(parameter, 0.3, 0.2)
    return dit


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("true_rms", [True, False])
@torch.no_grad()
def test_every_step_is_the_transformers(true_rms, masked):
    dit = transformer(true_rms)
    context, x = dit.context(torch.randn(2, 9, 24)), torch.randn(2, 6, 7)
    valid = torch.arange(9) < torch.tensor([[9], [5]]) if masked else None
    sampler = FlowSampler(dit, context, valid, 6, 4)
    for step in range(4):
        expected = dit(x, torch.full((2,), 1 - step / 4), context, valid)
        assert expected.std() > 0.01
        torch.testing.assert_close(sampler.velocity(x, step), expected, atol=1e-5, rtol=1e-5)


@settings(max_examples=20)
@given(st.integers(1, 3), st.integers(1, 10), st.integers(1, 10))
def test_samples_are_eulers(rows, chunk, steps):
    with torch.no_grad():
        dit = transformer(True)
        context, noise = dit.context(torch.randn(rows, 5, 24)), torch.randn(rows, chunk, 7)
        expected = euler(lambda x, t: dit(x, t, context), noise, steps)
        got = FlowSampler(dit, context, None, chunk, steps).sample(noise)
    torch.testing.assert_close(got, expected, atol=1e-4, rtol=1e-4)
