"""Learning curves, and state-feature alignment, of several arms in one picture each.

plot_training({"vanilla": read_metrics("runs/a"), "ptr": read_metrics("runs/b")}, Path("curves.png"))
plot_alignment(analyses, Path("alignment.png"))          # analyses: vla.analysis.tables.load
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vla.errors import UserError

if TYPE_CHECKING:
    import pandas as pd

OKABE_ITO = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
"""Okabe and Ito's colours, told apart with any colour vision; their yellow is left out, it is too faint for a line."""


def read_metrics(run_dir: str | Path) -> pd.DataFrame:
    """metrics.csv of a training run: one row per logged step, ascending; columns step and the logged metrics.

    Accepts rows that hold only some of the metrics (Lightning's CSVLogger writes one row per call and step). A step
    logged twice, by a run that was resumed, keeps its last value.

    Raises:
        UserError: no such file, no column "step", or no rows.
    """
    import pandas as pd

    path = Path(run_dir) / "metrics.csv"
    try:
        metrics = pd.read_csv(path)
    except (OSError, pd.errors.EmptyDataError, pd.errors.ParserError) as error:
        raise UserError(f"{path} cannot be read ({error}): give the folder of a run that has logged a step") from None
    if "step" not in metrics or metrics.empty:
        raise UserError(f"{path} has no logged steps: give the folder of a run that has logged a step")
    return metrics.groupby("step", as_index=False).last()


def plot_training(curves: dict[str, pd.DataFrame], out: Path) -> None:
    """Write a PNG (1600 px wide) with a panel per loss: each arm's smoothed curve over its faint raw values.

    Losses have no unit (normalised actions); the axis is logarithmic where all values of a loss are positive.

    Args:
        curves: arm -> frame with the column step and losses, i.e. columns named "loss" or with "loss" in their name.
        out: the picture; its folder exists.
    Raises:
        UserError: no arm has a loss.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.ticker import LogLocator

    losses = list(dict.fromkeys(column for frame in curves.values() for column in frame if "loss" in column))
    if not losses:
        raise UserError("there is nothing to plot: no arm has a column with 'loss' in its name")
    columns = min(len(losses), 2)
    rows = -(-len(losses) // columns)
    figure = Figure(figsize=(10, 4 if rows == 1 else 3.2 * rows), layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(rows, columns, squeeze=False).flat
    for panel, loss in zip(panels, losses, strict=False):
        for color, (arm, frame) in zip(_colors(len(curves)), curves.items(), strict=True):
            if loss in frame and len(known := frame[["step", loss]].dropna()):
                panel.plot(known.step, known[loss], color=color, alpha=0.3, linewidth=0.8)
                panel.plot(known.step, _smooth(known[loss]), color=color, linewidth=2, label=arm)
        values = [frame[loss].dropna() for frame in curves.values() if loss in frame]
        if all((value > 0).all() for value in values):
            panel.set_yscale("log")
            panel.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
            panel.yaxis.set_major_formatter("{x:g}")
            panel.yaxis.set_minor_formatter("")
        panel.set_xlabel("training step (optimiser updates)")
        panel.set_ylabel(f"{loss.replace('_', ' ')} (no unit)")
        panel.grid(alpha=0.3, which="both", linewidth=0.5)
        panel.legend(frameon=False)
    for panel in list(panels):
        panel.set_visible(False)
    save(figure, out)


def plot_alignment(analyses: pd.DataFrame, out: Path) -> None:
    """Write a PNG with a bar per arm for cosine and for scale alignment, as IDL's Fig. 1(c).

    A bar is an arm's mean over training seeds, with a mark and a 95 % interval for each.

    Args:
        analyses: columns benchmark, arm, train_seed, metric ("cosine", "scale"), value, low, high, n.
    Raises:
        UserError: no alignment among the analyses.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    rows = analyses[analyses.metric.isin(["cosine", "scale"])]
    if rows.empty:
        raise UserError("there is no alignment to plot: run evaluate.py evaluation=alignment first")
    benchmarks, arms = sorted(rows.benchmark.unique()), sorted(rows.arm.unique())
    figure = Figure(figsize=(2 + (2 + 0.7 * len(arms)) * len(benchmarks), 4), layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(1, len(benchmarks), squeeze=False, sharey=True).flat
    width = 0.8 / len(arms)
    for panel, benchmark in zip(panels, benchmarks, strict=True):
        for index, (arm, color) in enumerate(zip(arms, _colors(len(arms)), strict=True)):
            for place, metric in enumerate(("cosine", "scale")):
                of_seed = rows[(rows.benchmark == benchmark) & (rows.arm == arm) & (rows.metric == metric)]
                if len(of_seed):
                    x, mean = place - 0.4 + width * (index + 0.5), of_seed.value.mean()
                    count = len(of_seed)
                    spread = [x + 0.6 * width * ((seed + 0.5) / count - 0.5) for seed in range(count)]
                    error = [of_seed.value - of_seed.low, of_seed.high - of_seed.value]
                    panel.bar(x, mean, width * 0.9, color=color, label=arm if place == 0 else None)
                    panel.errorbar(spread, of_seed.value, error, fmt=".k", markersize=4, elinewidth=0.8, capsize=2)
                    top = (x, max(0, of_seed.high.max()))
                    panel.annotate(f"{mean:.2f}", top, (0, 3), textcoords="offset points", ha="center", fontsize=8)
        panel.set_xticks([0, 1], ["cosine distance", "scale distance"])
        panel.set_title(f"{benchmark}, {int(rows[rows.benchmark == benchmark].n.max())} frame pairs", fontsize=10)
        panel.axhline(0, color="black", linewidth=0.8)
        panel.grid(axis="y", alpha=0.3, linewidth=0.5)
        panel.set_axisbelow(True)
    figure.axes[0].set_ylabel("state-feature alignment\n(partial Spearman, no unit)")
    figure.legend(*figure.axes[0].get_legend_handles_labels(), loc="outside upper center", ncols=3, frameon=False)
    save(figure, out)


def save(figure: Any, out: Path) -> None:
    """As PNG, whole or not at all."""
    temporary = out.with_name(f".{out.name}.tmp")
    with temporary.open("wb") as file:
        figure.savefig(file, dpi=160, format="png")
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, out)


def _colors(n: int) -> list[str]:
    return [OKABE_ITO[i % len(OKABE_ITO)] for i in range(n)]


def _smooth(values: pd.Series) -> pd.Series:
    """Centred running mean over a twentieth of the curve, shorter at the ends."""
    return values.rolling(max(1, len(values) // 20), center=True, min_periods=1).mean()
