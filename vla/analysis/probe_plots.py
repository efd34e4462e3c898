"""Training curves of the frozen-encoder probes, as IDL's Fig. 1(b): one panel per probe, a curve per encoder."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np

from vla.analysis.plots import OKABE_ITO, save
from vla.errors import UserError

SMOOTH = 25
"""Steps of the running mean."""
STYLES = ("-", "--", ":", "-.")
"""Of the first seven arms, the next seven, …"""


def plot_probes(root: Path, out: Path) -> None:
    """Write a PNG with the mean training loss (over tasks and training seeds; band: lowest to highest seed) per arm.

    Raises:
        UserError: no probe below `root`.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    both = {"behaviour cloning": _cloning(root), "state prediction": _state(root)}
    panels = {name: found for name, found in both.items() if found}
    if not panels:
        raise UserError(f"{root} holds no probe to plot: run evaluate.py evaluation=bc_probe or state_probe first")
    figure = Figure(figsize=(5.2 * len(panels), 4), layout="constrained")
    FigureCanvasAgg(figure)
    arms = sorted({arm for curves in panels.values() for arm in curves})
    for panel, (name, curves) in zip(figure.subplots(1, len(panels), squeeze=False).flat, panels.items(), strict=True):
        for index, arm in enumerate(arms):
            color, dashes = OKABE_ITO[index % len(OKABE_ITO)], STYLES[index // len(OKABE_ITO) % len(STYLES)]
            if arm in curves:
                smooth = np.stack([_running_mean(np.asarray(curve)) for curve in curves[arm]])
                steps = np.arange(1, smooth.shape[1] + 1)
                panel.fill_between(steps, smooth.min(0), smooth.max(0), color=color, alpha=0.2, linewidth=0)
                mean, label = smooth.mean(0), f"{arm} ({len(smooth)} seeds)"
                panel.plot(steps, mean, color=color, linestyle=dashes, linewidth=2, label=label)
        panel.set_title(f"{name} from frozen tokens", fontsize=10)
        panel.set_xlabel("training step of the probe")
        panel.set_ylabel("training loss (L1 in the data's units)")
        panel.set_yscale("log")
        panel.grid(alpha=0.3, which="both", linewidth=0.5)
        panel.legend(frameon=False)
    save(figure, out)


def _cloning(root: Path) -> dict[str, list[list[float]]]:
    """arm → per training seed the curve averaged over tasks."""
    found: dict[str, list[list[float]]] = {}
    for path in sorted(root.rglob("bc_probe.json")):
        curves = [json.loads(file.read_text())["train_curve"] for file in sorted(path.parent.glob("probes/*.json"))]
        found.setdefault(json.loads(path.read_text())["arm"], []).append(np.mean(curves, axis=0).tolist())
    return found


def _state(root: Path) -> dict[str, list[list[float]]]:
    found: dict[str, list[list[float]]] = {}
    for path in sorted(root.rglob("state_probe.json")):
        content = json.loads(path.read_text())
        found.setdefault(content["arm"], []).append(content["train_curve"])
    return found


def _running_mean(curve: np.ndarray) -> np.ndarray:
    width = min(SMOOTH, len(curve))
    padded = np.pad(curve, (width // 2, width - 1 - width // 2), mode="edge")
    return np.convolve(padded, np.ones(width) / width, mode="valid")
