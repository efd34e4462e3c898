"""SimplerEnv's protocol as data: counts, poses and aggregation, against the fact sheet's tables; no simulator."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from envs.simpler.protocol import FILES, SUCCESS_RULES, aggregate, cells, members, robot_quaternion, success_rule
from vla.errors import UserError

COUNTS = {
    "widowx": {"spoon_on_towel": 24, "carrot_on_plate": 24, "stack_cube": 24, "eggplant_in_basket": 24, "average": 96},
    "google_vm": {"pick_coke_can": 300, "move_near": 240, "drawer": 216, "place_apple_in_top_drawer": 108},
    "google_va": {"pick_coke_can": 675, "move_near": 480, "drawer": 378, "place_apple_in_top_drawer": 189},
}
WIDOWX_MODE = "arm_pd_ee_target_delta_pose_align2_gripper_pd_joint_pos"
GOOGLE_MODE = (
    "arm_pd_ee_delta_pose_align_interpolate_by_planner_gripper_pd_joint_target_delta_pos_interpolate_by_planner"
)


def at(protocol: str, task: str, seed: int):
    return next(cell for cell in cells(protocol) if (cell.task, cell.seed) == (task, seed))


@pytest.mark.parametrize(("protocol", "group"), [(p, g) for p, groups in COUNTS.items() for g in groups])
def test_number_of_episodes(protocol, group):
    assert len(cells(protocol, [group])) == COUNTS[protocol][group]


@pytest.mark.parametrize("protocol", FILES)
def test_every_episode_has_a_name_of_its_own_and_travels_as_json(protocol):
    found = cells(protocol)
    assert len({(cell.task, cell.seed) for cell in found}) == len(found)
    for task, n in Counter(cell.task for cell in found).items():
        assert [cell.seed for cell in found if cell.task == task] == list(range(n))
    # No two of them are the same run under two names.
    runs = [json.dumps([cell.env_id, cell.build, cell.reset]) for cell in found]
    assert len(set(runs)) == len(runs)
    assert success_rule(protocol) == "last_step" and success_rule(protocol) in SUCCESS_RULES


def test_widowx_kwargs_are_those_of_the_script():
    """SimplerEnv scripts/octo_bridge.sh and evaluation/maniskill2_evaluator.py, copied out by hand."""
    cell = at("widowx", "carrot_on_plate", 7)
    assert cell.env_id == "PutCarrotOnPlateInScene-v0" and cell.instructions == ("put carrot on plate",)
    assert cell.build_with(Path("/data")) == {
        "obs_mode": "rgbd",
        "robot": "widowx",
        "sim_freq": 500,
        "control_mode": WIDOWX_MODE,
        "control_freq": 5,
        "max_episode_steps": 60,
        "scene_name": "bridge_table_1_v1",
        "camera_cfgs": {"add_segmentation": True},
        "rgb_overlay_path": "/data/real_inpainting/bridge_real_eval_1.png",
    }
    robot = {"init_xy": [0.147, 0.028], "init_rot_quat": [0, 0, 0, 1]}
    assert cell.reset == {"robot_init_options": robot, "obj_init_options": {"episode_id": 7}}
    sink = at("widowx", "eggplant_in_basket", 0)
    assert (sink.max_steps, sink.build["robot"]) == (120, "widowx_sink_camera_setup")
    assert sink.build["scene_name"] == "bridge_table_1_v2" and sink.reset["robot_init_options"]["init_xy"] == [
        0.127,
        0.06,
    ]
    assert at("widowx", "stack_cube", 23).env_id == "StackGreenCubeOnYellowCubeBakedTexInScene-v0"


def test_widowx_placements():
    """Fact sheet §4a, by hand: corners in the order (−,−), (−,+), (+,−), (+,+)."""
    near, far = (-0.235, -0.075), (-0.235, 0.075)
    for task, source, target, yaws in (
        ("spoon_on_towel", "spoon", "towel", (0, 90)),
        ("carrot_on_plate", "carrot", "plate", (180, -90)),
    ):
        for seed, yaw in enumerate(yaws):
            placement = at("widowx", task, seed).placement
            assert placement[source] == pytest.approx((*near, yaw)) and placement[target] == pytest.approx((*far, 0))
        last = at("widowx", task, 23).placement  # (+,+) onto (+,−)
        assert last[source] == pytest.approx((-0.085, 0.075, yaws[1])) and last[target] == pytest.approx(
            (-0.085, -0.075, 0)
        )
    cubes = [at("widowx", "stack_cube", seed).placement["green cube"] for seed in (0, 12)]
    assert cubes == [pytest.approx((-0.21, -0.05, 0)), pytest.approx((-0.26, -0.1, 0))]
    eggplants = [at("widowx", "eggplant_in_basket", seed).placement["eggplant"] for seed in (0, 1, 2, 3, 23)]
    first = (-0.115, 0.191)
    expected = [(*first, 0), (*first, 45), (*first, -45), (-0.115, 0.201, 0), (-0.095, 0.221, -45)]
    np.testing.assert_allclose(eggplants, expected, atol=1e-9)


def test_coke_can_kwargs_and_loop_order():
    first = at("google_vm", "pick_coke_can/horizontal", 0)
    assert first.build_with(Path("d")) == {
        "lr_switch": True,
        "urdf_version": None,
        "obs_mode": "rgbd",
        "robot": "google_robot_static",
        "sim_freq": 513,
        "control_mode": GOOGLE_MODE,
        "control_freq": 3,
        "max_episode_steps": 80,
        "scene_name": "google_pick_coke_can_1_v4",
        "camera_cfgs": {"add_segmentation": True},
        "rgb_overlay_path": "d/real_inpainting/google_coke_can_real_eval_1.png",
    }
    assert first.reset["robot_init_options"]["init_xy"] == [0.35, 0.2] and first.instructions == ("pick coke can",)
    xy = [
        at("google_vm", "pick_coke_can/standing", seed).reset["obj_init_options"]["init_xy"] for seed in (0, 1, 5, 24)
    ]
    np.testing.assert_allclose(xy, [(-0.35, -0.02), (-0.35, 0.09), (-0.2925, -0.02), (-0.12, 0.42)])
    seeds = range(0, 100, 25)
    colours = [at("google_vm", "pick_coke_can/vertical", seed).build["urdf_version"] for seed in seeds]
    tabletops = {f"recolor_tabletop_visual_matching_{number}" for number in (1, 2)}
    assert set(colours) == {None, "recolor_cabinet_visual_matching_1"} | tabletops
    assert at("google_vm", "pick_coke_can/vertical", 3).build["laid_vertically"] is True
    assert at("google_vm", "pick_coke_can/standing", 3).build["upright"] is True


def test_drawer_poses_and_overlays_go_together():
    poses = {
        "a0": (0.644, -0.179, -0.03), "a1": (0.765, -0.182, -0.02), "a2": (0.889, -0.203, -0.06),
        "b0": (0.652, 0.009, 0), "b1": (0.752, 0.009, 0), "b2": (0.851, 0.035, 0),
        "c0": (0.665, 0.224, 0), "c1": (0.765, 0.222, -0.025), "c2": (0.865, 0.222, -0.025),
    }  # fmt: skip
    for seed, (name, (x, y, yaw)) in enumerate(poses.items()):
        cell = at("google_vm", "close_drawer/middle", 9 + seed)
        assert cell.env_id == "CloseMiddleDrawerCustomInScene-v0" and cell.instructions == ("close middle drawer",)
        assert cell.build["rgb_overlay_path"] == f"real_inpainting/open_drawer_{name}.png"
        assert cell.variant == "urdf_tabletop_1" and cell.max_steps == 113
        assert cell.reset["obj_init_options"] == {"init_xy": [0, 0]}
        robot = cell.reset["robot_init_options"]
        assert robot["init_xy"] == [x, y]
        # Half a turn about z and then yaw more is one turn by π + yaw.
        turn = [np.cos((np.pi + yaw) / 2), 0, 0, np.sin((np.pi + yaw) / 2)]
        np.testing.assert_allclose(robot["init_rot_quat"], turn, atol=1e-7)
        kwargs = {"shader_dir": "rt", "station_name": "mk_station_recolor", "light_mode": "simple"}
        assert cell.build.items() >= (kwargs | {"disable_bad_material": True, "scene_name": "dummy_drawer"}).items()


def test_apple():
    visual = cells("google_vm", ["place_apple_in_top_drawer"])
    assert {tuple(c.reset["robot_init_options"]["init_xy"]) for c in visual} == {
        (0.644, -0.179), (0.652, 0.009), (0.665, 0.224),
    }  # fmt: skip
    assert {c.build["model_ids"] for c in visual} == {"baked_apple_v2"} and visual[0].max_steps == 200
    assert visual[0].instructions == ("open top drawer", "place apple into top drawer")
    aggregation = cells("google_va", ["place_apple_in_top_drawer"])
    assert {tuple(c.reset["robot_init_options"]["init_xy"]) for c in aggregation} == {
        (0.65, -0.2),
        (0.65, 0),
        (0.65, 0.2),
    }
    assert {c.build["model_ids"] for c in aggregation} == {"apple"}
    np.testing.assert_allclose(aggregation[5].reset["obj_init_options"]["init_xy"], (-0.05, 0.08))


def test_move_near_instructions_and_layouts():
    """Triplet id // 12, layout id % 12 // 6, pair id % 6 in the order (0,1), (0,2), (1,0), (1,2), (2,0), (2,1)."""
    told = {seed: at("google_vm", "move_near", seed).instructions for seed in (0, 5, 6, 17, 59, 60)}
    assert told == {
        0: ("move blue plastic bottle near pepsi can",),
        5: ("move orange near pepsi can",),
        6: ("move blue plastic bottle near pepsi can",),
        17: ("move sponge near apple",),
        59: ("move redbull can near pepsi can",),
        60: ("move blue plastic bottle near pepsi can",),
    }
    cell = at("google_vm", "move_near", 80)  # second colouring, episode 20: (apple, sponge) of the second layout
    assert cell.reset["obj_init_options"] == {"episode_id": 20} and cell.variant == "urdf_tabletop_1"
    assert cell.placement == {"7up can": (-0.13, 0.04), "apple": (-0.33, 0.19), "sponge": (-0.13, 0.34)}
    np.testing.assert_allclose(cell.reset["robot_init_options"]["init_rot_quat"], robot_quaternion(-0.09))
    assert cell.env_id == "MoveNearGoogleBakedTexInScene-v0"
    plain = at("google_va", "move_near", 60)
    assert plain.env_id == "MoveNearGoogleInScene-v0" and plain.build["no_distractor"] is True
    assert plain.build["rgb_overlay_path"] is None and "urdf_version" not in plain.build


