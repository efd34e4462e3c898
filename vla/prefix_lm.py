"""Who sees whom in a prefix language model: SpatialVLA's mask, and its public code's two others (fact sheet §0a.5, §5).

The prefix (pictures and prompt) sees itself in both directions, what follows sees what precedes it, padding is seen by
nobody; positions count from 1 and skip padding.
"""

from __future__ import annotations

import torch
from torch import Tensor

MASKS = ("prefix_lm", "released_flash", "released_eager")


def places_of(valid: Tensor) -> Tensor:
    """1, 2, … over the valid positions (B, L) of each row, then over its padding, wherever that stands."""
    return torch.where(valid, valid.cumsum(1), valid.sum(1, keepdim=True) + (~valid).cumsum(1))


def visible(mask: str, valid: Tensor, places: Tensor, prefix: int) -> Tensor:
    """Which position (second) each position (first) may look at, bool (B, L, L).

    Args:
        mask: one of MASKS.
        valid: bool (B, L), False for padding, which stands among the first `prefix` positions.
        places: of each position in its sequence (B, L).
    """
    before = places[:, None] <= places[:, :, None]
    if mask == "released_flash":
        return before & valid[:, None]
    in_prefix = torch.arange(valid.shape[1], device=valid.device) < prefix
    if mask == "released_eager":
        return in_prefix | (before & valid[:, None])
    return (in_prefix | before) & valid[:, None]


def additive(seen: Tensor, dtype: torch.dtype) -> Tensor:
    """What is added to attention logits: (B, 1, Q, K), 0 where bool (B, Q, K) holds."""
    return torch.zeros(seen.shape, dtype=dtype, device=seen.device).masked_fill_(~seen, torch.finfo(dtype).min)[:, None]
