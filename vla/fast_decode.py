"""A decoder read on from its cached keys and values, without what a transformers pass costs beside its arithmetic.

Token by token, a transformers pass builds masks, wraps caches and enters some twenty modules per layer; on a small
model that is most of the time. `StaticDecoder` runs the layers of one straight from their weights, with keys and values
in one buffer that is allocated once. It reads a block of tokens per row in one pass: a chain, or a tree of which the
caller keeps one path (vla/action_tokens/speculation.py).

The arithmetic is that of transformers' layers in fewer calls, attention that of torch's `scaled_dot_product_attention`
whatever implementation the model is set to: states agree to rounding.

    decoder = StaticDecoder(model, cache, seen, position, room=64)
    hidden = decoder.read(model.embed_tokens(ids)[:, None])   # (B, 1, D)
    decoder.keep()
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import Cache, GemmaModel, LlamaModel, Qwen3VLTextModel

MODELS = (LlamaModel, GemmaModel, Qwen3VLTextModel)
JOINED = 2**18
"""Numbers of a layer's projections, up to which those of one input are copied side by side: one call in place of
three. Of a large model the copy would cost more than it saves."""


def supports(model: nn.Module) -> bool:
    """Two norms a layer, no biases, rotary positions of fixed frequencies; Gemma 2 is none (four norms, soft caps)."""
    if not isinstance(model, MODELS) or model.config.rope_parameters["rope_type"] in ("dynamic", "longrope"):
        return False
    return not (model.config.attention_bias or getattr(model.config, "mlp_bias", False))


class StaticDecoder:
    """Keys and values of B rows, L positions of a prefix and `room` behind them. Without gradients: use under no_grad.

    Args:
        model: one that `supports` says yes to, in eval mode.
        cache: the prefix's, copied; not changed.
        seen: (B, L), nonzero where a position is no padding.
        position: (B,) of each row's next token.
        room: how many tokens of a row will be kept behind the prefix.
    """

    def __init__(self, model: nn.Module, cache: Cache, seen: Tensor, position: Tensor, room: int):
        attention = model.layers[0].self_attn
        scale = partial(_Norm, gemma=isinstance(model, GemmaModel), eps=model.config.rms_norm_eps)
        self.layers, self.norm = [_Layer(layer, scale) for layer in model.layers], scale([model.norm.weight])
        self.groups, self.width, self.scaling = attention.num_key_value_groups, attention.head_dim, attention.scaling
        first = cache.layers[0].keys
        rows, heads, self.length, _ = first.shape
        self.positions, self.lengths = np.array(position.tolist()), np.full(rows, self.length)
        self._hold(first.new_empty(len(self.layers), 2, rows, heads, self.length + room, self.width))
        for (keys, values), prefix in zip(self.layer_kept, cache.layers, strict=True):
            keys[:, :, : self.length], values[:, :, : self.length] = prefix.keys, prefix.values
        unseen = F.pad(seen == 0, (0, room), value=True)
        self.hidden = first.new_zeros(unseen.shape).masked_fill_(unseen, -torch.inf)  # added to scores
        places = torch.arange(self.positions.max() + room, device=first.device)[None]
        cosine, sine = (table[0] for table in model.rotary_emb(first, places))
        sine = torch.cat([-sine[:, : self.width // 2], sine[:, self.width // 2 :]], dim=-1)  # rotate_half's sign
        self.rotary = torch.stack([cosine, sine])

    def _hold(self, kept: Tensor) -> None:
        """kept: (layers, 2, B, heads, slots, width)"""
        self.kept, self.layer_kept = kept, [tuple(layer) for layer in kept]

    def read(self, embeds: Tensor, depth: np.ndarray | None = None, sees: Tensor | None = None) -> Tensor:
        """States (B, N, D) of embeds (B, N, D), after the last norm. Their keys and values stay until the next `keep`.

        Args:
            depth: (B, N) how many tokens after a row's next position each stands; None where N is 1.
            sees: (B, N, N), 0 where a token (dim 1) sees another of the block or itself, -inf elsewhere; None for N 1.
        """
        rows, count, _ = embeds.shape
        end = self.length + count
        if (lacking := end - self.kept.shape[4]) > 0:  # a block that is mostly not kept
            self._hold(F.pad(self.kept, (0, 0, 0, lacking)))
            self.hidden = F.pad(self.hidden, (0, lacking), value=-torch.inf)
        places = self.positions[:, None] + (0 if depth is None else depth)
        places = torch.from_numpy(places).to(embeds.device)
        cosine, sine = self.rotary[:, places][:, :, None]  # (B, 1, N, width)
        mask = self.hidden[:, None, None, : self.length]
        if sees is None:
            mask = F.pad(mask, (0, 1))
        else:
            mask = torch.cat([mask.expand(-1, -1, count, -1), sees[:, None].to(mask.dtype)], dim=3)
        if self.groups > 1:  # query heads that share a key head stand behind each other: no keys are repeated
            mask = mask.repeat(1, 1, self.groups, 1)
        x = embeds.reshape(rows * count, -1)
        for layer, (keys, values) in zip(self.layers, self.layer_kept, strict=True):
            heads = keys.shape[1]
            y = _projected(layer.attention_norm(x), layer.qkv).view(rows, count, -1, self.width).transpose(1, 2)
            turned = y[:, :-heads] if layer.heads_norm is None else layer.heads_norm(y[:, :-heads])
            turned = torch.addcmul(turned * cosine, turned.roll(self.width // 2, -1), sine)
            keys[:, :, self.length : end], values[:, :, self.length : end] = turned[:, -heads:], y[:, -heads:]
            query = turned[:, :-heads].reshape(rows, heads, -1, self.width)
            y = F.scaled_dot_product_attention(query, keys[:, :, :end], values[:, :, :end], mask, scale=self.scaling)
            y = y.reshape(rows, -1, count, self.width).transpose(1, 2).reshape(rows * count, -1)
            x = torch.addmm(x, y, layer.out)
            gate, up = _projected(layer.mlp_norm(x), layer.gate_up).chunk(2, dim=-1)
            x = torch.addmm(x, layer.activation(gate).mul_(up), layer.down)
        return self.norm(x).view(rows, count, -1)

    def keep(self, paths: list[list[int]] | None = None) -> None:
        """Make tokens of the block just read part of what later ones see; the others are forgotten.

        Args:
            paths: of each row the places in the block, in the order of the row's text; None for a block of one token.
        """
        if paths is None:
            self.hidden[:, self.length] = 0
            self.length, self.lengths, self.positions = self.length + 1, self.lengths + 1, self.positions + 1
            return
        if len(paths) == 1:
            self._keep_one(paths[0])
            return
        counts = np.array([len(path) for path in paths])
        order = np.arange(counts.max())
        places = np.array([path + [0] * (len(order) - len(path)) for path in paths]) + self.length
        places, slots = torch.from_numpy(np.stack([places, self.lengths[:, None] + order])).to(self.kept.device)
        unseen = torch.from_numpy(np.where(order < counts[:, None], 0, -np.inf)).to(self.hidden)
        shape = (*self.kept.shape[:4], len(order), self.width)
        chosen = self.kept.gather(4, places[None, None, :, None, :, None].expand(shape))
        self.kept.scatter_(4, slots[None, None, :, None, :, None].expand(shape), chosen)
        self.hidden.scatter_(1, slots, unseen)
        self.lengths, self.positions = self.lengths + counts, self.positions + counts
        self.length = int(self.lengths.max())

    def _keep_one(self, path: list[int]) -> None:
        """The same of a single row, in a third of the time."""
        count = len(path)
        if path[-1] >= count:  # they do not stand where they belong already
            places = torch.tensor([self.length + place for place in path], device=self.kept.device)
            self.kept.narrow(4, self.length, count).copy_(self.kept.index_select(4, places))
        self.hidden.narrow(1, self.length, count).zero_()
        self.length += count
        self.lengths, self.positions = self.lengths + count, self.positions + count


class _Norm:
    """Root-mean-square norm. In half precision Gemma scales before it rounds, the others after.

    Args:
        weights: of transformers' norms, each for as many heads as `counts` says; one for a whole state.
    """

    def __init__(self, weights: list[Tensor], gemma: bool, eps: float, counts: Sequence[int] = ()):
        weights = [1.0 + weight.float() if gemma else weight for weight in weights]
        root = weights[0].shape[-1] ** 0.5
        if counts:
            weights = [weight.expand(count, 1, -1) for weight, count in zip(weights, counts, strict=True)]
        self.scale, self.gemma = weights[0] if len(weights) == 1 else torch.cat(weights), gemma
        self.rooted, self.root = self.scale * root, root
        self.least = torch.tensor(eps**0.5 * root, device=self.scale.device)

    def __call__(self, x: Tensor) -> Tensor:
        # the mean square is the squared length over D: hypot adds eps to it under the root
        if x.dtype == torch.float32:
            return x / torch.linalg.vector_norm(x, dim=-1, keepdim=True).hypot_(self.least) * self.rooted
        y = x.float()
        y = y * self.root / torch.linalg.vector_norm(y, dim=-1, keepdim=True).hypot_(self.least)
        return (y * self.scale).to(x.dtype) if self.gemma else y.to(x.dtype) * self.scale


class _Layer:
    """What a pass needs of a decoder layer, looked up once."""

    def __init__(self, layer: nn.Module, norm: Callable[..., _Norm]):
        attention, mlp = layer.self_attn, layer.mlp
        self.attention_norm, self.mlp_norm = (
            norm([n.weight]) for n in (layer.input_layernorm, layer.post_attention_layernorm)
        )
        self.heads_norm = None
        if hasattr(attention, "q_norm"):
            counts = [p.out_features // attention.head_dim for p in (attention.q_proj, attention.k_proj)]
            self.heads_norm = norm([attention.q_norm.weight, attention.k_norm.weight], counts=counts)
        self.qkv = _joined(attention.q_proj, attention.k_proj, attention.v_proj)
        self.gate_up, self.activation = _joined(mlp.gate_proj, mlp.up_proj), mlp.act_fn
        self.out, self.down = attention.o_proj.weight.t(), mlp.down_proj.weight.t()


def _joined(*projections: nn.Linear) -> list[Tensor]:
    weights = [projection.weight for projection in projections]
    return [torch.cat(weights)] if sum(weight.numel() for weight in weights) <= JOINED else weights


def _projected(x: Tensor, weights: list[Tensor]) -> Tensor:
    parts = [F.linear(x, weight) for weight in weights]
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim=-1)


@torch.no_grad()
def likeliest_tokens(
    model: nn.Module,
    head: Callable[[Tensor], Tensor],
    hidden: Tensor,
    cache: Cache,
    seen: Tensor,
    position: Tensor,
    count: int,
) -> Tensor:
    """The `count` likeliest ids (B, count), one after the other, behind a prefix.

    Args:
        head: states (B, D) to logits.
        hidden: (B, D) of each row's last position.
        cache, seen, position: see StaticDecoder; the cache is not to be used again.
    """
    if not supports(model):
        return plain_tokens(model, head, hidden, cache, seen, position, count)
    decoder, said = StaticDecoder(model, cache, seen, position, room=count), [head(hidden).argmax(-1)]
    while len(said) < count:
        hidden = decoder.read(model.embed_tokens(said[-1])[:, None])[:, 0]
        decoder.keep()
        said.append(head(hidden).argmax(-1))
    return torch.stack(said, dim=1)


def plain_tokens(
    model: nn.Module,
    head: Callable[[Tensor], Tensor],
    hidden: Tensor,
    cache: Cache,
    seen: Tensor,
    position: Tensor,
    count: int,
) -> Tensor:
    """As `likeliest_tokens`, one pass of the model as transformers runs it for each."""
    seen, said = seen.long(), [head(hidden).argmax(-1)]
    while len(said) < count:
        seen = F.pad(seen, (0, 1), value=1)
        output = model(
            input_ids=said[-1][:, None],
            attention_mask=seen,
            position_ids=position[:, None],
            past_key_values=cache,
            use_cache=True,
        )
        said.append(head(output.last_hidden_state[:, 0]).argmax(-1))
        position = position + 1
    return torch.stack(said, dim=1)
