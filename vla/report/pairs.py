"""IDL's Fig. 1(c) pair by pair: feature distance over pose distance of the frame pairs that an alignment sums up.

Drawn as the score sees them (vla/analysis/alignment.py): ranks, of which what pixel differences explain is taken off.
evaluation=alignment leaves the distances in alignment_pairs.npz.
"""

from __future__ import annotations

import zipfile
from collections.abc import Sequence
from itertools import groupby

import numpy as np
from matplotlib.axes import Axes

from vla.analysis.alignment import residual_ranks
from vla.errors import UserError
from vla.report.drawing import Looks, Picture, draw
from vla.report.material import Evaluation

POINTS, PARTS = 150, 10
"""Drawn of each arm; stretches of pose distance, in each of which the median of all pairs makes the line."""


def pair_scatter(evaluations: Sequence[Evaluation], looks: Looks) -> list[Picture]:
    """A picture per benchmark and baseline, the pairs of an arm's training seeds together.

    Raises:
        UserError: a file of distances is damaged.
    """

    def group(of: Evaluation) -> tuple[str, str]:
        return of.benchmark, of.header.get("baseline") or ""

    pictures, measured = [], [of for of in evaluations if of.kind == "alignment"]
    for (benchmark, baseline), found in groupby(sorted(measured, key=group), key=group):
        arms: dict[str, list[tuple[np.ndarray, np.ndarray]]] = {}
        for evaluation in found:
            if (ranks := _ranks(evaluation)) is not None:
                arms.setdefault(evaluation.arm, []).append(ranks)
        if arms:
            points = {arm: tuple(map(np.concatenate, zip(*of, strict=True))) for arm, of in sorted(arms.items())}
            title = f"Frame pairs, cosine distance: {benchmark}" + (f", {baseline}" if baseline else "")
            pictures.append(_scatter(title, points, looks))
    return pictures


def _ranks(evaluation: Evaluation) -> tuple[np.ndarray, np.ndarray] | None:
    """(pose, feature) of each pair, in shares of all ranks around 0; None where nothing was kept."""
    path = evaluation.file.with_name("alignment_pairs.npz")
    if not path.exists():
        return None
    try:
        with np.load(path, allow_pickle=False) as content:
            cosine, pose, pixel = (content[name] for name in ("cosine", "pose", "pixel"))
        feature, pose = residual_ranks(cosine, pose, pixel)
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile) as error:
        raise UserError(f"{path} is damaged ({error}): delete its folder and evaluate again") from None
    return pose / len(pose), feature / len(pose)


def _scatter(title: str, points: dict[str, tuple[np.ndarray, np.ndarray]], looks: Looks) -> Picture:
    def paint(axes: Axes) -> None:
        rng = np.random.default_rng(0)
        for arm, (pose, feature) in points.items():
            look = looks[arm]
            some = rng.choice(len(pose), min(POINTS, len(pose)), replace=False)
            axes.scatter(pose[some], feature[some], s=9, color=look.color, marker=look.marker, alpha=0.35, linewidths=0)
            x, y = _line(pose, feature)
            label = f"{look.name} ({len(pose)} pairs)"
            axes.plot(x, y, color=look.color, linestyle=look.linestyle, marker=look.marker, linewidth=2.4, label=label)
        axes.set_xlabel("pose distance (rank, pixels held; 1 = all pairs)")
        axes.set_ylabel("feature distance (rank, pixels held)")
        axes.legend(loc="lower left", bbox_to_anchor=(0, 1), ncols=2)

    rises = {arm: _line(*found)[1] for arm, found in points.items()}
    told = "; ".join(f"{arm} from {rise[0]:+.2f} to {rise[-1]:+.2f}" for arm, rise in rises.items())
    return draw(paint, title, f"Median feature distance from the nearest to the farthest tenth of poses: {told}.", 4.2)


def _line(pose: np.ndarray, feature: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Medians of the pairs in each of PARTS equal parts of their number, by pose distance."""
    parts = np.array_split(np.argsort(pose, kind="stable"), min(PARTS, len(pose)))
    return tuple(np.array([np.median(values[part]) for part in parts]) for values in (pose, feature))
