"""FLOWER's flow transformer while sampling: what the Euler steps share is computed once.

The context's keys and values, normalised per head, do not depend on time or actions, and the times of the steps are
known beforehand, so that every block's shifts, scales and gates are those of a table with a row per step; the norms'
weights are multiplied into the scales. What is left per step are the products with the action tokens. Float32; equal to
`FlowTransformer` to rounding (tests/test_flow_sampler.py).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from vla.dit import EPS, Block, FlowTransformer, split_heads


class FlowSampler:
    """Actions from noise in `steps` Euler steps. Without gradients or dropout.

    Args:
        context: (B, L, dim), of `FlowTransformer.context`. valid: bool (B, L), or None for all of it.
        chunk: H, how many actions.
    """

    @torch.no_grad()
    def __init__(self, dit: FlowTransformer, context: Tensor, valid: Tensor | None, chunk: int, steps: int):
        self.dit, self.steps = dit, steps
        times = 1 - torch.arange(steps, device=context.device) / steps
        condition = dit.condition(times)
        shared = dit.adaln(condition)
        mask = None if valid is None else valid[:, None, None]
        self.blocks = [_Block(block, condition, shared, context, mask, chunk) for block in dit.blocks]

    @torch.no_grad()
    def velocity(self, x: Tensor, step: int) -> Tensor:
        """(B, H, A) at x (B, H, A) and t = 1 − step / steps."""
        hidden = self.dit.action_encoder(x)
        for block in self.blocks:
            hidden = block(hidden, step)
        return self.dit.action_decoder(hidden)

    def sample(self, noise: Tensor) -> Tensor:
        x = noise
        for step in range(self.steps):
            x = x - self.velocity(x, step) / self.steps
        return x


class _Block:
    """A block with its modulation per step (steps, dim) and its context's keys and values (B, heads, L, head)."""

    def __init__(
        self, block: Block, condition: Tensor, shared: Tensor, context: Tensor, mask: Tensor | None, chunk: int
    ):
        parts = (block.adaln(condition) + shared).chunk(6, dim=-1)
        shift_attn, scale_attn, gate_attn, shift_mlp, scale_mlp, gate_mlp = (part.unbind() for part in parts)
        self.attn = list(zip(shift_attn, (block.norm1.weight * (1 + s) for s in scale_attn), gate_attn, strict=True))
        self.feed = list(zip(shift_mlp, (block.norm3.weight * (1 + s) for s in scale_mlp), gate_mlp, strict=True))
        self.block, self.mask, own, cross = block, mask, block.self_attn, block.cross_attn
        self.true_rms = block.norm1.true_rms
        self.keys = cross.k_norm(split_heads(cross.k_proj(context), cross.heads))
        self.values = split_heads(cross.v_proj(context), cross.heads)
        self.turned = torch.stack([own.q_norm.weight, own.k_norm.weight])[:, None, None, None]
        cos, sin = own.cos[:chunk], own.sin[:chunk]
        self.cos, self.sin = torch.cat([cos, cos], dim=-1), torch.cat([-sin, sin], dim=-1)

    def __call__(self, x: Tensor, step: int) -> Tensor:
        block, own, cross = self.block, self.block.self_attn, self.block.cross_attn
        shift, scale, gate = self.attn[step]
        y = own.qkv(torch.addcmul(shift, self.normalised(x), scale))
        y = y.unflatten(-1, (3, own.heads, -1)).permute(2, 0, 3, 1, 4)
        both = self.normalised(y[:2]) * self.turned
        q, k = torch.addcmul(both * self.cos, both.roll(both.shape[-1] // 2, -1), self.sin)
        y = F.scaled_dot_product_attention(q, k, y[2], is_causal=True)
        x = torch.addcmul(x, gate, own.proj(y.transpose(1, 2).flatten(2)))
        q = split_heads(cross.q_proj(self.normalised(x) * block.norm2.weight), cross.heads)
        q = self.normalised(q) * cross.q_norm.weight
        y = F.scaled_dot_product_attention(q, self.keys, self.values, attn_mask=self.mask)
        x = x + cross.proj(y.transpose(1, 2).flatten(2))
        shift, scale, gate = self.feed[step]
        return torch.addcmul(x, gate, block.mlp(torch.addcmul(shift, self.normalised(x), scale)))

    def normalised(self, x: Tensor) -> Tensor:
        """RMSNorm without its weight."""
        if self.true_rms:
            return F.rms_norm(x, x.shape[-1:], eps=EPS)
        return x * torch.rsqrt(x.var(-1, keepdim=True) + EPS)
