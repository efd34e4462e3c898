"""The original SimplerEnv (ManiSkill2_real2sim, sapien 2.2.2) as an `envs.base.Environment`: all its tasks.

Runs in an interpreter of its own, `make simpler-original` (sapien 2 and 3 exclude each other, its inverse kinematics
needs numpy < 2); imports no torch. The episodes are those of protocol.py, built with SimplerEnv's build_maniskill2_env
and exactly the arguments of its scripts, reset without a seed on a fresh environment, as its evaluator does: where an
environment is used again, objects come to rest elsewhere (facts simpler §3, §4).

What differs: the simulator is made with obs_mode "none" and its picture taken when one is asked for, which leaves
states and frames bit-identical to stepping it as published. Without a GPU the drawer tasks are drawn by shader "ibl" in
place of "rt" (ray tracing takes minutes a frame there), and every record says so. A policy that ends a subtask itself
does not exist here: in place_apple_in_top_drawer the second instruction comes with step 101, the simulator's own limit.

    env = OriginalEnv("google_vm", "open_drawer/top")
    observation = env.reset(seed=0)          # the task's first episode
    done = env.step(action, render=False)
"""

from __future__ import annotations

import copy
import hashlib
import warnings
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np

from data.instructions import load_wordings
from envs.simpler import sapien2
from envs.simpler.actions import ROTATIONS, StickyGripper, motion, widowx_gripper
from envs.simpler.assets import asset_folder, check_assets, stand_ins, unmade_mesh
from envs.simpler.masking import BACKGROUNDS, mask_background
from envs.simpler.proprioception import bridge_state, fractal_state
from envs.simpler.protocol import SUCCESS_RULES, cells, paraphrased
from vla.errors import UserError
from vla.files import lock

CAMERAS = {"google_robot": "overhead_camera", "widowx": "3rd_view_camera"}
"""Robot -> what the camera "static" is: 640 × 512 and 640 × 480."""
SHADERS = ("rt", "ibl")
FIRST_LOAD_S = 300.0
"""For another worker to load a stage for the first time."""

_ROOT = Path(__file__).resolve().parents[2]
_BACKDROP = {
    "ground",
    "goal_site",
    "",
    "arena",
}  # what SimplerEnv lays the photo over, beside rgb_always_overlay_objects


