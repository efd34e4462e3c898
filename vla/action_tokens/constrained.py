"""Decoding an action's text so that it cannot be malformed, and asking the model only where there is a choice.

Greedy, batched, over a model that reads on from cached keys and values (vla/generation.py). At each choice the
likeliest of the characters that the grammar allows is taken; of the language head only the rows of those 14 characters
are computed. Characters that must follow (the point, the comma, all zeros after a one) are not asked for: they are read
together with the choice before them, in one pass. Where unconstrained greedy decoding would give a well-formed text,
this gives the same one: the likeliest token of all is then also the likeliest of those allowed.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from vla.action_tokens.strings import ALPHABET, DIMS, Grammar
from vla.errors import UserError
from vla.generation import Prefix, TextModel


def character_ids(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The id of each character of ALPHABET as a token of its own.

    Raises:
        UserError: the vocabulary lacks one.
    """
    ids = tokenizer.convert_tokens_to_ids(list(ALPHABET))
    lacking = [c for c, i in zip(ALPHABET, ids, strict=True) if i is None or i == tokenizer.unk_token_id]
    if lacking or len(set(ids)) < len(ALPHABET):
        raise UserError(f"this tokenizer has no token for {' '.join(lacking)}; policy.actions=string needs one each")
    return ids


class Reader:
    """Rows of texts being said: which state of the grammar each is in, what is still to be read by the model."""

    def __init__(self, grammar: Grammar, rows: int, steps: int):
        self.grammar, self.values = grammar, DIMS * steps
        self.texts = [""] * rows
        self.said = [0] * rows  # values that have ended
        self.states = [int(grammar.start[0])] * rows
        self.pending = [""] * rows

    def take(self, choices: list[int]) -> None:
        """Append to each unfinished row the character `choices` holds for it, and those that must follow."""
        for row, choice in enumerate(choices):
            self.pending[row] = ""
            if self.said[row] == self.values:
                continue
            state = int(self.grammar.next[self.states[row], choice])
            self.pending[row] = ALPHABET[choice] + self.grammar.forced[state]
            self.texts[row] += self.pending[row]
            self.states[row] = int(self.grammar.after[state])
            if self.states[row] == Grammar.END:
                self.said[row] += 1
                self.states[row] = int(self.grammar.start[self.said[row] % DIMS])

    @property
    def done(self) -> bool:
        return all(said == self.values for said in self.said)


def decode(model: TextModel, prefix: Prefix, grammar: Grammar, characters: list[int], steps: int) -> list[str]:
    """The text of `steps` actions for each row of the prefix.

    Args:
        characters: `character_ids` of the model's tokenizer.
    """
    device = prefix.hidden.device
    ids = torch.tensor(characters, device=device)
    head = model.head[ids].to(prefix.hidden.dtype)
    refused = torch.from_numpy(grammar.next < 0).to(device)
    reader = Reader(grammar, len(prefix.hidden), steps)
    hidden, seen, position = prefix.hidden, prefix.seen, prefix.position
    while True:
        logits = F.linear(hidden, head).float().masked_fill(refused[reader.states], -torch.inf)
        reader.take(logits.argmax(-1).tolist())
        if reader.done:
            return reader.texts
        block, lengths = _block(reader.pending, ids)
        real = torch.arange(block.shape[1], device=device) < lengths[:, None]
        seen = torch.cat([seen, real.to(seen.dtype)], dim=1)
        places = position[:, None] + torch.arange(block.shape[1], device=device)
        output = model.model(
            inputs_embeds=model.model.embed_tokens(block),
            attention_mask=seen,
            position_ids=places,
            past_key_values=prefix.cache,
            use_cache=True,
        ).last_hidden_state
        hidden = output[torch.arange(len(output), device=device), (lengths - 1).clamp(min=0)]
        position = position + lengths


def _block(texts: list[str], ids: Tensor) -> tuple[Tensor, Tensor]:
    """Ids (B, longest) of the texts, padded on the right with the first, and their lengths (B,)."""
    longest = max(map(len, texts))
    places = torch.tensor([[ALPHABET.index(c) for c in text] + [0] * (longest - len(text)) for text in texts])
    return ids[places.to(ids.device)], torch.tensor([len(text) for text in texts], device=ids.device)
