"""Decoding an action's text so that it cannot be malformed, and asking the model only where there is a choice.

Greedy, batched, over a model that reads on from cached keys and values (vla/generation.py). At each choice the
likeliest of the characters that the grammar allows is taken; of the language head only the rows of those 14 characters
are computed. Characters that must follow (the point, the comma, all zeros after a one) are not asked for: they are read
together with the choice before them, in one pass. Where unconstrained greedy decoding would give a well-formed text,
this gives the same one: the likeliest token of all is then also the likeliest of those allowed.

`decode_plain` makes one choice per pass of the model as transformers runs it. `decode_fast` gives the same text from a
decoder without overhead (vla/fast_decode.py) that makes several choices per pass (vla/action_tokens/speculation.py).
"""

from __future__ import annotations

from functools import cache

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from vla.action_tokens.speculation import DONE, Forest, Place, Tree
from vla.action_tokens.strings import ALPHABET, DIMS, Grammar
from vla.errors import UserError
from vla.fast_decode import StaticDecoder, supports
from vla.generation import Prefix, TextModel

WORTH = 1 / 25
"""Of a pass over a batch of one, what reading one more token in it costs; in proportion for more rows. Measured."""
LEAST = 0.9
"""What is nearly certain, a 0 before the point, is anticipated in every batch."""


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


def decode(model: TextModel, prefix: Prefix, grammar: Grammar, characters: list[int], steps: int) -> list[str]:
    """The text of `steps` actions for each row of the prefix, which is not to be used again.

    Args:
        characters: `character_ids` of the model's tokenizer.
    """
    if not supports(model.model):
        return decode_plain(model, prefix, grammar, characters, steps)
    worth = min(WORTH * len(prefix.hidden), LEAST)
    return decode_fast(model, prefix, forest(grammar.form, worth), characters, steps)


@cache
def forest(form: str, worth: float) -> Forest:
    return Forest(Grammar(form), worth)


@torch.inference_mode()
def decode_fast(model: TextModel, prefix: Prefix, forest: Forest, characters: list[int], steps: int) -> list[str]:
    """As `decode`, of a model that `vla.fast_decode.supports`; the prefix is left as it is."""
    device = prefix.hidden.device
    ids = torch.tensor(characters, device=device)
    embeddings, head = model.model.embed_tokens(ids), model.head[ids].to(prefix.hidden.dtype)
    start = forest.start(steps)
    refused = torch.from_numpy(forest.grammar.next[start[1]] < 0).to(device)
    first = F.linear(prefix.hidden, head).float().masked_fill(refused, -torch.inf).argmax(-1).tolist()
    said = [forest.say(start, choice) for choice in first]
    texts = [text for text, _ in said]
    decoder = StaticDecoder(
        model.model, prefix.cache, prefix.seen, prefix.position, room=forest.grammar.longest * steps
    )
    while any(place != DONE for _, place in said):
        trees = [forest.tree(text, place) for text, place in said]
        block, depth, sees, refused = _stacked(trees)
        block, sees, refused = (torch.from_numpy(part).to(device) for part in (block, sees, refused))
        hidden = decoder.read(embeddings[block], depth, sees)
        choices = (F.linear(hidden, head).float() + refused).argmax(-1).tolist()
        paths = []
        for row, tree in enumerate(trees):
            more, said[row], path = _walk(forest, tree, choices[row], said[row])
            texts[row] += more
            paths.append(path)
        decoder.keep(paths)
    return texts


def _walk(
    forest: Forest, tree: Tree, choices: list[int], said: tuple[str, Place]
) -> tuple[str, tuple[str, Place], list[int]]:
    """From the root as far as the choices stay within the tree, and one further.

    Returns:
        The text that was chosen, the part of it that is still to be read and where it leads, the path's tokens.
    """
    if said[1] == DONE:  # the end of a finished row's text is read over and over, and not kept
        return "", said, []
    node, chosen = tree.nodes[0], ""
    while True:
        choice = choices[node.path[-1]]
        said = forest.say(said[1], choice)
        chosen += said[0]
        if choice not in node.children:
            return chosen, said, node.path
        node = tree.nodes[node.children[choice]]


def _stacked(trees: list[Tree]) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """The trees' characters, depth, sees and refused, with a dimension for the rows, padded to the largest tree."""
    if len(trees) == 1:
        (tree,) = trees
        return tree.characters[None], tree.depth[None], tree.sees[None], tree.refused[None]
    longest = max(len(tree.characters) for tree in trees)
    characters, depth = np.zeros((2, len(trees), longest), dtype=np.int64)
    sees = np.full((len(trees), longest, longest), -np.inf, dtype=np.float32)
    refused = np.zeros((len(trees), longest, len(ALPHABET)), dtype=np.float32)
    for row, tree in enumerate(trees):
        count = len(tree.characters)
        characters[row, :count], depth[row, :count], refused[row, :count] = tree.characters, tree.depth, tree.refused
        sees[row, :count, :count] = tree.sees
    return characters, depth, sees, refused


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


def decode_plain(model: TextModel, prefix: Prefix, grammar: Grammar, characters: list[int], steps: int) -> list[str]:
    """As `decode`, of any model; its keys and values are added to the prefix's."""
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