def test_variants_of_the_aggregation():
    """Fact sheet §4c: 9, 8, 7 and 7 variants, none of them of the cameras."""
    changes = {
        task: {c.variant: (c.env_id, c.build["scene_name"]) for c in cells("google_va", [task])}
        for task in ("pick_coke_can/standing", "move_near", "open_drawer/top", "place_apple_in_top_drawer")
    }
    assert [len(variants) for variants in changes.values()] == [9, 8, 7, 7]
    assert not any("Camera" in env for variants in changes.values() for env, _ in variants.values())
    can = changes["pick_coke_can/standing"]
    assert can["distractors_more"][0] == "GraspSingleOpenedCokeCanDistractorInScene-v0"
    assert can["background_2"][1] == "google_pick_coke_can_1_v4_alt_background_2"
    assert can["table_1"][1] == "Baked_sc1_staging_objaverse_cabinet1_h870"
    drawers = {c.variant: c.build for c in cells("google_va", ["open_drawer/top"])}
    assert drawers["cabinet_3"]["station_name"] == "mk_station3" and drawers["darker"]["light_mode"] == "darker"
    assert drawers["background_office"]["scene_name"] == "modern_office_no_roof"
    assert {build["shader_dir"] for build in drawers.values()} == {"rt"}
    robots = {tuple(c.reset["robot_init_options"]["init_xy"]) for c in cells("google_va", ["open_drawer/top"])}
    assert robots == {(x, y) for x in (0.65, 0.75, 0.85) for y in (-0.2, 0, 0.2)}


