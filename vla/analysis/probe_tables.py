"""IDL table 4 from a folder of results: probe losses per encoder, and encoders paired on the training seeds they share.

Reads bc_probe.json and state_probe.json (vla/analysis/frozen.py). A loss has two sources of chance: which tasks and
which training seed. The interval of a row is over tasks (behaviour cloning) and says how far these networks' mean would
move with other tasks; only the comparison, paired over training seeds, speaks of the method.

    losses = load_losses(Path("results"))
    table, comparisons = loss_table(losses), compare_losses(losses)
"""

from __future__ import annotations

import json
from itertools import combinations
from pathlib import Path

import numpy as np
import pandas as pd

from vla.analysis.resampling import over_seeds
from vla.analysis.statistics import ALPHA, format_p, holm, mean_interval
from vla.errors import UserError

COLUMNS = {"bc_probe": "behaviour cloning", "state_probe": "state prediction"}
KEYS = ["benchmark", "baseline", "tap", "arm", "train_seed", "probe"]


def load_losses(root: Path) -> pd.DataFrame:
    """One row per (run, probe, measure, task), all tasks under "" for the state probe.

    Returns:
        benchmark, baseline, tap, arm, train_seed, probe ("behaviour cloning", "state prediction"), measure ("train",
        "validation"), task, loss, folder.

    Raises:
        UserError: a file cannot be read or lacks a key; two results of the same run and probe.
    """
    rows = []
    for kind, probe in COLUMNS.items():
        for path in sorted(root.rglob(f"{kind}.json")):
            try:
                content = json.loads(path.read_text())
                seed = content["train_seed"]
                about = {key: content[key] for key in ("benchmark", "baseline", "tap", "arm")}
                tasks = content.get("tasks") or [{"task": "", **{m: content[m] for m in ("train", "validation")}}]
                for task in tasks:
                    for measure in ("train", "validation"):
                        found = {"measure": measure, "task": task["task"], "loss": task[measure], "folder": path.parent}
                        rows.append(about | {"train_seed": str(seed), "probe": probe} | found)
            except (OSError, ValueError, KeyError) as error:
                raise UserError(f"{path} cannot be read or lacks {error}; run that evaluation again") from None
    losses = pd.DataFrame(rows, columns=[*KEYS, "measure", "task", "loss", "folder"])
    if (twice := losses.duplicated([*KEYS, "measure", "task"], keep=False)).any():
        folders = losses[twice].folder.unique()[:2]
        raise UserError(f"the same probe of the same run lies in {folders[0]} and in {folders[1]}: move one away")
    return losses


def loss_table(losses: pd.DataFrame) -> pd.DataFrame:
    """One row per (benchmark, baseline, tap, arm, training seed, probe).

    Returns:
        those keys, n (tasks), and for train and validation: mean over tasks, <measure>_low and _high (95 % bootstrap
        over tasks, nan where there is one number only).
    """
    table = []
    for key, group in losses.groupby(KEYS, dropna=False) if len(losses) else ():
        row = dict(zip(KEYS, key, strict=True)) | {"n": group.task.nunique()}
        for measure, values in group.groupby("measure"):
            low, high = mean_interval(values.loss) if len(values) > 1 else (np.nan, np.nan)
            row |= {measure: values.loss.mean(), f"{measure}_low": low, f"{measure}_high": high}
        table.append(row)
    return pd.DataFrame(table)


def compare_losses(losses: pd.DataFrame) -> pd.DataFrame:
    """Each pair of arms, on the training seeds and tasks both have; the unit is a training seed.

    Returns:
        benchmark, baseline, tap, probe, measure, arm_a, arm_b, seeds (how many), differences (per seed, mean over tasks
        of a − b), difference (their mean), low, high (95 %, Student's t over seeds), p (paired t-test over seeds), all
        nan below two seeds, and p_holm (over the pairs of arms of one probe and measure; nan for one pair).
    """
    table = []
    where = ["benchmark", "baseline", "tap", "probe", "measure"]
    for key, group in losses.groupby(where, dropna=False) if len(losses) else ():
        for a, b in combinations(sorted(set(group.arm)), 2):
            pair = group[group.arm == a].merge(group[group.arm == b], on=["train_seed", "task"])
            if not len(pair):
                continue
            each = (pair.loss_x - pair.loss_y).groupby(pair.train_seed).mean()
            row = dict(zip(where, key, strict=True)) | {"arm_a": a, "arm_b": b, "seeds": len(each)}
            interval = dict(zip(("low", "high", "p"), over_seeds(each), strict=True))
            table.append(row | {"differences": each.tolist(), "difference": each.mean()} | interval)
    compared = pd.DataFrame(table)
    for _, rows in compared.groupby(where, dropna=False) if len(compared) else ():
        if (tested := rows.p.dropna()).size > 1:
            compared.loc[tested.index, "p_holm"] = holm(tested.tolist())
    return compared.assign(p_holm=compared.get("p_holm", np.nan)) if len(compared) else compared


def verdict(row) -> str:
    """One plain sentence on a row of `compare_losses`."""
    if row.seeds < 2:
        return "one training seed: nothing can be said about the method"
    if np.isnan(row.p):
        return f"the same difference in all {row.seeds} training seeds: no test"
    several = not np.isnan(row.p_holm)
    p = row.p_holm if several else row.p
    told = f"({format_p(p)}{', Holm' if several else ''}, {row.seeds} training seeds)"
    if p >= ALPHA:
        return f"not distinguishable {told}"
    return f"{row.arm_a if row.difference < 0 else row.arm_b} is lower {told}"
