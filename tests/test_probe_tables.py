"""Tables and curves of the frozen-encoder probes, from files as evaluate.py writes them, against scipy."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from scipy.stats import ttest_rel

from scripts.tables import main
from vla.analysis.probe_plots import plot_probes
from vla.analysis.probe_tables import compare_losses, load_losses, loss_table, verdict
from vla.analysis.statistics import holm
from vla.errors import UserError

ARMS, SEEDS, TASKS = ("untouched", "vanilla", "ptr"), (0, 1, 2), 5


def write(root: Path, losses: np.ndarray, state: np.ndarray) -> None:
    """losses: (arm, seed, task, measure); state: (arm, seed, measure)."""
    for a, arm in enumerate(ARMS):
        for seed in SEEDS:
            about = {"benchmark": "libero_four", "baseline": "vlm4vla", "tap": "post_projector", "arm": arm}
            about |= {"train_seed": seed}
            folder = root / f"{arm}-s{seed}"
            (folder / "probes").mkdir(parents=True)
            tasks = []
            for t in range(TASKS):
                train, validation = losses[a, seed, t].tolist()
                tasks.append({"task": f"task{t}", "train": train, "validation": validation})
                (folder / "probes" / f"task{t}.json").write_text(json.dumps({"train_curve": [2 * train, train] * 20}))
            (folder / "bc_probe.json").write_text(json.dumps(about | {"tasks": tasks}))
            numbers = dict(zip(("train", "validation"), state[a, seed].tolist(), strict=True))
            (folder / "state_probe.json").write_text(json.dumps(about | numbers | {"train_curve": [0.2, 0.1] * 30}))


@pytest.fixture
def results(tmp_path) -> tuple[Path, np.ndarray, np.ndarray]:
    rng = np.random.default_rng(0)
    losses = 0.2 + 0.02 * rng.normal(size=(3, 3, TASKS, 2))
    losses[2] -= 0.1  # ptr is clearly lower
    state = 0.03 + 0.001 * rng.normal(size=(3, 3, 2))
    write(tmp_path / "results", losses, state)
    return tmp_path / "results", losses, state


def test_rows_are_means_over_tasks(results):
    root, losses, state = results
    table = loss_table(load_losses(root)).set_index(["probe", "arm", "train_seed"])
    for a, arm in enumerate(ARMS):
        for seed in SEEDS:
            row = table.loc["behaviour cloning", arm, str(seed)]
            assert row.train == pytest.approx(losses[a, seed, :, 0].mean()) and row.n == TASKS
            assert row.validation_low < row.validation < row.validation_high
            single = table.loc["state prediction", arm, str(seed)]
            assert single.validation == pytest.approx(state[a, seed, 1]) and np.isnan(single.validation_low)


def test_arms_are_paired_over_seeds(results):
    root, losses, state = results
    compared = compare_losses(load_losses(root)).set_index(["probe", "measure", "arm_a", "arm_b"], drop=False)
    assert len(compared) == 2 * 2 * 3
    row = compared.loc["behaviour cloning", "train", "ptr", "vanilla"]
    ptr, vanilla = losses[2, :, :, 0].mean(1), losses[1, :, :, 0].mean(1)
    test = ttest_rel(ptr, vanilla)
    assert row.p == pytest.approx(test.pvalue) and row.difference == pytest.approx((ptr - vanilla).mean())
    assert (row.low, row.high) == pytest.approx(tuple(test.confidence_interval(0.95)))
    assert verdict(row).startswith("ptr is lower (p = ") and "Holm" in verdict(row)
    family = compared.loc["behaviour cloning", "train"]
    assert family.p_holm.tolist() == pytest.approx(holm(family.p.tolist()))
    row = compared.loc["state prediction", "validation", "ptr", "untouched"]
    assert row.p == pytest.approx(ttest_rel(state[2, :, 1], state[0, :, 1]).pvalue)


def test_one_seed_says_nothing_of_the_method(results, tmp_path):
    root, _, _ = results
    losses = load_losses(root)
    compared = compare_losses(losses[losses.train_seed == "1"])
    assert all(verdict(row).startswith("one training seed") for row in compared.itertuples())


def test_differences_equal_in_every_seed_have_no_test(results):
    root, _, _ = results
    losses = load_losses(root)
    losses["loss"] = losses.arm.map({"ptr": 0.25, "vanilla": 0.5, "untouched": 1.0})
    compared = compare_losses(losses)
    assert all(verdict(row) == "the same difference in all 3 training seeds: no test" for row in compared.itertuples())


def test_every_arm_is_drawn_though_there_are_more_than_colours(results, tmp_path, monkeypatch):
    monkeypatch.setattr("vla.analysis.probe_plots.OKABE_ITO", ("#0072B2", "#D55E00"))
    drawn = []
    monkeypatch.setattr("matplotlib.axes.Axes.plot", lambda self, *_, label, **style: drawn.append((label, style)))
    monkeypatch.setattr("matplotlib.axes.Axes.legend", lambda *_, **__: None)
    plot_probes(results[0], tmp_path / "curves.png")
    assert len(drawn) == 6 and len({(style["color"], style["linestyle"]) for _, style in drawn}) == 3


def test_the_command_prints_and_draws(results, tmp_path, capsys):
    root, _, _ = results
    main([str(root), "--probes", str(tmp_path / "curves.png")])
    printed = capsys.readouterr().out
    assert "behaviour cloning from frozen tokens" in printed and "ptr vs vanilla, train: -0." in printed
    assert Image.open(tmp_path / "curves.png").width > 1000


def test_mistakes_are_named(results, tmp_path):
    root, losses, state = results
    with pytest.raises(UserError, match="holds no probe to plot"):
        plot_probes(tmp_path / "empty", tmp_path / "x.png")
    write(root / "again", losses, state)
    with pytest.raises(UserError, match="the same probe of the same run lies in"):
        load_losses(root)
    (root / "again" / "ptr-s0" / "bc_probe.json").write_text("{")
    with pytest.raises(UserError, match=r"ptr-s0/bc_probe\.json cannot be read"):
        load_losses(root / "again")
