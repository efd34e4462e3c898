"""From a results folder to tables, end to end, and the learning curves."""

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import scipy.stats
from PIL import Image

from scripts.tables import main
from vla.analysis import tables
from vla.analysis.plots import plot_training, read_metrics
from vla.errors import UserError

ROOT = Path(__file__).resolve().parent.parent


def write_run(
    folder, arm, successes, first_seed=30, train_seed=0, missing=0, env_kwargs=None, renderer="osmesa", **header
):
    """A run with one episode per character of `successes` ("1" or "0"); `header` overrides keys of run.json."""
    folder.mkdir(parents=True)
    kwargs = {"suite": "libero_goal", "start_displacement": 0.05, "cameras": ["static"]} | (env_kwargs or {})
    run = {"benchmark": "libero_goal", "arm": arm, "checkpoint": "c" * 64, "config": "k", "train_seed": train_seed}
    run |= {"evaluation": "rollout", "env_kwargs": kwargs, "execute_steps": 8} | header
    rows = [
        {
            "benchmark": run["benchmark"], "task": "put_the_bowl_on_the_plate", "seed": first_seed + i,
            "success": outcome == "1", "steps": 90, "seconds": 2.5, "subtasks": [], "attempts": 1,
            "checkpoint": run["checkpoint"], "config": "k", "execute_steps": 8, "renderer": renderer,
            "versions": {"mujoco": "3.3.2"},
        }
        for i, outcome in enumerate(successes)
    ]  # fmt: skip
    (folder / "run.json").write_text(json.dumps(run))
    (folder / "episodes.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "summary.json").write_text(json.dumps({"n": len(rows), "missing": missing}))


def write_analyses(folder, arm, mae, cosine, **extra):
    folder.mkdir(parents=True)
    label = {"arm": arm, "benchmark": "libero_goal", **extra}
    score = {"value": cosine, "low": cosine - 0.02, "high": cosine + 0.02, "n": 6000}
    (folder / "alignment.json").write_text(json.dumps({**label, "cosine": score, "scale": score}))
    error = {"value": mae, "low": mae - 0.5, "high": mae + 0.5, "n": 12}
    (folder / "ridge_probe.json").write_text(json.dumps({**label, "mae_mm": error}))


VANILLA, PTR, REPLAY = "11110000111100001111", "11111111111111111000", "0" * 20


@pytest.fixture
def results(tmp_path):
    root = tmp_path / "results"
    write_run(root / "rollout" / "vanilla", "vanilla", VANILLA)
    write_run(root / "rollout" / "ptr", "ptr", PTR[:17], missing=3)
    write_run(root / "rollout" / "replay", "replay", REPLAY, train_seed=None)
    write_analyses(root / "analysis" / "vanilla", "vanilla", 8.23, 0.25)
    write_analyses(root / "analysis" / "ptr", "ptr", 7.41, 0.81)
    return root


def test_printed_tables(results, capsys):
    main([str(results)])
    text = capsys.readouterr().out
    rows = {line.split("│")[1].strip(): [cell.strip() for cell in line.split("│")[2:-1]] for line in text.splitlines() if "│" in line}  # fmt: skip # noqa: E501
    assert rows["vanilla"] == ["0.60 [0.39, 0.78] (12/20)", "8.2 [7.7, 8.7] (12)", "0.25 [0.23, 0.27] (6000)"]
    assert rows["ptr – incomplete (3 missing)"][0] == "1.00 [0.82, 1.00] (17/17)"
    assert rows["replay"] == ["0.00 [0.00, 0.16] (0/20)", "–", "–"]
    assert rows["ptr vs vanilla"][:2] == ["17", "8 / 0"]  # the 17 shared episodes, not vanilla's 20
    assert "ptr vs vanilla: ptr better (+0.47, p = 0.008, n = 17 pairs)" in text
    assert "start_displacement=0.05" in text


def test_numbers_against_scipy(results):
    episodes, analyses = tables.load(results)
    numbers = tables.results_table(episodes, analyses).set_index("arm")
    wilson = scipy.stats.binomtest(12, 20).proportion_ci(method="wilson")
    assert tuple(numbers.loc["vanilla", ["rate_low", "rate_high"]]) == pytest.approx((wilson.low, wilson.high))
    compared = tables.comparison_table(episodes).set_index(["arm_a", "arm_b"])
    assert compared.n.to_dict() == {("ptr", "replay"): 17, ("ptr", "vanilla"): 17, ("replay", "vanilla"): 20}
    p = {("ptr", "replay"): 2 * 0.5**17, ("ptr", "vanilla"): 2 * 0.5**8, ("replay", "vanilla"): 2 * 0.5**12}
    assert compared.p.to_dict() == pytest.approx(p)
    smallest_first = sorted(p, key=p.get)
    assert [compared.p_holm[pair] for pair in smallest_first] == pytest.approx(
        [p[pair] * factor for pair, factor in zip(smallest_first, (3, 2, 1), strict=True)]
    )


def test_csv_and_latex(results, tmp_path, capsys):
    write_run(results / "odd", "50%_data & <ptr>", VANILLA, first_seed=100)
    main([str(results), "--csv", str(tmp_path / "t.csv"), "--latex", str(tmp_path / "t.tex")])
    frame = pd.read_csv(tmp_path / "t.csv").set_index("arm")
    assert frame.loc["vanilla", ["successes", "n", "missing", "probe_n", "cosine_n"]].tolist() == [12, 20, 0, 12, 6000]
    assert frame.loc["ptr", ["rate", "missing", "probe", "cosine"]].tolist() == [1, 3, 7.41, 0.81]
    assert frame.loc["replay"].isna().sum() == 12  # three measurements of four numbers
    compared = pd.read_csv(tmp_path / "t_comparisons.csv").set_index(["arm_a", "arm_b"])
    assert compared.n["ptr", "vanilla"] == 17
    assert compared.n["50%_data & <ptr>", "vanilla"] == 0
    assert "no shared episodes" in compared.verdict["50%_data & <ptr>", "vanilla"]

    latex = (tmp_path / "t.tex").read_text()
    for rule in ("\\toprule", "\\midrule", "\\bottomrule", "\\begin{tabular}"):
        assert latex.count(rule) == 2
    assert (
        "libero\\_goal & vanilla & 0.60 [0.39, 0.78] (12/20) & 8.2 [7.7, 8.7] (12) & 0.25 [0.23, 0.27] (6000) \\\\"
        in latex
    )
    assert "50\\%\\_data \\& $<$ptr$>$" in latex
    assert "ptr -- incomplete (3 missing)" in latex
    assert not re.search(r"(?<!\\)[_%]|[^\x00-\x7f]", latex)
    assert "no shared episodes" in capsys.readouterr().out


def test_training_seeds_are_listed_pooled_and_paired_by_seed(tmp_path):
    for seed in (0, 1, 2):
        write_run(tmp_path / f"a{seed}", "ptr", PTR, train_seed=seed)
        write_run(tmp_path / f"b{seed}", "vanilla", VANILLA, train_seed=seed)
        write_analyses(tmp_path / f"c{seed}", "ptr", 7.0 + seed, 0.5, train_seed=seed)
    write_run(tmp_path / "d", "replay", REPLAY, train_seed=None)
    episodes, analyses = tables.load(tmp_path)
    results = tables.results_table(episodes, analyses)
    ptr = results[results.arm == "ptr"].set_index("train_seed")
    assert ptr.n.to_dict() == {"0": 20, "1": 20, "2": 20, "pooled": 60}
    assert ptr.successes["pooled"] == 51
    assert ptr.probe["pooled"] == pytest.approx(8.0) and np.isnan(ptr.probe_low["pooled"])
    compared = tables.comparison_table(episodes).set_index(["arm_a", "arm_b"])
    assert compared.n["ptr", "vanilla"] == 60
    assert compared.n["ptr", "replay"] == 20  # one training seed: the control's episodes are not used thrice
    assert "training seeds 0 and –" in compared.verdict["ptr", "replay"]
    assert any("Pooled" in note for note in tables.notes(episodes, results))
    assert "ptr, training seed 1" in set(tables.printable(results).arm)


def test_unequal_conditions_are_neither_pooled_nor_paired(tmp_path):
    write_run(tmp_path / "a", "ptr", PTR)
    write_run(tmp_path / "b", "vanilla", VANILLA, env_kwargs={"start_displacement": 0.0})
    write_run(tmp_path / "c", "vanilla", VANILLA, env_kwargs={"cameras": ["static", "wrist"]}, renderer="egl")
    episodes, analyses = tables.load(tmp_path)
    results, compared = tables.results_table(episodes, analyses), tables.comparison_table(episodes)
    assert set(tables.printable(results).benchmark) == {
        "libero_goal (start_displacement=0.0)",
        "libero_goal (start_displacement=0.05)",
    }
    assert tables.printable_comparisons(compared, results).benchmark.tolist() == [
        "libero_goal (start_displacement=0.05)"
    ]
    assert any("renderer (egl; osmesa)" in note for note in tables.notes(episodes, results))


def test_analyses_stand_beside_the_policies_own_rollouts(tmp_path):
    write_run(tmp_path / "a", "ptr", PTR)
    write_run(tmp_path / "b", "ptr", VANILLA, evaluation="bc_probe")
    write_analyses(tmp_path / "c", "ptr", 7.4, 0.8)
    for folder, shown in (("a", {"libero_goal (evaluation=rollout)"}), (None, {"libero_goal"})):
        text = tables.printable(tables.results_table(*tables.load(tmp_path)))
        assert set(text.benchmark[text["alignment, cosine"] != tables.NONE]) == shown
        if folder:
            shutil.rmtree(tmp_path / folder)


def test_missing_counts_follow_the_records(tmp_path):
    write_run(tmp_path / "a", "ptr", "111")
    (tmp_path / "a" / "summary.json").write_text(json.dumps({"n": 1, "missing": 4}))  # older than the records
    write_run(tmp_path / "b", "vanilla", "110")
    (tmp_path / "b" / "summary.json").unlink()
    shown = tables.printable(tables.results_table(*tables.load(tmp_path)))
    assert shown.arm.tolist() == ["ptr – incomplete (2 missing)", "vanilla – incomplete (no summary.json)"]
    assert shown["success rate"].str.contains(r"\(3/3\)|\(2/3\)").all()


def test_analyses_alone_make_a_table(tmp_path, capsys):
    write_analyses(tmp_path / "a", "ptr", 7.4, 0.8)
    main([str(tmp_path)])
    assert "7.4 [6.9, 7.9] (12)" in capsys.readouterr().out


def damage_header(root):
    path = root / "rollout" / "ptr" / "run.json"
    path.write_text(json.dumps({key: value for key, value in json.loads(path.read_text()).items() if key != "arm"}))


def damage_rows(root):
    path = root / "rollout" / "ptr" / "episodes.jsonl"
    path.write_text(path.read_text().replace('"success"', '"succes"'))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (damage_header, "run.json names no arm"),
        (damage_rows, "success"),
        (lambda root: (root / "rollout" / "ptr" / "run.json").unlink(), "run.json cannot be read"),
        (lambda root: (root / "rollout" / "ptr" / "summary.json").write_text("{"), "summary.json cannot be read"),
        (lambda root: (root / "rollout" / "ptr" / "summary.json").write_text("{}"), "summary.json lacks"),
        (lambda root: (root / "analysis" / "ptr" / "alignment.json").write_text('{"arm": "ptr"}'), "'benchmark'"),
        (lambda root: write_run(root / "again", "ptr", "1"), "the same episode"),
        (lambda root: write_analyses(root / "again", "ptr", 7, 0.8), "the same analysis"),
    ],
)
def test_damaged_results_are_one_line_and_exit_code_2(results, damage, message, capsys):
    damage(results)
    with pytest.raises(SystemExit) as stop:
        main([str(results)])
    error = capsys.readouterr().err
    assert stop.value.code == 2
    assert message in error and error.startswith("error: ") and error.count("\n") == 1


