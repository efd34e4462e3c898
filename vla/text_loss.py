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
from vla.policy import sent


@dataclass(frozen=True)
class TextTargets:
    """Of each row, ids to be said after its prompt, and which of them count."""

    ids: list[list[int]]
    counted: list[list[bool]]


def cross_entropy(model: TextModel, prefix: Prefix, targets: TextTargets) -> tuple[Tensor, Tensor, Tensor]:
    """(sum of the cross-entropies, how many ids counted, how many of them were the likeliest)."""
    device, longest = prefix.hidden.device, max(map(len, targets.ids))
    ids = sent([row + [0] * (longest - len(row)) for row in targets.ids], device)
    # Which ids count is known here: asked of the device, the host would wait for it.
    counted = [(row, at) for row, said in enumerate(targets.counted) for at, counts in enumerate(said) if counts]
    labels = sent(torch.tensor([targets.ids[row][at] for row, at in counted], dtype=torch.long), device)
    lengths = sent([len(row) for row in targets.ids], device)
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
    places = sent(torch.tensor([row * longest + at for row, at in counted], dtype=torch.long), device)
    said = hidden.flatten(0, 1).index_select(0, places)
    logits = model.logits(said).float()  # of what counts only: the head is the widest matrix there is
    count = sent(len(counted), device)
    return F.cross_entropy(logits, labels, reduction="sum"), count, (logits.argmax(-1) == labels).sum()
