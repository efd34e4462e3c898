"""CALVIN's protocol (pure functions, always tested) and its real simulator (where it is installed)."""

from __future__ import annotations

import hashlib
import importlib.util
import json

import numpy as np
import pytest

from data.calvin import CalvinSplit
from envs.calvin_sequences import (
    RULES,
    TASKS,
    fnv1_32,
    generate,
    initial_scenes,
    initial_state,
    is_chain,
    outcomes,
)
from vla.cli import compose_config
from vla.errors import UserError

installed = importlib.util.find_spec("calvin_env") is not None and importlib.util.find_spec("pybullet") is not None
sim = pytest.mark.skipif(not installed, reason="calvin_env is not installed: make calvin")

FIRST = {
    "led": 1, "lightbulb": 1, "slider": "left", "drawer": "open", "red_block": "slider_left", "blue_block": "table",
    "pink_block": "slider_right", "grasped": 0,
}  # fmt: skip
FIRST_TASKS = [
    "rotate_blue_block_right", "move_slider_right", "lift_red_block_slider", "place_in_slider", "turn_off_lightbulb",
]  # fmt: skip
PUBLISHED = "840cb992c69ce9b6d59f6020966b6300c15233f8e0b9667b6486c1962424d308"
"""sha256 of the JSON of the 1,000 chains; they were compared one by one with the list that VLM4VLA publishes."""


def test_hash_is_pyhash():
    """Upstream's test vectors and the golden value of the first scene (fact sheets calvin §1, baselines §1.5)."""
    assert (fnv1_32("test"), fnv1_32("hello world")) == (3910690890, 3799943344)
    assert fnv1_32(str(FIRST.values())) == 2138410836


def test_scenes_and_rules():
    scenes = initial_scenes()
    assert len(scenes) == 192 and FIRST in scenes and len(TASKS) == 34
    assert list(scenes[0]) == list(FIRST), "the order of the keys is hashed"
    assert is_chain(FIRST, FIRST_TASKS)
    assert not is_chain(FIRST, [*FIRST_TASKS[:4], "move_slider_left"]), "two tasks of one category"
    assert not is_chain(FIRST, FIRST_TASKS[1:2] + FIRST_TASKS[2:4] + ["open_drawer", "stack_block"])
    # Stacking with two blocks on the table could end in two ways, so it is in no chain.
    held = FIRST | {"red_block": "grasped", "grasped": 1, "pink_block": "table"}
    assert len(outcomes(held, "stack_block")) == 2 and not is_chain(held, ["stack_block"])
    assert all(not outcomes(FIRST, task) for task in ("open_drawer", "turn_on_led", "unstack_block"))
    assert {category for category, _ in RULES.values()} == set(range(1, 12))


def test_start_state_of_the_first_chain():
    robot, scene = initial_state(FIRST)
    assert robot.shape == (15,) and robot[14] == 1
    assert scene[:6].tolist() == [0.28, 0.22, 0, 0.088, 1, 1]
    np.testing.assert_allclose(scene[6:9], [-0.240851662, 0.0924044687, 0.460990009])  # red, behind the slider's left
    np.testing.assert_allclose(scene[18:21], [0.070341633, 0.0924044687, 0.460990009])  # pink, behind its right
    assert scene[13] == pytest.approx(-0.12, abs=1e-4)  # blue, on the table
    yaws = scene[[11, 17, 23]]
    assert (np.abs(yaws - np.pi / 2) <= np.pi / 8).all() and len(set(yaws)) == 3
    assert initial_state(FIRST)[1].tolist() == scene.tolist()


@pytest.mark.slow
def test_chains_are_the_published_ones():
    chains = generate()
    assert chains[0] == (FIRST, FIRST_TASKS)
    assert hashlib.sha256(json.dumps(chains).encode()).hexdigest() == PUBLISHED


