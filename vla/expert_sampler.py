"""π0's velocity while sampling: what does not change from step to step is computed once.

The suffix is one state token and H action tokens. The state token sees the prefix and itself, never the actions, so its
keys and values are the same in all steps: it is read once and joins the prefix. Each Euler step then reads the H action
tokens alone, through vla/fast_decode.py's layers in place of transformers', with one buffer of keys and values and no
mask or cache built on the way. Equal to `Pi0.velocity` to rounding (tests/test_expert_sampler.py).
"""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import Cache, PI0ForConditionalGeneration

from vla.fast_decode import StaticDecoder


class ExpertSampler:
    """Velocity (B, H, A) at x (B, H, A) and times t (B,). Without gradients.

    Args:
        cache, valid: of the prefix, as `Pi0.prefix` gives them.
        state: (B, state_dim), normalised.
    """

    @torch.no_grad()
    def __init__(self, pi0: PI0ForConditionalGeneration, cache: Cache, valid: Tensor, state: Tensor):
        self.embed, self.out = pi0.embed_action_time, pi0.action_out_proj
        self.decoder = StaticDecoder(pi0.model.dit, cache, valid, valid.sum(1), room=1 + pi0.config.chunk_size)
        self.dtype = self.embed.state_proj.weight.dtype
        self.decoder.read(self.embed.state_proj(state.to(self.dtype))[:, None])
        self.decoder.keep()
        width = self.embed.action_in_proj.out_features
        self.of_action, self.of_time = self.embed.action_time_mlp_in.weight.split(width, dim=1)

    @torch.no_grad()
    def __call__(self, x: Tensor, t: Tensor) -> Tensor:
        rows, steps, _ = x.shape
        embed = self.embed
        time = F.linear(embed.sinusoid_embeds(t).to(self.dtype), self.of_time, embed.action_time_mlp_in.bias)
        inner = F.linear(embed.action_in_proj(x.to(self.dtype)), self.of_action) + time[:, None]
        depth = np.broadcast_to(np.arange(steps), (rows, steps))
        sees = x.new_zeros(rows, steps, steps)
        hidden = self.decoder.read(embed.action_time_mlp_out(F.silu(inner)), depth, sees)
        return self.out(hidden).float()
