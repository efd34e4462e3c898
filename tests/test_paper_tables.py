"""The papers' tables with ours beside them, from made-up results to the printed text."""

from __future__ import annotations

import re

import numpy as np
import pandas as pd
import pytest
import scipy.stats
from paper_runs import identity, write_chains, write_episodes, write_json

from envs.simpler.protocol import aggregate, cells
from scripts.tables import main
from vla.analysis import paper_print
from vla.analysis.paper_print import commands
from vla.analysis.paper_results import deviations, load_runs, score_weights
from vla.analysis.paper_tables import compare_with_paper
from vla.analysis.papers import load_paper, papers
from vla.cli import CONF
from vla.errors import UserError
from vla.experiment import expand


@pytest.fixture
def chains(tmp_path):
    """Two seeds of three arms of VLM4VLA at full size, and a rehearsal."""
    rng, lengths = np.random.default_rng(0), {}
    for seed in (0, 1):
        for arm, done in (("vanilla", 0.6), ("ptr", 0.8), ("aux", 0.6)):
            lengths[arm, seed] = rng.binomial(5, done, 60)
            write_chains(tmp_path / "r" / f"{arm}{seed}", "vlm4vla", arm, seed, lengths[arm, seed])
    write_chains(tmp_path / "r" / "tiny0", "vlm4vla", "vanilla", 0, rng.integers(0, 2, 30), "tiny")
    write_chains(tmp_path / "r" / "tiny1", "vlm4vla", "ptr", 0, rng.integers(0, 2, 30), "tiny")
    return tmp_path / "r", lengths


def cell(sheet, arm, column, setting=()):
    (only,) = [c for c in sheet.cells if (c.setting, c.row.arm, c.column.name) == (setting, arm, column)]
    return only


def test_ours_beside_idl_table6(chains):
    root, lengths = chains
    sheet = compare_with_paper(load_paper("idl_table6"), load_runs(root), in_sequence=True)
    average = cell(sheet, "ptr", "Avg. Len.")
    assert average.ours.value == pytest.approx(np.mean([lengths["ptr", s].mean() for s in (0, 1)]))
    assert (average.ours.n, average.ours.seeds, average.ours.missing) == (120, 2, 0)
    differences = [(lengths["ptr", s] - lengths["vanilla", s]).mean() for s in (0, 1)]
    p = scipy.stats.ttest_1samp(differences, 0).pvalue
    assert average.compared.p == pytest.approx(p) and average.compared.difference == pytest.approx(np.mean(differences))
    others = scipy.stats.ttest_1samp([(lengths["aux", s] - lengths["vanilla", s]).mean() for s in (0, 1)], 0).pvalue
    assert average.compared.p_holm == pytest.approx(min(1, max(2 * min(p, others), p if p > others else 0)))
    assert average.compared.p_networks < 0.001 and average.compared.verdict == "better (2 seeds)"
    assert average.compared.told.startswith("go on: after 120 of 2,000 pairs, about ")
    second = cell(sheet, "ptr", "2")
    assert second.ours.value == pytest.approx(np.mean([(lengths["ptr", s] >= 2).mean() for s in (0, 1)]))
    assert cell(sheet, "vanilla", "2").compared is None
    spread = np.concatenate([lengths["ptr", s] - lengths["vanilla", s] for s in (0, 1)]).std()
    z = scipy.stats.norm.ppf(0.975) + scipy.stats.norm.ppf(0.8)
    assert average.pairs_needed == pytest.approx((z * spread / 0.063) ** 2, rel=0.01)  # 409.7 − 403.4


def test_no_interval_leaves_what_can_be(tmp_path):
    for seed, done in enumerate((5, 5, 2)):
        write_chains(tmp_path / str(seed), "vlm4vla", "ptr", seed, [done] * 20)
    sheet = compare_with_paper(load_paper("idl_table6"), load_runs(tmp_path))
    length, fifth = cell(sheet, "ptr", "Avg. Len.").ours, cell(sheet, "ptr", "5").ours
    assert (length.value, length.high, fifth.low, fifth.high) == pytest.approx((4.0, 5.0, 0.0, 1.0))


