"""A robot's control loop around a served policy, with limits that hold whatever the policy says.

    python scripts/serve.py policy=runs/<run>/policy &
    python examples/robot_loop.py --steps 40             # a made-up robot, so that it runs here

For a real one, write a class with the four methods of `Robot` and its own `Limits`. It stops (`robot.stop()`, always,
on every way out) when the server is late or gone, when an observation is stale, and on a number that is no number.
"""

from __future__ import annotations

import argparse
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from vla.serving.client import PolicyClient, ServerError


@dataclass(frozen=True)
class Limits:
    """What a robot may do in one control step, in its base frame. The values suit a table-top arm at 5 Hz."""

    low: tuple[float, float, float] = (0.15, -0.25, 0.02)  # m, corners of the box the gripper stays in
    high: tuple[float, float, float] = (0.50, 0.25, 0.40)
    translation: float = 0.02  # m, length of a step
    rotation: float = 0.10  # rad, angle of a step
    gripper_open_above: float = 0.7  # between the two the gripper stays as it is
    gripper_close_below: float = 0.3
    gripper_patience: int = 2  # steps in a row that must ask for the other state
    stale_after_s: float = 0.5  # age of an observation that is not acted upon any more


class Robot(Protocol):
    def observe(self) -> Observation: ...

    def move(self, motion: np.ndarray, gripper_open: bool) -> None:
        """Move by (3 translation in m, 3 rotation vector in rad) in the base frame; returns after the control step."""

    def stop(self) -> None:
        """Hold still; called once, at the end."""


@dataclass(frozen=True)
class Observation:
    images: dict[str, np.ndarray]  # camera: uint8 (H, W, 3), turned as in training
    state: np.ndarray  # what the policy was trained on
    position: np.ndarray  # of the gripper, m, base frame
    taken_at: float  # time.monotonic() when the oldest part of it was measured


class Stop(RuntimeError):
    """Why the robot must not move on."""


@dataclass
class Gripper:
    """Hysteresis: a hand that flutters drops things."""

    limits: Limits
    is_open: bool = True
    asked: int = field(default=0, init=False)

    def update(self, command: float) -> bool:
        """Whether it should be open, after one more command (0 closed … 1 open)."""
        threshold = self.limits.gripper_close_below if self.is_open else self.limits.gripper_open_above
        other = command < threshold if self.is_open else command > threshold
        self.asked = self.asked + 1 if other else 0
        if self.asked >= self.limits.gripper_patience:
            self.is_open, self.asked = not self.is_open, 0
        return self.is_open


def limited_motion(motion: np.ndarray, position: np.ndarray, limits: Limits) -> np.ndarray:
    """The part of a motion (6,) that is allowed from `position` (3,), m: into the box, then no faster than allowed.

    Both leave a gripper that is inside the box inside, since a box is convex; one outside comes back at that speed.

    Raises:
        Stop: NaN or infinity, in the motion or the position.
    """
    if motion.shape != (6,) or not (np.isfinite(motion).all() and np.isfinite(position).all()):
        raise Stop(f"no motion can be made of {motion} at {position}")
    motion = motion.astype(np.float64)
    motion[:3] = np.clip(position + motion[:3], limits.low, limits.high) - position
    return np.concatenate([shortened(motion[:3], limits.translation), shortened(motion[3:], limits.rotation)])


def shortened(vector: np.ndarray, longest: float) -> np.ndarray:
    """The vector, or one in its direction of length `longest`."""
    largest = np.abs(vector).max()
    if largest == 0:
        return vector
    direction = vector / largest  # first, since the square of a large number is infinite
    length = np.linalg.norm(direction)
    return direction / length * min(length * largest, longest)


def check_fresh(observation: Observation, limits: Limits, now: float) -> None:
    """Raises Stop when the observation is too old, or from the future (another clock)."""
    age = now - observation.taken_at
    if not -0.001 <= age <= limits.stale_after_s:
        raise Stop(f"the observation is {age:.2f} s old, more than {limits.stale_after_s} s")


