"""SimplerEnv's scores in the tables: from records on disk to the printed numbers."""

from __future__ import annotations

import json
import re

import numpy as np
import pytest

from envs.simpler.protocol import cells
from scripts.tables import main
from vla.analysis import tables
from vla.analysis.simpler_tables import protocol_scores
from vla.errors import UserError

PART = ["move_near", "open_drawer", "close_drawer"]


def write_run(folder, arm, successes, lost=(), groups=PART, seed=0, **kwargs):
    """A run of google_vm: success of (task, variant, seed), without the episodes `lost`."""
    folder.mkdir(parents=True)
    header = {"benchmark": "simpler_google_vm", "arm": arm, "train_seed": seed, "protocol": "google_vm"}
    header |= {"groups": groups, "env_kwargs": {"suite": "google_vm", "renderer": "cpu"} | kwargs}
    rows = [
        {
            "benchmark": "simpler_google_vm", "task": cell.task, "seed": cell.seed, "success": successes(cell),
            "steps": 80, "seconds": 2.5, "subtasks": [], "attempts": 1, "checkpoint": "c", "config": "k",
            "execute_steps": 4, "renderer": "vulkan-cpu", "versions": {"simpler_env": "4ab7178e"},
        }
        for cell in cells("google_vm", groups)
        if (cell.task, cell.seed) not in lost
    ]  # fmt: skip
    (folder / "run.json").write_text(json.dumps(header))
    (folder / "episodes.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "summary.json").write_text(json.dumps({"n": len(rows), "missing": len(lost)}))


def value(scores, arm, name):
    return scores[(scores.arm == arm) & (scores.score == name)].iloc[0]


def test_scores_are_the_protocols(tmp_path):
    """By hand: a variant of four, two of three drawers, and all of the closing."""
    write_run(tmp_path / "a", "ptr", lambda cell: (
        cell.variant == "urdf_default" if cell.task == "move_near"
        else cell.task != "open_drawer/middle"
    ))  # fmt: skip
    scores = protocol_scores(tables.load(tmp_path)[0])
    assert value(scores, "ptr", "move_near").value == 0.25 and value(scores, "ptr", "move_near").n == 240
    assert value(scores, "ptr", "open_drawer").value == pytest.approx(2 / 3)
    assert value(scores, "ptr", "drawer").value == pytest.approx((2 / 3 + 1) / 2)
    assert "average" not in set(scores.score), "the coke can was not asked for"


def test_missing_episodes_are_counted_and_printed(tmp_path, capsys):
    lost = [("move_near", 3), ("open_drawer/top", 0), ("open_drawer/top", 1)]
    write_run(tmp_path / "a", "ptr", lambda cell: cell.seed % 2 == 0, lost)
    write_run(tmp_path / "b", "vanilla", lambda cell: False)
    scores = protocol_scores(tables.load(tmp_path)[0])
    near, opened, closed = (value(scores, "ptr", name) for name in ("move_near", "open_drawer", "close_drawer"))
    assert np.isnan(near.value) and (near.n, near.missing) == (239, 1)
    assert np.isnan(opened.value) and (opened.n, opened.missing) == (106, 2)
    assert (closed.value, closed.missing) == (0.5, 0)
    main([str(tmp_path)])
    printed = capsys.readouterr().out
    assert "SimplerEnv's own scores" in printed and "training seed 0" in printed
    assert re.search(r"close_drawer\s*│ 0\.500 \(108\)\s*│ 0\.000 \(108\)", printed)
    assert re.search(r"move_near\s*│ – \(239, 1 missing\)\s*│ 0\.000 \(240\)", printed)


def test_parts_run_apart_are_one_protocol_and_conditions_stay_apart(tmp_path):
    for name, groups in (("a", ["move_near"]), ("b", ["drawer"])):
        write_run(tmp_path / name, "ptr", lambda cell: True, groups=groups)
    write_run(tmp_path / "c", "ptr", lambda cell: False, renderer="gpu")
    scores = protocol_scores(tables.load(tmp_path)[0])
    assert scores.conditions.nunique() == 2
    for _, rows in scores.groupby("conditions"):
        assert set(rows.score) >= {"move_near", "open_drawer", "close_drawer", "drawer"}
        assert rows.value.nunique() == 1 and not rows.missing.any()


def test_other_benchmarks_have_no_such_scores(tmp_path):
    write_run(tmp_path / "a", "ptr", lambda cell: True)
    header = json.loads((tmp_path / "a/run.json").read_text())
    del header["protocol"]
    (tmp_path / "a/run.json").write_text(json.dumps(header))
    assert protocol_scores(tables.load(tmp_path)[0]).empty


def test_a_foreign_episode_is_an_error(tmp_path):
    write_run(tmp_path / "a", "ptr", lambda cell: True)
    header = json.loads((tmp_path / "a/run.json").read_text())
    (tmp_path / "a/run.json").write_text(json.dumps(header | {"groups": ["drawer"]}))
    with pytest.raises(UserError, match="move_near seed 0 which is not asked for in google_vm"):
        protocol_scores(tables.load(tmp_path)[0])