def test_missing_and_empty_folders(tmp_path, capsys):
    for arguments in (
        [str(tmp_path / "nowhere")],
        [str(tmp_path)],
        [str(tmp_path), "--csv", str(tmp_path / "x" / "t.csv")],
    ):
        with pytest.raises(SystemExit) as stop:
            main(arguments)
        assert stop.value.code == 2
        assert capsys.readouterr().err.count("\n") == 1


def test_script_runs_anywhere_without_torch(results, tmp_path):
    code = (
        "import runpy, sys; sys.argv = ['tables.py', sys.argv[2]]; "
        f"runpy.run_path({str(ROOT / 'scripts' / 'tables.py')!r}, run_name='__main__'); "
        "assert 'torch' not in sys.modules and 'hydra' not in sys.modules"
    )
    done = subprocess.run([sys.executable, "-c", code, "-", str(results)], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "not distinguishable" in done.stdout or "better" in done.stdout


def test_learning_curves(tmp_path):
    (tmp_path / "metrics.csv").write_text("step,loss,val_loss\n10,1.0,\n10,,2.0\n20,0.5,\n20,0.4,\n")
    metrics = read_metrics(tmp_path)
    assert metrics.step.tolist() == [10, 20]
    assert metrics.loss.tolist() == [1.0, 0.4] and metrics.val_loss[0] == 2.0
    steps = np.arange(1, 200)
    other = pd.DataFrame({"step": steps, "loss": np.exp(-steps / 50), "inverse_loss": 1 / steps, "samples_per_s": 3.0})
    plot_training({"vanilla": metrics, "ptr": other}, tmp_path / "curves.png")
    with Image.open(tmp_path / "curves.png") as picture:
        assert picture.format == "PNG" and picture.width >= 1200
        assert len(picture.convert("RGB").getcolors(10**6)) > 20
    assert not list(tmp_path.glob(".*"))
    with pytest.raises(UserError):
        read_metrics(tmp_path / "nowhere")
    with pytest.raises(UserError):
        plot_training({"vanilla": metrics[["step"]]}, tmp_path / "none.png")


def test_several_baselines_may_have_the_same_arms(tmp_path):
    write_run(tmp_path / "a", "ptr", "1100", baseline="flower")
    write_run(tmp_path / "b", "ptr", "1000", baseline="pi0")
    write_run(tmp_path / "c", "replay", "0000")
    write_analyses(tmp_path / "d", "ptr", 5.0, 0.2, baseline="pi0", train_seed=0)
    episodes, analyses = tables.load(tmp_path)
    results = tables.results_table(episodes, analyses).set_index("arm")
    assert results.successes.to_dict() == {"flower ptr": 2, "pi0 ptr": 1, "replay": 0}
    assert results.probe.dropna().to_dict() == {"pi0 ptr": 5.0}
    write_run(tmp_path / "alone" / "a", "ptr", "1100", baseline="flower")
    alone, _ = tables.load(tmp_path / "alone")
    assert set(alone.arm) == {"ptr"}


def test_of_two_arms_either_the_baseline_or_the_idea_differs(tmp_path):
    """FLOWER with an idea against VLM4VLA without it would say nothing of either."""
    for baseline in ("flower", "vlm4vla"):
        for arm in ("vanilla", "ptr"):
            write_run(tmp_path / baseline / arm, arm, PTR, baseline=baseline)
    write_run(tmp_path / "replay", "replay", REPLAY, train_seed=None)
    episodes, _ = tables.load(tmp_path)
    compared = tables.comparison_table(episodes)
    trained = {"flower ptr", "flower vanilla", "vlm4vla ptr", "vlm4vla vanilla"}
    pairs = {("flower ptr", "flower vanilla"), ("vlm4vla ptr", "vlm4vla vanilla")}
    pairs |= {("flower ptr", "vlm4vla ptr"), ("flower vanilla", "vlm4vla vanilla")}
    found = {frozenset(pair) for pair in zip(compared.arm_a, compared.arm_b, strict=True)}
    assert found == {frozenset(pair) for pair in pairs} | {frozenset((arm, "replay")) for arm in trained}


def test_what_is_found_of_a_baseline_does_not_hang_on_another(tmp_path):
    def adjusted() -> dict[frozenset, float]:
        compared = tables.comparison_table(tables.load(tmp_path)[0])
        pairs = zip(compared.arm_a, compared.arm_b, strict=True)
        return {frozenset(pair): p for pair, p in zip(pairs, compared.p_holm, strict=True)}

    for arm, successes in (("vanilla", VANILLA), ("aux", REPLAY), ("ptr", PTR)):
        write_run(tmp_path / "vlm4vla" / arm, arm, successes, baseline="vlm4vla")
    alone = adjusted()
    for arm, successes in (("vanilla", REPLAY), ("aux", VANILLA), ("ptr", PTR)):
        write_run(tmp_path / "flower" / arm, arm, successes, baseline="flower")
    beside = adjusted()
    assert len(alone) == 3 and len(beside) == 3 + 3 + 3
    for pair, p in alone.items():
        assert beside[frozenset(f"vlm4vla {arm}" for arm in pair)] == p


def test_alignment_is_drawn_a_bar_an_arm(tmp_path, monkeypatch):
    """Thirty networks are six bars, each as high as the mean of its seeds."""
    for seed, cosine in enumerate((0.1, 0.2, 0.6)):
        for baseline in ("flower", "vlm4vla"):
            write_analyses(tmp_path / f"{baseline}{seed}", "ptr", 7.0, cosine, train_seed=seed, baseline=baseline)
    drawn = []
    monkeypatch.setattr("matplotlib.axes.Axes.bar", lambda self, x, height, *_, **style: drawn.append(height))
    monkeypatch.setattr("matplotlib.figure.Figure.legend", lambda *_, **__: None)
    main([str(tmp_path), "--alignment", str(tmp_path / "bars.png")])
    assert drawn[::2] == pytest.approx([0.3, 0.3]) and len(drawn) == 4 and (tmp_path / "bars.png").stat().st_size > 5000
