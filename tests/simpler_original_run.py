"""What the tests ask of the original SimplerEnv, run in its own interpreter; not a test file itself.

    .venv-simpler/bin/python -m tests.simpler_original_run NAME OUT.npz ARGUMENTS(JSON)

calls the function NAME below and keeps the arrays it returns in OUT.npz.
"""

from __future__ import annotations

import copy
import json
import sys
import time

import numpy as np

from envs.simpler.assets import asset_folder
from envs.simpler.original import CAMERAS, OriginalEnv
from envs.simpler.protocol import cells


def actions(count: int) -> np.ndarray:
    """(count, 7) motions that matter, the gripper closing and opening."""
    rng = np.random.default_rng(0)
    motions = rng.uniform(-1, 1, (count, 6)) * [0.05, 0.05, 0.05, 0.2, 0.2, 0.2]
    return np.column_stack([motions, np.arange(count) // 3 % 2 == 0])


def run(
    suite: str, task: str, seed: int, steps: int, every: int = 1, cameras: tuple = ("static",), before: tuple = ()
) -> dict:
    """An episode of `actions`, every so many steps drawn: state of all bodies, what a policy reads, frames, steps/s.

    In the same environment the episodes `before` are begun first.
    """
    env = OriginalEnv(suite, task, cameras=cameras)
    for other in before:
        env.reset(other)
        env.step(actions(1)[0])
    seen = env.reset(seed)
    bodies, states, frames, started = [env.sim_state()], [seen["state"]], [seen["images"].get("static")], time.time()
    for index, action in enumerate(actions(steps)):
        drawn = bool(every) and index % every == 0
        env.step(action, render=drawn)
        bodies.append(env.sim_state())
        states.append(env.proprioception())
        if drawn and cameras:
            frames.append(env.observe()["images"]["static"])
    speed = steps / (time.time() - started)
    env.close()
    return {"bodies": bodies, "states": states, "frames": frames if cameras else [], "speed": speed}


def published(suite: str, task: str, seed: int, steps: int) -> dict:
    """The same episode the way SimplerEnv's own evaluator runs it: its wrappers, a picture every step, its gripper."""
    from transforms3d.euler import euler2axangle

    env = OriginalEnv(suite, task)
    cell = env._cells[seed]
    from simpler_env.utils.env.env_builder import build_maniskill2_env
    from simpler_env.utils.env.observation_utils import get_image_from_maniskill2_obs_dict as image_of

    build = cell.build_with(env._assets)
    if "shader_dir" in build:
        build["shader_dir"] = env.shader
    simulator = build_maniskill2_env(cell.env_id, **build)
    observation, _ = simulator.reset(options=copy.deepcopy(cell.reset))
    bodies, frames = [simulator.unwrapped.get_state()], [image_of(simulator, observation)]
    before, held, latched, repeats = None, False, 0.0, 0
    for action in actions(steps):
        axis, angle = euler2axangle(*action[3:6])
        if suite == "widowx":
            gripper = 2.0 * (action[6] > 0.5) - 1.0
        else:
            # octo_model.py: relative, latched above one half, repeated 15 times.
            gripper = 0.0 if before is None else before - action[6]
            before = action[6]
            if abs(gripper) > 0.5 and not held:
                held, latched = True, gripper
            if held:
                repeats, gripper = repeats + 1, latched
            if repeats == 15:
                held, repeats, latched = False, 0, 0.0
        observation, *_ = simulator.step(np.concatenate([action[:3], axis * angle, [gripper]]))
        bodies.append(simulator.unwrapped.get_state())
        frames.append(image_of(simulator, observation))
    simulator.close()
    return {"bodies": bodies, "frames": frames}


def masked(suite: str, task: str, seed: int, steps: int) -> dict:
    """Frames with the photo and with one colour, the bodies' ids at every pixel, and what the ids are called."""
    found: dict = {"plain": [], "masked": [], "ids": [], "front": []}
    for background in ("overlay", "masked"):
        env = OriginalEnv(suite, task, background=background)
        env.reset(seed)
        for action in actions(steps):
            env.step(action)
            found["plain" if background == "overlay" else "masked"].append(env.observe()["images"]["static"])
            if background == "overlay":
                env.simulator._obs_mode = "image"
                found["ids"].append(env.simulator.get_obs()["image"][CAMERAS[env._robot]]["Segmentation"][..., 1])
                env.simulator._obs_mode = "none"
        simulator = env.simulator
        names = {actor.name: actor.id for actor in simulator.get_actors()}
        links = [link.id for body in simulator.get_articulations() for link in body.get_links()]
        found["front"] = [*links, *(number for name, number in names.items() if name != "arena")]
        found["robot"] = [link.id for link in simulator.agent.robot.get_links()]
        env.close()
    return found


def first_frames(episodes: list) -> dict:
    """The first frame of each (suite, task, seed), and what the policy is told there."""
    frames, told = {}, {}
    for index, (suite, task, seed) in enumerate(episodes):
        env = OriginalEnv(suite, task)
        seen = env.reset(seed)
        frames[f"frame{index}"], told[f"told{index}"] = seen["images"]["static"], seen["instruction"]
        env.close()
    return frames | told


def words(suite: str) -> dict:
    """{"task variant": what the policy is told} in the first episode of every variant of every task, one step taken.

    Reset fails where the simulator's own instruction is another one.
    """
    told, env = {}, None
    for cell in cells(suite):
        if f"{cell.task} {cell.variant}" in told:
            continue
        if env is None or env.task != cell.task:
            env = OriginalEnv(suite, cell.task, cameras=())
        told[f"{cell.task} {cell.variant}"] = env.reset(cell.seed)["instruction"]
        env.step(actions(1)[0])
    return {"told": list(told.items())}


def pairs(suite: str, seeds: list) -> dict:
    """What the policy is told in episodes of move near."""
    env = OriginalEnv(suite, "move_near", cameras=())
    return {"told": [env.reset(seed)["instruction"] for seed in seeds]}


def two_instructions() -> dict:
    """place_apple_in_top_drawer up to the change of instruction: steps at which `replan` is set, and the words."""
    env = OriginalEnv("google_vm", "place_apple_in_top_drawer")
    told, replans = [env.reset(0)["instruction"]], []
    for step in range(1, 104):
        env.step(np.array([0, 0, 0, 0, 0, 0, 1.0]), render=False)
        if env.replan:
            replans.append(step)
            assert env.observe()["images"]["static"].shape == (512, 640, 3)
        told.append(env.instruction)
    env.close()
    return {"told": told, "replans": replans}


def assets() -> dict:
    return {"root": str(asset_folder())}


if __name__ == "__main__":
    name, out, arguments = sys.argv[1:]
    np.savez(out, **globals()[name](**json.loads(arguments)))