def naive_scores(protocol: str, success: dict[tuple[str, int], bool]) -> dict[str, float]:
    """SimplerEnv's averaging as its tool does it: a folder per variant, a mean per folder, a mean of the folders."""

    def folders(task: str) -> list[float]:
        found: dict[str, list[bool]] = {}
        for cell in cells(protocol):
            if cell.task == task:
                found.setdefault(cell.variant, []).append(success[task, cell.seed])
        return [sum(values) / len(values) for values in found.values()]

    def mean(values: list[float]) -> float:
        return sum(values) / len(values)

    can = mean([mean(folders(f"pick_coke_can/{way}")) for way in ("horizontal", "vertical", "standing")])
    drawer = {
        what: mean([rate for which in ("top", "middle", "bottom") for rate in folders(f"{what}_drawer/{which}")])
        for what in ("open", "close")
    }
    near = mean(folders("move_near"))
    return {
        "pick_coke_can": can,
        "move_near": near,
        "open_drawer": drawer["open"],
        "close_drawer": drawer["close"],
        "drawer": mean(list(drawer.values())),
        "place_apple_in_top_drawer": mean(folders("place_apple_in_top_drawer")),
        "average": mean([can, drawer["open"], drawer["close"], near]),
    }


def rows_of(protocol: str, seed: int) -> list[dict]:
    rng = np.random.default_rng(seed)
    # A rate of its own for every variant: else a mean over episodes could pass for one over variants.
    rates: dict[tuple[str, str], float] = {}
    rows = []
    for cell in cells(protocol):
        rate = rates.setdefault((cell.task, cell.variant), rng.random())
        rows.append({"task": cell.task, "seed": cell.seed, "success": bool(rng.random() < rate)})
    return rows


