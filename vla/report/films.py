"""Film strips of rollouts, as IDL's Fig. 3: six frames of an episode, the arms below each other on the same episode."""

from __future__ import annotations

import base64
import io
import re
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path

from vla.report.material import Material

FRAMES, MOST, SIDE = 6, 6, 192
NAME = re.compile(r"(?P<task>.+)_seed(?P<seed>\d+)_(?P<outcome>success|failure)")
"""Of a film without its ending, given by envs/rollout.py and envs/worker.py; a frame per control step."""


@dataclass(frozen=True)
class Strip:
    """`frames`: (control step, JPEG as data: URI); `trouble` instead where the film cannot be read."""

    arm: str
    seed: str
    outcome: str
    frames: list[tuple[int, str]]
    trouble: str = ""


@dataclass(frozen=True)
class Episode:
    """The same task and seed, filmed under one or more policies."""

    benchmark: str
    task: str
    seed: str
    strips: list[Strip]


def strips(material: Material) -> tuple[list[Episode], int]:
    """The episodes filmed under the most arms first, at most `MOST`; and how many more were filmed."""
    filmed = defaultdict(list)
    for evaluation in material.evaluations:
        for path in sorted(evaluation.file.parent.glob("videos/*.mp4")) if "rollouts" in evaluation.kind else ():
            if found := NAME.fullmatch(path.stem):
                filmed[evaluation.benchmark, found["task"], found["seed"]].append((evaluation, found["outcome"], path))
    order = sorted(filmed, key=lambda key: (-len({e.arm for e, _, _ in filmed[key]}), key))
    episodes = []
    for key in order[:MOST]:
        per_arm = {}
        for evaluation, outcome, path in filmed[key]:  # one training seed of each arm
            per_arm.setdefault((evaluation.kind, evaluation.arm), (evaluation, outcome, path))
        found = [_strip(e.arm, e.seed, outcome, path) for e, outcome, path in per_arm.values()]
        episodes.append(Episode(key[0], key[1].replace("_", " "), key[2], found))
    shown = sum(len(episode.strips) for episode in episodes)
    return episodes, sum(len(films) for films in filmed.values()) - shown


def _strip(arm: str, seed: str, outcome: str, path: Path) -> Strip:
    import av

    try:
        with av.open(str(path)) as container:
            count = sum(1 for _ in container.decode(video=0))
            chosen = _spread(count)
            container.seek(0)
            wanted = [(i, frame) for i, frame in enumerate(container.decode(video=0)) if i in chosen]
            frames = [(i, _jpeg(frame.to_image())) for i, frame in wanted]
    except (av.FFmpegError, IndexError, OSError) as error:  # a picture less is no reason to have no report
        return Strip(arm, seed, outcome, [], f"{path.name} cannot be read ({error})")
    return Strip(arm, seed, outcome, frames)


def _spread(count: int) -> list[int]:
    """The first frame, the last, and those evenly between."""
    return sorted({round(i * (count - 1) / (FRAMES - 1)) for i in range(FRAMES)}) if count else []


def _jpeg(image) -> str:
    image.thumbnail((SIDE, SIDE))
    out = io.BytesIO()
    image.save(out, format="JPEG", quality=82)
    return "data:image/jpeg;base64," + base64.b64encode(out.getvalue()).decode()