def test_rehearsals_stand_apart_from_the_papers_numbers(chains):
    root, _ = chains
    sheet = compare_with_paper(load_paper("idl_table6"), load_runs(root))
    assert sheet.settings == [(), ("size=tiny",)]
    tiny = cell(sheet, "ptr", "Avg. Len.", ("size=tiny",))
    assert tiny.ours.n == 30 and tiny.pairs_needed is None
    real, rehearsal, *_ = paper_print.text_tables(sheet)
    assert "paper" in real.text and "paper" not in rehearsal.text
    assert "REHEARSAL (size=tiny), not comparable with the paper" in rehearsal.title
    numbers = paper_print.numbers(sheet)
    assert numbers[numbers.setting == "size=tiny"].paper.isna().all()


@pytest.mark.parametrize(
    ("header", "told"),
    [
        ({"env_kwargs": {"renderer": "tiny"}}, ["renderer=tiny"]),
        ({"env_kwargs": {"renderer": "egl", "max_steps": 90}}, ["max_steps=90"]),
        ({"env_kwargs": {"background": "masked", "success_rule": "ever"}}, ["success_rule=ever", "background=masked"]),
        ({"benchmark": "simpler_google_masked", "env_kwargs": {"background": "masked"}}, []),
        ({"env": "envs.simpler.maniskill3:WidowXEnv"}, ["simulator=maniskill3"]),
        ({"policy": {"size": "small"}}, ["size=small"]),
        ({"policy": None}, ["size=not recorded"]),
        ({"tap": "layer:24"}, []),
    ],
)
def test_what_makes_a_run_a_rehearsal(header, told):
    assert deviations(identity("b", "flower", "ptr", 0) | header) == told
    with_tap = [] if "tap" in header else ["tap=None"]
    assert set(deviations(identity("b", "flower", "ptr", 0) | header, "layer:24")) == {*told, *with_tap}


def test_a_rehearsals_settings_stand_in_its_title(tmp_path):
    write_chains(tmp_path / "a", "flower", "ptr", 0, [1, 2, 3], renderer="tiny")
    sheet = compare_with_paper(load_paper("idl_table1"), load_runs(tmp_path))
    assert sheet.settings == [(), ("renderer=tiny",)]
    assert all(c.ours is None for c in sheet.cells if not c.setting)
    assert "Training steps, renderer=tiny: FLOWER + Ours 30,000" in paper_print.notes(sheet)


def test_one_seed_is_of_these_networks(tmp_path):
    rng = np.random.default_rng(0)
    a, b = rng.binomial(5, 0.8, 80), rng.binomial(5, 0.5, 80)
    write_chains(tmp_path / "a", "flower", "ptr", 0, a)
    write_chains(tmp_path / "b", "flower", "vanilla", 0, b[:50])
    sheet = compare_with_paper(load_paper("idl_table1"), load_runs(tmp_path))
    (fifth,) = [c for c in sheet.cells if (c.row.baseline, c.row.arm, c.column.name) == ("flower", "ptr", "5")]
    wilson = scipy.stats.binomtest(int((a == 5).sum()), 80).proportion_ci(method="wilson")
    assert (fifth.ours.low, fifth.ours.high) == pytest.approx((wilson.low, wilson.high))
    only_a, only_b = ((a[:50] == 5) & (b[:50] < 5)).sum(), ((a[:50] < 5) & (b[:50] == 5)).sum()
    exact = scipy.stats.binomtest(int(only_a), int(only_a + only_b))
    mid_p = exact.pvalue - scipy.stats.binom.pmf(only_a, only_a + only_b, 0.5)
    assert (fifth.compared.n, fifth.compared.test) == (50, "McNemar mid-p")
    assert fifth.compared.p == pytest.approx(mid_p)
    assert fifth.compared.verdict == "better (1 seed)"
    assert any("these two networks" in note for note in paper_print.notes(sheet))


def test_missing_runs_are_shown_with_their_commands(chains, capsys):
    root, _ = chains
    main([str(root), "table=idl_table1"])
    printed = capsys.readouterr().out
    assert re.search(r"FLOWER \+ Ours.*4\.56.*–, not run", printed)
    assert "python train.py -m experiment=idl_table1 baseline=flower ablation=ptr && python evaluate.py -m" in printed
    assert "4.54 (a)" in printed and "(a) FLOWER, Avg. Len.: 4.54 does not follow: its columns give 4.48." in printed
    assert "ablation=vanilla" in printed.split("Not run: FLOWER:")[1] and "Not run: VLM4VLA" not in printed


