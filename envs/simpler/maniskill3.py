"""SimplerEnv's four WidowX tasks on ManiSkill3 as an `envs.base.Environment`: frames only when asked for.

Needs `make simpler` (mani_skill 3.0.1, a Vulkan device) and MS_ASSET_DIR, the folder with
data/tasks/bridge_v2_real2sim_dataset and data/robots/widowx. Figures are not those of the original simulator and do not
belong in a table with them (facts simpler §2): physics, inverse kinematics and contact tests are others, and
- the eggplant lies in the 24 of ManiSkill3's 64 poses (8 places × 8 measured orientations) whose source names the
  original's yaws, 0, 45 and −45°, in the original's order;
- objects start where the original's come to rest, not in the air;
- the original's controller takes axis-angle and ManiSkill3's takes Euler angles; here both turn by the same rotation.

What differs from the package's own step and reset: a step renders on request only, which leaves states bit-identical
(rendering is 86 % of a step on a CPU); every reset builds the scene anew (0.3 s), without which spoon and eggplant
start a micrometre off where an episode ran before; and an environment keeps to itself what the package shares among
all environments of a process (the overlay, the bodies in front of it).

    env = WidowXEnv("carrot_on_plate")
    observation = env.reset(seed=0)          # episode 0 of 24
    done = env.step(action, render=False)
"""

from __future__ import annotations

import logging
import os
import warnings
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np

from envs.simpler.actions import ROTATIONS, controller_angles, motion, widowx_gripper
from envs.simpler.masking import BACKGROUNDS, mask_background
from envs.simpler.proprioception import bridge_state
from envs.simpler.protocol import SUCCESS_RULES, cells
from envs.simpler.vulkan import choose_driver, resolve_renderer
from vla.errors import UserError

TASKS = tuple(dict.fromkeys(cell.task for cell in cells("widowx")))
CAMERAS = {"static": "3rd_view_camera"}

_DATA = "data/tasks/bridge_v2_real2sim_dataset"
_STAGES = ("stages/bridge_table_1_v1.glb", "stages/bridge_table_1_v2.glb")
_PROXY_BYTES = 100_000  # the real stages are of several megabytes, a box that stands in for one is of two kilobytes
_EGGPLANT = (8, (1, 2, 0))  # orientations in ManiSkill3, and which of them are labelled 0, 45 and −45°


