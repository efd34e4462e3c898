"""scripts/report.py on a made-up experiment of every kind of result: what is on the page, and what cannot get on it."""

from __future__ import annotations

import itertools
import json
import re
import shlex
import shutil
import time
from dataclasses import asdict
from html.parser import HTMLParser
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pandas as pd
import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from scripts.report import main
from scripts.tables import main as tables_main
from tests.report_files import ARMS, SEEDS, TASKS, header, write_json, write_results, write_rollouts, write_runs
from tests.test_simpler_tables import write_run as write_simpler
from vla.cli import compose_config
from vla.errors import UserError
from vla.report import pictures
from vla.report.answers import Answer, main_pairs
from vla.report.drawing import Looks, draw, plain
from vla.report.page import write_page

pytestmark = pytest.mark.xdist_group("report")  # the page of most tests is made once

CHANGES = {
    "inverse_dynamics.weight": 0.3,
    "max_steps": 700,
    "data.path": "/data/with space",
    "optim.betas": [0.9, 0.95],
}
HOSTILE = """</style><script>alert(1)</script><img src=x onerror=alert(2)>"' $\\frac{ &amp; {{ 7*7 }} \x07"""


class Page(HTMLParser):
    """What a browser makes of a page: elements with their attributes, rows of tables, and the text outside scripts."""

    def __init__(self, source: str):
        super().__init__()
        self.source, self.elements, self.rows, self.open = source, [], [], []
        self.words: list[str] = []
        self.cell: list[str] | None = None
        self.feed(source)
        self.text = " ".join(" ".join(self.words).split())

    def handle_starttag(self, tag, attributes):
        self.elements.append((tag, dict(attributes)))
        self.open.append(tag)
        if tag == "tr":
            self.rows.append([])
        if tag in ("td", "th"):
            self.cell = []

    def handle_endtag(self, tag):
        if tag in ("td", "th"):
            self.rows[-1].append("".join(self.cell))
            self.cell = None
        while self.open and self.open.pop() != tag:
            pass

    def handle_data(self, data):
        if self.open and self.open[-1] in ("script", "style"):
            return
        self.words.append(data)
        if self.cell is not None:
            self.cell.append(data)

    def count(self, tag: str) -> int:
        return sum(name == tag for name, _ in self.elements)


def report(results: Path, *words: str) -> Page:
    out = results.parent / "report.html"
    main([str(results), f"out={out}", *words])
    return Page(out.read_text())