def test_the_commands_of_missing_rows_name_runs_of_their_experiments():
    for name in papers():
        paper = load_paper(name)
        for row in paper.rows:
            if row.arm is None:
                continue
            for command in commands(paper, row, paper.columns):
                if "experiment=" in command:
                    words = command.partition(" && ")[0].removeprefix("python train.py ").split()
                    told = " ".join(expand("train", [*words, "-m"], CONF))
                    assert re.search(rf"(ablation|arm)=[\w,]*{row.arm}\b", told) and f"={row.baseline}" in told


def score_runs(root, groups=("pick_coke_can", "open_drawer", "close_drawer", "move_near"), lost=0):
    rng, rows = np.random.default_rng(0), {}
    for arm, rate in (("vanilla", 0.3), ("plus", 0.6)):
        episodes = [
            {"task": c.task, "seed": c.seed, "success": bool(rng.random() < rate * (1 + (c.variant == cells("google_vm")[0].variant)) / 2)}  # noqa: E501
            for c in cells("google_vm", list(groups))
        ]  # fmt: skip
        arguments = {
            "success_rule": "last_step",
            "renderer": "gpu",
            "shader": "rt",
            "max_steps": None,
            "action_scale": 1.0,
        }
        header = identity("simpler_google_vm", "openvla", arm, 0, protocol="google_vm", groups=list(groups))
        header |= {"env": "envs.simpler.original:OriginalEnv", "env_kwargs": arguments}
        write_episodes(root / arm, header, episodes[lost:], episodes[:lost])
        rows[arm] = episodes
    return rows


def test_simplers_scores_are_weighted_as_the_protocol_says(tmp_path):
    rows = score_runs(tmp_path)
    sheet = compare_with_paper(load_paper("genvla_table2"), load_runs(tmp_path))
    for arm, episodes in rows.items():
        expected = aggregate("google_vm", episodes, ["pick_coke_can", "open_drawer", "close_drawer", "move_near"])
        for name, column in (("open_drawer", "Open Drawer"), ("move_near", "Move Near"), ("average", "Avg")):
            assert cell_of(sheet, "openvla", arm, column).ours.value == pytest.approx(expected[name].value)
    average = cell_of(sheet, "openvla", "plus", "Avg")
    assert average.ours.n == 300 + 108 + 108 + 240 and average.compared.test == "sign flips"
    assert cell_of(sheet, "openvla", "plus", "Pick Can").compared.test == "McNemar mid-p"
    assert sum(score_weights("google_vm", "average").values()) == pytest.approx(1)
    assert average.compared.verdict.startswith("better")


def cell_of(sheet, baseline, arm, column):
    (only,) = [c for c in sheet.cells if (c.row.baseline, c.row.arm, c.column.name) == (baseline, arm, column)]
    return only


def test_a_score_with_missing_episodes_is_none(tmp_path):
    score_runs(tmp_path, lost=3)
    sheet = compare_with_paper(load_paper("genvla_table2"), load_runs(tmp_path))
    pick, near = (cell_of(sheet, "openvla", "plus", name) for name in ("Pick Can", "Move Near"))
    assert np.isnan(pick.ours.value) and pick.ours.missing == 3 and pick.compared is None
    assert near.ours.missing == 0 and near.compared is not None
    assert paper_print.ours(pick) == "– (n = 297, 1 seed, INCOMPLETE: 3 missing)"


