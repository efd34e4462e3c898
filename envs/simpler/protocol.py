"""SimplerEnv's protocol as data: every episode of a benchmark, with the simulator's exact arguments, and its scores.

Files beside this one: widowx.yaml, google_vm.yaml (visual matching), google_va.yaml (variant aggregation). A task is
    env            the simulator's environment id
    instructions   what the policy is told, one per subtask; {source} and {target} come from the episode
    success        the simulator's test, in words
    build          keyword arguments of SimplerEnv's build_maniskill2_env; paths are relative to the asset folder
    variants       name -> {env, build}: what replaces the task's own; every variant weighs the same in the score
    places         robot poses x, y (m) and yaw (rad; on top of half a turn), each a number or [from, to, count],
                   perhaps with a `build` of its own
    objects        x, y of the object (m) in the same notation, or
    episodes       layouts the simulator knows by number
and is expanded with the loops of SimplerEnv's evaluator, outermost first: variant, robot x, robot y, yaw, object x,
object y or episode number (facts simpler §4). Nothing here needs a simulator.

    for cell in cells("google_vm", ["pick_coke_can"]): ...
    scores = aggregate("google_vm", rows)          # rows: records with task, seed, success (envs/records.py)
"""

from __future__ import annotations

import functools
import itertools
import zlib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from data.instructions import Wording, variants_of
from vla.errors import UserError

FILES = {path.stem: path for path in Path(__file__).parent.glob("*.yaml")}
SUCCESS_RULES = ("last_step", "ever", "early_stop")
"""Success is what the last step says (SimplerEnv's own rule), or what any step said; the last two differ in name only
here, because an episode that cannot fail any more is not run on."""


@dataclass(frozen=True)
class Cell:
    """One episode of a benchmark; (task, seed) names it in the records."""

    task: str
    seed: int
    """Index in the task's list of episodes."""
    variant: str
    env_id: str
    build: dict[str, Any]
    """Keyword arguments of build_maniskill2_env, JSON-able; see `build_with`."""
    reset: dict[str, Any]
    """The `options` of env.reset, which is called on a fresh environment and without a seed. Hand over a copy: some
    environments write into it."""
    instructions: tuple[str, ...]
    """One per subtask, in order."""
    placement: dict[str, tuple[float, ...]]
    """Object -> x, y (m), and yaw (degrees) where the episode sets it, as far as `reset` or the episode says."""

    @property
    def max_steps(self) -> int:
        return self.build["max_episode_steps"]

    def build_with(self, assets: Path) -> dict[str, Any]:
        """`build` with the overlay's path below `assets`, ManiSkill2_real2sim's data folder."""
        overlay = self.build.get("rgb_overlay_path")
        return self.build | ({"rgb_overlay_path": str(assets / overlay)} if overlay else {})


@dataclass(frozen=True)
class Score:
    """The mean of `n` episodes' successes, weighted as the protocol says; None unless all of them are there."""

    value: float | None
    n: int
    missing: int


def cells(protocol: str, groups: Iterable[str] | None = None) -> list[Cell]:
    """The episodes of a protocol, tasks in file order, or those of the tasks and scores named in `groups`.

    Raises:
        UserError: no such protocol, task or score.
    """
    wanted = None if groups is None else {task for group in groups for task in members(protocol, group)}
    return [cell for cell in _expanded(protocol) if wanted is None or cell.task in wanted]


def members(protocol: str, name: str) -> list[str]:
    """The tasks behind the score or task `name`."""
    data = _load(protocol)
    if name in data["tasks"]:
        return [name]
    if name not in data["scores"]:
        known = ", ".join([*data["scores"], *data["tasks"]])
        raise UserError(f"{name} is neither a score nor a task of {protocol}; choose from {known}")
    return list(dict.fromkeys(task for member in data["scores"][name] for task in members(protocol, member)))


def paraphrased(episodes: list[Cell], wordings: dict[str, Wording]) -> list[Cell]:
    """The same episodes, told in other words (data/simpler_paraphrases.yaml).

    A function of (task, seed) alone for whole tasks, as `cells` gives them: each sentence is told equally often in a
    task, and which episode is told which was shuffled once, so that no sentence goes with one pose, pair or variant.

    Raises:
        UserError: a task without other words.
    """
    told = []
    for task, group in itertools.groupby(episodes, key=lambda cell: cell.task):
        group = list(group)
        turns = np.random.default_rng(zlib.crc32(task.encode())).permutation(len(group))
        for cell, turn in zip(group, turns, strict=True):
            choices = [variants_of(instruction, wordings) for instruction in cell.instructions]
            if not all(choices):
                raise UserError(
                    f"no paraphrases of {cell.instructions[0]!r}; add them, or leave {task} out of the groups"
                )
            words = tuple(sentences[turn % len(sentences)] for sentences in choices)
            told.append(replace(cell, instructions=words))
    return told


def success_rule(protocol: str) -> str:
    return _load(protocol)["success_rule"]


def aggregate(
    protocol: str, rows: Iterable[Mapping[str, Any]], groups: Iterable[str] | None = None
) -> dict[str, Score]:
    """Every task's and score's value from episode records.

    A task is the mean over its variants of the mean over their episodes, a score the mean of its members (facts simpler
    §4d). A value with an episode missing behind it is None, never the mean of the rest.

    Args:
        rows: records of one run, with "task", "seed", "success".
        groups: the part of the protocol that was run, as for `cells`; scores that reach beyond it are left out.

    Raises:
        UserError: a row that is no episode of the protocol, or a second one of the same.
    """
    chosen = cells(protocol, groups)
    success = _successes(protocol, chosen, rows)
    found: dict[str, Score] = {}
    for task, episodes in itertools.groupby(chosen, key=lambda cell: cell.task):
        variants: dict[str, list[bool | None]] = {}
        for cell in episodes:
            variants.setdefault(cell.variant, []).append(success.get((task, cell.seed)))
        found[task] = _mean([_mean_of_episodes(values) for values in variants.values()])
    for name, parts in _load(protocol)["scores"].items():
        if all(part in found for part in parts):
            found[name] = _mean([found[part] for part in parts])
    return found


