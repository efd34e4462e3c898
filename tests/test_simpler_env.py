"""SimplerEnv's WidowX tasks in the real simulator, ManiSkill3 (make simpler; the scenes are at MS_ASSET_DIR)."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image
from scipy.spatial.transform import Rotation

from envs.simpler.maniskill3 import TASKS, WidowXEnv, asset_folder
from envs.simpler.protocol import cells
from envs.simpler.vulkan import resolve_renderer
from tests.simpler_sim import NOTHING, sim
from vla.errors import UserError

pytestmark = pytest.mark.xdist_group("simpler")  # building a drawn environment takes seconds: once, not once a worker


@pytest.fixture(scope="module")
def drawn():
    """task, background -> an environment with its camera, each built once."""
    try:
        resolve_renderer("auto")
    except UserError as error:
        pytest.skip(str(error))
    built: dict[tuple[str, str], WidowXEnv] = {}

    def get(task: str, background: str = "overlay") -> WidowXEnv:
        if (task, background) not in built:
            built[task, background] = WidowXEnv(task, background=background)
        return built[task, background]

    yield get
    for env in built.values():
        env.close()


@pytest.fixture(scope="module")
def blind():
    """task -> an environment without camera: no Vulkan, a tenth of the time."""
    built: dict[str, WidowXEnv] = {}

    def get(task: str) -> WidowXEnv:
        if task not in built:
            built[task] = WidowXEnv(task, cameras=())
        return built[task]

    yield get
    for env in built.values():
        env.close()


def actions(count: int, seed: int = 0) -> np.ndarray:
    rng = np.random.default_rng(seed)
    motions = rng.uniform(-1, 1, (count, 6)) * [0.02, 0.02, 0.02, 0.1, 0.1, 0.1]
    return np.concatenate([motions, rng.integers(0, 2, (count, 1))], axis=1)


def segmentation(env: WidowXEnv) -> np.ndarray:
    """(480, 640) ids of the bodies in the present frame."""
    simulator = env.maniskill
    data = simulator.get_obs(simulator.get_info())["sensor_data"]["3rd_view_camera"]
    return data["segmentation"][0, ..., 0].numpy()


def bodies(env: WidowXEnv) -> dict[str, int]:
    """Name -> id, of everything in the scene."""
    return {body.name: number for number, body in env.maniskill.segmentation_id_map.items()}


FOREGROUND = {
    "spoon_on_towel": {"bridge_spoon_generated_modified", "table_cloth_generated_shorter"},
    "carrot_on_plate": {"bridge_carrot_generated_modified", "bridge_plate_objaverse_larger"},
    "stack_cube": {"baked_green_cube_3cm", "baked_yellow_cube_3cm"},
    "eggplant_in_basket": {"eggplant"},
}
BACKGROUND = {"arena", "sink", "dummy_sink_target_plane"}


@pytest.mark.sim
@sim
def test_the_four_tasks_render(drawn, tmp_path):
    """Left in the test's folder as contact_sheet.png: a row per task, episodes 0, 9 and 18."""
    rows = []
    for task in TASKS:
        env, row = drawn(task), []
        for seed in (0, 9, 18):
            observation = env.reset(seed)
            frame = observation["images"]["static"]
            assert frame.shape == (480, 640, 3) and frame.dtype == np.uint8
            seen, ids = segmentation(env), bodies(env)
            for name in FOREGROUND[task]:
                assert (seen == ids[name]).sum() > 150, f"{name} is not to be seen in episode {seed} of {task}"
            # Robot and objects are drawn, everything else is the photo.
            front = np.isin(seen, [number for name, number in ids.items() if name not in BACKGROUND])
            photo = "bridge_sink.png" if task == "eggplant_in_basket" else "bridge_real_eval_1.png"
            folder = asset_folder() / "data/tasks/bridge_v2_real2sim_dataset/real_inpainting"
            overlay = np.array(Image.open(folder / photo).convert("RGB").resize((640, 480), Image.Resampling.BILINEAR))
            np.testing.assert_allclose(frame[~front].astype(int), overlay[~front], atol=1)
            assert 0.02 < front.mean() < 0.4
            assert np.abs(frame[front].astype(int) - overlay[front]).mean() > 20, "nothing is drawn over the photo"
            row.append(frame)
        assert not np.array_equal(row[0], row[1])
        rows.append(np.concatenate(row, axis=1))
    # Each keeps its own photo, whatever was built after it.
    np.testing.assert_array_equal(drawn(TASKS[0]).reset(0)["images"]["static"], rows[0][:, :640])
    sheet = Image.fromarray(np.concatenate(rows))
    sheet.resize((sheet.width // 2, sheet.height // 2)).save(tmp_path / "contact_sheet.png")


@pytest.mark.sim
@sim
@pytest.mark.parametrize("task", TASKS)
def test_objects_start_where_the_protocol_says(blind, task):
    env = blind(task)
    for seed in (0, 1, 23):
        env.reset(seed)
        (*source, yaw), (*target, _) = cells("widowx", [task])[seed].placement.values()
        found = {name: body.pose for name, body in env.maniskill.objs.items()}
        for name, xy in zip(found, (source, target), strict=True):
            np.testing.assert_allclose(found[name].p[0, :2], xy, atol=0.004, err_msg=f"{name}, episode {seed}")
        if task != "eggplant_in_basket":  # which rolls as it comes to rest
            along = Rotation.from_quat(next(iter(found.values())).q[0].numpy(), scalar_first=True).apply([1, 0, 0])
            turned = np.rad2deg(np.arctan2(along[1], along[0])) - yaw
            assert abs((turned + 180) % 360 - 180) < 8
        robot = env.maniskill.agent.robot.pose.raw_pose[0].numpy()
        place = (0.127, 0.06, 0.85) if task == "eggplant_in_basket" else (0.147, 0.028, 0.87)
        np.testing.assert_allclose(robot, [*place, 0, 0, 0, 1], atol=1e-6)


@pytest.mark.sim
@sim
def test_rendering_changes_no_state(drawn, blind):
    """Every step, every third, none, and without a renderer at all: the same states bit for bit."""

    def run(env: WidowXEnv, every: int) -> tuple[np.ndarray, dict[int, np.ndarray]]:
        env.reset(5)
        states, frames = [env.sim_state()], {}
        for index, action in enumerate(actions(15)):
            env.step(action, render=bool(every) and index % every == 0)
            states.append(env.sim_state())
            if every and index % every == 0:
                frames[index] = env.observe()["images"]["static"]
        return np.stack(states), frames

    env = drawn("carrot_on_plate")
    states, frames = run(env, 1)
    for every in (3, 0):
        other, seen = run(env, every)
        np.testing.assert_array_equal(other, states)
        for index, frame in seen.items():
            np.testing.assert_array_equal(frame, frames[index])
    np.testing.assert_array_equal(run(blind("carrot_on_plate"), 0)[0], states)
    assert not np.array_equal(frames[0], frames[12]) and np.ptp(states, axis=0).max() > 0.01


@pytest.mark.sim
@sim
def test_reset_is_a_function_of_task_and_seed_alone(blind):
    """The eggplant, which comes to rest elsewhere, by up to a decimetre, where a scene is used again."""

    def run(env: WidowXEnv, order: list[int]) -> dict[int, np.ndarray]:
        traces = {}
        for index, seed in enumerate(order):
            env.reset(seed)
            states = [env.sim_state()]
            for action in actions(4):
                env.step(action)
                states.append(env.sim_state())
            traces[seed] = np.stack(states)
            for action in actions(6, seed=index):  # what happens before another episode
                env.step(action * [2, 2, 2, 1, 1, 1, 1])
        return traces

    order = [15, 2, 9, 23, 16]
    fresh = WidowXEnv("eggplant_in_basket", cameras=())
    first, again = run(fresh, order), run(blind("eggplant_in_basket"), [7, *reversed(order)])
    fresh.close()
    for seed in order:
        np.testing.assert_array_equal(again[seed], first[seed])
    assert not np.array_equal(first[15][0], first[2][0])


@pytest.mark.sim
@sim
@pytest.mark.parametrize("task", ["carrot_on_plate", "eggplant_in_basket"])
def test_masked_frames_differ_outside_robot_and_objects_only(drawn, task):
    """On the simulator's own segmentation, of an environment built after ones of other tasks."""
    plain, masked = drawn(task), drawn(task, "masked")
    frame, hidden = (env.reset(9)["images"]["static"] for env in (plain, masked))
    seen, ids = segmentation(plain), bodies(plain)
    links = {link.name for link in plain.maniskill.agent.robot.links}
    front = np.isin(seen, [ids[name] for name in links | FOREGROUND[task]])
    np.testing.assert_array_equal(hidden[front], frame[front])
    assert not hidden[~front].any() and frame[~front].any(axis=-1).mean() > 0.9
    assert set(plain.kept_ids()) == {ids[name] for name in links | FOREGROUND[task]}
    for action in actions(6):
        plain.step(action)
        masked.step(action)
    front = np.isin(segmentation(plain), plain.kept_ids())
    images = [env.observe()["images"]["static"] for env in (plain, masked)]
    np.testing.assert_array_equal(images[1], np.where(front[..., None], images[0], 0))
    assert masked.versions()["background"] == "masked" and plain.versions()["background"] == "overlay"


@pytest.mark.sim
@sim
def test_success_rules(blind, monkeypatch):
    """Success is put in by hand, true in the steps 2 and 3 of 5 and in the last: what a step returns."""
    env = blind("stack_cube")
    monkeypatch.setattr(env, "max_steps", 5)

    def run(rule: str, holds: list[bool]) -> list[bool]:
        monkeypatch.setattr(env, "success_rule", rule)
        env.reset(0)
        told = iter(holds)
        monkeypatch.setattr(env.maniskill, "get_info", lambda: {"success": [next(told)]})
        results = []
        while not env._ended:
            results.append(env.step(NOTHING))
        with pytest.raises(RuntimeError, match="has ended"):
            env.step(NOTHING)
        monkeypatch.undo()
        monkeypatch.setattr(env, "max_steps", 5)
        return results

    passing, lasting = [False, True, True, False, False], [False, True, False, False, True]
    assert run("last_step", passing) == [False] * 5, "what was true and is no more"
    assert run("last_step", lasting) == [*[False] * 4, True]
    assert run("ever", passing) == run("early_stop", passing) == [False, True]
    assert run("ever", [False] * 5) == [False] * 5


@pytest.mark.sim
@sim
def test_actions_move_the_target_pose_in_the_base_axes(blind):
    env = blind("stack_cube")
    env.reset(0)

    def target() -> tuple[np.ndarray, Rotation]:
        pose = env.maniskill.agent.controller.controllers["arm"]._target_pose
        return pose.p[0].numpy(), Rotation.from_quat(pose.q[0].numpy(), scalar_first=True)

    place, turn = target()
    rpy = np.array([0.3, -0.2, 0.4])
    env.step(np.array([0.01, -0.02, -0.03, *rpy, 1]))
    moved, turned = target()
    np.testing.assert_allclose(moved - place, [0.01, -0.02, -0.03], atol=1e-6)
    # SimplerEnv's own: Rz(yaw) · Ry(pitch) · Rx(roll), from the left.
    about = [Rotation.from_rotvec(angle * axis) for angle, axis in zip(rpy, np.eye(3), strict=True)]
    expected = about[2] * about[1] * about[0] * turn
    assert (expected.inv() * turned).magnitude() < 1e-3
    env.reset(0)
    env.rotation = "axis_angle"
    try:
        env.step(np.array([0, 0, 0, *rpy, 1]))
        assert ((Rotation.from_rotvec(rpy) * turn).inv() * target()[1]).magnitude() < 1e-3
    finally:
        env.rotation = "euler"
    for bad in (np.zeros(6), np.full(7, np.nan)):
        with pytest.raises(ValueError, match="7 finite"):
            env.step(bad)


@pytest.mark.sim
@sim
def test_state_is_bridge_data(blind):
    """Base axes, rotation from the hand pointing down, opening in [0, 1]; the start pose is the fact sheet's (§4a)."""
    env = blind("carrot_on_plate")
    state = env.reset(0)["state"]
    assert state.shape == (7,) and state.dtype == np.float32
    world = np.array([-0.1451, 0.0341, 1.0053])  # of the hand; the base is turned by 180° about z
    np.testing.assert_allclose(state[:3], (world - [0.147, 0.028, 0.87]) * [-1, -1, 1], atol=2e-4)
    assert np.abs(state[3:6]).max() < 0.06 and state[6] == 1
    for _ in range(6):
        env.step(NOTHING * [1, 1, 1, 1, 1, 1, 0])
    assert env.proprioception()[6] < 0.1
    before = env.proprioception()
    for _ in range(6):
        env.step(np.array([0.02, 0, 0, 0, 0, 0.05, 1]))
    after = env.proprioception()
    np.testing.assert_allclose(after[:3] - before[:3], [0.12, 0, 0], atol=0.02)
    np.testing.assert_allclose(after[3:6] - before[3:6], [0, 0, 0.3], atol=0.06)
    assert after[6] > 0.9


@pytest.mark.sim
@sim
def test_episodes_end_at_24_and_an_undrawn_frame_is_not_to_be_had(drawn):
    env = drawn("carrot_on_plate")
    with pytest.raises(UserError, match="no episode 24; seeds are 0 to 23"):
        env.reset(24)
    env.reset(0)
    env.step(NOTHING, render=False)
    with pytest.raises(RuntimeError, match="not rendered"):
        env.observe()
    versions = env.versions()
    assert versions["mani_skill"] == "3.0.1" and versions["success_rule"] == "last_step"
    assert versions["renderer"] in ("vulkan-cpu", "vulkan-gpu") and versions["stage"] in ("proxy", "original")
    assert env.max_steps == 60 and env.instruction == "put carrot on plate"
