"""CALVIN's 1,000 evaluation chains and the scenes they start from (fact sheet calvin §3).

A chain is a symbolic initial scene and five tasks that can be done in it one after the other. The public generator
draws five of the 34 tasks until they fit the scene, from numpy's legacy generator; this module makes the same draws,
so its chains are the published ones. `sequences(n)` are the first n of the 1,000: generating n of them from scratch
would give others.
"""

from __future__ import annotations

import functools
import itertools
import json
import os
from pathlib import Path
from typing import Any

import numpy as np

Scene = dict[str, Any]
"""Symbolic: led, lightbulb (0/1), slider, drawer, three blocks' places, grasped (0/1), in this order."""

COLORS = ("red", "blue", "pink")
SLIDES = ("slider_right", "slider_left")
CHAIN, TOTAL = 5, 1000
STEPS = 360
"""Control steps a subtask may take."""


def _rules() -> dict[str, tuple[int, list[tuple[Scene, Scene]]]]:
    """Task → (category, its (condition, effect) pairs); no chain holds two tasks of one category."""
    free, held = {"grasped": 0}, {"grasped": 1}
    rules: dict[str, tuple[int, list[tuple[Scene, Scene]]]] = {}
    for verb, color, side in itertools.product(("rotate", "push"), COLORS, ("right", "left")):
        rules[f"{verb}_{color}_block_{side}"] = 1, [({f"{color}_block": "table", **free}, {})]
    for old, new in (("right", "left"), ("left", "right")):
        rules[f"move_slider_{new}"] = 2, [({"slider": old, **free}, {"slider": new})]
    rules["open_drawer"] = 3, [({"drawer": "closed", **free}, {"drawer": "open"})]
    rules["close_drawer"] = 3, [({"drawer": "open", **free}, {"drawer": "closed"})]
    for color in COLORS:
        block = f"{color}_block"
        lifted = {block: "grasped", **held}
        hidden = [
            ({block: f"slider_{a}", "slider": b, **free}, lifted) for a, b in (("left", "right"), ("right", "left"))
        ]
        rules[f"lift_{block}_table"] = 4, [({block: "table", **free}, lifted)]
        rules[f"lift_{block}_slider"] = 5, hidden
        rules[f"lift_{block}_drawer"] = 6, [({block: "drawer", "drawer": "open", **free}, lifted)]
    blocks = [f"{color}_block" for color in COLORS]
    sides = list(itertools.product(blocks, ("right", "left")))
    rules["place_in_slider"] = (
        7,
        [({b: "grasped", "slider": side, **held}, {b: f"slider_{side}", **free}) for b, side in sides],
    )
    rules["place_in_drawer"] = 7, [({b: "grasped", "drawer": "open", **held}, {b: "drawer", **free}) for b in blocks]
    pairs = list(itertools.permutations(blocks, 2))
    rules["stack_block"] = (
        10,
        [({a: "grasped", b: "table", **held}, {a: "stacked_top", b: "stacked_bottom", **free}) for a, b in pairs],
    )
    rules["unstack_block"] = (
        11,
        [({a: "stacked_top", b: "stacked_bottom", **free}, {a: "table", b: "table"}) for a, b in pairs],
    )
    for light in ("lightbulb", "led"):
        for word, now in (("on", 1), ("off", 0)):
            rules[f"turn_{word}_{light}"] = 8, [({light: 1 - now, **free}, {light: now})]
    rules["push_into_drawer"] = (
        9,
        [
            ({b: "table", "drawer": "open", **free} | {o: SLIDES for o in blocks if o != b}, {b: "drawer", **free})
            for b in blocks
        ],
    )
    return rules


RULES = _rules()
TASKS = tuple(RULES)
"""The 34 tasks, in the generator's order."""


def outcomes(scene: Scene, task: str) -> list[Scene]:
    """The scenes `task` can lead to from `scene`; [] where it cannot be done."""
    return [
        scene | effect
        for condition, effect in RULES[task][1]
        if all(scene[k] in v if isinstance(v, tuple) else scene[k] == v for k, v in condition.items())
    ]


def is_chain(scene: Scene, tasks: list[str]) -> bool:
    """Whether the tasks can be done in this order, each with one possible outcome and a category of its own."""
    if len({RULES[task][0] for task in tasks}) < len(tasks):
        return False
    for task in tasks:
        after = outcomes(scene, task)
        if len(after) != 1:
            return False
        scene = after[0]
    return True


