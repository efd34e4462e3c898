"""A small CALVIN of one's own: scripted experts play in scenes A, B, C and D, written in the official layout.

A play segment is a few tasks in a row from a random scene; each success is a language window with one of the public
training sentences. Segment i of a scene is a function of (seed, scene, i) alone. An attempt is first played without
rendering (a thousand steps a second) and only what succeeded is played again with the cameras on.

Differences from the data recorded in virtual reality: `rel_actions` are the commands that were executed, which replay;
the public ones are differences of measured poses, of which a third replays (fact sheet calvin §6). `actions` are the
absolute targets of those commands. Depth and tactile images are left out.

    collect_calvin(Path("datasets/calvin_abc_d"), demos=210)

Called from a script, that needs the usual `if __name__ == "__main__":`, since workers are spawned.
"""

from __future__ import annotations

import io
import json
import multiprocessing
import os
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor, wait
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from data.calvin import CAMERA_KEYS
from envs.calvin import annotations
from envs.calvin_experts import CalvinExpert
from envs.calvin_sequences import COLORS, TASKS, Scene, outcomes
from envs.calvin_sim import CalvinSim, package_root, resolve_renderer
from vla.errors import UserError
from vla.files import write_atomic

TRAINING, VALIDATION = ("A", "B", "C"), ("D",)
FRAMES_PER_SCENE = 2_000_000  # of the seven digits in a frame's name
WINDOW = 64
"""Longest window of the public annotation; of a longer demonstration the last so many frames are described."""
TASKS_PER_SEGMENT, STEPS_PER_TASK = 4, 160
TAIL = 16
"""Frames kept after a segment's last window, for o_{t+H}."""
_TRIES_WITHOUT_SUCCESS = 50


@dataclass(frozen=True)
class Settings:
    """Everything a scene's part depends on; kept beside the journals, so that another collection is told apart."""

    scene: str
    demos: int
    cameras: tuple[str, ...]
    renderer: str
    seed: int