def _successes(protocol: str, chosen: list[Cell], rows: Iterable[Mapping[str, Any]]) -> dict[tuple[str, int], bool]:
    known = {(cell.task, cell.seed) for cell in chosen}
    success: dict[tuple[str, int], bool] = {}
    for row in rows:
        key = (row["task"], row["seed"])
        if key not in known or key in success:
            what = "twice" if key in success else "which is not asked for"
            raise UserError(f"the records hold {key[0]} seed {key[1]} {what} in {protocol}; give one run's records")
        success[key] = bool(row["success"])
    return success


def _mean_of_episodes(values: list[bool | None]) -> Score:
    missing = values.count(None)
    return Score(None if missing else float(np.mean(values)), len(values) - missing, missing)


def _mean(parts: list[Score]) -> Score:
    whole = all(part.value is not None for part in parts)
    value = float(np.mean([part.value for part in parts])) if whole else None
    return Score(value, sum(part.n for part in parts), sum(part.missing for part in parts))


@functools.lru_cache
def _load(protocol: str) -> dict[str, Any]:
    if protocol not in FILES:
        raise UserError(f"SimplerEnv has no protocol {protocol!r}; choose one of {', '.join(sorted(FILES))}")
    return yaml.safe_load(FILES[protocol].read_text())


@functools.lru_cache
def _expanded(protocol: str) -> tuple[Cell, ...]:
    return tuple(cell for name, task in _load(protocol)["tasks"].items() for cell in _task_cells(name, task))


def _task_cells(name: str, task: dict[str, Any]) -> Iterator[Cell]:
    seeds = itertools.count()
    layouts = list(_object_layouts(task))
    for variant, change in task["variants"].items():
        for place in task["places"]:
            for x, y, yaw in itertools.product(*(_numbers(place[key]) for key in ("x", "y", "yaw"))):
                robot = {"init_xy": [x, y], "init_rot_quat": robot_quaternion(yaw)}
                for options, placement, words in layouts:
                    yield Cell(
                        task=name,
                        seed=next(seeds),
                        variant=variant,
                        env_id=change.get("env", task["env"]),
                        build=task["build"] | place.get("build", {}) | change.get("build", {}),
                        reset={"robot_init_options": robot, "obj_init_options": options},
                        instructions=tuple(text.format(**words) for text in task["instructions"]),
                        placement=placement,
                    )


def robot_quaternion(yaw: float) -> list[float]:
    """(w, x, y, z): half a turn about z, then `yaw` about z, in the single precision that sapien.Pose holds."""
    return [float(np.float32(value)) for value in (-np.sin(yaw / 2) + 0.0, 0.0, 0.0, np.cos(yaw / 2))]


def _numbers(value: float | list[float]) -> list[float]:
    return np.linspace(*value[:2], value[2]).tolist() if isinstance(value, list) else [float(value)]


Layout = tuple[dict[str, Any], dict[str, tuple[float, ...]], dict[str, str]]
"""obj_init_options, placement, words for the instruction."""


def _object_layouts(task: dict[str, Any]) -> Iterator[Layout]:
    if "objects" in task:
        for xy in itertools.product(_numbers(task["objects"]["x"]), _numbers(task["objects"]["y"])):
            yield {"init_xy": list(xy)}, {"object": xy}, {}
        return
    data = task["episodes"]
    kind = _triplet_layouts if "triplets" in data else _sink_layouts if "target_xy" in data else _corner_layouts
    for episode, (placement, words) in enumerate(kind(data)):
        yield {"episode_id": episode}, placement, words


def _triplet_layouts(data: dict[str, Any]) -> Iterator[tuple[dict, dict[str, str]]]:
    """Move near: for each triplet, each layout, each ordered pair of (source, target)."""
    for names, layout in itertools.product(data["triplets"], data["layouts"]):
        placement = {name: tuple(xy) for name, xy in zip(names, layout, strict=True)}
        for source, target in itertools.permutations(names, 2):
            yield placement, {"source": source, "target": target}


def _corner_layouts(data: dict[str, Any]) -> Iterator[tuple[dict, dict[str, str]]]:
    """Bridge tables: for each square, each ordered pair of its corners, each yaw of the source."""
    (x, y), signs = data["centre"], list(itertools.product((-1, 1), repeat=2))
    for half in data["half_edges"]:
        corners = [(x + half * dx, y + half * dy) for dx, dy in signs]
        for (source, target), yaw in itertools.product(itertools.permutations(corners, 2), data["source_yaws"]):
            yield {data["source"]: (*source, yaw), data["target"]: (*target, 0)}, {}


def _sink_layouts(data: dict[str, Any]) -> Iterator[tuple[dict, dict[str, str]]]:
    """Bridge sink: for each position of the source, each of its yaws."""
    places = itertools.product(_numbers(data["x"]), _numbers(data["y"]))
    for place, yaw in itertools.product(places, data["source_yaws"]):
        yield {data["source"]: (*place, yaw), data["target"]: (*data["target_xy"], 0)}, {}
