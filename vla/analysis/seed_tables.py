"""What several training seeds say of a method: arms paired by training seed, one difference each, a t test over them.

Two policies can be told apart by enough episodes (vla/analysis/tables.py) and still differ by the luck of training.
Here the unit is a training run: the success rate (of chains also Avg. Len.) on the episodes that both arms' runs of a
seed share, and the numbers that an analysis of their encoders gives.
"""

from __future__ import annotations

import numpy as np
import pandas as pd

from vla.analysis.chains import CHAIN, with_lengths
from vla.analysis.resampling import over_seeds
from vla.analysis.statistics import ALPHA, format_p, holm
from vla.analysis.tables import GROUP, NONE, families_of_arms

SUCCESS, AVG_LEN = "success rate", "Avg. Len."
LARGEST = {SUCCESS: 1.0, AVG_LEN: float(CHAIN)}
"""Differences that can be."""
NAMES = {"cosine": "alignment, cosine", "scale": "alignment, scale", "probe": "state probe, mm"}
COLUMNS = ["arm_a", "arm_b", "seeds", "differences", "difference", "low", "high", "p", "p_holm", "verdict"]


def compare_over_seeds(episodes: pd.DataFrame, analyses: pd.DataFrame) -> pd.DataFrame:
    """Each pair of arms (tables.families_of_arms) that shares two training seeds or more, under equal conditions.

    Those of an analysis are "".

    Returns:
        benchmark, conditions, measure, arm_a, arm_b, seeds (how many), differences (a − b per seed), difference (their
        mean), low, high (95 %, Student's t), p (paired t test), p_holm (over the pairs of a family; nan for one pair),
        verdict.
    """
    values = [*_rates(episodes), *_analysed(analyses)]
    table = []
    families = [(key, of_seed, family) for key, of_seed, families in values for family in families]
    for (benchmark, conditions, measure), of_seed, family in families:
        pairs = []
        for a, b in family:
            shared = sorted(of_seed[a].keys() & of_seed[b].keys(), key=lambda seed: (len(seed), seed))
            each = [d for seed in shared if (d := _difference(of_seed[a][seed], of_seed[b][seed])) is not None]
            pairs.append((a, b, each))
        table += [[benchmark, conditions, measure, *row] for row in judged(pairs, LARGEST.get(measure))]
    return pd.DataFrame(table, columns=[*GROUP, "measure", *COLUMNS])


def judged(pairs: list[tuple[str, str, list[float]]], most: float | None) -> list[list]:
    """Rows of COLUMNS of a family of pairs (arm a, arm b, a − b per training seed); none of one seed or without any.

    Args:
        most: the largest difference that can be, where the larger number makes an arm better; None: it is higher only.
    """
    pairs = [pair for pair in pairs if len(pair[-1]) > 1]
    tests = [over_seeds(each) for *_, each in pairs]
    adjusted, several, rows = iter(holm([p for *_, p in tests if not np.isnan(p)])), len(pairs) > 1, []
    for (a, b, each), (low, high, p) in zip(pairs, tests, strict=True):
        corrected, mean = p if np.isnan(p) else next(adjusted), float(np.mean(each))
        if most is not None:
            low, high = max(low, -most), min(high, most)
        told = _verdict(a, b, "is higher" if most is None else "better", mean, corrected, len(each), several)
        rows.append([a, b, len(each), each, mean, low, high, p, corrected if several else np.nan, told])
    return rows


def told(row) -> str:
    """ "+0.12 [-0.03, +0.27] (seeds: +0.10, +0.14)" of a row of `compare_over_seeds`."""
    each = ", ".join(f"{difference:+.2f}" for difference in row.differences)
    return f"{row.difference:+.2f} [{row.low:+.2f}, {row.high:+.2f}] (seeds: {each})"


def _rates(episodes: pd.DataFrame):
    """((benchmark, conditions, measure), {arm: {training seed: value of each (task, seed)}}, families of arms)."""
    trained = episodes[episodes.train_seed != NONE] if len(episodes) else episodes
    for measure, column, frame in ((SUCCESS, "success", trained), (AVG_LEN, "length", with_lengths(trained))):
        for key, group in frame.groupby(GROUP, sort=True) if len(frame) else ():
            of_seed: dict[str, dict[str, pd.Series]] = {}
            for (arm, seed), rows in group.groupby(["arm", "train_seed"]):
                of_seed.setdefault(arm, {})[seed] = rows.set_index(["task", "seed"])[column].astype(float)
            yield (*key, measure), of_seed, families_of_arms(group)


def _analysed(analyses: pd.DataFrame):
    measured = analyses[analyses.train_seed != NONE] if len(analyses) else analyses
    for (benchmark, metric), group in measured.groupby(["benchmark", "metric"], sort=True) if len(measured) else ():
        of_seed: dict[str, dict[str, float]] = {}
        for row in group.itertuples():
            of_seed.setdefault(row.arm, {})[row.train_seed] = float(row.value)
        yield (benchmark, "", NAMES[metric]), of_seed, families_of_arms(group)


def _difference(a: pd.Series | float, b: pd.Series | float) -> float | None:
    """Of rates on the episodes both have; None where they share none."""
    if isinstance(a, float):
        return a - b
    shared = (a - b).dropna()
    return float(shared.mean()) if len(shared) else None


def _verdict(a: str, b: str, word: str, difference: float, p: float, seeds: int, several: bool) -> str:
    """ "ptr better (p = 0.01, Holm, 5 training seeds)"; `word` is what the larger number makes an arm."""
    if np.isnan(p):
        return f"the same difference in all {seeds} training seeds: no test"
    how = f"({format_p(p)}{', Holm' if several else ''}, {seeds} training seeds)"
    if p >= ALPHA:
        return f"not distinguishable {how}"
    return f"{a if difference > 0 else b} {word} {how}"
