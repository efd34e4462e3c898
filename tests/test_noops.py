"""Leaving out no-ops, against the rule written as a loop over what is kept.

pytest tests/test_noops.py
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from data.episode import Episode, Window
from data.noops import kept_steps, without_noops
from vla.errors import UserError

steps_lists = st.lists(st.tuples(st.sampled_from([0.0, 5e-5, 9e-5, 2e-4, 0.5]), st.integers(0, 1)), max_size=15)


def made(steps: list[tuple[float, int]]) -> Episode:
    """Step t moves by its number along one axis; frames and state hold t."""
    actions = np.zeros((len(steps), 7), np.float32)
    for t, (motion, gripper) in enumerate(steps):
        actions[t, t % 6], actions[t, 6] = motion, gripper
    numbers = np.arange(len(steps))
    frames = {"static": np.broadcast_to(numbers[:, None, None, None], (len(steps), 2, 2, 3)).astype(np.uint8)}
    return Episode("do it", frames, numbers[:, None].astype(np.float32), actions, "task", "made:0")


def kept_by_the_rule(steps: list[tuple[float, int]]) -> list[int]:
    kept: list[int] = []
    for t, (motion, gripper) in enumerate(steps):
        still = motion < 1e-4
        if not (still and (not kept or steps[kept[-1]][1] == gripper)):
            kept.append(t)
    return kept


@given(steps_lists)
def test_the_rule(steps):
    assert np.flatnonzero(kept_steps(made(steps).actions)).tolist() == kept_by_the_rule(steps)


def test_the_norm_is_of_all_six_dims():
    actions = np.zeros((2, 7), np.float32)
    actions[0, :6], actions[1, :6] = 4e-5, 4.2e-5  # norms 0.98e-4 and 1.03e-4
    assert kept_steps(actions).tolist() == [False, True]


@given(steps_lists, st.data())
def test_everything_keeps_step_and_windows_keep_their_steps(steps, data):
    kept = kept_by_the_rule(steps)
    if not kept:
        with pytest.raises(UserError, match="made:0: every action is a no-op"):
            without_noops(made(steps))
        return
    last = len(steps) - 1
    bounds = data.draw(st.lists(st.tuples(st.integers(0, last), st.integers(0, last)).map(sorted), max_size=4))
    windows = tuple(Window(f"w{i}", "t", a, b - a + 1) for i, (a, b) in enumerate(bounds))
    valid = np.arange(len(steps)) % 2 == 0
    found = without_noops(replace(made(steps), windows=windows, frame_valid=valid))
    assert found.state[:, 0].tolist() == kept
    assert found.frames["static"][:, 0, 0, 0].tolist() == kept
    np.testing.assert_array_equal(found.actions, made(steps).actions[kept])
    assert found.frame_valid.tolist() == [t % 2 == 0 for t in kept]
    expected = {f"w{i}": [t for t in kept if a <= t <= b] for i, (a, b) in enumerate(bounds)}
    got = {w.instruction: found.state[w.start : w.start + w.length, 0].tolist() for w in found.windows}
    assert got == {name: inside for name, inside in expected.items() if inside}


def test_without_windows_there_are_none():
    found = without_noops(made([(0.5, 1), (0.0, 1), (0.5, 1)]))
    assert (found.windows, found.frame_valid, len(found.described())) == (None, None, 1)