class WidowXEnv:
    """One task. See `envs.base.Environment` for the protocol and the module's docstring for what it is.

    Args:
        task: one of TASKS.
        cameras: ("static",), 640 × 480, or () for physics alone, which needs no Vulkan.
        success_rule: last_step, ever or early_stop (envs/simpler/protocol.py). With the first only the last control
            step of an episode can succeed; with the others it ends at the first success.
        background: overlay (the photo of the real table) or masked (one colour); envs/simpler/masking.py.
        rotation: what the three numbers of an action are, euler or axis_angle (envs/simpler/actions.py).
        action_scale: factor on translation and angle, 1 in the protocol.
        renderer: auto, gpu or cpu (envs/simpler/vulkan.py).
        max_steps: control steps of an episode; the protocol's (60, eggplant 120) by default.

    Raises:
        UserError: a name that is not known; package, assets or Vulkan device missing.
    """

    def __init__(
        self,
        task: str,
        cameras: tuple[str, ...] = ("static",),
        success_rule: str = "last_step",
        background: str = "overlay",
        rotation: str = "euler",
        action_scale: float = 1.0,
        renderer: str = "auto",
        max_steps: int | None = None,
    ):
        for name, value, known in (
            ("task", task, TASKS),
            ("success_rule", success_rule, SUCCESS_RULES),
            ("background", background, BACKGROUNDS),
            ("rotation", rotation, ROTATIONS),
        ):
            if value not in known:
                raise UserError(f"{name}={value} of SimplerEnv is not known; choose one of {', '.join(known)}")
        if unknown := set(cameras) - set(CAMERAS):
            raise UserError(f"cameras {sorted(unknown)} of SimplerEnv's WidowX: choose from {', '.join(CAMERAS)}")
        self.task, self.cameras, self.success_rule = task, tuple(cameras), success_rule
        self.background, self.rotation, self.action_scale = background, rotation, action_scale
        self._cells = cells("widowx", [task])
        self.max_steps = self._cells[0].max_steps if max_steps is None else max_steps
        self.instruction = self._cells[0].instructions[0]
        self.subtasks: list[dict] = []
        self.replan = self.failed = False
        self._steps, self._ended = 0, True
        self._frames: dict[str, np.ndarray] | None = None
        self._stage = stage_of(asset_folder())
        self._renderer = f"vulkan-{resolve_renderer(renderer)}" if self.cameras else "none"
        self.maniskill = self._build()

    def _build(self) -> Any:
        """ManiSkill3's environment, without the wrapper that counts steps and the prompt that downloads."""
        choose_driver()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            import mani_skill.envs
            from mani_skill.utils.registration import REGISTERED_ENVS
        # It warns of every object of every scene.
        mani_skill.logger.setLevel(logging.ERROR)
        base = REGISTERED_ENVS[self._cells[0].env_id.replace("-v0", "-v1")].cls
        # The package keeps both in attributes of the class, so that an environment would see those of the ones before.
        own: dict[str, Any] = {"_rgb_overlay_images": {}, "_objects_to_remove_from_greenscreen": []}
        if self.cameras:
            options = {"obs_mode": "rgb+segmentation", "render_backend": self._renderer.removeprefix("vulkan-")}
        else:
            own |= {"SUPPORTED_OBS_MODES": ["none"], "rgb_overlay_mode": "none"}
            options = {"obs_mode": "none", "render_backend": "none"}
        return type(base.__name__, (base,), own)(num_envs=1, sim_backend="physx_cpu", **options)

    def reset(self, seed: int) -> dict:
        """Start episode `seed` of the task's 24. See `Environment.reset`."""
        if not 0 <= seed < len(self._cells):
            raise UserError(f"{self.task} has no episode {seed}; seeds are 0 to {len(self._cells) - 1}")
        orientations, labelled = _EGGPLANT
        episode = seed
        if self.task == "eggplant_in_basket":
            episode = seed // len(labelled) * orientations + labelled[seed % len(labelled)]
        observation, _ = self.maniskill.reset(seed=0, options={"episode_id": episode, "reconfigure": True})
        self._steps, self._ended = 0, False
        self._frames = self._read(observation)
        return self.observe()

    def step(self, action: np.ndarray, render: bool = True) -> bool:
        """Execute one control step of 0.2 s; True once the episode counts as a success. See `Environment.step`.

        Args:
            action: (7,) xyz (m) and rotation (rad) that move the last target pose, in the axes of the robot's base;
                gripper above one half opens.

        Raises:
            RuntimeError: the episode has ended.
            ValueError: not 7 finite numbers.
        """
        if self._ended:
            raise RuntimeError(f"the episode of {self.task} has ended; reset before the next step")
        moved = motion(action, self.rotation, self.action_scale)
        command = np.concatenate([moved[:3], controller_angles(moved[3:]), [widowx_gripper(action[6])]])
        # env.step() in two: it would compute an observation, with its frame, every time.
        self.maniskill._step_action(command.astype(np.float32))
        self.maniskill._elapsed_steps += 1
        info = self.maniskill.get_info()
        self._frames = self._read(self.maniskill.get_obs(info)) if render and self.cameras else None
        self._steps += 1
        last = self._steps == self.max_steps
        success = bool(info["success"][0]) and (last or self.success_rule != "last_step")
        self._ended = last or success
        return success

    def observe(self) -> dict:
        """The observation after the last step; state: see `proprioception`. See `Environment.observe`."""
        if self.cameras and self._frames is None:
            raise RuntimeError("the last step was not rendered: call step(action, render=True) before observe()")
        return {"images": self._frames or {}, "state": self.proprioception(), "instruction": self.instruction}

    def proprioception(self) -> np.ndarray:
        """(7,) float32 as BridgeData's state, see `bridge_state`."""
        agent = self.maniskill.agent
        pose = agent.robot.pose.inv() * agent.robot.links_map["ee_gripper_link"].pose
        return bridge_state(pose.p[0].numpy(), pose.q[0].numpy(), agent.robot.get_qpos()[0, 6:8].numpy())

    def kept_ids(self) -> np.ndarray:
        """Segmentation ids of what stands before the background: the robot's links and the task's visible objects."""
        return self.maniskill._segmentation_ids_to_keep.numpy()

    def sim_state(self) -> np.ndarray:
        """(D,) float32: poses and velocities of all bodies, joints, and the controller's target."""
        return self.maniskill.get_state()[0].numpy().copy()

    def versions(self) -> dict[str, str]:
        packages = {package: version(package) for package in ("mani_skill", "sapien")}
        notes = {"stage": self._stage, "eggplant": "24 of 64 poses", "success_rule": self.success_rule}
        return packages | notes | {"background": self.background, "renderer": self._renderer}

    def close(self) -> None:
        self.maniskill.close()

    def _read(self, observation: dict) -> dict[str, np.ndarray] | None:
        """uint8 (H, W, 3) per camera of ManiSkill's observation, with the background that was asked for."""
        if not self.cameras:
            return None
        frames = {}
        for camera in self.cameras:
            data = observation["sensor_data"][CAMERAS[camera]]
            frame = data["rgb"][0].numpy()
            if self.background == "masked":
                frame = mask_background(frame, data["segmentation"][0, ..., 0].numpy(), self.kept_ids())
            frames[camera] = frame.copy()
        return frames


def asset_folder() -> Path:
    """ManiSkill's folder of this benchmark, complete as far as a missing part can be named.

    Raises:
        UserError: the package or the assets are missing.
    """
    if find_spec("mani_skill") is None:
        raise UserError("mani_skill is not installed; run `make simpler`")
    root = Path(os.environ.get("MS_ASSET_DIR") or Path.home() / ".maniskill")
    needed = [_DATA + "/custom/info_bridge_custom_v0.json", *(f"{_DATA}/{stage}" for stage in _STAGES)]
    needed += [_DATA + "/real_inpainting/bridge_sink.png", "data/robots/widowx/wx250s.urdf"]
    if missing := [path for path in needed if not (root / path).exists()]:
        raise UserError(
            f"WidowX's scenes are not at {root} ({missing[0]} is missing); set MS_ASSET_DIR to the folder that has "
            "them, or download them: python -m mani_skill.utils.download_asset bridge_v2_real2sim widowx250s"
        )
    return root


def stage_of(root: Path) -> str:
    """ "proxy" where a box stands in for a stage: frames with the overlay are the same, collisions are not quite."""
    small = any((root / _DATA / stage).stat().st_size < _PROXY_BYTES for stage in _STAGES)
    return "proxy" if small else "original"