class OriginalEnv:
    """One task. See `envs.base.Environment` for the protocol and the module's docstring for what it is.

    Args:
        suite: google_vm, google_va or widowx (envs/simpler/<suite>.yaml).
        task: one of its tasks.
        cameras: ("static",), or () for no frames; a Vulkan device is needed all the same.
        success_rule: last_step, ever or early_stop (envs/simpler/protocol.py). With the first only the last control
            step of an episode can succeed; with the others it ends at the first success.
        background: overlay (the photo, where the protocol has one) or masked (one colour); envs/simpler/masking.py.
        paraphrases: file of other words for the instructions, below the project's root (protocol.paraphrased).
        rotation: what the three numbers of an action are, euler or axis_angle (envs/simpler/actions.py).
        action_scale: factor on translation and angle, 1 in the protocol.
        renderer: auto, gpu or cpu (envs/simpler/sapien2.py).
        shader: rt or ibl, of the tasks that the protocol draws with rt; auto: rt on a GPU.
        max_steps: control steps of an episode; the protocol's by default.

    Raises:
        UserError: a name that is not known; package, assets or Vulkan device missing.
    """

    def __init__(
        self,
        suite: str,
        task: str,
        cameras: tuple[str, ...] = ("static",),
        success_rule: str = "last_step",
        background: str = "overlay",
        paraphrases: str | None = None,
        rotation: str = "euler",
        action_scale: float = 1.0,
        renderer: str = "auto",
        shader: str = "auto",
        max_steps: int | None = None,
    ):
        for name, value, known in (
            ("success_rule", success_rule, SUCCESS_RULES),
            ("background", background, BACKGROUNDS),
            ("rotation", rotation, ROTATIONS),
            ("shader", shader, ("auto", *SHADERS)),
        ):
            if value not in known:
                raise UserError(f"{name}={value} of SimplerEnv is not known; choose one of {', '.join(known)}")
        if unknown := set(cameras) - {"static"}:
            raise UserError(f"cameras {sorted(unknown)} of SimplerEnv: there is static only")
        self.task, self.cameras, self.success_rule = task, tuple(cameras), success_rule
        self.background, self.rotation, self.action_scale = background, rotation, action_scale
        self._cells = cells(suite, [task])
        self._told = [cell.instructions for cell in self._cells]
        self.max_steps = self._cells[0].max_steps if max_steps is None else max_steps
        self._notes = {"success_rule": success_rule, "background": background}
        if paraphrases is not None:
            content = (_ROOT / paraphrases).read_bytes()
            self._told = [c.instructions for c in paraphrased(self._cells, load_wordings(_ROOT / paraphrases))]
            self._notes["paraphrases"] = f"{Path(paraphrases).name} {hashlib.sha256(content).hexdigest()[:8]}"
        self._assets = asset_folder()
        device, self._renderer = sapien2.renderer(renderer)
        self.shader = {"gpu": "rt", "cpu": "ibl"}[device] if shader == "auto" else shader
        # Notes are of the suite, not of the task: all records of a run carry the same.
        missing = stand_ins(self._assets, cells(suite))
        self._notes["assets"] = f"stand-ins for {', '.join(missing)}" if missing else "original"
        if any("shader_dir" in cell.build for cell in cells(suite)):
            self._notes["drawers"] = "ray tracing" if self.shader == "rt" else "no ray tracing"
        self._notes["renderer"] = f"vulkan-{device}"
        self.instruction = self._told[0][0]
        self.subtasks: list[dict] = []
        self.replan = self.failed = False
        self.simulator: Any = None
        self._seed, self._steps, self._ended = 0, 0, True
        self._gripper = StickyGripper()
        self._frames: dict[str, np.ndarray] | None = None

    def reset(self, seed: int) -> dict:
        """Start episode `seed` of the task's list, in a simulator made for it. See `Environment.reset`."""
        if not 0 <= seed < len(self._cells):
            raise UserError(f"{self.task} has no episode {seed}; seeds are 0 to {len(self._cells) - 1}")
        check_assets(self._assets, self._cells[seed])
        self.close()
        if mesh := unmade_mesh(self._assets, self._cells[seed]):
            self._make_mesh(seed, mesh.parent)
        self.simulator = self._build(seed)
        self.simulator.reset(options=copy.deepcopy(self._cells[seed].reset))
        self._seed, self._steps, self._ended, self.replan = seed, 0, False, False
        self._gripper = StickyGripper()
        self.instruction = self._instruction()
        self._frames = self._draw() if self.cameras else {}
        return self.observe()

    def _make_mesh(self, seed: int, folder: Path) -> None:
        """Let one of several workers load the stage for the first time, in a simulator that nobody uses."""
        with lock(folder, patience_s=FIRST_LOAD_S, by="simulator"):
            if unmade_mesh(self._assets, self._cells[seed]):
                self._build(seed).close()

    def _build(self, seed: int) -> Any:
        """SimplerEnv's environment without gymnasium's wrappers (a step limit, and an order that we keep)."""
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that a later version of the task exists: it is another task
            from simpler_env.utils.env.env_builder import build_maniskill2_env

            cell = self._cells[seed]
            build = cell.build_with(self._assets) | {"obs_mode": "none"}
            if "shader_dir" in build:
                build["shader_dir"] = self.shader
            return build_maniskill2_env(cell.env_id, **build).unwrapped

    def step(self, action: np.ndarray, render: bool = True) -> bool:
        """Execute one control step (1/3 s, WidowX 0.2 s); True once the episode counts as a success.

        See `Environment.step`. `replan` is set, and the step drawn, where another instruction holds after it.

        Args:
            action: (7,) xyz (m) and rotation (rad) of the hand in the axes of the robot's base; gripper above one half
                opens, on the Google Robot when it changes and for 15 steps (envs/simpler/actions.py).

        Raises:
            RuntimeError: the episode has ended.
            ValueError: not 7 finite numbers.
        """
        if self._ended:
            raise RuntimeError(f"the episode of {self.task} has ended; reset before the next step")
        moved = motion(action, self.rotation, self.action_scale)
        gripper = self._gripper(action[6]) if self._robot == "google_robot" else widowx_gripper(action[6])
        success = bool(self.simulator.step(np.append(moved, gripper))[2])
        before, self.instruction = self.instruction, self._instruction()
        self.replan = self.instruction != before
        self._frames = self._draw() if self.cameras and (render or self.replan) else None
        self._steps += 1
        last = self._steps == self.max_steps
        success = success and (last or self.success_rule != "last_step")
        self._ended = last or success
        return success

    def observe(self) -> dict:
        """The observation after the last step; state: see envs/simpler/proprioception.py. See `Environment.observe`."""
        if self.cameras and self._frames is None:
            raise RuntimeError("the last step was not rendered: call step(action, render=True) before observe()")
        return {"images": self._frames or {}, "state": self.proprioception(), "instruction": self.instruction}

    def proprioception(self) -> np.ndarray:
        """(8,) as RT-1 records it, WidowX (7,) as BridgeData does."""
        agent = self.simulator.agent
        pose = agent.robot.pose.inv() * self.simulator.tcp.pose
        if self._robot == "google_robot":
            return fractal_state(pose.p, pose.q, agent.get_gripper_closedness())
        return bridge_state(pose.p, pose.q, agent.robot.get_qpos()[6:8])

    def kept_ids(self) -> np.ndarray:
        """Segmentation ids of what stands before the background: robot, cabinet and the task's objects."""
        simulator, behind = self.simulator, set(self.simulator.rgb_always_overlay_objects)
        kept = [actor.id for actor in simulator.get_actors() if actor.name not in behind | _BACKDROP]
        for articulation in simulator.get_articulations():
            if articulation.name not in behind:
                kept += [link.id for link in articulation.get_links()]
        return np.array(kept)

    def sim_state(self) -> np.ndarray:
        """(D,) float32: poses and velocities of all bodies and joints."""
        return self.simulator.get_state()

    def versions(self) -> dict[str, str]:
        return {name: _commit(name) for name in ("simpler_env", "mani_skill2_real2sim")} | self._notes

    def close(self) -> None:
        if self.simulator is not None:
            self.simulator.close()
            self.simulator = None

    @property
    def _robot(self) -> str:
        return "google_robot" if self._cells[0].build["robot"].startswith("google_robot") else "widowx"

    def _instruction(self) -> str:
        """What the policy is told now: the subtask is the simulator's, the words are the protocol's or other ones."""
        said, known = self.simulator.get_language_instruction(), self._cells[self._seed].instructions
        if said not in known:
            raise RuntimeError(f"the simulator says {said!r} where the protocol of {self.task} says {known}")
        return self._told[self._seed][known.index(said)]

    def _draw(self) -> dict[str, np.ndarray]:
        """{"static": uint8 (H, W, 3)} of the present state, by the simulator's own get_obs."""
        simulator = self.simulator
        simulator._obs_mode = "image"
        try:
            image = simulator.get_obs()["image"][CAMERAS[self._robot]]
        finally:
            simulator._obs_mode = "none"
        # As ManiSkill2's wrapper for rgbd has it: cut off, not rounded.
        frame = np.clip(image["Color"][..., :3] * 255, 0, 255).astype(np.uint8)
        if self.background == "masked":
            frame = mask_background(frame, image["Segmentation"][..., 1], self.kept_ids())
        return {"static": frame}


def _commit(package: str) -> str:
    """The commit that an installed clone of `package` is at, eight digits; "unknown" where it is no clone."""
    head = Path(find_spec(package).origin).parents[1] / ".git/HEAD"
    name = head.read_text().strip() if head.exists() else ""
    return name[:8] if len(name) == 40 else "unknown"