def test_libero_suites_probes_and_files(tmp_path):
    """IDL tables 3, 4 and 5, GenVLA's figures: each number from the file that evaluate.py writes it to."""
    rng, spatial = np.random.default_rng(0), {}
    for seed in (0, 1, 2):
        for arm, gain in (("vanilla", 0.0), ("ptr", 0.2)):
            header = identity("libero_four", "vlm4vla", arm, seed, evaluation="bc_probe", env_kwargs={})
            outcomes = [
                {"benchmark": suite, "task": f"{suite}_{k % 2}", "seed": k, "success": bool(rng.random() < 0.4 + gain)}
                for suite in ("libero_spatial", "libero_object", "libero_goal", "libero_10")
                for k in range(20)
            ]
            folder = tmp_path / f"{arm}{seed}"
            write_episodes(folder / "rollouts-x", header, outcomes)
            spatial[arm, seed] = np.mean([o["success"] for o in outcomes if o["benchmark"] == "libero_spatial"])
            tasks = [
                {"task": f"t{k}", "train": 0.2 - gain / 2 + k / 100 + seed / 100, "validation": 0.3} for k in range(5)
            ]
            write_json(folder, "bc_probe.json", header, tasks=tasks)
            state = identity("libero_four", "vlm4vla", arm, seed, evaluation="state_probe")
            write_json(folder / "s", "state_probe.json", state, train=0.02 - gain / 20 + seed / 1000, validation=0.03)
            about = identity("calvin_abc_d", "vlm4vla", arm, seed, evaluation="alignment")
            about["tap"] = "layer:24"
            number = {"value": 0.3 + gain + seed / 100, "low": 0.2, "high": 0.7, "n": 6000}
            write_json(folder / "a", "alignment.json", about, cosine=number, scale=number)
    runs = load_runs(tmp_path)
    third = compare_with_paper(load_paper("idl_table3"), runs)
    means = [spatial["ptr", s] for s in (0, 1, 2)]
    assert cell_of(third, "vlm4vla", "ptr", "Spatial").ours.value == pytest.approx(np.mean(means))
    assert cell_of(third, "vlm4vla", "ptr", "Average").ours.n == 240
    fourth = compare_with_paper(load_paper("idl_table4"), runs)
    train = cell_of(fourth, "vlm4vla", "ptr", "BC train")
    assert train.ours.value == pytest.approx(0.1 + 0.02 + 0.01) and train.ours.n == 15
    assert train.compared.difference == pytest.approx(-0.1) and np.isnan(train.compared.p)  # each seed gives the same
    state = cell_of(fourth, "vlm4vla", "vanilla", "State train")
    assert state.ours.value == pytest.approx(0.021) and (state.ours.n, state.ours.seeds) == (3, 3)
    expected = scipy.stats.t.interval(0.95, 2, 0.021, scipy.stats.sem([0.02, 0.021, 0.022]))
    assert (state.ours.low, state.ours.high) == pytest.approx(expected, abs=2e-4)
    assert (
        cell_of(compare_with_paper(load_paper("idl_table5"), runs), "vlm4vla", "ptr", "Scale difference").ours.seeds
        == 3
    )


def test_lower_is_better_for_losses(tmp_path):
    rng = np.random.default_rng(0)
    for arm, mean in (("vanilla", 0.2), ("ptr", 0.1), ("untouched", 0.3)):
        tasks = [{"task": f"t{k}", "train": mean + rng.normal(0, 0.01), "validation": 0.3} for k in range(40)]
        header = identity("libero_four", "vlm4vla", arm, 0, evaluation="bc_probe")
        write_json(tmp_path / arm, "bc_probe.json", header, tasks=tasks)
    sheet = compare_with_paper(load_paper("idl_table4"), load_runs(tmp_path))
    verdicts = {arm: cell_of(sheet, "vlm4vla", arm, "BC train").compared.verdict for arm in ("ptr", "untouched")}
    assert verdicts == {"ptr": "better (1 seed)", "untouched": "worse (1 seed)"}


def test_figures_and_the_real_robot(tmp_path):
    for arm, right in (("vanilla", 0.4), ("plus", 0.6)):
        header = identity("vqa", "openvla", arm, 0, evaluation="vqa", set="gqa")
        accuracy = {"value": right, "low": right - 0.1, "high": right + 0.1, "n": 500}
        write_json(tmp_path / f"v{arm}", "vqa_probe.json", header, accuracy=accuracy, missing=7)
        header = identity("cifar10", "openvla", arm, 0, evaluation="cifar10")
        write_json(tmp_path / f"c{arm}", "cifar10_probe.json", header, accuracy=accuracy)
        header = identity("real_robot", "openvla", arm, 0, evaluation="real_robot")
        trials = [{"task": "PickKnife", "seed": n, "success": n <= 25 * right} for n in range(1, 26)]
        write_episodes(tmp_path / f"t{arm}", header, trials)
    runs = load_runs(tmp_path)
    gqa = cell_of(compare_with_paper(load_paper("genvla_fig5"), runs), "openvla", "plus", "GQA")
    assert paper_print.ours(gqa) == "60.0 [50.0, 70.0] (n = 1, 1 seed, INCOMPLETE: 7 missing)"
    assert gqa.compared.verdict == "one number each, nothing to test with (1 seed)"
    assert cell_of(compare_with_paper(load_paper("genvla_fig4"), runs), "openvla", "plus", "CIFAR-10").ours.value == 0.6
    robot = compare_with_paper(load_paper("genvla_table5"), runs)
    assert cell_of(robot, "openvla", "plus", "PickKnife").compared.difference == pytest.approx(5 / 25)
    assert any("scripts/trial.py" in note for note in paper_print.notes(robot))


