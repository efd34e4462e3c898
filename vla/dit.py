"""FLOWER's flow transformer: from noisy actions, a time and a context to a velocity (fact sheet §4.3).

Every block is self-attention over the action steps, cross-attention to the context and SwiGLU. Shifts, scales and gates
come from the time: a projection shared by all blocks (AdaLN-Zero, its weights start at zero) plus a low-rank one of
each block (which does not start at zero, so a fresh block is no identity).

Departures from the public code: only the end-effector action space is kept, without the two others and the embedding of
the space, which nothing reads; of the shared projection's nine parts the last three, which nothing reads either, are
left out; self-attention is plain causal (the public call gives a mask and is_causal at once, which torch refuses on a
CPU); proprioception, zeros in every released configuration, is left out.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

EPS = 1e-6
SINUSOID = 256
"""Width of the sinusoidal embedding of a number."""


class FlowTransformer(nn.Module):
    """Velocity (B, H, A) at noisy actions (B, H, A), times (B,) in [0, 1] and context (B, L, dim).

    Args:
        action_dim: A.
        context_dim: width of the features that `context` takes.
        max_length: most action steps, the length of the RoPE tables.
        low_rank: inner width of each block's own modulation.
        true_rms: RMSNorm divides by the root mean square, timm ≥ 1.0.13; False: by the root of the unbiased variance,
            as older timm did. Which of the two the released weights were trained with is unknown (fact sheet §0a.1).
        frequency: the control frequency's code, the same number for every sample (§4.3).
    """

    def __init__(
        self,
        action_dim: int,
        context_dim: int,
        *,
        dim: int,
        heads: int,
        layers: int,
        max_length: int = 100,
        rope_theta: float = 32.0,
        low_rank: int = 256,
        attention_dropout: float = 0.1,
        residual_dropout: float = 0.1,
        mlp_dropout: float = 0.1,
        true_rms: bool = True,
        frequency: float = 3.0,
    ):
        super().__init__()
        self.max_length, self.frequency = max_length, frequency
        self.cond_norm = RMSNorm(context_dim, true_rms)
        self.cond_linear = nn.Linear(context_dim, dim, bias=False)
        self.action_encoder = nn.Sequential(nn.Linear(action_dim, dim), nn.GELU(), nn.Linear(dim, dim))
        self.t_embedder = ScalarEmbedder(dim, period=10_000, scale=1000)
        self.frequency_embedder = ScalarEmbedder(dim, period=1000, scale=1)
        self.adaln = nn.Linear(dim, 6 * dim, bias=False)
        nn.init.zeros_(self.adaln.weight)
        attention = dict(heads=heads, dropout=attention_dropout, out_dropout=residual_dropout, true_rms=true_rms)
        rope = dict(max_length=max_length, theta=rope_theta)
        self.blocks = nn.ModuleList(Block(dim, low_rank, mlp_dropout, true_rms, attention, rope) for _ in range(layers))
        self.action_decoder = nn.Linear(dim, action_dim)

    def context(self, features: Tensor) -> Tensor:
        """What the blocks attend to, (B, L, dim), from the encoder's features (B, L, context_dim)."""
        return self.cond_linear(self.cond_norm(features))

    def condition(self, t: Tensor) -> Tensor:
        """What the blocks' modulation is made of, (N, dim), at times (N,)."""
        frequency = self.frequency_embedder(t.new_full((1,), self.frequency))
        return F.silu(stateless_norm(self.t_embedder(t)) + stateless_norm(frequency))

    def forward(self, actions: Tensor, t: Tensor, context: Tensor, valid: Tensor | None = None) -> Tensor:
        """`valid` is bool (B, L), False for context that is not to be attended to; None for all of it."""
        condition = self.condition(t)
        shared = self.adaln(condition)
        mask = None if valid is None else valid[:, None, None]
        hidden = self.action_encoder(actions)
        for block in self.blocks:
            hidden = block(hidden, condition, shared, context, mask)
        return self.action_decoder(hidden)


class Block(nn.Module):
    """x += gate · self-attention(mod(RMS(x))); x += cross-attention(RMS(x)); x += gate · SwiGLU(mod(RMS(x)))."""

    def __init__(self, dim: int, low_rank: int, mlp_dropout: float, true_rms: bool, attention: dict, rope: dict):
        super().__init__()
        self.norm1, self.norm2, self.norm3 = (RMSNorm(dim, true_rms) for _ in range(3))
        self.self_attn = SelfAttention(dim, **attention, **rope)
        self.cross_attn = CrossAttention(dim, **attention)
        self.mlp = SwiGLU(dim, mlp_dropout)
        self.adaln = nn.Sequential(nn.Linear(dim, low_rank), nn.Linear(low_rank, 6 * dim))

    def forward(self, x: Tensor, condition: Tensor, shared: Tensor, context: Tensor, mask: Tensor | None) -> Tensor:
        parts = (self.adaln(condition) + shared)[:, None].chunk(6, dim=-1)
        shift_attn, scale_attn, gate_attn, shift_mlp, scale_mlp, gate_mlp = parts
        x = x + gate_attn * self.self_attn(self.norm1(x) * (1 + scale_attn) + shift_attn)
        x = x + self.cross_attn(self.norm2(x), context, mask)
        return x + gate_mlp * self.mlp(self.norm3(x) * (1 + scale_mlp) + shift_mlp)


