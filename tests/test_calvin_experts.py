"""CALVIN's scripted experts in the real simulator."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from envs.calvin_experts import CalvinExpert
from envs.calvin_sequences import ROBOT, STEPS, initial_scenes, initial_state, outcomes, sequences
from envs.calvin_sim import CalvinSim
from envs.calvin_table import Table
from vla.errors import UserError

ROOT = Path(__file__).resolve().parent.parent
missing = [name for name in ("calvin_env", "pybullet") if importlib.util.find_spec(name) is None]
pytestmark = [
    pytest.mark.sim,
    pytest.mark.skipif(bool(missing), reason=f"{', '.join(missing)} is not installed: make calvin"),
]
in_d = pytest.mark.parametrize("sim", ["D"], indirect=True)


@pytest.fixture(scope="module")
def sim(request) -> CalvinSim:
    simulator = CalvinSim(request.param, cameras=())
    yield simulator
    simulator.close()


def start(sim: CalvinSim, task: str) -> None:
    """The first of the protocol's scenes in which the task can be done."""
    sim.reload()
    sim.reset(*initial_state(next(scene for scene in initial_scenes() if outcomes(scene, task))))


def attempt(sim: CalvinSim, task: str, seed: int = 0) -> tuple[np.ndarray, bool]:
    """Actions (n, 7) up to success or the protocol's last step, and whether it was success."""
    before, expert = sim.info(), CalvinExpert(sim, task, np.random.default_rng(seed))
    actions = []
    while len(actions) < STEPS:
        actions.append(expert.act())
        sim.step(actions[-1])
        if sim.achieved(task, before):
            return np.array(actions), True
    return np.array(actions), False


@in_d
@pytest.mark.parametrize(
    "task",
    [
        "open_drawer",
        "move_slider_left",
        "turn_on_led",
        "turn_on_lightbulb",
        "rotate_red_block_right",
        "push_blue_block_left",
        "lift_pink_block_table",
        "lift_red_block_slider",
    ],
)
def test_does_the_task_smoothly(sim, task):
    start(sim, task)
    actions, done = attempt(sim, task)
    assert done and len(actions) <= 100
    assert actions.shape[1] == 7 and actions.dtype == np.float64
    assert np.abs(actions[:, :6]).max() <= 1 and set(actions[:, 6]) <= {0.0, 1.0}
    assert np.linalg.norm(np.diff(actions[:, :3], axis=0), axis=1).max() < 0.25, "a jerk of the hand"
    assert np.linalg.norm(np.diff(actions[:, 3:6], axis=0), axis=1).max() < 0.35, "a jerk of the wrist"


@in_d
@pytest.mark.parametrize("then", ["place_in_slider", "stack_block"])
def test_goes_on_from_where_the_last_task_ended(sim, then):
    start(sim, "lift_red_block_table")
    assert attempt(sim, "lift_red_block_table")[1]
    assert attempt(sim, then)[1]


@in_d
def test_fetches_a_block_that_it_dropped(sim):
    start(sim, "lift_red_block_table")
    assert attempt(sim, "lift_red_block_table")[1]
    before, expert = sim.info(), CalvinExpert(sim, "place_in_slider", np.random.default_rng(0))
    dropped = False
    for _ in range(STEPS):
        action = expert.act()
        if not dropped:
            action = np.append(action[:6], 1.0)  # the fingers open by themselves
            dropped = "robot" not in Table(sim).touching("red")
        sim.step(action)
        if sim.achieved("place_in_slider", before):
            break
    assert dropped and sim.achieved("place_in_slider", before)


@in_d
def test_same_seed_same_actions_and_states(sim):
    def run(seed: int):
        start(sim, "lift_red_block_slider")
        actions, _ = attempt(sim, "lift_red_block_slider", seed)
        return actions, np.concatenate(sim.state())

    global_state = np.random.get_state()[1].copy()
    (actions, state), (again, state_again), (other, _) = run(3), run(3), run(4)
    np.testing.assert_array_equal(actions, again)
    np.testing.assert_array_equal(state, state_again)
    assert not np.array_equal(actions[:20], other[:20]), "the generator varies the demonstrations"
    np.testing.assert_array_equal(np.random.get_state()[1], global_state)


@in_d
def test_holds_still_once_done(sim):
    start(sim, "turn_on_led")
    before, expert = sim.info(), CalvinExpert(sim, "turn_on_led", np.random.default_rng(0))
    for _ in range(150):
        action = expert.act()
        sim.step(action)
    assert sim.achieved("turn_on_led", before)
    np.testing.assert_allclose(action[:6], 0, atol=1e-9)


@in_d
def test_unknown_task_is_named(sim):
    with pytest.raises(UserError, match="make_coffee"):
        CalvinExpert(sim, "make_coffee", np.random.default_rng(0))


@pytest.mark.parametrize("sim", ["A", "B", "C"], indirect=True)
@pytest.mark.parametrize("task", ["close_drawer", "turn_off_lightbulb", "turn_on_lightbulb", "move_slider_right"])
def test_finds_its_way_in_other_scenes(sim, task):
    """Drawer, switch and door lie elsewhere in each scene (fact sheet calvin §2)."""
    sim.reload()
    sim.reset()
    _, scene = sim.state()
    scene[0], scene[1] = (0.24, 0.0) if task == "move_slider_right" else (0.0, 0.22)
    scene[3], scene[4] = (0.088, 1) if task == "turn_off_lightbulb" else (0.0, 0)
    sim.reset(ROBOT, scene)
    assert attempt(sim, task)[1]


@in_d
@pytest.mark.slow
def test_first_hundred_chains(sim):
    """Measured: Avg. Len. 4.85. A random policy has 0; quick experts of the fact sheet (calvin §6) 3.76."""
    done = []
    for index, (scene, tasks) in enumerate(sequences(100)):
        sim.reload()
        sim.reset(*initial_state(scene))
        count = 0
        while count < len(tasks) and attempt(sim, tasks[count], seed=100 * index + count)[1]:
            count += 1
        done.append(count)
    assert np.mean(done) >= 4.6


@pytest.mark.slow
def test_killed_and_resumed_chains_are_those_of_an_undisturbed_run(tmp_path):
    """`evaluate.py policy=expert`: two workers without disturbance; two workers, kill -9 in the middle, then one."""
    sequences()  # made once, outside the runs

    def command(root: str, workers: int) -> list[str]:
        words = "policy=expert benchmark=calvin_abc_d benchmark.renderer=tiny episodes=10"
        where = (f"results_root={tmp_path / root}", f"evaluation.workers={workers}")
        return [sys.executable, "evaluate.py", *words.split(), *where]

    def rows(root: str) -> list[dict]:
        files = list((tmp_path / root).rglob("episodes.jsonl"))
        lines = files[0].read_text().split("\n")[:-1] if files else []
        return [{k: v for k, v in json.loads(line).items() if k != "seconds"} for line in lines]

    subprocess.run(command("whole", 2), check=True, cwd=ROOT)
    killed = subprocess.Popen(command("killed", 2), cwd=ROOT)
    deadline = time.monotonic() + 300
    while len(rows("killed")) < 3 and killed.poll() is None and time.monotonic() < deadline:
        time.sleep(0.05)
    killed.kill()
    killed.wait()
    before = rows("killed")
    assert 3 <= len(before) < 10, "killed in the middle"
    subprocess.run(command("killed", 1), check=True, cwd=ROOT)
    assert rows("killed") == rows("whole") and len(rows("whole")) == 10
    assert sum(row["success"] for row in rows("whole")) >= 6
