"""The CALVIN table: the public `calvin_env` on current Python, frames only when asked for (fact sheet calvin §1-3).

`calvin_env` (commit 797142c) is not on PyPI; README says how to install it. It was written for gym, pyhash and a git
checkout; `_package` gives it what it imports and no more. Differences from its own `PlayTableSimEnv.step`:

- cameras are rendered by `frame`, never by a step (rendering is 98 % of the time, and the state does not depend on it);
- `reload` rebuilds the physics world from a seed, without which a chain's outcome depends on the chain before it;
- the gripper's last command does not survive a reset, and motion is clipped to [-1, 1] (the package does neither).

One simulator per process: several of the package's calls reach for the first physics client whatever theirs is.

    sim = CalvinSim("D")
    sim.reset(*initial_state(scene)); before = sim.info()
    sim.step(action); done = sim.achieved("open_drawer", before)
"""

from __future__ import annotations

import logging
import os
import subprocess
import sys
import types
import warnings
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np

from vla.errors import UserError

SCENES = ("A", "B", "C", "D")
CAMERAS = {"static": "static", "wrist": "gripper"}
RENDERERS = ("auto", "tiny", "egl")
INSTALL = "calvin_env is not installed; run `make calvin` (README, CALVIN)"

_PHYSICS_HZ = 240
_PROBE = "from envs.calvin_sim import CalvinSim; CalvinSim('D', ('static',), 'egl').frame('static')"


def resolve_renderer(renderer: str) -> str:
    """ "auto" is egl where it draws a frame, else tiny; asked in a process of its own, because a broken EGL aborts.

    Raises:
        UserError: an unknown renderer, or egl asked for and not working.
    """
    if renderer not in RENDERERS:
        raise UserError(f"benchmark.renderer={renderer} is not known; choose one of {', '.join(RENDERERS)}")
    if renderer == "tiny" or os.environ.get("VLA_CALVIN_EGL") == "proven":
        return "tiny" if renderer == "tiny" else "egl"
    path = os.pathsep.join([str(Path(__file__).resolve().parents[1]), *filter(None, [os.environ.get("PYTHONPATH")])])
    environment = {**os.environ, "PYTHONPATH": path, "VLA_CALVIN_EGL": "proven"}
    try:
        probe = subprocess.run(
            [sys.executable, "-c", _PROBE], capture_output=True, text=True, env=environment, timeout=120
        )
        complaint = None if probe.returncode == 0 else (probe.stdout + probe.stderr).strip().splitlines()[-1:]
    except subprocess.TimeoutExpired:
        complaint = ["no frame within 120 s"]
    if complaint is None:
        os.environ["VLA_CALVIN_EGL"] = "proven"
        return "egl"
    if renderer == "auto":
        return "tiny"
    device = os.environ.get("EGL_VISIBLE_DEVICES")
    where = f" on EGL_VISIBLE_DEVICES={device}" if device else ""
    raise UserError(
        f"benchmark.renderer=egl cannot draw{where} ({''.join(complaint)}): use renderer=tiny, another device, or "
        "install libegl1 and a driver"
    )