class SelfAttention(nn.Module):
    """Causal over the action steps, queries and keys normalised per head, then turned by RoPE.

    The tables `cos` and `sin` (max_length, head/2) are in the state dict, as in the public code: a released checkpoint
    brings its own.
    """

    def __init__(
        self,
        dim: int,
        heads: int,
        dropout: float,
        out_dropout: float,
        true_rms: bool,
        max_length: int,
        theta: float,
    ):
        super().__init__()
        self.heads, self.dropout = heads, dropout
        self.qkv = nn.Linear(dim, 3 * dim, bias=False)
        self.proj, self.out_dropout = nn.Linear(dim, dim, bias=False), nn.Dropout(out_dropout)
        self.q_norm, self.k_norm = RMSNorm(dim // heads, true_rms), RMSNorm(dim // heads, true_rms)
        frequencies = theta ** (-torch.arange(0, dim // heads, 2) / (dim // heads))
        angles = torch.arange(max_length)[:, None] * frequencies
        self.register_buffer("cos", angles.cos())
        self.register_buffer("sin", angles.sin())

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (split_heads(part, self.heads) for part in self.qkv(x).chunk(3, dim=-1))
        cos, sin = self.cos[: x.shape[1]], self.sin[: x.shape[1]]
        q, k = rotate(self.q_norm(q), cos, sin).to(v.dtype), rotate(self.k_norm(k), cos, sin).to(v.dtype)
        dropout = self.dropout if self.training else 0.0
        out = F.scaled_dot_product_attention(q, k, v, dropout_p=dropout, is_causal=True)
        return self.out_dropout(self.proj(out.transpose(1, 2).flatten(2)))


class CrossAttention(nn.Module):
    """From the action steps to the context; queries and keys normalised per head, no RoPE."""

    def __init__(self, dim: int, heads: int, dropout: float, out_dropout: float, true_rms: bool):
        super().__init__()
        self.heads, self.dropout = heads, dropout
        self.q_proj, self.k_proj, self.v_proj = (nn.Linear(dim, dim, bias=False) for _ in range(3))
        self.proj, self.out_dropout = nn.Linear(dim, dim, bias=False), nn.Dropout(out_dropout)
        self.q_norm, self.k_norm = RMSNorm(dim // heads, true_rms), RMSNorm(dim // heads, true_rms)

    def forward(self, x: Tensor, context: Tensor, mask: Tensor | None) -> Tensor:
        v = split_heads(self.v_proj(context), self.heads)
        q = self.q_norm(split_heads(self.q_proj(x), self.heads)).to(v.dtype)
        k = self.k_norm(split_heads(self.k_proj(context), self.heads)).to(v.dtype)
        dropout = self.dropout if self.training else 0.0
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=dropout)
        return self.out_dropout(self.proj(out.transpose(1, 2).flatten(2)))


class SwiGLU(nn.Module):
    """silu(W₁x) · W₂x, projected back; two thirds of 4·dim wide, rounded up to a multiple of 256."""

    def __init__(self, dim: int, dropout: float):
        super().__init__()
        hidden = math.ceil((8 * dim // 3) / 256) * 256
        self.fc1, self.fc2 = nn.Linear(dim, hidden, bias=False), nn.Linear(dim, hidden, bias=False)
        self.proj, self.dropout = nn.Linear(hidden, dim, bias=False), nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        return self.proj(self.dropout(F.silu(self.fc1(x)) * self.fc2(x)))


class ScalarEmbedder(nn.Module):
    """Numbers (N,) → (N, dim): [cos | sin] of scale · number · period^(−k/128), then an MLP."""

    def __init__(self, dim: int, period: float, scale: float):
        super().__init__()
        self.period, self.scale = period, scale
        self.mlp = nn.Sequential(nn.Linear(SINUSOID, dim), nn.SiLU(), nn.Linear(dim, dim))

    def forward(self, numbers: Tensor) -> Tensor:
        half = SINUSOID // 2
        exponents = torch.arange(half, device=numbers.device, dtype=torch.float32) / half
        angles = numbers.float()[:, None] * (self.scale * torch.exp(-math.log(self.period) * exponents))
        return self.mlp(torch.cat([angles.cos(), angles.sin()], dim=-1))


class RMSNorm(nn.Module):
    """x / sqrt(mean(x²) + 1e-6) · weight over the last dim; `true_rms` as in FlowTransformer."""

    def __init__(self, dim: int, true_rms: bool = True):
        super().__init__()
        self.true_rms = true_rms
        self.weight = nn.Parameter(torch.ones(dim))

    def forward(self, x: Tensor) -> Tensor:
        x = x.float()
        power = x.square().mean(-1, keepdim=True) if self.true_rms else x.var(-1, keepdim=True)
        return x * torch.rsqrt(power + EPS) * self.weight


def stateless_norm(x: Tensor) -> Tensor:
    """Zero mean and unit variance over the last dim, without parameters."""
    return F.layer_norm(x.float(), x.shape[-1:], eps=EPS)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """RoPE on (B, heads, H, head) with tables (H, head/2): dim i turns with dim i + head/2."""
    first, second = x.chunk(2, dim=-1)
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)


def split_heads(x: Tensor, heads: int) -> Tensor:
    """(B, L, dim) → (B, heads, L, dim / heads)."""
    return x.unflatten(-1, (heads, -1)).transpose(1, 2)