def run(
    client: PolicyClient,
    robot: Robot,
    instruction: str,
    steps: int,
    execute_steps: int,
    limits: Limits,
    units: tuple[float, float] = (1.0, 1.0),
) -> str:
    """Control the robot for `steps` steps; returns why it ended, and has stopped the robot in any case.

    Args:
        execute_steps: actions of a chunk before the policy is asked again.
        units: metres and radians per unit of the policy's actions: 1 where trained on metres (Bridge), 0.05 and 0.5
            for LIBERO's controller.
    """
    keys, scale = client.metadata, np.repeat(units, 3)
    gripper = Gripper(limits)
    plan: list[np.ndarray] = []
    try:
        for _ in range(steps):
            observation = robot.observe()
            if not plan:
                plan = actions_of(client.infer(message(observation, instruction, keys)))[:execute_steps]
            check_fresh(observation, limits, time.monotonic())  # after the wait for the server, which makes it old
            action = plan.pop(0)
            motion = limited_motion(action[:6] * scale, observation.position, limits)
            robot.move(motion, gripper.update(float(action[6])))
    except (Stop, ServerError) as reason:
        return str(reason)
    finally:
        robot.stop()
    return f"{steps} steps done"


def actions_of(answer: dict[str, Any]) -> list[np.ndarray]:
    """The chunk of an answer, H actions (7,); Stop where it is none."""
    chunk = answer.get("actions")
    if not isinstance(chunk, np.ndarray) or chunk.ndim != 2 or chunk.shape[1] != 7 or not len(chunk):
        raise Stop(f"the server's answer holds no actions (H, 7), but {sorted(answer)}")
    return list(chunk)


def message(observation: Observation, instruction: str, keys: dict[str, Any]) -> dict[str, Any]:
    """The observation under the names that the server asks for."""
    named = {key: observation.images[camera] for camera, key in keys["cameras"].items()}
    if keys["state"] is not None:
        named[keys["state"]] = observation.state
    return named | {keys["prompt"]: instruction}


class FakeRobot:
    """A point that goes where it is told, with noise for a picture.

    Args:
        cameras: those the policy reads.
        state_size: numbers in the state that the policy reads.
    """

    def __init__(self, cameras: list[str], state_size: int = 8, hz: float = 20.0) -> None:
        self.cameras, self.state_size, self.period = cameras, state_size, 1 / hz
        self.position = np.array([0.3, 0.0, 0.2])
        self.moves: list[np.ndarray] = []
        self.stops = 0
        self._rng = np.random.default_rng(0)

    def observe(self) -> Observation:
        images = {c: self._rng.integers(0, 256, (128, 128, 3), dtype=np.uint8) for c in self.cameras}
        state = np.zeros(self.state_size, np.float32)
        return Observation(images, state, self.position.copy(), time.monotonic())

    def move(self, motion: np.ndarray, gripper_open: bool) -> None:
        self.moves.append(motion)
        self.position = self.position + motion[:3]
        time.sleep(self.period)

    def stop(self) -> None:
        self.stops += 1


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--url", default="ws://127.0.0.1:8000")
    parser.add_argument("--instruction", default="pick up the carrot")
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument(
        "--execute-steps", type=int, default=4, help="actions of a chunk before the policy is asked again"
    )
    parser.add_argument("--timeout", type=float, default=0.4, help="seconds for an answer; the robot stops after it")
    parser.add_argument(
        "--units", type=float, nargs=2, default=(1.0, 1.0), help="metres and radians per unit of action"
    )
    options = parser.parse_args()
    try:
        client = PolicyClient(options.url, options.timeout)
    except ServerError as error:
        sys.exit(f"error: {error}; start it with scripts/serve.py, or name it with --url")
    with client:
        robot = FakeRobot(list(client.metadata["cameras"]))
        steps, execute, units = options.steps, options.execute_steps, tuple(options.units)
        reason = run(client, robot, options.instruction, steps, execute, Limits(), units)
    travelled = sum(np.linalg.norm(motion[:3]) for motion in robot.moves)
    print(f"{reason}; {len(robot.moves)} moves, {travelled:.2f} m travelled, now at {robot.position.round(3)}")


if __name__ == "__main__":
    main()
