"""The cross-entropy of texts that a policy's language model is to say, teacher-forced, behind pictures and prompts.

The same reading of the prompt as in generation (vla/generation.py): the prefix leaves keys and values, with gradients,
and the texts are read behind it in one pass.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from vla.generation import Prefix, TextModel

IGNORED = -100


@dataclass(frozen=True)
class TextTargets:
    """Of each row, ids to be said after its prompt, and which of them count."""

    ids: list[list[int]]
    counted: list[list[bool]]


def cross_entropy(model: TextModel, prefix: Prefix, targets: TextTargets) -> tuple[Tensor, Tensor, Tensor]:
    """(sum of the cross-entropies, how many ids counted, how many of them were the likeliest)."""
    device, longest = prefix.hidden.device, max(map(len, targets.ids))
    ids = torch.tensor([row + [0] * (longest - len(row)) for row in targets.ids], device=device)
    labels = torch.tensor(
        [
            [i if said else IGNORED for i, said in zip(row, counted, strict=True)] + [IGNORED] * (longest - len(row))
            for row, counted in zip(targets.ids, targets.counted, strict=True)
        ],
        device=device,
    )
    lengths = torch.tensor([len(row) for row in targets.ids], device=device)
    place = torch.arange(longest - 1, device=device)
    real = place < (lengths - 1)[:, None]  # the last id is said, never read
    read = model.model(
        inputs_embeds=model.model.embed_tokens(ids[:, :-1]),
        attention_mask=torch.cat([prefix.seen, real.to(prefix.seen.dtype)], dim=1),
        position_ids=prefix.position[:, None] + place,
        past_key_values=prefix.cache,
        use_cache=True,
    ).last_hidden_state
    hidden = torch.cat([prefix.hidden[:, None], read], dim=1)
    counted = labels != IGNORED
    logits = model.logits(hidden[counted]).float()  # of what counts only: the head is the widest matrix there is
    labels = labels[counted]
    return F.cross_entropy(logits, labels, reduction="sum"), counted.sum(), (logits.argmax(-1) == labels).sum()
