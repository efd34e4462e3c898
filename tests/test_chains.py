"""CALVIN's numbers from made-up records, against plain counting and all permutations."""

from __future__ import annotations

import itertools
import json

import numpy as np
import pandas as pd
import pytest

from scripts.tables import main
from vla.analysis.chains import chain_metrics, chains_table, compare_lengths


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


def test_table_pairs_arms_on_chains_and_training_seeds():
    common = {"benchmark": "calvin_abc_d", "train_seed": "0"}
    rows = [row(i, done, arm="ptr", **common) for i, done in enumerate([5, 4, 3, 5])]
    rows += [row(i, done, arm="vanilla", **common) for i, done in enumerate([4, 4, 1])]
    results, comparisons = chains_table(pd.DataFrame(rows))
    assert results.set_index("arm").avg_len.to_dict() == {"ptr": 17 / 4, "vanilla": 3.0}
    assert results.set_index("arm").sr5["ptr"] == 0.5
    (pair,) = comparisons.to_dict("records")
    assert (pair["n"], pair["difference"]) == (3, pytest.approx((1 + 0 + 2) / 3))
    empty = chains_table(pd.DataFrame([{"benchmark": "libero_goal", "arm": "a", "train_seed": "0", "subtasks": []}]))
    assert len(empty[0]) == len(empty[1]) == 0


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