class CalvinSim:
    """The play table of one scene.

    Args:
        scene: A, B, C or D.
        cameras: keys of CAMERAS; static is 200 × 200, wrist 84 × 84.
        renderer: a key of RENDERERS.

    Raises:
        UserError: unknown scene, camera or renderer; the package or the renderer is missing.
    """

    def __init__(self, scene: str = "D", cameras: tuple[str, ...] = ("static", "wrist"), renderer: str = "tiny"):
        if scene not in SCENES:
            raise UserError(f"CALVIN scene {scene!r} is not known; choose one of {', '.join(SCENES)}")
        if unknown := set(cameras) - set(CAMERAS):
            raise UserError(f"cameras {sorted(unknown)} of CALVIN: choose from {', '.join(CAMERAS)}")
        self.scene, self.cameras, self.renderer = scene, tuple(cameras), resolve_renderer(renderer)
        root = _package()
        config = _compose(root / "conf", scene, self.renderer == "egl")
        import hydra

        self.env = hydra.utils.instantiate(config.env)
        self.env.get_camera_obs = lambda: ({}, {})
        self._camera = {camera.name: camera for camera in self.env.cameras}
        from calvin_env.envs.tasks import Tasks

        self._oracle = Tasks(config.tasks.tasks)
        self.tasks = tuple(self._oracle.tasks)

    def reload(self, seed: int = 0) -> None:
        """Rebuild the physics world, so that what follows is a function of the seed and the actions alone."""
        env = self.env
        env.seed(seed)
        env.scene.np_random = env.np_random
        env.p.resetSimulation(physicsClientId=env.cid)
        env.p.setPhysicsEngineParameter(deterministicOverlappingPairs=1, physicsClientId=env.cid)
        env.p.setTimeStep(1 / _PHYSICS_HZ, physicsClientId=env.cid)
        env.load()

    def reset(self, robot_obs: np.ndarray | None = None, scene_obs: np.ndarray | None = None) -> None:
        """Put robot (15,) and scene (24,) into a state; their defaults are the home pose and randomly placed blocks."""
        self.env.robot.gripper_action = 1 if robot_obs is None else int(np.sign(robot_obs[14])) or 1
        self.env.reset(robot_obs=robot_obs, scene_obs=scene_obs)

    def step(self, action: np.ndarray) -> None:
        """One control step of 1/30 s.

        Args:
            action: (7,) relative end-effector motion in [-1, 1] (1 = 2 cm, 0.05 rad; clipped), gripper 1 = open or 0.
        """
        action = np.asarray(action, dtype=np.float64)
        if action.shape != (7,) or not np.isfinite(action).all():
            raise ValueError(f"a CALVIN action is 7 finite numbers, not {action}")
        self.env.step(np.append(action[:6].clip(-1, 1), 1.0 if action[6] >= 0.5 else -1.0))

    def frame(self, camera: str) -> np.ndarray:
        """uint8 (H, W, 3) of the current state."""
        rgb, _ = self._camera[CAMERAS[camera]].render()
        return np.ascontiguousarray(rgb)

    def state(self) -> tuple[np.ndarray, np.ndarray]:
        """robot_obs (15,) and scene_obs (24,), float64 (fact sheet calvin §5)."""
        observation = self.env.get_state_obs()
        return observation["robot_obs"], observation["scene_obs"]

    def info(self) -> dict[str, Any]:
        """What the oracle compares: poses, joints, contacts."""
        return self.env.get_info()

    def achieved(self, task: str, before: dict[str, Any]) -> bool:
        """Whether `task` has been done since `before` (the public oracle)."""
        return bool(self._oracle.get_task_info_for_set(before, self.info(), {task}))

    def versions(self) -> dict[str, str]:
        return {"calvin_env": _commit(), "pybullet": version("pybullet"), "renderer": self.renderer}

    def close(self) -> None:
        self.env.close()
        self.env.ownsPhysicsClient = False  # or its destructor would disconnect a later simulator


def _package() -> Path:
    """Import calvin_env, with stand-ins for what it imports and does not need; returns the root of its checkout."""
    root = package_root()
    if "gym" not in sys.modules:
        import gymnasium

        sys.modules["gym"] = gymnasium
        sys.modules["gym.utils"], sys.modules["gym.utils.seeding"] = gymnasium.utils, gymnasium.utils.seeding
    for name in ("quaternion", "git"):
        sys.modules.setdefault(name, types.ModuleType(name))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import calvin_env.utils.utils as utils

        utils.get_git_commit_hash = lambda path: _commit()  # its own needs GitPython and a checkout
        import calvin_env.envs.play_table_env  # noqa: F401
    logging.getLogger("calvin_env").setLevel(logging.WARNING)
    return root


def package_root() -> Path:
    """Where the checkout of calvin_env lies.

    Raises:
        UserError: it is not installed.
    """
    if find_spec("calvin_env") is None or find_spec("pybullet") is None:
        raise UserError(INSTALL)
    return Path(next(iter(find_spec("calvin_env").submodule_search_locations))).parent


def _compose(conf: Path, scene: str, egl: bool):
    from hydra import compose, initialize_config_dir

    overrides = [
        f"scene=calvin_scene_{scene}",
        "cameras=static_and_gripper",
        "use_vr=false",
        f"env.use_egl={str(egl).lower()}",
        "env.use_scene_info=true",
        "hydra/job_logging=default",
        "hydra/hydra_logging=default",
    ]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with initialize_config_dir(str(conf), version_base="1.1"):
            return compose("config_data_collection", overrides=overrides)


def _commit() -> str:
    """The package's commit where it lies in a checkout."""
    try:
        done = subprocess.run(
            ["git", "-C", str(package_root()), "rev-parse", "--short=7", "HEAD"], capture_output=True, text=True
        )
    except FileNotFoundError:
        return "unknown"
    return done.stdout.strip() or "unknown"