@pytest.mark.parametrize("protocol", ["google_vm", "google_va"])
@settings(max_examples=5)
@given(seed=st.integers(0, 2**32 - 1))
def test_aggregation_equals_the_naive_one(protocol, seed):
    rows = rows_of(protocol, seed)
    expected = naive_scores(protocol, {(row["task"], row["seed"]): row["success"] for row in rows})
    found = aggregate(protocol, np.random.default_rng(seed).permutation(rows).tolist())
    assert {name: found[name].value for name in expected} == pytest.approx(expected)
    assert found["drawer"].n == COUNTS[protocol]["drawer"] and not any(score.missing for score in found.values())


def test_widowx_average_is_that_of_the_four_tasks():
    wins = {"spoon_on_towel": 6, "carrot_on_plate": 3, "stack_cube": 5, "eggplant_in_basket": 18}
    rows = [{"task": c.task, "seed": c.seed, "success": c.seed < wins[c.task]} for c in cells("widowx")]
    found = aggregate("widowx", rows)
    # IDL table 2, last row but for its order: 12.5, 75.0, 25.0, 20.8 and 33.3 %.
    assert [round(100 * found[task].value, 1) for task in wins] == [25.0, 12.5, 20.8, 75.0]
    assert found["average"].value == pytest.approx(32 / 96) and found["average"].n == 96


def test_variants_weigh_the_same_whatever_their_success():
    rows = [
        {"task": c.task, "seed": c.seed, "success": c.variant in ("base", "darker")}
        for c in cells("google_va", ["move_near"])
    ]
    assert aggregate("google_va", rows, ["move_near"])["move_near"].value == 2 / 8


def test_missing_episodes_are_reported_not_averaged_away():
    rows = rows_of("google_vm", 0)
    lost = [("pick_coke_can/standing", 17), ("open_drawer/top", 0), ("open_drawer/top", 35)]
    found = aggregate("google_vm", [row for row in rows if (row["task"], row["seed"]) not in lost])
    whole = aggregate("google_vm", rows)
    missing = {"pick_coke_can/standing": 1, "pick_coke_can": 1, "open_drawer/top": 2, "open_drawer": 2}
    missing |= {"drawer": 2, "average": 3}
    assert {name: score.missing for name, score in found.items() if score.missing} == missing
    for name, score in found.items():
        assert score.value == (None if score.missing else whole[name].value)
        assert score.n + score.missing == whole[name].n
    nothing = aggregate("google_vm", [])
    assert (
        all(score.value is None and score.n == 0 for score in nothing.values()) and nothing["move_near"].missing == 240
    )


def test_a_part_of_the_protocol_can_be_run():
    part = ["pick_coke_can", "move_near"]
    rows = [{"task": c.task, "seed": c.seed, "success": True} for c in cells("google_vm", part)]
    found = aggregate("google_vm", rows, part)
    assert set(found) == {*members("google_vm", "pick_coke_can"), "move_near", "pick_coke_can"}
    assert all(score.value == 1 for score in found.values())


def test_bad_input_is_one_line():
    with pytest.raises(UserError, match=r"no protocol 'google'.*google_va, google_vm, widowx"):
        cells("google")
    with pytest.raises(UserError, match=r"pick_can is neither.*pick_coke_can"):
        cells("google_vm", ["pick_can"])
    row = {"task": "move_near", "seed": 3, "success": True}
    with pytest.raises(UserError, match="move_near seed 3 twice"):
        aggregate("google_vm", [row, row])
    with pytest.raises(UserError, match="move_near seed 240 which is not asked for"):
        aggregate("google_vm", [row | {"seed": 240}])
    with pytest.raises(UserError, match="move_near seed 3 which is not asked for"):
        aggregate("google_vm", [row], ["drawer"])
