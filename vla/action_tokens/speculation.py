"""What may follow in an action's text, as a tree that a model reads in one pass (vla/action_tokens/constrained.py).

A choice is known only once the character before it has been read. To make several choices in one pass, the pass reads,
behind the character last chosen, those that may follow it too, and what may follow those: every path from the root is
a text that the grammar allows. Of the choices that come back, the one at the root is right, and so is each one whose
path the choices before it have taken; the rest is forgotten. None is taken on trust:
the text is that of one choice per pass.

Which paths are worth reading: those that have a chance of `worth` or more if all numbers were equally likely. At 0.04
the tree behind a value's last digit holds both signs, each with a 0, the point and ten first digits: 28 tokens that
make four choices. Above 0.1 no digit is anticipated, from 0.5 on no sign, above 1 nothing.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np

from vla.action_tokens.strings import ALPHABET, DIMS, Grammar

Place = tuple[int, int]
"""Values of the text that have not ended, and the grammar's state in the one that is being said."""
DONE: Place = (0, Grammar.END)


@dataclass(frozen=True)
class Tree:
    """N tokens: the root's text, then those of its descendants, each behind its parent.

    Attributes:
        characters: int64 (N,), in ALPHABET.
        depth: int64 (N,), tokens before each in its path.
        sees: float32 (N, N), 0 where a token (dim 0) sees another of its path or itself, -inf elsewhere.
        refused: float32 (N, 14), 0 at the characters that may follow a node's last token, -inf elsewhere.
        nodes: the root first.
    """

    characters: np.ndarray
    depth: np.ndarray
    sees: np.ndarray
    refused: np.ndarray
    nodes: list[Node]


@dataclass(frozen=True)
class Node:
    """A choice: the tokens from the root's first to its own last, and the nodes that go on from it, by character."""

    path: list[int]
    children: dict[int, int]


class Forest:
    """The trees of a grammar, made where they are first needed."""

    def __init__(self, grammar: Grammar, worth: float):
        self.grammar, self.worth = grammar, worth
        self._trees: dict[tuple[str, Place], Tree] = {}
        self._said: dict[tuple[Place, int], tuple[str, Place]] = {}

    def start(self, steps: int) -> Place:
        """Of the text of `steps` actions."""
        return DIMS * steps, int(self.grammar.start[0])

    def say(self, place: Place, character: int) -> tuple[str, Place]:
        """The character, and those that must follow up to the next choice, be it the next value's; where that is."""
        if (place, character) not in self._said:
            self._said[place, character] = self._say(place, character)
        return self._said[place, character]

    def _say(self, place: Place, character: int) -> tuple[str, Place]:
        left, state = place
        text, state = ALPHABET[character], int(self.grammar.next[state, character])
        while True:
            text, state = text + self.grammar.forced[state], int(self.grammar.after[state])
            if state != Grammar.END:
                return text, (left, state)
            left -= 1
            if left == 0:
                return text, DONE
            state = int(self.grammar.start[-left % DIMS])
            if (self.grammar.next[state] >= 0).sum() > 1:
                return text, (left, state)

    def tree(self, text: str, place: Place) -> Tree:
        """The tree whose root is `text`, which has been chosen and leads to `place`."""
        left, state = place
        if left > 2 * DIMS:  # no tree reaches beyond the next step: all but the last two are alike
            left -= (left - DIMS - 1) // DIMS * DIMS
        key = text, (left, state)
        if key not in self._trees:
            self._trees[key] = self._grow(*key)
        return self._trees[key]

    def _grow(self, text: str, place: Place) -> Tree:
        characters, depth, paths, nodes, places = [], [], [], [], []

        def add(text: str, place: Place, before: list[int], chance: float) -> int:
            path = list(before)
            for character in text:
                path = [*path, len(characters)]
                characters.append(ALPHABET.index(character))
                depth.append(len(path) - 1)
                paths.append(path)
            number = len(nodes)
            nodes.append(Node(path, {}))
            places.append(place)
            for choice, share in self._shares(place).items():
                more, after = self.say(place, choice)
                if chance * share >= self.worth and after != DONE:  # nothing is asked behind the text's end
                    nodes[number].children[choice] = add(more, after, path, chance * share)
            return number

        add(text, place, [], 1.0)
        sees = np.full((len(characters), len(characters)), -np.inf, dtype=np.float32)
        for token, path in enumerate(paths):
            sees[token, path] = 0
        refused = np.zeros((len(characters), len(ALPHABET)), dtype=np.float32)
        for node, (_, state) in zip(nodes, places, strict=True):
            refused[node.path[-1], self.grammar.next[state] < 0] = -np.inf
        return Tree(np.array(characters), np.array(depth), sees, refused, nodes)

    def _shares(self, place: Place) -> dict[int, float]:
        """Of the numbers that a text may still become, the share that goes on with each character."""
        if place == DONE:
            return {}
        state = place[1]
        return {
            int(c): self._texts[self.grammar.next[state, c]] / self._texts[state]
            for c in np.flatnonzero(self.grammar.next[state] >= 0)
        }

    @cached_property
    def _texts(self) -> np.ndarray:
        """How many texts each state accepts."""
        counts = {Grammar.END: 1}

        def count(state: int) -> int:
            if state not in counts:
                counts[state] = sum(count(int(after)) for after in self.grammar.next[state] if after >= 0)
            return counts[state]

        return np.array([count(state) for state in range(len(self.grammar.next))])