@pytest.fixture(scope="module")
def experiment(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("experiment")
    write_results(root / "results")
    write_runs(root / "runs", changes=CHANGES)
    return root


@pytest.fixture(scope="module")
def page(experiment) -> Page:
    return report(experiment / "results", f"runs={experiment / 'runs'}")


def test_every_section_has_its_content(page):
    for heading in ("The answer first", "What has been measured", "Tables", "Figures", "Provenance"):
        assert heading in page.text
    for title in (
        "Differences in success: libero_goal",
        "policy loss: vlm4vla tiny on libero_goal",
        "inverse-dynamics loss: vlm4vla tiny on libero_goal",
        "behaviour-cloning probe on frozen tokens: libero_goal",
        "state probe on frozen tokens: libero_goal",
        "State-feature alignment: libero_goal",
        "Frame pairs, cosine distance: libero_goal, vlm4vla",
        "Alignment and success, a point per trained policy: libero_goal",
        "Success per task: libero_goal",
        "Success per task: calvin_abc_d",
        "Visual question answering: vlm4vla",
        "CIFAR-10: vlm4vla",
    ):
        assert title in page.text
    assert page.count("svg") == 13  # those and the differences of CALVIN
    images = [attributes["src"].split(",")[0] for tag, attributes in page.elements if tag == "img"]
    assert images.count("data:image/jpeg;base64") == 6 * len(ARMS)
    assert images.count("data:image/png;base64") == len(ARMS) * len(SEEDS)
    assert "step 0" in page.text and "step 20" in page.text and "aux (training seed 0): failure" in page.text
    assert "Not measured at all" not in page.text
    assert "abcdef012345" in page.text and "d" * 13 in page.text and "mujoco, rolled out with 3.3.2" in page.text
    assert all("aria-label" in attributes for tag, attributes in page.elements if tag == "svg")


def test_numbers_are_those_of_the_tables(page, experiment, capsys):
    tables_main([str(experiment / "results")])
    printed = capsys.readouterr().out
    rows = [[c.strip() for c in line.split("│")[1:-1]] for line in printed.splitlines() if line.startswith("│")]
    numbers = [[cell for cell in row if re.search(r"\d", cell)] for row in rows]
    assert len(numbers) >= 50
    for row, cells in zip(rows, numbers, strict=True):
        if row[0] and cells:  # else a wrapped line
            assert any(set(cells) <= set(other) for other in page.rows), row
    verdicts = [
        line for line in printed.splitlines() if re.match(r"\S+ vs \S+: .*(better|not distinguishable) \(", line)
    ]
    assert len(verdicts) >= 3
    for line in verdicts:
        (arms, *_, told) = line.split(";")[0].split(": ")  # between them the difference, which is a column of the page
        assert f"{arms} : {told}" in page.text


def test_wilson_of_a_cell_is_statsmodels(page, experiment):
    from statsmodels.stats.proportion import proportion_confint

    rows = [
        json.loads(line)
        for line in (experiment / "results/libero_goal/policy1-s0/episodes.jsonl").read_text().splitlines()
    ]
    done, n = sum(row["success"] for row in rows), len(rows)
    low, high = proportion_confint(done, n, method="wilson")
    assert ["ptr, training seed 0", f"{done / n:.2f} [{low:.2f}, {high:.2f}] ({done}/{n})"] in [
        r[:2] for r in page.rows
    ]


def test_one_file_that_loads_nothing(page):
    for tag, attributes in page.elements:
        for name in ("src", "href", "xlink:href", "action", "data", "poster", "srcset"):
            assert attributes.get(name, "#").startswith(("#", "data:image/")), (tag, name)
        assert not any(name.startswith("on") for name in attributes)
    assert not re.search(r"https?://|file://|@import", page.source)
    assert set(re.findall(r"url\((.)", page.source)) <= {"#"}
    assert page.count("link") == page.count("iframe") == page.count("object") == 0
    ids = [attributes["id"] for _, attributes in page.elements if "id" in attributes]
    targets = {a["href"][1:] for tag, a in page.elements if tag in ("use", "a")} | set(
        re.findall(r"url\(#([^)]+)\)", page.source)
    )
    assert targets <= set(ids) and all(ids.count(target) == 1 for target in targets)
    assert "prefers-color-scheme: dark" in page.source and "@media print" in page.source


def test_the_same_input_gives_the_same_page(page, experiment):
    assert report(experiment / "results", f"runs={experiment / 'runs'}").source == page.source


def test_commands_repeat_the_configurations(page, experiment):
    commands = [line for line in page.source.split("<pre", 2)[1].splitlines() if "train.py" in line]
    assert len(commands) == len(ARMS) * len(SEEDS)
    folders = sorted((experiment / "runs").iterdir())
    for line, folder in zip(commands, folders, strict=True):
        words = shlex.split(line.partition("python ")[2].replace("&#39;", "'"))
        again = json.loads(json.dumps(asdict(compose_config("train", *words[1:]))))
        assert again == yaml.safe_load((folder / "config.yaml").read_text())
    assert "evaluation=rollout episodes=12 first_seed=30 benchmark.start_displacement=0.05 # tasks: 3" in page.text


def test_what_is_missing_is_said(tmp_path):
    results = tmp_path / "results"
    write_rollouts(results / "a", header("vanilla", 0), {TASKS[0]: [1, 0, 1]}, missing=2)
    write_json(results / "b", "alignment.json", header("ptr", 1) | {k: SCORE for k in ("cosine", "scale")})
    write_runs(tmp_path / "runs", arms=("aux",), seeds=(0,))
    shutil.rmtree(next((tmp_path / "runs").iterdir()) / "policy")
    shown = report(results, f"runs={tmp_path / 'runs'}")
    assert ["vanilla", "0", "incomplete: 2 episodes missing", "missing"] in shown.rows
    assert ["ptr", "1", "missing", "measured"] in shown.rows and ["aux", "0", "missing", "missing"] in shown.rows
    for kind in ("behaviour-cloning probe", "state probe", "position probe", "VQA", "CIFAR-10", "latency", "films"):
        assert f"missing: {kind}" in shown.text
    assert "missing: rollouts" not in shown.text and "missing: alignment" not in shown.text
    assert "vanilla – incomplete (2 missing)" in shown.text and "missing: not trained to its end" in shown.text
    assert "There is nothing to compare" in shown.text
    assert "missing: no training runs" in report(results, f"runs={results}").text


def test_damaged_distances_of_pairs_are_named(tmp_path):
    results = tmp_path / "results"
    write_results(results, arms=("ptr",), seeds=(0,))
    (path := next(results.rglob("alignment_pairs.npz"))).write_bytes(path.read_bytes()[:200])
    with pytest.raises(UserError, match=r"alignment_pairs\.npz is damaged .* evaluate again"):
        write_page(results, tmp_path / "runs", tmp_path / "page.html")
    assert not (tmp_path / "page.html").exists()


SCORE = {"value": 0.5, "low": 0.4, "high": 0.6, "n": 100}


def test_names_from_files_stay_text(tmp_path):
    results = tmp_path / "results"
    write_results(results, arms=(HOSTILE, "_a", "$x^"), seeds=(0,))
    write_runs(tmp_path / "runs", arms=(HOSTILE, "_a"), seeds=(0,))
    folder = next((tmp_path / "runs").iterdir())
    (folder / "config.yaml").write_text((folder / "config.yaml").read_text() + f"note: {json.dumps(HOSTILE)}\n")
    shown = report(results, f"runs={tmp_path / 'runs'}")
    assert shown.count("script") == shown.count("style") == 1
    assert not any("onerror" in attributes or attributes.get("src") == "x" for _, attributes in shown.elements)
    assert "<script>alert(1)</script>" in shown.text and "{{ 7*7 }}" in shown.text
    assert shown.count("svg") == 13 and "$x^" in shown.text and "_a" in shown.text


@settings(max_examples=15)
@given(st.text(max_size=60))
def test_any_text_can_be_drawn(text):
    def paint(axes):
        axes.plot([0, 1], label=plain(text))
        axes.legend()

    picture = draw(paint, text, text)
    root = ElementTree.fromstring(str(picture.svg))
    assert plain(text, 300) == root.get("aria-label")
    assert plain(text) in {element.text for element in root.iter("text")} and len(plain(text)) <= 49


def test_an_arm_looks_the_same_everywhere_and_like_no_other():
    looks = Looks(str(i) for i in range(24))
    assert len({(look.color, look.marker, str(look.linestyle)) for look in looks.values()}) == 24
    first = list(looks.values())[:5]
    for part in ("color", "marker", "linestyle", "hatch"):
        assert len({str(getattr(look, part)) for look in first}) == 5  # told apart without colour


def test_arms_keep_their_colour_over_the_pictures(page):
    figures = dict(re.findall(r"<figcaption>([^<]*)</figcaption>(<svg.*?</svg>)", page.source, re.S))
    for title in ("policy loss: vlm4vla tiny on libero_goal", "State-feature alignment: libero_goal"):
        svg = figures[title].lower()
        assert all(color in svg for color in ("#0072b2", "#d55e00", "#009e73")) and "#cc79a7" not in svg
        assert all(f">{arm}" in svg for arm in ARMS)


def test_curves_are_means_of_stretches():
    values = np.random.default_rng(0).random(1000)
    steps, means = pictures._binned(pd.Series(values, np.arange(1000)))
    assert len(means) == pictures.POINTS and means.mean() == pytest.approx(values.mean(), rel=0.01)
    edges = np.linspace(0, 1000, pictures.POINTS + 1).astype(int)
    assert means[7] == pytest.approx(values[edges[7] : edges[8]].mean())
    assert steps[7] == pytest.approx((edges[7] + edges[8] - 1) / 2)


def test_a_verdict_names_its_winner():
    def of(sentence: str, first: str = "a", second: str = "a b") -> str:
        return Answer("q", first, second, sentence, "", "", "").decided

    assert of("a b better (+0.3, p = 0.01, n = 20 pairs)") == "a b better"
    assert of("a is lower (p = 0.01, 3 training seeds)") == "a lower"
    assert of("not distinguishable (p = 0.5, n = 20 pairs)") == ""
    assert of("too few pictures to tell (+0.1)") == ""


def test_pairs_with_vanilla_come_first_where_there_are_many():
    def of(*arms: str) -> list[str]:
        pairs = itertools.combinations(sorted(arms), 2)
        return main_pairs([Answer("q", a, b, "", "", "", "") for a, b in pairs])

    assert of("aux", "ptr", "vanilla") == ["aux vs ptr", "aux vs vanilla", "ptr vs vanilla"]
    assert of("aux", "plus", "ptr", "vanilla") == ["aux vs vanilla", "plus vs vanilla", "ptr vs vanilla"]
    assert of("pi0 ptr", "pi0 vanilla", "flower ptr", "flower vanilla") == [
        "flower ptr vs flower vanilla",
        "pi0 ptr vs pi0 vanilla",
    ]
    assert len(of("a", "b", "c", "d")) == 6


def test_several_baselines_name_the_arms(tmp_path):
    results = tmp_path / "results"
    for baseline in ("vlm4vla", "flower"):
        write_rollouts(results / baseline, header("ptr", 0, baseline=baseline), {TASKS[0]: [1, 0, 1, 1]})
        write_json(results / "state" / baseline, "state_probe.json", header("ptr", 0, baseline=baseline) | STATE)
    shown = report(results)
    assert "flower ptr vs vlm4vla ptr" in shown.text and ["ptr", "0"] not in [row[:2] for row in shown.rows]
    assert ["flower ptr", "0", "post_projector", "1", "0.1000", "0.2000"] in shown.rows


def test_simplerenvs_scores_are_weighted_and_gaps_said(tmp_path):
    lost = [("move_near", 3)]
    write_simpler(tmp_path / "results" / "a", "ptr", lambda cell: cell.seed % 2 == 0, lost)
    write_simpler(tmp_path / "results" / "b", "vanilla", lambda cell: False)
    shown = report(tmp_path / "results")
    assert ["close_drawer", "ptr", "0", "0.500", "108"] in shown.rows
    assert ["move_near", "ptr", "0", "–", "239, 1 missing"] in shown.rows
    assert ["ptr", "0", "incomplete: 1 episodes missing"] in shown.rows


STATE = {"tap": "post_projector", "train": 0.1, "validation": 0.2, "train_curve": [0.3, 0.2]}


def test_bad_input_is_one_line(tmp_path, experiment, capsys):
    (tmp_path / "empty").mkdir()
    broken = tmp_path / "broken"
    shutil.copytree(experiment / "runs", broken)
    (next(broken.iterdir()) / "config.yaml").write_text("{")
    results = str(experiment / "results")
    for words, told in (
        ([str(tmp_path / "empty")], "run evaluate.py first"),
        ([str(tmp_path / "none")], "is not a folder"),
        ([results, f"runs={tmp_path / 'none'}"], "is not a folder"),
        ([results, f"out={tmp_path / 'none' / 'x.html'}"], "cannot be written"),
        ([results, f"runs={broken}", f"out={tmp_path / 'x.html'}"], "config.yaml is no run's"),
    ):
        with pytest.raises(SystemExit) as stop:
            main(words)
        printed = capsys.readouterr().err
        assert stop.value.code == 2 and told in printed and printed.count("\n") == 1
    assert not (tmp_path / "x.html").exists()


def test_a_damaged_film_is_said(tmp_path):
    write_rollouts(tmp_path / "results" / "a", header("vanilla", 0), {TASKS[0]: [1, 0, 1]})
    (tmp_path / "results" / "a" / "videos").mkdir()
    (tmp_path / "results" / "a" / "videos" / f"{TASKS[0]}_seed30_success.mp4").write_bytes(b"no film")
    assert f"missing: {TASKS[0]}_seed30_success.mp4 cannot be read" in report(tmp_path / "results").text


def test_thirty_runs_take_seconds(tmp_path):
    seeds = range(10)
    for arm in ARMS:
        for seed in seeds:
            rates = np.random.default_rng(seed).random(50) < 0.5
            write_rollouts(tmp_path / "results" / f"{arm}{seed}", header(arm, seed), {task: rates for task in TASKS})
    write_runs(tmp_path / "runs", seeds=seeds, rows=2000)
    started = time.process_time()
    shown = report(tmp_path / "results", f"runs={tmp_path / 'runs'}")
    assert time.process_time() - started < 30 and len(shown.source) < 2e6
