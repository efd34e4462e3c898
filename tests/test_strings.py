"""Actions as text and the automaton that accepts them."""

from __future__ import annotations

import re

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from vla.action_tokens.strings import ALPHABET, FORMS, Grammar, read, write, write_value
from vla.errors import UserError

VALUES = st.floats(-1, 1, width=32)
STEPS = st.lists(st.tuples(*[VALUES] * 6, st.sampled_from([0.0, 1.0])), min_size=1, max_size=3)
# Written by hand from fact sheet §8.2, one per form.
PATTERN = {
    "genvla": r"(1\.0|0\.0|-1\.0|-?0\.(\d{0,3}[1-9])),",
    "fixed": r"(\+1\.0000|-1\.0000|\+0\.\d{4}|-0\.(?!0000)\d{4}),",
}


@pytest.mark.parametrize(
    ("value", "genvla", "fixed"),
    [
        (0.03124, "0.0312,", "+0.0312,"),
        (-0.1, "-0.1,", "-0.1000,"),
        (0.0, "0.0,", "+0.0000,"),
        (-0.00004, "0.0,", "+0.0000,"),
        (0.0001, "0.0001,", "+0.0001,"),
        (1.7, "1.0,", "+1.0000,"),
        (-1.0, "-1.0,", "-1.0000,"),
    ],
)
def test_a_value_s_text(value, genvla, fixed):
    assert (write_value(value, "genvla"), write_value(value, "fixed")) == (genvla, fixed)


@given(STEPS, st.sampled_from(FORMS))
def test_round_trip_loses_at_most_half_a_unit(steps, form):
    values = np.array(steps)
    again = read(write(values, form), values.size)
    assert np.abs(again - values.reshape(-1)).max() <= 5e-5 + 1e-7


@given(STEPS)
def test_genvla_form_is_what_python_prints(steps):
    """The paper's code: str(round(x, 4)) and a comma; minus zero and 1e-04 aside."""
    for value in np.array(steps).reshape(-1):
        rounded = round(float(value), 4)
        if rounded != 0 and abs(rounded) >= 0.001:
            assert write_value(value, "genvla") == f"{rounded},"


def accepts(grammar: Grammar, text: str, dim: int) -> bool:
    state = grammar.start[dim]
    for character in text:
        if character not in ALPHABET or state == Grammar.END:
            return False
        state = grammar.next[state, ALPHABET.index(character)]
        if state < 0:
            return False
    return bool(state == Grammar.END)


@pytest.mark.parametrize("form", FORMS)
def test_the_automaton_accepts_what_is_written(form):
    grammar = Grammar(form)
    assert all(accepts(grammar, write_value(k / 10000, form), 0) for k in range(-10000, 10001))
    assert [write_value(v, form) for v in (0, 1) if accepts(grammar, write_value(v, form), 6)] == [
        write_value(0, form), write_value(1, form)
    ]  # fmt: skip
    assert not accepts(grammar, write_value(0.5, form), 6)
    assert len(grammar.next) < 60  # minimal, not a trie of 20 001 texts


@given(st.text(ALPHABET, max_size=9), st.sampled_from(FORMS))
def test_the_automaton_accepts_nothing_else(text, form):
    assert accepts(Grammar(form), text, 0) == (re.fullmatch(PATTERN[form], text) is not None)


@pytest.mark.parametrize("form", FORMS)
def test_forced_characters_are_those_without_a_choice(form):
    grammar = Grammar(form)
    for state in range(1, len(grammar.next)):
        here = state
        for character in grammar.forced[state]:
            (only,) = np.flatnonzero(grammar.next[here] >= 0)
            assert ALPHABET[only] == character
            here = grammar.next[here, only]
        assert here == grammar.after[state]
        assert here == Grammar.END or (grammar.next[here] >= 0).sum() > 1


@pytest.mark.parametrize("text", ["", "0.1,0.2", "0.1,x,0.3,", "0.1,,0.3,", "nan,0.1,0.2,", "1e5,0,0,"])
def test_what_is_no_action_is_none(text):
    assert read(text, 3) is None


def test_what_others_print_is_read():
    np.testing.assert_allclose(read("0.5, -0.25,1,\n", 3), [0.5, -0.25, 1])
    np.testing.assert_allclose(read("7.5,-2.0,+.5,", 3), [1, -1, 0.5])


def test_an_unknown_form_is_named():
    with pytest.raises(UserError, match=r"policy\.string\.form=hex is not known; choose genvla or fixed"):
        Grammar("hex")
