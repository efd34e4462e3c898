"""The original SimplerEnv (make simpler-original) in its own interpreter: state, frames, evaluate.py through it."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import evaluate
from envs.records import load_records
from envs.simpler import sapien2
from envs.simpler.protocol import cells
from tests.simpler_sim import PYTHON, ask_original, asset_path, original
from vla.cli import compose_config
from vla.errors import UserError
from vla.replay import NothingPolicy

pytestmark = [pytest.mark.sim, pytest.mark.slow, original, pytest.mark.xdist_group("simpler")]


@pytest.fixture(scope="module", autouse=True)
def draws():
    try:
        sapien2.resolve_renderer(PYTHON, "auto")
    except UserError as error:
        pytest.skip(str(error))


@pytest.mark.parametrize(
    ("suite", "task", "seed"),
    [
        ("google_vm", "pick_coke_can/horizontal", 7),
        ("google_vm", "close_drawer/middle", 4),
        ("widowx", "carrot_on_plate", 5),
    ],
)
def test_states_and_frames_are_the_published_ones(tmp_path, suite, task, seed):
    """Bit for bit those of SimplerEnv's own evaluation loop; neither what ran before nor drawing less changes any."""
    episode = {"suite": suite, "task": task, "seed": seed, "steps": 8}
    all_drawn = ask_original(tmp_path, "run", **episode)
    again = ask_original(tmp_path, "run", **episode, every=3, before=[1, seed])
    blind = ask_original(tmp_path, "run", **episode, cameras=[])
    published = ask_original(tmp_path, "published", **episode)
    for other in (again, blind, published):
        np.testing.assert_array_equal(all_drawn["bodies"], other["bodies"])
    np.testing.assert_array_equal(all_drawn["frames"], published["frames"])
    np.testing.assert_array_equal(all_drawn["frames"][1::3], again["frames"][1:])
    np.testing.assert_array_equal(all_drawn["states"], blind["states"])
    assert np.abs(np.diff(all_drawn["bodies"], axis=0)).max(axis=1).min() > 0.001, "something moves in every step"
    assert (np.diff(all_drawn["frames"].astype(int), axis=0) != 0).any(axis=(1, 2, 3)).all()
    assert all_drawn["states"].shape == (9, 7 if suite == "widowx" else 8)
    speeds = {name: float(found["speed"]) for name, found in (("all", all_drawn), ("1 in 3", again), ("none", blind))}
    print(f"{suite} {task}: steps/s by frames drawn {speeds}")


def test_the_first_episode_on_a_stage_is_as_every_later_one(tmp_path, monkeypatch):
    """sapien 2 loads a stage otherwise the first time, and keeps a file beside it."""
    stage, own = asset_path("hab2_bench_assets/stages/bridge_table_1_v1.glb"), tmp_path / "data"
    (own / "hab2_bench_assets/stages").mkdir(parents=True)
    shutil.copy(stage, own / "hab2_bench_assets/stages")
    for name in ("custom", "real_inpainting"):
        (own / name).symlink_to(asset_path(name))
    monkeypatch.setenv("MS2_REAL2SIM_ASSET_DIR", str(own))
    episode = {"suite": "widowx", "task": "carrot_on_plate", "seed": 5, "steps": 1, "cameras": []}
    first, later = (ask_original(tmp_path, "run", **episode) for _ in range(2))
    assert list(own.rglob("*.nonconvex.stl")), "sapien keeps it elsewhere now, or not at all"
    np.testing.assert_array_equal(first["bodies"], later["bodies"])


@pytest.mark.parametrize("task", ["pick_coke_can/horizontal", "open_drawer/top", "move_near"])
def test_masked_frames_differ_outside_robot_and_task_objects_only(tmp_path, task):
    found = ask_original(tmp_path, "masked", suite="google_vm", task=task, seed=3, steps=3)
    front = np.isin(found["ids"], found["front"])
    np.testing.assert_array_equal(found["masked"], np.where(front[..., None], found["plain"], 0))
    assert found["plain"][~front].any(axis=-1).mean() > 0.9, "there is something to be masked"
    robot = np.isin(found["ids"], found["robot"])
    assert robot.sum() > 2000 and (front & ~robot).sum() > 500, "robot and objects are both to be seen"
    assert 0.01 < front.mean() < 0.6


SHEET = [
    ("google_vm", "pick_coke_can/horizontal", 3), ("google_vm", "pick_coke_can/vertical", 37),
    ("google_vm", "pick_coke_can/standing", 99),
    *(("google_vm", "move_near", seed) for seed in (0, 87, 239)),
    *(("google_vm", f"open_drawer/{which}", seed) for which, seed in (("top", 0), ("middle", 13), ("bottom", 35))),
    *(("google_vm", f"close_drawer/{which}", seed) for which, seed in (("top", 8), ("middle", 22), ("bottom", 30))),
    ("google_vm", "place_apple_in_top_drawer", 0), ("google_vm", "place_apple_in_top_drawer", 44),
    ("google_va", "open_drawer/middle", 4),
    ("google_va", "pick_coke_can/standing", 130), ("google_va", "open_drawer/top", 58),
    ("google_va", "place_apple_in_top_drawer", 22),
    *(("widowx", task, 4) for task in ("spoon_on_towel", "carrot_on_plate", "stack_cube")),
]  # fmt: skip


