"""The original SimplerEnv with its simulator pretended: episodes, commands, notes, files, what is missing."""

from __future__ import annotations

import subprocess
import sys
from collections import Counter

import numpy as np
import pytest

from envs import episodes
from envs.simpler import assets, original, sapien2
from envs.simpler.assets import LARGE, check_assets, git_hash, large_files, stand_ins
from envs.simpler.masking import MASK_COLOUR
from envs.simpler.original import OriginalEnv
from envs.simpler.proprioception import fractal_state
from envs.simpler.protocol import cells, paraphrased
from tests.simpler_sim import NOTHING, ROOT
from vla.cli import compose_config
from vla.errors import UserError


class Body:
    def __init__(self, name: str, number: int, links: int = 0):
        self.name, self.id = name, number
        self.links = [Body(f"{name}{index}", number + index) for index in range(links)]

    def get_links(self) -> list:
        return self.links


class PretendedSimulator:
    """Says the cell's instructions, the second one from step 3 on; true in the steps `holds`; a frame of one value."""

    rgb_always_overlay_objects = ("sink",)

    def __init__(self, said: tuple[str, ...], holds: set[int]):
        self.said, self.holds, self.commands, self.drawn = said, holds, [], 0
        self._obs_mode, self.resets = "none", []

    def reset(self, options: dict) -> None:
        self.resets.append(options)

    def step(self, command: np.ndarray) -> tuple:
        self.commands.append(command)
        return None, 0.0, len(self.commands) in self.holds, False, {}

    def get_language_instruction(self) -> str:
        return self.said[min(len(self.commands) // 3, len(self.said) - 1)]

    def get_obs(self) -> dict:
        assert self._obs_mode == "image"
        self.drawn += 1
        colour = np.full((4, 5, 4), 0.999, dtype=np.float32)
        ids = np.zeros((4, 5, 4), dtype=np.int64)
        ids[..., 1] = np.arange(20).reshape(4, 5)
        picture = {"Color": colour, "Segmentation": ids}
        return {"image": {"overhead_camera": picture, "3rd_view_camera": picture}}

    def get_actors(self) -> list[Body]:
        return [Body("arena", 1), Body("opened_coke_can", 2), Body("sink", 3), Body("goal_site", 4)]

    def get_articulations(self) -> list[Body]:
        return [Body("robot", 5, links=3), Body("cabinet", 10, links=2)]

    def close(self) -> None:
        self.commands = None


@pytest.fixture
def pretend(monkeypatch, tmp_path):
    """(suite, task, holds, arguments) -> an OriginalEnv whose simulators are pretended; `env.made` are those."""
    monkeypatch.setattr(original, "asset_folder", lambda: tmp_path)
    monkeypatch.setattr(original, "check_assets", lambda root, cell: None)
    monkeypatch.setattr(sapien2, "renderer", lambda kind: ("cpu", None))
    monkeypatch.setattr(original, "_commit", lambda package: "12345678")

    def make(suite: str, task: str, holds: set[int] = frozenset(), **arguments) -> OriginalEnv:
        env = OriginalEnv(suite, task, **arguments)
        env.made = []

        def build(seed: int) -> PretendedSimulator:
            env.made.append(PretendedSimulator(env._cells[seed].instructions, holds))
            return env.made[-1]

        monkeypatch.setattr(env, "_build", build)
        monkeypatch.setattr(env, "proprioception", lambda: np.zeros(8, dtype=np.float32))
        return env

    return make


def test_success_rules(pretend):
    """True in the steps 2 and 3 of 5, and in 2 and 5: what a step returns, and that the episode ends with it."""
    for rule, holds, expected in (
        ("last_step", {2, 3}, [False] * 5),
        ("last_step", {2, 5}, [*[False] * 4, True]),
        ("ever", {2, 3}, [False, True]),
        ("early_stop", {2, 3}, [False, True]),
        ("ever", set(), [False] * 5),
    ):
        env = pretend("google_vm", "open_drawer/top", holds, success_rule=rule, max_steps=5)
        env.reset(0)
        results = []
        while not env._ended:
            results.append(env.step(NOTHING))
        assert results == expected
        with pytest.raises(RuntimeError, match="has ended"):
            env.step(NOTHING)


def test_every_episode_gets_a_simulator_of_its_own_and_the_protocols_options(pretend):
    env = pretend("google_vm", "pick_coke_can/vertical")
    for seed in (0, 60):
        env.reset(seed)
        env.step(NOTHING)
        options = env.simulator.resets[0]
        assert options == env._cells[seed].reset and options is not env._cells[seed].reset
        options["obj_init_options"]["cabinet_init_qpos"] = 0.2  # as some environments do
    assert len(env.made) == 2 and env.made[0].commands is None, "the one before is closed"
    assert all("cabinet_init_qpos" not in cell.reset["obj_init_options"] for cell in cells("google_vm"))
    with pytest.raises(UserError, match="no episode 100; seeds are 0 to 99"):
        env.reset(100)


def test_commands_are_those_of_the_robot(pretend):
    """Google: sticky and relative, anew in every episode; WidowX: absolute."""
    openings = [1, 0, 1, 1, 1]
    env = pretend("google_vm", "pick_coke_can/vertical")
    for _ in range(2):
        env.reset(0)
        for opening in openings:
            env.step(np.array([0.1, 0.2, 0.3, 0, 0, 0.5, opening]))
        found = np.array(env.simulator.commands)
        np.testing.assert_array_equal(found[:, 6], [0, 1, 1, 1, 1])
        np.testing.assert_allclose(found[:, :6], [[0.1, 0.2, 0.3, 0, 0, 0.5]] * 5)
    env = pretend("widowx", "stack_cube", action_scale=0.5)
    env.reset(0)
    for opening in openings:
        env.step(np.array([0.1, 0, 0, 0, 0, 0.5, opening]))
    np.testing.assert_allclose(
        np.array(env.simulator.commands)[:, [0, 5, 6]], [[0.05, 0.25, 2 * o - 1] for o in openings]
    )


def test_a_second_instruction_is_told_and_seen_at_once(pretend):
    env = pretend("google_vm", "place_apple_in_top_drawer")
    assert env.reset(0)["instruction"] == "open top drawer"
    for step in range(1, 6):
        env.step(NOTHING, render=False)
        assert env.replan == (step == 3)
        if step == 3:
            assert env.observe()["instruction"] == "place apple into top drawer"
            assert env.observe()["images"]["static"].shape == (4, 5, 3)
        else:
            with pytest.raises(RuntimeError, match="not rendered"):
                env.observe()
    assert env.simulator.drawn == 2, "the first frame and the one of the new instruction"


def test_frames_are_drawn_on_request_and_masked_by_what_stands_in_front(pretend):
    env = pretend("google_vm", "pick_coke_can/vertical")
    frame = env.reset(0)["images"]["static"]
    assert frame.dtype == np.uint8 and (frame == 254).all(), "0.999 · 255 is cut off, not rounded"
    env.step(NOTHING)
    env.step(NOTHING, render=False)
    assert env.simulator.drawn == 2 and env.simulator._obs_mode == "none"
    env = pretend("google_vm", "pick_coke_can/vertical", background="masked")
    frame = env.reset(0)["images"]["static"].reshape(-1, 3)
    front = {2, 5, 6, 7, 10, 11}  # the can, the robot, the cabinet; not the arena, the goal, the sink
    assert {number for number in range(20) if (frame[number] == 254).all()} == front
    assert (frame[[number for number in range(20) if number not in front]] == MASK_COLOUR).all()
    blind = pretend("google_vm", "pick_coke_can/vertical", cameras=())
    assert blind.reset(0)["images"] == {} and blind.simulator.drawn == 0


def test_paraphrases_are_told_and_named(pretend):
    file = "data/simpler_paraphrases.yaml"
    env = pretend("google_vm", "move_near", paraphrases=file)
    expected = paraphrased(cells("google_vm", ["move_near"]), original.load_wordings(ROOT / file))
    told = [env.reset(seed)["instruction"] for seed in (0, 17, 239)]
    assert told == [expected[seed].instructions[0] for seed in (0, 17, 239)]
    assert not {t for t in told if t.startswith("move ")} and env.reset(17)["instruction"] == told[1]
    assert env.versions()["paraphrases"].split()[0] == "simpler_paraphrases.yaml"
    with pytest.raises(UserError, match="no paraphrases of 'open top drawer'"):
        pretend("google_vm", "open_drawer/top", paraphrases=file)


def test_a_simulator_that_says_something_else_is_not_evaluated(pretend, monkeypatch):
    env = pretend("google_vm", "open_drawer/top")
    monkeypatch.setattr(env, "_build", lambda seed: PretendedSimulator(("open middle drawer",), set()))
    with pytest.raises(RuntimeError, match="says 'open middle drawer' where the protocol of open_drawer/top"):
        env.reset(0)


def test_notes_are_the_same_for_every_task_of_a_suite(pretend):
    """Records of a run must agree in them (envs/records.py)."""
    tasks = dict.fromkeys(cell.task for cell in cells("google_vm"))
    notes = [pretend("google_vm", task, cameras=()).versions() for task in tasks]
    assert all(note == notes[0] for note in notes)
    assert notes[0]["drawers"] == "no ray tracing" and notes[0]["renderer"] == "vulkan-cpu"
    assert notes[0]["assets"].startswith("stand-ins for baked_opened_redbull_can, blue_plastic_bottle, google_pick")
    assert pretend("google_vm", "move_near", shader="rt").versions()["drawers"] == "ray tracing"
    assert "drawers" not in pretend("widowx", "stack_cube").versions()


def test_names_that_are_not_known_are_one_line(pretend):
    for wrong, choices in (
        ({"success_rule": "sometimes"}, "last_step, ever, early_stop"),
        ({"background": "white"}, "overlay, masked"),
        ({"rotation": "quaternion"}, "euler, axis_angle"),
        ({"shader": "opengl"}, "auto, rt, ibl"),
        ({"cameras": ("wrist",)}, "static only"),
    ):
        with pytest.raises(UserError, match=choices):
            pretend("google_vm", "move_near", **wrong)
    with pytest.raises(UserError, match="neither a score nor a task"):
        pretend("google_vm", "stack_cube")


def test_state_is_rt1s():
    """fractal20220817_data's base_pose_tool_reached is x, y, z, then the quaternion with w last."""
    state = fractal_state(np.array([1.0, 2, 3]), np.array([0.5, 0.1, 0.2, 0.3]), 1.2)
    np.testing.assert_array_equal(state, np.array([1, 2, 3, 0.1, 0.2, 0.3, 0.5, 1], dtype=np.float32))


def test_hash_is_gits(tmp_path):
    (tmp_path / "a.glb").write_bytes(b"some\0stage")
    found = subprocess.check_output(["git", "hash-object", "a.glb"], text=True, cwd=tmp_path).strip()
    assert git_hash(tmp_path / "a.glb") == found and git_hash(tmp_path / "b.glb") == ""
    assert len(set(LARGE.values())) == len(LARGE) and all(len(value) == 40 for value in LARGE.values())


def test_stand_ins_are_named_and_missing_assets_too(tmp_path, monkeypatch):
    suite = cells("google_vm", ["move_near"])
    stage, bottle, redbull = large_files(suite[0])
    assert stage.endswith("google_pick_coke_can_1_v4.glb") and "bottle" in bottle and "baked_opened_redbull" in redbull
    with pytest.raises(UserError, match=r"lacks .*google_pick_coke_can_1_v4\.glb, which move_near"):
        check_assets(tmp_path, suite[0])
    for path in (stage, bottle, redbull, suite[0].build["rgb_overlay_path"]):
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / path).write_bytes(path.encode())
    check_assets(tmp_path, suite[0])
    names = ["baked_opened_redbull_can", "blue_plastic_bottle", "google_pick_coke_can_1_v4"]
    assert stand_ins(tmp_path, suite) == names
    monkeypatch.setitem(LARGE, stage, assets.git_hash(tmp_path / stage))
    assert stand_ins(tmp_path, suite) == names[:2]
    # A model in another format is drawn too, and is a stand-in.
    (tmp_path / bottle).rename((tmp_path / bottle).with_suffix(".glb"))
    check_assets(tmp_path, suite[0])
    (tmp_path / bottle).with_suffix(".glb").unlink()
    with pytest.raises(UserError, match="lacks custom/models/blue_plastic_bottle"):
        check_assets(tmp_path, suite[0])
    drawers = cells("google_vm", ["drawer", "place_apple_in_top_drawer"])
    assert stand_ins(tmp_path, drawers) == [], "they need none of the large files"


def test_importing_the_environment_is_light():
    """The other interpreter has neither torch nor Hydra."""
    script = (
        "import sys, envs.simpler.original, envs.worker; "
        "print([m for m in ('torch', 'hydra', 'vla.config', 'sapien', 'pandas') if m in sys.modules])"
    )
    assert subprocess.check_output([sys.executable, "-c", script], text=True, cwd=ROOT).strip() == "[]"


def planned(monkeypatch, *overrides: str) -> tuple[str, dict, list]:
    """What evaluate.py would run."""
    monkeypatch.setattr(sapien2, "resolve_renderer", lambda python, renderer: "cpu")
    cfg = compose_config("evaluate", "policy=nothing", *overrides)

    class Policy:
        cameras = ("static",)

    return episodes.simulator(cfg, Policy(), {})


@pytest.mark.parametrize(
    ("overrides", "counts"),
    [
        (["simpler_google_vm"], {"pick_coke_can": 300, "move_near": 240, "open_drawer": 108, "close_drawer": 108}),
        (["simpler_google_va"], {"pick_coke_can": 675, "move_near": 480, "open_drawer": 189, "close_drawer": 189}),
        (["simpler_google_masked"], {"pick_coke_can": 300, "move_near": 240, "open_drawer": 108, "close_drawer": 108}),
        (["simpler_google_paraphrase"], {"pick_coke_can": 300, "move_near": 240}),
        (["simpler_google_vm", "benchmark.groups=[place_apple_in_top_drawer]"], {"place_apple_in_top_drawer": 108}),
        (["simpler_widowx", "benchmark.simulator=original"], {
            "spoon_on_towel": 24, "carrot_on_plate": 24, "stack_cube": 24, "eggplant_in_basket": 24,
        }),
    ],
)  # fmt: skip
def test_no_number_of_episodes_is_all_of_them(monkeypatch, overrides, counts):
    name, *others = overrides
    env, arguments, found = planned(monkeypatch, f"benchmark={name}", "episodes=0", *others)
    assert Counter(spec.task.split("/")[0] for spec in found) == counts
    assert env == "envs.simpler.original:OriginalEnv" and arguments["shader"] == "ibl"
    assert arguments["background"] == ("masked" if name == "simpler_google_masked" else "overlay")
    assert arguments["paraphrases"] == ("data/simpler_paraphrases.yaml" if "paraphrase" in name else None)
    some = planned(monkeypatch, f"benchmark={name}", "episodes=3", "first_seed=2", *others)[2]
    assert Counter(spec.seed for spec in some) == dict.fromkeys((2, 3, 4), len({spec.task for spec in found}))


def test_what_cannot_be_evaluated_is_one_line(monkeypatch, tmp_path):
    for overrides, complaint in (
        (
            ["benchmark=simpler_google_vm", "benchmark.simulator=maniskill3"],
            "not on ManiSkill3; set",
        ),
        (["benchmark=simpler_google_vm", "benchmark.simulator=isaac"], "isaac is not known; choose one of maniskill3"),
        (["benchmark=simpler_google_vm", "policy=expert"], "has no scripted expert"),
    ):
        with pytest.raises(UserError, match=complaint):
            planned(monkeypatch, *overrides)
    monkeypatch.undo()
    missing = compose_config("evaluate", "policy=nothing", "benchmark=simpler_google_vm", "benchmark.python=/no/python")
    with pytest.raises(UserError, match=r"/no/python does not exist; run `make simpler-original`"):
        episodes.simulator(missing, object(), {})
    with pytest.raises(UserError, match=r"not installed in the interpreter.*make simpler-original"):
        sapien2.resolve_renderer(ROOT / ".venv/bin/python", "auto")


def test_the_interpreter_is_the_originals_alone():
    cfg = compose_config("evaluate", "policy=nothing", "benchmark=simpler_google_vm")
    assert episodes.interpreter(cfg) == ROOT / ".venv-simpler/bin/python"
    assert episodes.interpreter(compose_config("evaluate", "policy=nothing", "benchmark=simpler_widowx")) is None
    assert episodes.interpreter(compose_config("evaluate", "policy=nothing", "benchmark=libero_goal")) is None
