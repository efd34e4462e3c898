"""Actions as text: one character one token (GenVLA §III-B; fact sheet §8.2).

A normalised value in [-1, 1] is written with four decimals and a comma behind it, the values of a step one after the
other. Two forms:
    genvla   as the paper's code prints them, without trailing zeros: 0.0312,-0.1,0.25,0.0,-0.0077,0.0,1.0,
    fixed    sign and four decimals always: +0.0312,-0.1000,+0.2500,+0.0000,-0.0077,+0.0000,+1.0000,
Zero has no minus sign, and 0.0001 is not 1e-04 (the public code prints that). The last value of a step is the gripper,
0 or 1. Writing and reading again loses at most 5e-5.

`Grammar` is the smallest automaton that accepts these texts and no others. Where it allows one character only, nothing
needs to be asked of a model.
"""

from __future__ import annotations

import re
from functools import cache

import numpy as np

from vla.errors import UserError

FORMS = ("genvla", "fixed")
ALPHABET = "0123456789-+.,"
DECIMALS = 4
DIMS = 7
_NUMBER = re.compile(r"[-+]?\d+(\.\d*)?|[-+]?\.\d+")


def write_value(value: float, form: str) -> str:
    """The text of a value in [-1, 1], comma included; outside it is clipped."""
    units = round(float(np.clip(value, -1, 1)) * 10**DECIMALS)
    sign = "-" if units < 0 else "+" if form == "fixed" else ""
    whole, decimals = divmod(abs(units), 10**DECIMALS)
    digits = f"{decimals:0{DECIMALS}d}"
    if form == "genvla":
        digits = digits.rstrip("0") or "0"
    return f"{sign}{whole}.{digits},"


def write(values: np.ndarray, form: str) -> str:
    """The text of normalised actions (H, 7): 7 · H values."""
    return "".join(write_value(value, form) for value in np.asarray(values, dtype=np.float64).reshape(-1))


def read(text: str, count: int) -> np.ndarray | None:
    """float32 (count,) from a text, None where its first `count` parts are not all numbers (§8.2: fall back, count)."""
    parts = [part.strip() for part in text.split(",")][:count]
    if len(parts) < count or not all(_NUMBER.fullmatch(part) for part in parts):
        return None
    return np.clip(np.array([float(part) for part in parts], dtype=np.float32), -1, 1)


class Grammar:
    """Which character may follow which, for the values of one step after the other.

    Attributes:
        next: int64 (S, 14), the state after each character of ALPHABET, -1 where it may not stand.
        start: int64 (7,), the state in which each value of a step begins.
        forced: S strings, the characters that must follow from a state up to the next choice or the value's end.
        after: int64 (S,), the state after those; END where the value has ended.
        longest: characters of the longest step.
    """

    END = 0

    def __init__(self, form: str):
        if form not in FORMS:
            raise UserError(f"policy.string.form={form} is not known; choose {' or '.join(FORMS)}")
        self.next, self.start, self.forced, self.after = _automaton(form)
        self.form = form
        self.longest = DIMS * max(len(write_value(value, form)) for value in (-0.1234, 1.0))


@cache
def _automaton(form: str) -> tuple[np.ndarray, np.ndarray, list[str], np.ndarray]:
    scale = 10**DECIMALS
    motion = sorted({write_value(k / scale, form) for k in range(-scale, scale + 1)})
    gripper = sorted({write_value(value, form) for value in (0.0, 1.0)})
    states: dict[tuple, int] = {(): Grammar.END}
    starts = [_node(texts, 0, states) for texts in (motion, gripper)]
    table = np.full((len(states), len(ALPHABET)), -1, dtype=np.int64)
    for edges, state in states.items():
        for character, target in edges:
            table[state, ALPHABET.index(character)] = target
    forced, after = [], np.zeros(len(states), dtype=np.int64)
    for state in range(len(states)):
        text, here = "", state
        while here != Grammar.END and (allowed := np.flatnonzero(table[here] >= 0)).size == 1:
            text, here = text + ALPHABET[allowed[0]], int(table[here, allowed[0]])
        forced.append(text)
        after[state] = here
    return table, np.array([starts[0]] * (DIMS - 1) + [starts[1]]), forced, after


def _node(texts: list[str], depth: int, states: dict[tuple, int]) -> int:
    """The state that accepts what follows `depth` characters of the sorted `texts`; equal languages share a state."""
    if texts == [texts[0]] and len(texts[0]) == depth:
        return Grammar.END
    groups: dict[str, list[str]] = {}
    for text in texts:
        groups.setdefault(text[depth], []).append(text)
    edges = tuple((character, _node(group, depth + 1, states)) for character, group in sorted(groups.items()))
    return states.setdefault(edges, len(states))