def test_first_frames(tmp_path):
    """Left in the test's folder as contact_sheet.png, three in a row in the order of SHEET."""
    found = ask_original(tmp_path, "first_frames", episodes=SHEET)
    tiles = []
    for index, (suite, task, seed) in enumerate(SHEET):
        frame, cell = found[f"frame{index}"], cells(suite, [task])[seed]
        assert frame.shape == ((480 if suite == "widowx" else 512), 640, 3) and frame.dtype == np.uint8
        assert found[f"told{index}"] == cell.instructions[0]
        assert frame.std() > 20, "a picture, not one colour"
        tiles.append(np.asarray(Image.fromarray(frame).resize((320, 256))))
    assert len({tile.tobytes() for tile in tiles}) == len(tiles)
    rows = [np.concatenate(tiles[start : start + 3], axis=1) for start in range(0, len(tiles), 3)]
    Image.fromarray(np.concatenate(rows)).save(tmp_path / "contact_sheet.png")


def test_the_photo_is_all_that_is_not_drawn(tmp_path):
    """Visual matching: behind robot and cabinet the frame is the overlay, resized as the simulator does."""
    found = ask_original(tmp_path, "masked", suite="google_vm", task="open_drawer/top", seed=3, steps=1)
    assets = Path(str(ask_original(tmp_path, "assets")["root"]))
    photo = Image.open(assets / cells("google_vm", ["open_drawer/top"])[3].build["rgb_overlay_path"]).convert("RGB")
    photo = np.asarray(photo.resize((640, 512), Image.Resampling.BILINEAR)).astype(int)
    behind = ~np.isin(found["ids"][0], found["front"])
    assert np.abs(found["plain"][0][behind].astype(int) - photo[behind]).mean() < 2


@pytest.mark.parametrize("suite", ["google_vm", "google_va", "widowx"])
def test_every_variant_of_every_task_can_be_built_and_says_what_the_protocol_says(tmp_path, suite):
    told = ask_original(tmp_path, "words", suite=suite)["told"]
    expected = {}
    for cell in cells(suite):
        expected.setdefault(f"{cell.task} {cell.variant}", cell.instructions[0])
    assert {name: words for name, words in told} == expected


def test_instructions_that_change(tmp_path):
    """Move near's is the episode's, and the apple's changes within it."""
    for suite in ("google_vm", "google_va"):
        seeds = [0, 11, 20, 33, 47, 59]
        told = ask_original(tmp_path, "pairs", suite=suite, seeds=seeds)["told"]
        expected = cells(suite, ["move_near"])
        assert list(told) == [expected[seed].instructions[0] for seed in seeds]
    found = ask_original(tmp_path, "two_instructions")
    assert list(found["replans"]) == [101], "the step that begins with 100 steps taken"
    assert list(found["told"]) == ["open top drawer"] * 101 + ["place apple into top drawer"] * 3


class WatchingPolicy(NothingPolicy):
    """Does nothing and keeps what it is shown."""

    cameras = ("static",)
    chunk = 4

    def __init__(self) -> None:
        self.seen: list[dict] = []

    def predict(self, observation: dict) -> torch.Tensor:
        self.seen.append({"image": observation["images"]["static"], "told": list(observation["instruction"])})
        return super().predict(observation)


def test_through_the_evaluator(tmp_path, monkeypatch):
    """evaluate.py with a policy that looks: a coke can and a drawer task, run in the other interpreter and recorded."""
    policy = WatchingPolicy()
    monkeypatch.setattr(evaluate, "load", lambda cfg: (policy, {"arm": "watching", "train_seed": None}, "none"))
    overrides = ["benchmark=simpler_google_vm", "episodes=1", "benchmark.max_steps=8", "evaluation.workers=1"]
    overrides += ["benchmark.groups=[pick_coke_can/horizontal,open_drawer/top]", f"results_root={tmp_path}"]
    summary = evaluate.evaluate(compose_config("evaluate", "policy=watching", *overrides))
    assert summary["complete"] and summary["n"] == 2 and summary["successes"] == 0
    assert [seen["told"][0] for seen in policy.seen] == ["pick coke can"] * 2 + ["open top drawer"] * 2
    shapes = {tuple(seen["image"].shape) for seen in policy.seen}
    assert shapes == {(1, 3, 512, 640)} or shapes == {(1, 512, 640, 3)}
    folder = next((tmp_path / "simpler_google_vm").iterdir())
    header, rows = json.loads((folder / "run.json").read_text()), load_records(folder)
    assert header["env"] == "envs.simpler.original:OriginalEnv" and header["protocol"] == "google_vm"
    versions = rows.versions[0]
    assert versions["mani_skill2_real2sim"] == "ef7a4d4f" and versions["success_rule"] == "last_step"
    assert versions["drawers"] == ("no ray tracing" if rows.renderer[0] == "vulkan-cpu" else "ray tracing")


def test_doing_nothing_never_succeeds(tmp_path):
    """Judged by every step, over whole episodes of every task of visual matching."""
    overrides = ["benchmark=simpler_google_vm", "benchmark.groups=null", "episodes=1", "first_seed=5"]
    overrides += ["benchmark.success_rule=ever", f"results_root={tmp_path}"]
    summary = evaluate.evaluate(compose_config("evaluate", "policy=nothing", *overrides))
    assert summary["complete"] and summary["n"] == 11 and summary["successes"] == 0
