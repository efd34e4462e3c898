"""What of SimplerEnv's WidowX tasks needs no simulator: masking, and one line for everything that can be missing."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from envs.simpler import maniskill3, vulkan
from envs.simpler.maniskill3 import WidowXEnv, stage_of
from envs.simpler.masking import mask_background
from envs.simpler.vulkan import resolve_renderer
from tests.simpler_sim import sim
from vla.errors import UserError

ROOT = Path(__file__).resolve().parent.parent


def test_masking_by_hand():
    frame = np.arange(2 * 3 * 3, dtype=np.uint8).reshape(2, 3, 3)
    ids = np.array([[0, 1, 2], [2, 7, 1]])
    masked = mask_background(frame, ids, np.array([1, 7]), colour=(9, 8, 7))
    expected = [[[9, 8, 7], frame[0, 1], [9, 8, 7]], [[9, 8, 7], frame[1, 1], frame[1, 2]]]
    np.testing.assert_array_equal(masked, np.array(expected, dtype=np.uint8))
    assert masked.dtype == np.uint8 and frame[0, 0, 0] == 0, "the frame itself is left alone"
    with pytest.raises(ValueError, match="cannot be masked"):
        mask_background(frame, ids[:1], np.array([1]))


def test_names_that_are_not_known_are_one_line():
    for wrong, choices in (
        ({"task": "pick_coke_can"}, "spoon_on_towel"),
        ({"task": "stack_cube", "success_rule": "sometimes"}, "last_step, ever, early_stop"),
        ({"task": "stack_cube", "background": "white"}, "overlay, masked"),
        ({"task": "stack_cube", "rotation": "quaternion"}, "euler, axis_angle"),
        ({"task": "stack_cube", "cameras": ("wrist",)}, "static"),
    ):
        with pytest.raises(UserError, match=choices):
            WidowXEnv(**wrong)
    with pytest.raises(UserError, match=r"renderer=opengl.*auto, gpu, cpu"):
        resolve_renderer("opengl")


def test_what_is_missing_is_named(monkeypatch, tmp_path):
    monkeypatch.setattr(maniskill3, "find_spec", lambda name: None)
    with pytest.raises(UserError, match="mani_skill is not installed; run `make simpler`"):
        WidowXEnv("stack_cube")
    monkeypatch.setattr(maniskill3, "find_spec", lambda name: object())
    monkeypatch.setenv("MS_ASSET_DIR", str(tmp_path))
    with pytest.raises(UserError, match=r"info_bridge_custom_v0\.json is missing.*set MS_ASSET_DIR"):
        WidowXEnv("stack_cube")
    monkeypatch.setattr(vulkan, "find_spec", lambda name: None)
    with pytest.raises(UserError, match="sapien is not installed; run `make simpler`"):
        resolve_renderer("cpu")


@pytest.mark.sim
@sim
def test_without_a_vulkan_device_one_line_says_what_to_install():
    environment = {**os.environ, "VK_ICD_FILENAMES": "/nonexistent.json", "PYTHONPATH": str(ROOT)}
    environment.pop("VLA_VULKAN_PROVEN", None)
    script = "from envs.simpler.maniskill3 import WidowXEnv; WidowXEnv('stack_cube', renderer='cpu')"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, env=environment)
    last = done.stderr.strip().splitlines()[-1]
    assert "UserError: SAPIEN finds no Vulkan device" in last and "make simpler" in last
    assert "mani_skill/" not in done.stderr, "found out before the simulator is loaded"


def test_small_stages_are_called_proxies(tmp_path):
    stages = tmp_path / "data/tasks/bridge_v2_real2sim_dataset/stages"
    stages.mkdir(parents=True)
    for name, size in (("bridge_table_1_v1.glb", 5_000_000), ("bridge_table_1_v2.glb", 1876)):
        (stages / name).write_bytes(bytes(size))
    assert stage_of(tmp_path) == "proxy"
    (stages / "bridge_table_1_v2.glb").write_bytes(bytes(5_000_000))
    assert stage_of(tmp_path) == "original"


def test_importing_the_environment_is_light():
    script = (
        "import sys, envs.simpler.maniskill3, envs.simpler.experts; "
        "print([m for m in ('torch', 'sapien', 'mani_skill', 'gymnasium') if m in sys.modules])"
    )
    assert subprocess.check_output([sys.executable, "-c", script], text=True, cwd=ROOT).strip() == "[]"
