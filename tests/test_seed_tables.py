"""Arms compared over training seeds, against scipy's paired t test on rates computed by hand."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
import scipy.stats

from vla.analysis.seed_tables import SUCCESS, compare_over_seeds, told
from vla.analysis.statistics import holm

RATES = {"vanilla": [0.3, 0.5, 0.4, 0.2], "aux": [0.7, 0.8, 0.75, 0.6], "ptr": [0.4, 0.4, 0.5, 0.3]}


def episodes_of(rates: dict[str, list[float]], n: int = 20) -> pd.DataFrame:
    rng = np.random.default_rng(0)
    rows = []
    for arm, of_seed in rates.items():
        for seed, rate in enumerate(of_seed):
            success = rng.permutation(np.arange(n) < round(rate * n))
            rows += [("b", "{}", None, arm, str(seed), "task", episode, bool(s)) for episode, s in enumerate(success)]
    columns = ["benchmark", "conditions", "baseline", "arm", "train_seed", "task", "seed", "success"]
    return pd.DataFrame(rows, columns=columns)


def analyses_of(values: dict[str, list[float]]) -> pd.DataFrame:
    rows = [("b", None, arm, str(seed), "cosine", v) for arm, found in values.items() for seed, v in enumerate(found)]
    return pd.DataFrame(rows, columns=["benchmark", "baseline", "arm", "train_seed", "metric", "value"])


@pytest.mark.parametrize("measure", [SUCCESS, "alignment, cosine"])
def test_differences_are_tested_over_training_seeds(measure):
    none = episodes_of({})
    found = (
        compare_over_seeds(episodes_of(RATES), none)
        if measure == SUCCESS
        else compare_over_seeds(none, analyses_of(RATES))
    )
    assert set(found.measure) == {measure} and len(found) == 3
    tests = []
    for row in found.itertuples():
        test = scipy.stats.ttest_rel(RATES[row.arm_a], RATES[row.arm_b])
        interval = test.confidence_interval(0.95)
        assert (row.low, row.high, row.p) == pytest.approx((interval.low, interval.high, test.pvalue))
        assert row.differences == pytest.approx(np.subtract(RATES[row.arm_a], RATES[row.arm_b]))
        tests.append(test.pvalue)
    assert found.p_holm.tolist() == pytest.approx(holm(tests))
    (better,) = found[(found.arm_a == "aux") & (found.arm_b == "vanilla")].verdict
    word = "better" if measure == SUCCESS else "is higher"
    assert better.startswith(f"aux {word} (p = 0.00") and "Holm, 4 training seeds" in better
    (same,) = found[(found.arm_a == "ptr") & (found.arm_b == "vanilla")].itertuples()
    assert same.verdict.startswith("not distinguishable") and told(same).startswith("+0.05 [")


def test_only_shared_episodes_and_seeds_count():
    episodes = episodes_of({"a": [1.0, 1.0, 0.5], "b": [0.5, 0.0]})
    episodes = episodes[~((episodes.arm == "b") & (episodes.train_seed == "0") & (episodes.seed >= 10))]
    (row,) = compare_over_seeds(episodes, analyses_of({})).itertuples()
    own = episodes[(episodes.arm == "b") & (episodes.train_seed == "0")].success.mean()
    assert row.seeds == 2 and row.differences == pytest.approx([1 - own, 1.0]) and -1 <= row.low <= row.high <= 1


@pytest.mark.parametrize("rates", [{"a": [0.5], "b": [0.2]}, {"a": [0.5, 0.4]}, {}])
def test_without_two_shared_seeds_nothing_is_said(rates):
    assert compare_over_seeds(episodes_of(rates), analyses_of(rates)).empty


def test_seeds_that_agree_exactly_are_not_tested():
    (row,) = compare_over_seeds(episodes_of({"a": [0.5, 0.5], "b": [0.25, 0.25]}), analyses_of({})).itertuples()
    assert np.isnan(row.p) and "no test" in row.verdict