@pytest.fixture(scope="module")
def chains(tmp_path_factory):
    """The first chain as the cached list, and an environment: generating all 1,000 takes half a minute."""
    folder = tmp_path_factory.mktemp("data")
    (folder / "calvin").mkdir()
    (folder / "calvin" / "eval_sequences.json").write_text(json.dumps([[FIRST, FIRST_TASKS]] * 1000))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("VLA_DATA", str(folder))
        from envs.calvin import CalvinChains
        from envs.calvin_sequences import sequences

        sequences.cache_clear()
        env = CalvinChains("D", max_steps=40)
        yield env
        env.close()
        sequences.cache_clear()


def actions(count: int, seed: int = 0) -> np.ndarray:
    rng = np.random.default_rng(seed)
    return np.concatenate([rng.uniform(-1, 1, (count, 6)), rng.integers(0, 2, (count, 1))], axis=1)


@pytest.mark.sim
@sim
def test_reset_is_a_function_of_the_chain_alone(chains):
    def run(noise: int) -> np.ndarray:
        chains.reset(0)
        for action in actions(noise, seed=noise):
            chains.step(action)
        first = chains.reset(1)
        states = [chains.sim_state()]
        for action in actions(25):
            chains.step(action)
            states.append(chains.sim_state())
        return np.stack(states), first

    (a, observation), (b, other) = run(0), run(30)
    np.testing.assert_array_equal(a, b)
    for camera, shape in (("static", (200, 200, 3)), ("wrist", (84, 84, 3))):
        assert observation["images"][camera].shape == shape and observation["images"][camera].dtype == np.uint8
        np.testing.assert_array_equal(observation["images"][camera], other["images"][camera])
    assert observation["state"].shape == (15,) and observation["state"][14] == 1
    np.testing.assert_allclose(observation["state"], initial_state(FIRST)[0], atol=1e-4)


@pytest.mark.sim
@sim
def test_rendering_changes_no_state(chains):
    traces = []
    for every in (0, 1, 3):
        chains.reset(0)
        trace = []
        for index, action in enumerate(actions(30)):
            chains.step(action)
            if every and index % every == 0:
                chains.observe()
            trace.append(chains.sim_state())
        traces.append(np.stack(trace))
    np.testing.assert_array_equal(traces[0], traces[1])
    np.testing.assert_array_equal(traces[0], traces[2])


@pytest.mark.sim
@sim
def test_a_chain_moves_on_and_ends(chains):
    """Success is put in by hand: what is tested is what the environment makes of it."""
    chains.reset(0)
    first = chains.instruction
    done = iter([False, False, True, False, True, *[False] * 100])
    chains.sim.achieved = lambda task, before: next(done)
    try:
        hold = np.array([0, 0, 0, 0, 0, 0, 1.0])
        assert not chains.step(hold) and not chains.replan
        chains.step(hold)
        assert not chains.step(hold) and chains.replan and not chains.failed
        assert chains.instruction != first and chains.subtasks[0] == {
            "task": FIRST_TASKS[0],
            "success": True,
            "steps": 3,
        }
        chains.step(hold)
        assert not chains.replan
        chains.step(hold)
        for _ in range(40):
            assert not chains.failed
            chains.step(hold)
        assert chains.failed and [s["steps"] for s in chains.subtasks] == [3, 2, 40]
        with pytest.raises(RuntimeError, match="has ended"):
            chains.step(hold)
        chains.reset(0)
        chains.sim.achieved = lambda task, before: True
        assert [chains.step(hold) for _ in range(5)] == [False, False, False, False, True]
        assert not chains.failed and len(chains.subtasks) == 5
    finally:
        del chains.sim.achieved