def initial_scenes() -> list[Scene]:
    """The 192 symbolic scenes: one or two blocks on the table, at most one behind each side of the slider."""
    places = ("table", *SLIDES)
    values = {
        "led": (0, 1),
        "lightbulb": (0, 1),
        "slider": ("right", "left"),
        "drawer": ("closed", "open"),
        **{f"{color}_block": places for color in COLORS},
        "grasped": (0,),
    }
    scenes = [dict(zip(values, combination, strict=True)) for combination in itertools.product(*values.values())]
    return [scene for scene in scenes if _plausible([scene[f"{color}_block"] for color in COLORS])]


def _plausible(places: list[str]) -> bool:
    return places.count("table") in (1, 2) and all(places.count(slide) < 2 for slide in SLIDES)


def generate() -> list[tuple[Scene, list[str]]]:
    """All 1,000 chains, from numpy's legacy generator; some seconds."""
    scenes = initial_scenes()
    chains: list[tuple[Scene, list[str]]] = []
    for index, share in enumerate(np.array_split(np.arange(TOTAL), len(scenes))):
        random = np.random.RandomState(index)
        found = 0
        possible = {i for i, task in enumerate(TASKS) if len(outcomes(scenes[index], task)) == 1}
        while found < len(share):
            drawn = random.permutation(len(TASKS))[:CHAIN].tolist()  # what choice(replace=False) draws
            if drawn[0] in possible and is_chain(scenes[index], tasks := [TASKS[i] for i in drawn]):
                chains.append((scenes[index], tasks))
                found += 1
    order = list(range(TOTAL))
    np.random.RandomState(0).shuffle(order)
    return [chains[i] for i in order]


@functools.lru_cache
def sequences(count: int = TOTAL) -> list[tuple[Scene, list[str]]]:
    """The first `count` chains, cached as JSON under $VLA_DATA."""
    file = Path(os.environ.get("VLA_DATA", "datasets")) / "calvin" / "eval_sequences.json"
    if not file.exists():
        file.parent.mkdir(parents=True, exist_ok=True)
        partial = file.with_name(f".{file.name}.{os.getpid()}")
        partial.write_text(json.dumps(generate()))
        os.replace(partial, file)
    return [(scene, list(tasks)) for scene, tasks in json.loads(file.read_text())[:count]]


def fnv1_32(text: str) -> int:
    """pyhash's fnv1_32 of a Python string: 32-bit FNV-1 from 0 over its UTF-16-LE bytes."""
    value = 0
    for byte in text.encode("utf-16-le"):
        value = (value * 16777619) & 0xFFFFFFFF ^ byte
    return value


ROBOT = np.array(
    [0.02586889, -0.2313129, 0.5712808, 3.09045411, -0.02908596, 1.50013585, 0.07999963, -1.21779124, 1.03987629,
     2.11978254, -2.34205014, -0.87015899, 1.64119093, 0.55344928, 1.0]
)  # fmt: skip
"""robot_obs every chain starts from."""

_BEHIND_SLIDER = {
    "slider_left": (-0.240851662, 0.0924044687, 0.460990009),
    "slider_right": (0.070341633, 0.0924044687, 0.460990009),
}
_ON_TABLE = ((0.0500000896, -0.120000177, 0.459990009), (0.229995412, -0.11999514, 0.45999001))
_YAW = (np.pi / 2 - np.pi / 8, np.pi / 2 + np.pi / 8)


def initial_state(scene: Scene) -> tuple[np.ndarray, np.ndarray]:
    """robot_obs (15,) and scene_obs (24,) of a symbolic scene, in the coordinates of scene D.

    Which of the two places on the table a block gets, and its yaw, are drawn from a hash of the scene, so that a scene
    always looks the same.
    """
    random = np.random.RandomState(fnv1_32(str(scene.values())))
    table = [np.array(place) for place in _ON_TABLE]
    random.shuffle(table)
    state = np.zeros(24)
    state[0] = 0.28 if scene["slider"] == "left" else 0.0
    state[1] = 0.22 if scene["drawer"] == "open" else 0.0
    state[3] = 0.088 if scene["lightbulb"] else 0.0
    state[4:6] = scene["lightbulb"], scene["led"]
    for index, color in enumerate(COLORS):
        place, start = scene[f"{color}_block"], 6 + 6 * index
        # Of two blocks on the table red takes the first place and pink the second; blue takes what red leaves.
        second = color == "pink" or (color == "blue" and scene["red_block"] == "table")
        state[start : start + 3] = _BEHIND_SLIDER.get(place, table[int(second)])
        state[start + 5] = random.uniform(*_YAW)
    return ROBOT.copy(), state
