"""Action conventions of SimplerEnv, each pitfall of the fact sheet against an independent formula."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from envs.simpler.actions import StickyGripper, controller_angles, motion, widowx_gripper
from vla.errors import UserError

angles = st.lists(st.floats(-1.5, 1.5), min_size=3, max_size=3).map(np.array)


def about(axis: int, angle: float) -> np.ndarray:
    """(3, 3) rotation about a coordinate axis, written out."""
    c, s = np.cos(angle), np.sin(angle)
    i, j = (axis + 1) % 3, (axis + 2) % 3
    matrix = np.eye(3)
    matrix[i, i], matrix[i, j], matrix[j, i], matrix[j, j] = c, -s, s, c
    return matrix


def rodrigues(axis_angle: np.ndarray) -> np.ndarray:
    """(3, 3) rotation of an axis-angle vector."""
    angle = np.linalg.norm(axis_angle)
    x, y, z = axis_angle / angle if angle else np.zeros(3)
    cross = np.array([[0, -z, y], [z, 0, -x], [-y, x, 0]])
    return np.eye(3) + np.sin(angle) * cross + (1 - np.cos(angle)) * cross @ cross


def act(rotation=(0, 0, 0), xyz=(0.01, -0.02, 0.03), gripper=1.0) -> np.ndarray:
    return np.array([*xyz, *rotation, gripper])


@given(angles)
def test_euler_angles_are_about_fixed_axes_roll_first(rpy):
    """transforms3d's euler2axangle with its default "sxyz": Rz(yaw) · Ry(pitch) · Rx(roll)."""
    expected = about(2, rpy[2]) @ about(1, rpy[1]) @ about(0, rpy[0])
    np.testing.assert_allclose(rodrigues(motion(act(rpy))[3:]), expected, atol=1e-9)


def test_euler_angles_equal_transforms3d():
    euler = pytest.importorskip("transforms3d.euler", reason="transforms3d is not installed: make simpler")
    for rpy in np.random.default_rng(0).uniform(-1.5, 1.5, (50, 3)):
        axis, angle = euler.euler2axangle(*rpy)
        np.testing.assert_allclose(rodrigues(motion(act(rpy))[3:]), rodrigues(axis * angle), atol=1e-9)
        if angle < np.pi:  # beyond, the same turn has two names
            np.testing.assert_allclose(motion(act(rpy))[3:], axis * angle, atol=1e-9)


def test_euler_is_not_axis_angle():
    """Reading one as the other is right to first order, and 0.1 rad wrong at the angles of a wrist turn."""
    rpy = (0.6, 0.0, 0.8)
    assert np.abs(motion(act(rpy))[3:] - rpy).max() > 0.1
    np.testing.assert_array_equal(motion(act(rpy), rotation="axis_angle")[3:], rpy)
    np.testing.assert_allclose(motion(act((0.01, 0.02, -0.01)))[3:], (0.01, 0.02, -0.01), atol=3e-4)


@given(angles)
def test_scale_multiplies_translation_and_angle(rpy):
    whole, half = motion(act(rpy)), motion(act(rpy), scale=0.5)
    np.testing.assert_allclose(half, whole / 2, atol=1e-12)
    # Half the angle twice is the whole rotation, which half the Euler angles would not give.
    np.testing.assert_allclose(rodrigues(half[3:]) @ rodrigues(half[3:]), rodrigues(whole[3:]), atol=1e-9)


def test_nothing_is_clipped():
    np.testing.assert_array_equal(motion(act(xyz=(3.0, -2.0, 1.5)))[:3], (3.0, -2.0, 1.5))


@given(angles)
def test_maniskill3_gets_the_same_rotation_in_its_own_angles(rpy):
    """Its controller makes Rx(a) · Ry(b) · Rz(c) of the three numbers."""
    turn = motion(act(rpy))[3:]
    a, b, c = controller_angles(turn)
    np.testing.assert_allclose(about(0, a) @ about(1, b) @ about(2, c), rodrigues(turn), atol=1e-7)


def test_bad_actions_are_named():
    for bad in (np.zeros(6), np.full(7, np.nan)):
        with pytest.raises(ValueError, match="7 finite numbers"):
            motion(bad)
    with pytest.raises(UserError, match=r"rotation=quaternion.*euler, axis_angle"):
        motion(act(), rotation="quaternion")


def test_widowx_gripper_is_absolute_and_binary():
    assert [widowx_gripper(opening) for opening in (0.0, 0.49, 0.5, 0.51, 1.0)] == [-1, -1, -1, 1, 1]


def commands(openings: list[float], **options) -> list[float]:
    gripper = StickyGripper(**options)
    return [gripper(opening) for opening in openings]


def test_google_first_step_is_zero_whatever_is_asked():
    assert commands([0.0])[0] == 0 and commands([1.0])[0] == 0


def test_google_closing_is_plus_one_and_opening_minus_one():
    assert commands([1.0, 0.0])[1] == 1 and commands([0.0, 1.0])[1] == -1


def test_google_change_is_held_for_fifteen_steps():
    """One step of "closed" and back: the gripper closes for 15 steps all the same."""
    assert commands([1.0, 0.0, *[1.0] * 20]) == [0, *[1] * 15, *[0] * 6]
    assert commands([1.0, *[0.0] * 20]) == [0, *[1] * 15, *[0] * 5]
    assert commands([1.0, 0.0, *[1.0] * 20], repeats=10) == [0, *[1] * 10, *[0] * 11]


def test_google_change_right_after_the_hold_counts():
    """Closed for exactly 15 steps, then open: the next latch starts at once, the other way."""
    assert commands([1.0, *[0.0] * 15, *[1.0] * 16]) == [0, *[1] * 15, *[-1] * 15, 0]


def test_google_change_during_the_hold_is_lost_when_every_step_is_compared():
    """Open again in the middle of the hold: OpenVLA never opens, SpatialVLA opens when the hold is over."""
    openings = [1.0, *[0.0] * 5, *[1.0] * 30]
    assert -1 not in commands(openings)
    held = commands(openings, every_step=False)
    assert held == [0, *[1] * 15, *[-1] * 15, *[0] * 5]


def test_google_small_changes_pass_through_and_slow_ones_do_not_latch():
    assert commands([1.0, 0.6, 0.2, 0.0]) == pytest.approx([0, 0.4, 0.4, 0.2])
    # Against the last latch the same slow closing counts, at the step where it has become half.
    assert commands([1.0, 0.6, 0.2, 0.2], every_step=False) == pytest.approx([0, 0.4, 0.8, 0.8])
    assert commands([1.0, 0.5, 0.5]) == [0, 0.5, 0], "exactly one half does not latch"


def naive_sticky(openings: list[float], repeats: int) -> list[float]:
    """Octo's and OpenVLA's rule, step by step with its own three variables (fact sheet §5)."""
    previous, sticky, repeated, value, out = None, False, 0, 0.0, []
    for opening in openings:
        relative = 0.0 if previous is None else previous - opening
        previous = opening
        if abs(relative) > 0.5 and not sticky:
            sticky, value = True, relative
        if sticky:
            repeated, relative = repeated + 1, value
        if repeated == repeats:
            sticky, repeated, value = False, 0, 0.0
        out.append(relative)
    return out


@given(st.lists(st.sampled_from([0.0, 0.3, 0.8, 1.0]), max_size=80), st.integers(1, 15))
def test_google_gripper_equals_the_rule_written_out(openings, repeats):
    assert commands(openings, repeats=repeats) == naive_sticky(openings, repeats)