@pytest.mark.sim
@sim
def test_bad_actions_scenes_and_renderers_are_named(chains, monkeypatch):
    from envs.calvin_sim import CalvinSim, resolve_renderer

    for bad in (np.zeros(6), np.full(7, np.nan)):
        with pytest.raises(ValueError, match="7 finite numbers"):
            chains.sim.step(bad)
    with pytest.raises(UserError, match="chain 1000"):
        chains.reset(1000)
    with pytest.raises(UserError, match="scene 'E'"):
        CalvinSim("E")
    with pytest.raises(UserError, match="overhead"):
        CalvinSim("D", ("overhead",))
    with pytest.raises(UserError, match="renderer=opengl"):
        resolve_renderer("opengl")
    monkeypatch.delenv("VLA_CALVIN_EGL", raising=False)
    monkeypatch.setenv("EGL_VISIBLE_DEVICES", "7")
    with pytest.raises(UserError, match=r"EGL_VISIBLE_DEVICES=7.*renderer=tiny"):
        resolve_renderer("egl")
    assert resolve_renderer("auto") == "tiny"


@pytest.mark.sim
@sim
def test_motion_is_clipped_and_the_gripper_is_binary(chains):
    chains.reset(0)
    before = chains.sim.env.robot.target_pos.copy()
    chains.step(np.array([5.0, 0, 0, 0, 0, 0, 0.7]))
    np.testing.assert_allclose(chains.sim.env.robot.target_pos - before, [0.02, 0, 0], atol=1e-9)
    assert chains.sim.env.robot.gripper_action == 1
    chains.step(np.array([0, 0, 0, 0, 0, 0, 0.3]))
    assert chains.sim.env.robot.gripper_action == -1
    assert chains.reset(0)["state"][14] == 1, "the last episode's gripper command must not survive"


@pytest.mark.slow
@pytest.mark.sim
@sim
def test_collected_data_are_of_the_official_layout_and_replay(tmp_path, monkeypatch):
    from envs.calvin_collection import Settings, collect_scene
    from envs.calvin_sim import CalvinSim

    folder = tmp_path / "training"
    (folder / ".collect").mkdir(parents=True)
    settings = Settings("B", 2, ("static",), "tiny", 0)
    collect_scene(folder, settings)
    before = {path.name: path.read_bytes() for path in folder.glob("*.npz")}
    journal = (folder / ".collect" / "B.jsonl").read_text()
    # Killed in the middle of a segment and gone on with: the same files.
    (folder / ".collect" / "B.jsonl").write_text("")
    next(iter(sorted(folder.glob("*.npz")))).unlink()
    collect_scene(folder, settings)
    assert (folder / ".collect" / "B.jsonl").read_text() == journal
    assert {path.name: path.read_bytes() for path in folder.glob("*.npz")} == before
    from envs.calvin_collection import _finish

    _finish(folder, ("B",))
    split = CalvinSplit(folder)
    assert len(split.annotations) >= 2
    window = split.annotations[0]
    files = [np.load(split.frame_file(frame)) for frame in range(window.start, window.end + 1)]
    assert all(np.abs(file["rel_actions"][:6]).max() <= 1 and abs(file["rel_actions"][6]) == 1 for file in files)
    table = CalvinSim("B", ("static",))
    table.reload()
    table.reset(files[0]["robot_obs"].astype(float), files[0]["scene_obs"].astype(float))
    start = table.info()
    done = False
    for file in files:
        table.step(np.append(file["rel_actions"][:6], file["rel_actions"][6] > 0))
        done = done or table.achieved(window.task, start)
    table.close()
    assert done


def test_collecting_without_the_simulator_is_one_line(tmp_path, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    monkeypatch.setattr("envs.calvin_sim.find_spec", lambda name: None)
    from envs.calvin_collection import collect_calvin

    with pytest.raises(UserError, match="make calvin"):
        collect_calvin(tmp_path / "out", 3)
    assert not (tmp_path / "out").exists()


def test_benchmark_composes():
    cfg = compose_config("evaluate", "policy=x", "benchmark=calvin_abc_d")
    assert (cfg.benchmark.family, cfg.benchmark.max_steps, cfg.benchmark.chunk) == ("calvin", 360, 10)
