"""CALVIN's numbers from made-up records, against plain counting and all permutations."""

from __future__ import annotations

import itertools
import json

import numpy as np
import pandas as pd
import pytest
import scipy.stats
from statsmodels.stats.multitest import multipletests

from scripts.tables import main
from vla.analysis.chains import chain_metrics, chains_table, compare_lengths
from vla.analysis.seed_tables import compare_over_seeds


def row(seed: int, done: int, **extra) -> dict:
    tasks = ["open_drawer", "lift_red_block_table", "stack_block", "turn_on_led", "push_into_drawer"]
    subtasks = [{"task": t, "success": i < done, "steps": 40} for i, t in enumerate(tasks[: min(done + 1, 5)])]
    return {"seed": seed, "subtasks": subtasks, "success": done == 5} | extra


def test_metrics_equal_counting():
    lengths = [0, 1, 1, 3, 5, 5, 2]
    metrics = chain_metrics([row(i, done) for i, done in enumerate(lengths)])
    for k, sr in enumerate(metrics["sr"], 1):
        assert sr["k"] == k and sr["successes"] == sum(done >= k for done in lengths)
        assert sr["rate"] == pytest.approx(sr["successes"] / 7) and sr["interval"][0] < sr["rate"] <= sr["interval"][1]
    assert (
        metrics["avg_len"]["value"]
        == pytest.approx(np.mean(lengths))
        == pytest.approx(sum(sr["rate"] for sr in metrics["sr"]))
    )
    assert metrics["avg_len"]["interval"][0] < 17 / 7 < metrics["avg_len"]["interval"][1]
    # The first subtask is tried by all, the second by those who did the first.
    tried = {task: (found["n"], found["successes"]) for task, found in metrics["per_task"].items()}
    assert tried["open_drawer"] == (7, 6) and tried["lift_red_block_table"] == (6, 4) and tried["stack_block"] == (4, 3)


def test_permutation_equals_all_sign_flips():
    a, b = np.array([5, 3, 2, 5, 4, 1]), np.array([4, 1, 2, 5, 2, 2])
    difference = a - b
    means = [np.mean(difference * signs) for signs in itertools.product((1, -1), repeat=6)]
    expected = np.mean(np.abs(means) >= abs(difference.mean()) - 1e-12)
    result = compare_lengths(a, b)
    assert result["p"] == pytest.approx(expected) and result["difference"] == pytest.approx(difference.mean())


def chains_of(arm: str, lengths: list[int], seed: str = "0", conditions: str = "{}", baseline: str = "b") -> list[dict]:
    common = {"benchmark": "calvin_abc_d", "conditions": conditions, "baseline": baseline, "task": "chain"}
    return [row(i, done, arm=arm, train_seed=seed, **common) for i, done in enumerate(lengths)]


def test_table_pairs_arms_on_chains_and_training_seeds():
    rows = chains_of("ptr", [5, 4, 3, 5]) + chains_of("vanilla", [4, 4, 1])
    results, comparisons = chains_table(pd.DataFrame(rows))
    assert results.set_index("arm").avg_len.to_dict() == {"ptr": 17 / 4, "vanilla": 3.0}
    assert results.set_index("arm").sr5["ptr"] == 0.5
    (pair,) = comparisons.to_dict("records")
    assert (pair["n"], pair["difference"]) == (3, pytest.approx((1 + 0 + 2) / 3))
    assert np.isnan(pair["p_holm"]) and pair["verdict"].startswith("not distinguishable (paired permutation p = ")
    empty = chains_table(pd.DataFrame([{"benchmark": "libero_goal", "arm": "a", "train_seed": "0", "subtasks": []}]))
    assert len(empty[0]) == len(empty[1]) == 0


def test_several_arms_are_adjusted_and_unlike_runs_are_not_compared():
    rng = np.random.default_rng(0)
    lengths = {"aux": rng.integers(1, 6, 40), "ptr": rng.integers(0, 5, 40), "vanilla": rng.integers(0, 4, 40)}
    rows = [found for arm, of in lengths.items() for found in chains_of(arm, of)]
    rows += chains_of("flower dual", rng.integers(0, 6, 40), baseline="flower")  # another baseline and another idea
    rows += chains_of("ptr", rng.integers(0, 6, 40), conditions='{"renderer": "egl"}')
    _, comparisons = chains_table(pd.DataFrame(rows))
    assert list(zip(comparisons.arm_a, comparisons.arm_b, strict=True)) == [
        ("aux", "ptr"), ("aux", "vanilla"), ("ptr", "vanilla"),
    ]  # fmt: skip
    assert comparisons.p_holm.tolist() == pytest.approx(multipletests(comparisons.p, method="holm")[1])
    best = comparisons.set_index(["arm_a", "arm_b"]).verdict["aux", "vanilla"]
    assert best.startswith("aux is better (paired permutation p < 0.001, Holm") and "n = 40 chains" in best


def test_avg_len_is_tested_over_training_seeds():
    ptr, vanilla = ([5, 4, 3], [4, 4, 4], [5, 5, 2]), ([4, 1, 1], [3, 0, 2], [0, 2, 3])
    rows = []
    for seed in range(3):
        rows += chains_of("ptr", ptr[seed], str(seed)) + chains_of("vanilla", vanilla[seed], str(seed))
    analyses = pd.DataFrame(columns=["benchmark", "baseline", "arm", "train_seed", "metric", "value"])
    found = compare_over_seeds(pd.DataFrame(rows), analyses).set_index("measure")
    test = scipy.stats.ttest_rel(np.mean(ptr, axis=1), np.mean(vanilla, axis=1))
    own = found.loc["Avg. Len."]
    assert (own.difference, own.p) == pytest.approx((np.mean(ptr) - np.mean(vanilla), test.pvalue))
    assert own.verdict.startswith("ptr better (") and set(found.index) == {"success rate", "Avg. Len."}


def test_the_script_prints_them(tmp_path, capsys):
    for arm, lengths in (("ptr", [5, 4, 3, 5]), ("vanilla", [4, 4, 1, 2])):
        folder = tmp_path / arm
        folder.mkdir()
        (folder / "run.json").write_text(json.dumps({"arm": arm, "train_seed": 0, "env_kwargs": {"scene": "D"}}))
        common = {
            "benchmark": "calvin_abc_d", "task": "chain", "steps": 200, "seconds": 1.0, "attempts": 1,
            "checkpoint": "x", "config": "c", "execute_steps": 10, "renderer": "tiny", "versions": {},
        }  # fmt: skip
        lines = [json.dumps(common | row(i, done)) + "\n" for i, done in enumerate(lengths)]
        (folder / "episodes.jsonl").write_text("".join(lines))
    main([str(tmp_path)])
    out = capsys.readouterr().out
    assert "Avg. Len." in out and "4.25" in out and "2.75" in out and "paired permutation" in out