def collect_calvin(
    out: Path,
    demos: int,
    cameras: tuple[str, ...] = ("static", "wrist"),
    renderer: str = "auto",
    seed: int = 0,
    workers: int = 2,
    progress: bool = True,
) -> list[Path]:
    """Write `out`/training (scenes A, B, C) with `demos` windows and `out`/validation (D) with a tenth as many.

    What a stopped collection has written is kept and gone on from; a finished one is left as it is.

    Args:
        cameras: keys of data.calvin.CAMERA_KEYS.
        renderer: see envs/calvin_sim.py; evaluate with the same one.
        workers: processes, one scene each at a time.

    Returns:
        The two folders.

    Raises:
        UserError: calvin_env or the sentences are missing, other settings in `out`, an expert that never succeeds.
    """
    if low := [f"{name}={count}" for name, count in {"demos": demos, "workers": workers}.items() if count < 1]:
        raise UserError(f"{', '.join(low)}: must be at least 1")
    package_root()
    annotations("training")
    renderer = resolve_renderer(renderer)
    jobs: list[tuple[Path, Settings]] = []
    for split, scenes, count in (("training", TRAINING, demos), ("validation", VALIDATION, max(1, demos // 10))):
        share = [count // len(scenes) + (i < count % len(scenes)) for i in range(len(scenes))]
        for scene, wanted in zip(scenes, share, strict=True):
            jobs.append((out / split, Settings(scene, wanted, tuple(cameras), renderer, seed)))
    for folder, settings in jobs:
        _adopt(folder, settings)
    todo = [(folder, settings) for folder, settings in jobs if _count(_journal(folder, settings)) < settings.demos]
    _run(todo, workers, progress)
    for split, scenes in (("training", TRAINING), ("validation", VALIDATION)):
        _finish(out / split, scenes)
    return [out / "training", out / "validation"]


def _run(jobs: list[tuple[Path, Settings]], workers: int, progress: bool) -> None:
    if not jobs:
        return
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    context = multiprocessing.get_context("spawn")
    with (
        Progress(*columns, disable=not progress) as bar,
        ProcessPoolExecutor(min(workers, len(jobs)), mp_context=context) as pool,
    ):
        bars = [bar.add_task(f"scene {settings.scene}", total=settings.demos) for _, settings in jobs]
        futures = [pool.submit(collect_scene, folder, settings) for folder, settings in jobs]
        try:
            while wait(futures, timeout=0.5).not_done:
                for task, (folder, settings) in zip(bars, jobs, strict=True):
                    bar.update(task, completed=min(_count(_journal(folder, settings)), settings.demos))
                for future in futures:
                    if future.done():
                        future.result()
        finally:
            for future in futures:
                future.cancel()
        for future, task, (_, settings) in zip(futures, bars, jobs, strict=True):
            future.result()
            bar.update(task, completed=settings.demos)


def collect_scene(folder: Path, settings: Settings) -> None:
    """Add segments to `folder` until the scene has its windows; every finished segment is one line of its journal."""
    sim = CalvinSim(settings.scene, settings.cameras, settings.renderer)
    journal = _journal(folder, settings)
    done = list(_segments(journal))
    attempt = 1 + max((segment["attempt"] for segment in done), default=-1)
    frame = 1 + max((s["last"] for s in done), default="ABCD".index(settings.scene) * FRAMES_PER_SCENE - 1)
    found, barren = sum(len(segment["windows"]) for segment in done), 0
    while found < settings.demos:
        segment = play(sim, settings, attempt, most=settings.demos - found)
        if segment is not None:
            _write_frames(folder, frame, segment.frames)
            windows = [[frame + start, frame + end, task, text] for start, end, task, text in segment.windows]
            line = {"attempt": attempt, "first": frame, "last": frame + len(segment.frames) - 1, "windows": windows}
            with journal.open("a") as file:
                file.write(json.dumps(line) + "\n")
                file.flush()
                os.fsync(file.fileno())
            frame += len(segment.frames)
            found += len(windows)
        barren = 0 if segment is not None else barren + 1
        if barren == _TRIES_WITHOUT_SUCCESS:
            raise UserError(f"scene {settings.scene}: the expert failed {barren} times in a row; is calvin_env intact?")
        attempt += 1
    sim.close()


@dataclass(frozen=True)
class Segment:
    frames: list[dict[str, np.ndarray]]
    windows: list[tuple[int, int, str, str]]
    """(first frame, last frame, task, sentence), counted from the segment's beginning."""


def play(sim: CalvinSim, settings: Settings, attempt: int, most: int) -> Segment | None:
    """Segment `attempt`, with at most `most` windows; None where no task succeeded."""
    rng = np.random.default_rng([settings.seed, ord(settings.scene), attempt])
    start = random_start(sim, rng)
    actions, windows = rehearse(sim, rng, most)
    if not windows:
        return None
    restore(sim, *start)
    frames = []
    for action in actions[: windows[-1][1] + 1 + TAIL]:
        robot, scene = sim.state()
        images = {CAMERA_KEYS[camera]: sim.frame(camera) for camera in settings.cameras}
        sim.step(action)
        target = sim.env.robot.target_pos, sim.env.robot.target_orn
        gripper = 1.0 if action[6] >= 0.5 else -1.0
        frames.append(
            {
                "rel_actions": np.append(action[:6].clip(-1, 1), gripper),
                "actions": np.concatenate([*target, [gripper]]),
                "robot_obs": robot,
                "scene_obs": scene,
                **images,
            }
        )
    return Segment(frames, windows)


def rehearse(sim: CalvinSim, rng: np.random.Generator, most: int) -> tuple[list[np.ndarray], list]:
    """Tasks one after the other from the present state, unrendered: all actions, and the windows of the successes."""
    actions: list[np.ndarray] = []
    windows: list[tuple[int, int, str, str]] = []
    done: set[str] = set()
    for _ in range(min(TASKS_PER_SEGMENT, most)):
        possible = [task for task in TASKS if task not in done and len(outcomes(symbolic(sim), task)) == 1]
        if not possible:
            break
        task = possible[rng.integers(len(possible))]
        before, expert, first = sim.info(), CalvinExpert(sim, task, rng), len(actions)
        for _ in range(STEPS_PER_TASK):
            actions.append(expert.act())
            sim.step(actions[-1])
            if sim.achieved(task, before):
                break
        else:
            return actions, windows
        sentences = annotations("training")[task]
        last = len(actions) - 1
        windows.append((max(first, last - WINDOW + 1), last, task, sentences[rng.integers(len(sentences))]))
        done.add(task)
    for _ in range(TAIL):  # o_{t+H} of the last window
        actions.append(expert.act())
        sim.step(actions[-1])
    return actions, windows


def random_start(sim: CalvinSim, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray, int]:
    """Blocks anywhere on the table, doors and lights either way; returns what `restore` needs."""
    world = int(rng.integers(2**31))
    sim.reload(world)
    sim.reset()
    robot, scene = sim.state()
    scene[0] = rng.integers(2) * slider_range(sim.env.scene.doors[0])
    scene[1] = rng.integers(2) * 0.22
    scene[4:6] = rng.integers(2, size=2)
    scene[3] = 0.088 * scene[4]
    restore(sim, robot, scene, world)
    return robot, scene, world


def restore(sim: CalvinSim, robot: np.ndarray, scene: np.ndarray, world: int) -> None:
    sim.reload(world)
    sim.reset(robot, scene)


def slider_range(door: Any) -> float:
    """How far the sliding door opens, metres; it differs between scenes (fact sheet calvin §5)."""
    return float(door.p.getJointInfo(door.uid, door.joint_index, physicsClientId=door.cid)[9])


def symbolic(sim: CalvinSim) -> Scene:
    """What the present state is in the terms of envs/calvin_sequences.py."""
    info = sim.info()
    scene = info["scene_info"]
    doors = {name: door["current_state"] for name, door in scene["doors"].items()}
    slider, drawer = (doors[f"base__{name}"] for name in ("slide", "drawer"))
    blocks = {name: block for name, block in scene["movable_objects"].items()}
    robot = info["robot_info"]["uid"]
    uids = {block["uid"]: name for name, block in blocks.items()}
    places: dict[str, str] = {}
    for color in COLORS:
        block = blocks[f"block_{color}"]
        x, y, z = block["current_pos"]
        touching = {contact[2] for contact in block["contacts"]}
        if robot in touching and z > 0.48:
            places[color] = "grasped"
        elif y > 0.0:
            places[color] = "slider_left" if x < -0.08 else "slider_right"
        elif z < 0.42:
            places[color] = "drawer"
        elif any(uid in touching and blocks[uids[uid]]["current_pos"][2] < z - 0.02 for uid in uids):
            places[color] = "stacked_top"
        elif any(uid in touching and blocks[uids[uid]]["current_pos"][2] > z + 0.02 for uid in uids):
            places[color] = "stacked_bottom"
        else:
            places[color] = "table"
    lights = {name: int(light["logical_state"]) for name, light in scene["lights"].items()}
    return {
        "led": lights["led"],
        "lightbulb": lights["lightbulb"],
        "slider": "left" if slider > 0.12 else "right",
        "drawer": "open" if drawer > 0.1 else "closed",
        **{f"{color}_block": places[color] for color in COLORS},
        "grasped": int("grasped" in places.values()),
    }


def _write_frames(folder: Path, first: int, frames: list[dict[str, np.ndarray]]) -> None:
    for index, arrays in enumerate(frames):
        low = {name: a.astype(np.float32) if a.dtype.kind == "f" else a for name, a in arrays.items()}
        np.savez_compressed(folder / f"episode_{first + index:07d}.npz", **low)


def _journal(folder: Path, settings: Settings) -> Path:
    return folder / ".collect" / f"{settings.scene}.jsonl"


def _segments(journal: Path) -> Iterator[dict[str, Any]]:
    """The finished segments; a last line that a killed process left half written is not one."""
    lines = journal.read_text().split("\n")[:-1] if journal.exists() else []
    return (json.loads(line) for line in lines)


def _count(journal: Path) -> int:
    return sum(len(segment["windows"]) for segment in _segments(journal))


def _adopt(folder: Path, settings: Settings) -> None:
    """Make the folder this collection's, or find that it is."""
    if folder.exists() and any(folder.iterdir()) and not (folder / ".collect").is_dir():
        raise UserError(f"{folder} is not empty and was not collected here; choose another place with out=DIR")
    file = folder / ".collect" / f"{settings.scene}.json"
    file.parent.mkdir(parents=True, exist_ok=True)
    mine = json.loads(json.dumps(asdict(settings)))
    if file.exists() and (found := json.loads(file.read_text())) != mine:
        differing = [f"{key} was {found.get(key)}, now {mine[key]}" for key in mine if found.get(key) != mine[key]]
        raise UserError(f"{folder} was collected otherwise ({', '.join(differing)}); choose another place with out=DIR")
    file.write_text(json.dumps(mine))
    journal = _journal(folder, settings)
    if journal.exists() and not (content := journal.read_bytes()).endswith(b"\n"):
        os.truncate(journal, content.rfind(b"\n") + 1)


def _finish(folder: Path, scenes: tuple[str, ...]) -> None:
    """The index files of the official layout, from the journals."""
    segments = {scene: list(_segments(folder / ".collect" / f"{scene}.jsonl")) for scene in scenes}
    bounds = np.array([[s["first"], s["last"]] for scene in scenes for s in segments[scene]])
    windows = [window for scene in scenes for s in segments[scene] for window in s["windows"]]
    info = {f"calvin_scene_{k}": [s[0]["first"], s[-1]["last"]] for k, s in segments.items()}
    language = {
        "language": {"ann": [w[3] for w in windows], "task": [w[2] for w in windows]},
        "info": {"episodes": [], "indx": [(w[0], w[1]) for w in windows]},
    }
    (folder / "lang_annotations").mkdir(exist_ok=True)
    _save(folder / "lang_annotations" / "auto_lang_ann.npy", language)
    _save(folder / "scene_info.npy", info)
    _save(folder / "ep_lens.npy", bounds[:, 1] - bounds[:, 0] + 1)
    _save(folder / "statistics.yaml", _statistics(folder, bounds))
    _save(folder / "ep_start_end_ids.npy", bounds)  # last: with it the folder is a split


def _statistics(folder: Path, bounds: np.ndarray) -> dict:
    names = ("robot_obs", "scene_obs", "actions")
    rows: dict[str, list] = {name: [] for name in names}
    for first, last in bounds:
        for frame in range(first, last + 1):
            with np.load(folder / f"episode_{frame:07d}.npz") as arrays:
                for name in names:
                    rows[name].append(arrays[name])
    stacked = {name: np.stack(values).astype(np.float64) for name, values in rows.items()}
    moments = {n: [{"mean": stacked[n].mean(0).tolist(), "std": stacked[n].std(0).tolist()}] for n in names[:2]}
    low, high = stacked["actions"].min(0), stacked["actions"].max(0)
    return moments | {"act_min_bound": low.tolist(), "act_max_bound": high.tolist()}


def _save(path: Path, content: Any) -> None:
    if path.suffix == ".yaml":
        write_atomic(path, yaml.safe_dump(content))
    else:
        array = io.BytesIO()
        np.save(array, content)
        write_atomic(path, array.getvalue())