def test_all_three_files_say_the_same(chains, tmp_path, capsys):
    root, lengths = chains
    out = [f"--{kind}={tmp_path / f't.{kind}'}" for kind in ("csv", "markdown", "latex")]
    main([str(root), "--table", "idl_table6", "--sequential", *out])
    printed, text = capsys.readouterr().out, (tmp_path / "t.markdown").read_text()
    share = f"{100 * np.mean([(lengths['ptr', s] >= 3).mean() for s in (0, 1)]):.1f} ["
    latex = (tmp_path / "t.latex").read_text()
    assert share in text and share in latex and share.split()[0] in printed
    frame = pd.read_csv(tmp_path / "t.csv").set_index(["setting", "arm", "column"])
    assert frame.loc[("paper's", "ptr", "3"), "value"] == pytest.approx(float(share[:-2]), abs=0.05)
    assert frame.loc[("paper's", "ptr", "Avg. Len."), ["paper", "n", "seeds", "pairs"]].tolist() == [4.1, 120, 2, 120]
    assert not re.search(r"(?<!\\)[_%&]|[^\x00-\x7f]", re.sub(r" & |^% .*$", "", latex, flags=re.M))
    assert latex.count("\\toprule") == text.count("\n| --- ") == 3
    rows = [line for line in text.splitlines() if line.startswith("| + PTR")]
    assert all(line.count(" | ") == rows[0].count(" | ") for line in rows[:6])


def test_another_benchmark_is_a_rehearsal(tmp_path, capsys):
    for arm in ("vanilla", "ptr"):
        header = identity("libero_goal", "vlm4vla", arm, 0, "tiny", env_kwargs={"start_displacement": 0.05})
        write_episodes(tmp_path / arm, header, [{"task": "t", "seed": k, "success": k % 2 == 0} for k in range(10)])
    main([str(tmp_path), "table=idl_table6", "benchmark=libero_goal"])
    printed = capsys.readouterr().out
    assert "REHEARSAL (benchmark=libero_goal, size=tiny, start_displacement=0.05)" in printed
    assert "50.0 [23.7, 76.3] (n = 10, 1 seed)" in re.sub(r"\s+│?\s*", " ", printed.replace("│", " "))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["table=idl_table9"], "table=idl_table9 does not exist; choose one of: genvla_fig3"),
        (["nowhere", "table=idl_table1"], "nowhere is not a folder"),
        (["--sequential"], "--sequential does not go without table=NAME: add table=NAME"),
        (["table=idl_table1", "--probes", "x.png"], "--probes does not go with table=NAME"),
        (["table=idl_table1", "--markdown", "no/such/t.md"], "create the folder no/such first"),
    ],
)
def test_mistakes_are_one_line(arguments, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as stop:
        main(arguments)
    error = capsys.readouterr().err
    assert stop.value.code == 2 and message in error and error.count("\n") == 1


def test_results_that_cannot_be_used_are_named(tmp_path):
    write_chains(tmp_path / "a", "flower", "ptr", 0, [1, 2])
    write_chains(tmp_path / "b", "flower", "ptr", 0, [1, 2])
    with pytest.raises(UserError, match=r"flower ptr, training seed 0: the same results lie in .*a and in .*b"):
        compare_with_paper(load_paper("idl_table1"), load_runs(tmp_path))
    (tmp_path / "b" / "run.json").write_text("{")
    with pytest.raises(UserError, match=r"b/run\.json cannot be read"):
        load_runs(tmp_path)
