"""The papers' printed numbers: what contradicts what, and what their own gains can show."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import scipy.stats
from hypothesis import given
from hypothesis import strategies as st

from vla.analysis.paper_power import gains
from vla.analysis.papers import Column, Paper, Row, check_paper, load_paper, papers, read_paper
from vla.errors import UserError


def found(name):
    return {(f.row, f.column, f.printed) for f in check_paper(load_paper(name)) if f.row}


def test_the_checker_finds_what_cannot_be_and_nothing_else():
    """By hand: 99.3 + 95.9 + 90.5 + 84.8 + 77.5 = 448.0; 3/24 = 12.5; 25 + 58.3 + 20.8 + 12.5 = 4 · 29.15."""
    wrong = {
        ("FLOWER", "Avg. Len.", "4.54"),
        ("SpatialVLA (pre-trained)", "Spoon", "12.3"),
        ("RoboVLMs (fine-tuned)", "Average", "31.3"),
        ("π₀ w/ Inst. Aug.", "MoveNear orig.", "78.52"),  # 78.54 in table II
    }
    assert set().union(*(found(name) for name in papers())) == wrong
    assert "its columns give 4.48" in next(f.told for f in check_paper(load_paper("idl_table1")))
    assert any("nearest is 3/24 = 12.5" in f.told for f in check_paper(load_paper("idl_table2")))


def test_episodes_that_stand_in_the_text_only_are_doubted_as_a_whole():
    """GenVLA's 300 a task: 33.93, 11.11, 64.41 … are no k/300; 36.70 is 110/300 = 36.7 with a zero added."""
    (finding,) = check_paper(load_paper("genvla_table2"))
    values = [v for row in load_paper("genvla_table2").rows for v in row.values[:-1]]
    assert len(values) == 36
    rounded = {round(100 * k / 300, places) for k in range(301) for places in (1, 2)}
    cut = {int(10**places * 100 * k / 300) / 10**places for k in range(301) for places in (1, 2)}
    odd = [value for value in values if value not in rounded | cut]
    assert finding.told.startswith(f"{len(odd)} of 36 cells are no multiple of 1/300")


def table_of(counts, n, cut, shift=0.0):
    """A row of rates k / n, printed to one decimal, rounded or cut off, with their mean, off by `shift`."""
    printed = [np.floor(1000 * k / n + 1e-9) / 10 if cut else round(100 * k / n, 1) for k in counts]
    mean = round(100 * sum(counts) / n / len(counts) + shift, 1)
    columns = [Column(str(i), {"tasks": [str(i)]}, "%", 1, n) for i in range(len(counts))]
    columns.append(Column("mean", "mean", "%", 1, n * len(counts), mean_of=[c.name for c in columns]))
    return Paper("made", "made", "made", "b", "rollout", columns, [Row("a", [*printed, mean])])


counted = st.integers(5, 300).flatmap(
    lambda n: st.tuples(st.lists(st.integers(0, n), min_size=2, max_size=6), st.just(n))
)


@given(counted, st.booleans())
def test_no_consistent_table_is_flagged(counted, cut):
    assert check_paper(table_of(*counted, cut)) == []


@given(counted, st.booleans(), st.sampled_from([-1.0, -0.4, 0.4, 1.0]))
def test_a_wrong_mean_is_flagged(counted, cut, shift):
    findings = check_paper(table_of(*counted, cut, shift))
    assert ("a", "mean") in {(f.row, f.column) for f in findings}


@pytest.mark.parametrize(("value", "told"), [(12.3, "no multiple of 1/24"), (100.4, "outside 0 … 100")])
def test_a_wrong_cell_is_flagged(value, told):
    paper = table_of([3, 5], 24, False)
    (finding, *_) = check_paper(replace(paper, rows=[Row("a", [value, *paper.rows[0].values[1:]])]))
    assert (finding.row, finding.column) == ("a", "0") and told in finding.told


def test_success_that_rises_along_the_chain_is_flagged():
    columns = [Column("1", {"chain": 1}, "%", 1), Column("2", {"chain": 2}, "%", 1)]
    (finding,) = check_paper(Paper("p", "", "", "b", "rollout", columns, [Row("a", [50.0, 50.1])]))
    assert "exceeds 50.0" in finding.told


def test_files_that_are_no_table_are_refused():
    good = {
        "title": "",
        "source": "",
        "benchmark": "b",
        "evaluation": "rollout",
        "rows": [{"name": "a", "values": [1.0]}],
    }
    column = {"name": "c", "measure": "mean", "unit": "%", "decimals": 1}
    columns = [[column | {"colour": 1}], [column, column], [column | {"mean_of": ["x"]}]]
    for wrong in (good, good | {"columns": [column], "extra": 1}, *(good | {"columns": c} for c in columns)):
        with pytest.raises(UserError, match=r"data/papers/made\.yaml"):
            read_paper("made", wrong)
    with pytest.raises(UserError, match="choose one of: genvla_fig3"):
        load_paper("idl_table9")


def test_the_papers_gains_are_within_noise():
    """Normal tests by hand from the printed rates, as in the project's fact sheets: p 0.39, 0.11, 0.64, 0.17."""
    p = {
        (table, gain.row.name): gain.p
        for table, last in (("idl_table1", "Avg. Len."), ("idl_table2", "Average"), ("idl_table3", "Average"))
        for gain in gains(load_paper(table))
        if gain.column.name == last
    }
    assert p["idl_table1", "VLM4VLA + Ours"] == pytest.approx(0.39, abs=0.006)
    assert p["idl_table1", "FLOWER + Ours"] == pytest.approx(0.11, abs=0.006)
    assert p["idl_table2", "SpatialVLA + Ours"] == pytest.approx(0.64, abs=0.006)
    assert p["idl_table3", "VLM4VLA + Ours"] == pytest.approx(0.17, abs=0.006)
    (needed,) = [g.needed for g in gains(load_paper("idl_table2")) if (g.row.arm, g.column.name) == ("ptr", "Average")]
    a, b, z = 29 / 96, 32 / 96, scipy.stats.norm.ppf(0.975) + scipy.stats.norm.ppf(0.8)
    assert needed == pytest.approx(z**2 * (a * (1 - a) + b * (1 - b)) / (a - b) ** 2, rel=0.02)
