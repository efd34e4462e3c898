"""evaluation=vqa from files in the official formats to a table: scores by hand, resumed, refused, compared."""

from __future__ import annotations

import json
import shutil
from io import StringIO
from pathlib import Path

import numpy as np
import pytest
import scipy.stats
from rich.console import Console
from statsmodels.stats.multitest import multipletests

from data.vqa import Question, read_questions
from evaluate import evaluate
from scripts.tables import main as tables
from tests.conftest import train_config
from tests.vqa_files import SETS, overrides, write_sets
from train import train
from vla.analysis import vqa
from vla.analysis.statistics import rate_interval
from vla.analysis.vqa_records import Answers, estimate, read_answers, summarise, weights_of
from vla.analysis.vqa_tables import compare_over_seeds, compare_probes, load_probes, show_representations
from vla.cli import compose_config
from vla.errors import UserError

SHORT = ("evaluation.vqa.max_new_tokens=4", "evaluation.vqa.batch_size=3")


@pytest.fixture(scope="module")
def policies(store, tmp_path_factory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("runs")
    few = ("ablation=untouched", "normalization=q99")
    return {
        name: train(train_config(store.path, root, f"baseline={name}", *few))
        for name in ("openvla", "pi0", "vlm4vla", "flower")
    }


@pytest.fixture
def places(tmp_path) -> dict[str, tuple[Path, Path]]:
    return write_sets(tmp_path)


def run(policy: Path, places, root: Path, *more: str) -> dict:
    where = (f"policy={policy}", f"results_root={root}", *overrides(places), *SHORT)
    return evaluate(compose_config("evaluate", *where, *more))


@pytest.mark.parametrize("baseline", ["openvla", "pi0", "vlm4vla"])
def test_every_set_is_asked_and_resumed(baseline, policies, places, tmp_path, monkeypatch):
    head = ("evaluation.vqa.head=tied",) if baseline == "vlm4vla" else ()
    results = run(policies[baseline], places, tmp_path / "a", *head)
    assert list(results) == list(SETS)
    for name, result in results.items():
        rows = read_answers(result["folder"])
        questions = read_questions(name, *places[name])
        assert [row["id"] for row in rows] == [question.id for question in questions]
        assert result["accuracy"]["n"] == len(questions) and result["missing"] == 0
        header = json.loads((result["folder"] / "run.json").read_text())
        assert header["set"] == name and header["baseline"] == baseline
    monkeypatch.setattr(vqa, "generate", lambda *arguments: pytest.fail("asked again"))
    again = run(policies[baseline], places, tmp_path / "a", *head)
    assert {k: v["accuracy"] for k, v in again.items()} == {k: v["accuracy"] for k, v in results.items()}


def test_only_missing_questions_are_asked(policies, places, tmp_path, monkeypatch):
    select = ("evaluation.vqa.select=[pope]",)
    whole = run(policies["openvla"], places, tmp_path / "whole", *select)["pope"]
    part = run(policies["openvla"], places, tmp_path / "a", *select, "evaluation.vqa.limit=4")["pope"]
    assert part["accuracy"]["n"] == 4 and part["missing"] == 6
    file = part["folder"] / "answers.jsonl"
    kept = file.read_bytes()
    file.write_bytes(kept + b'{"id": "torn')  # as a killed process leaves it
    asked = []
    ask = vqa.generate
    monkeypatch.setattr(vqa, "generate", lambda model, frames, prompts, n: asked.extend(prompts) or ask(model, frames, prompts, n))  # fmt: skip  # noqa: E501
    rest = run(policies["openvla"], places, tmp_path / "a", *select)["pope"]
    assert len(asked) == 6 and file.read_bytes().startswith(kept)
    assert asked[0] == "Is there a dog in the image?\nAnswer the question using a single word or phrase."
    by_id = [{row["id"]: row for row in read_answers(result["folder"])} for result in (whole, rest)]
    assert by_id[0] == by_id[1] and rest["pope"] == whole["pope"]


def test_scores_by_hand(policies, places, tmp_path, monkeypatch):
    """A model that always says one thing: every number follows from the files."""
    monkeypatch.setattr(vqa, "generate", lambda model, frames, prompts, n: [said] * len(prompts))
    said = "No, nokia."
    results = run(policies["openvla"], places, tmp_path / "a")
    assert {name: result["accuracy"]["value"] for name, result in results.items()} == {
        "textvqa": 0.0, "pope": 0.5, "gqa": 0.0, "vizwiz": 0.0, "vsr": pytest.approx(2 / 3),
    }  # fmt: skip
    mean = results["pope"]["pope"]["mean"]
    assert (mean["accuracy"], mean["f1"], mean["yes_ratio"]) == (0.5, 0.0, 0.0)
    assert results["vsr"]["unread"] == 0.0
    said = "The nok."
    results = run(policies["openvla"], places, tmp_path / "b")
    assert results["textvqa"]["accuracy"]["value"] == pytest.approx(0.3)
    assert results["vsr"]["unread"] == 1.0 and results["vsr"]["accuracy"]["value"] == 0.0
    assert results["pope"]["pope"]["random"] == dict(accuracy=0.5, precision=0.5, recall=1.0, f1=pytest.approx(2 / 3), yes_ratio=1.0)  # fmt: skip  # noqa: E501
    said = "Unanswerable"
    result = run(policies["openvla"], places, tmp_path / "c", "evaluation.vqa.lower_case=true")["vizwiz"]
    assert result["accuracy"]["value"] == 1.0 and result["groups"]["other"]["n"] == 1
    assert result["accuracy"]["low"] == pytest.approx(rate_interval(3, 3)[0])


def row(name: str, image: str, score: float, group: str = "", said: str = "yes") -> dict:
    return {"id": name, "image": image, "group": group, "said": said, "score": score}


def test_interval_is_wilsons_or_over_pictures():
    ones = [1.0] * 40
    alone = [row(str(i), f"{i}.jpg", float(i % 4 == 0)) for i in range(40)]
    assert (estimate(alone, ones).low, estimate(alone, ones).high) == rate_interval(10, 40)
    shared = [row(str(i), f"{i // 8}.jpg", float(i // 8 == 0)) for i in range(40)]  # five pictures, one of them right
    found = estimate(shared, ones)
    assert found.value == 0.2 and found.high - found.low > 1.5 * np.diff(rate_interval(8, 40))[0]
    wrong = [row(str(i), f"{i // 8}.jpg", 0.0) for i in range(40)]
    assert (estimate(wrong, ones).low, estimate(wrong, ones).high) == rate_interval(0, 5)
    soft = [row(str(i), "one.jpg", 0.3) for i in range(3)]
    assert (estimate(soft, ones[:3]).low, estimate(soft, ones[:3]).high) == (0.0, 1.0)


def test_pope_is_the_mean_of_its_splits():
    questions, rows = [], []
    for split, right, count in (("random", 1, 2), ("popular", 1, 4), ("adversarial", 0, 4)):
        for i in range(count):
            said = "yes" if i < right else "no"
            questions.append(Question(f"{split}-{i}", Path(f"{i}.jpg"), "?", ("yes",), split))
            rows.append(row(f"{split}-{i}", f"{i}.jpg", float(i < right), split, said))
    found = summarise("pope", rows, questions)
    assert found["accuracy"]["value"] == pytest.approx((1 / 2 + 1 / 4 + 0) / 3)
    assert found["pope"]["mean"]["accuracy"] == pytest.approx(found["accuracy"]["value"])
    assert {g: e["value"] for g, e in found["groups"].items()} == {"random": 0.5, "popular": 0.25, "adversarial": 0.0}
    assert weights_of("gqa", ["", ""]) == [1.0, 1.0] and weights_of("pope", ["a", "b", "b"]) == [1.0, 0.5, 0.5]


def test_a_folder_holds_one_run(tmp_path):
    header = {"set": "gqa", "prompt": "{question}"}
    with Answers(tmp_path, header) as answers:
        answers.append([row("1", "a.jpg", 1.0)])
        with pytest.raises(UserError, match="is being written by another evaluation"):
            Answers(tmp_path, header)
    with pytest.raises(UserError, match=r'holds another run: prompt was "\{question\}", now "else"'):
        Answers(tmp_path, header | {"prompt": "else"})
    with Answers(tmp_path, header) as answers:
        assert list(answers.rows) == ["1"]
    (tmp_path / "answers.jsonl").write_text('{"id": 1}\n')
    with pytest.raises(UserError, match=r"line 1 is no answer: it needs id, image, group, said, score"):
        Answers(tmp_path, header)
    (tmp_path / "answers.jsonl").write_text("nonsense\n")
    with pytest.raises(UserError, match="line 1 is not JSON"):
        Answers(tmp_path, header)


def test_bad_input_is_one_line(policies, places, tmp_path):
    with pytest.raises(UserError, match="Flower cannot answer in text"):
        run(policies["flower"], places, tmp_path / "a")
    with pytest.raises(UserError, match="select=okvqa is not known"):
        run(policies["openvla"], places, tmp_path / "a", "evaluation.vqa.select=[okvqa]")
    with pytest.raises(UserError, match=r"sets\.gqa\.prompt must hold {question} once"):
        run(policies["openvla"], places, tmp_path / "a", "evaluation.vqa.sets.gqa.prompt=what")
    shutil.rmtree(places["gqa"][1])
    with pytest.raises(UserError, match=r"gqa is not a folder"):
        run(policies["openvla"], places, tmp_path / "a")
    assert not (tmp_path / "a").exists(), "nothing is asked before everything is there"


def test_tables_print_arms_and_their_difference(policies, places, tmp_path, monkeypatch, capsys):
    said = {"vanilla": "yes", "plus": "no"}
    monkeypatch.setattr(vqa, "generate", lambda model, frames, prompts, n: [said[arm]] * len(prompts))
    for arm in said:
        run(policies["openvla"], places, tmp_path / "results", f"arm={arm}")
    capsys.readouterr()
    tables([str(tmp_path / "results")])
    printed = capsys.readouterr().out
    lines = printed.splitlines()
    assert "Visual question answering" in printed
    rows = [line.split("│")[1].strip() for line in lines if line.startswith("│")]
    assert rows == [name for name in SETS for _ in said], "in the order of Fig. 5"
    told = {line.split(", ")[2].split(":")[0]: line for line in lines if line.startswith("plus vs vanilla, seed 0")}
    assert list(told) == list(SETS)
    few = "too few pictures to tell (-1.000 [-1.000, -1.000], p = 0.25, 4 questions about 2 pictures)"
    assert told["gqa"].endswith(few)
    shutil.copytree(next((tmp_path / "results").rglob("vqa_probe.json")).parent, tmp_path / "results" / "copy")
    with pytest.raises(SystemExit):
        tables([str(tmp_path / "results")])
    assert "the same evaluation of the same run lies in" in capsys.readouterr().err


def write_answers(root: Path, arm: str, seed: int, scores: np.ndarray, extra: tuple = ()) -> None:
    """What evaluation=vqa leaves of GQA: two questions about each picture."""
    rows = [row(str(i), f"{i // 2}.jpg", float(value)) for i, value in enumerate(scores)]
    about = {"set": "gqa", "baseline": "pi0", "arm": arm, "train_seed": seed, "missing": 0}
    with Answers(root / f"{arm}{seed}", about) as answers:
        answers.append([*rows, *extra])
    accuracy = {"value": scores.mean(), "low": 0.0, "high": 1.0, "n": len(rows)}
    (root / f"{arm}{seed}" / "vqa_probe.json").write_text(json.dumps(about | {"accuracy": accuracy}))


def test_arms_are_paired_on_shared_questions(tmp_path):
    """Thirty pictures with two questions each; b also has questions that a was not asked."""
    rng = np.random.default_rng(0)
    scores = {"a": rng.integers(0, 2, 60), "b": rng.integers(0, 2, 60), "c": np.zeros(60)}
    for arm, values in scores.items():
        write_answers(tmp_path, arm, 0, values, (row("x", "x.jpg", 1.0),) if arm == "b" else ())
    compared = compare_probes(load_probes(tmp_path)).set_index(["arm_a", "arm_b"])
    close, apart = compared.loc[("a", "b")], compared.loc[("a", "c")]
    assert close.n == apart.n == 60
    assert close.difference == pytest.approx((scores["a"] - scores["b"]).mean()) and close.low < 0 < close.high
    assert close.told.startswith("not distinguishable") and apart.told.startswith("a better (+")
    pairs = (scores["a"] - scores["b"]).reshape(30, 2).mean(1)
    error = 1.96 * pairs.std(ddof=1) / np.sqrt(30)  # of thirty pictures, not of sixty questions
    assert close.high - close.low == pytest.approx(2 * error, rel=0.15)
    chance = np.ones(1)  # of every sum of the differences, in halves, with signs that are flipped at will
    for halves in np.abs(2 * pairs).astype(int):
        chance = np.convolve(chance, np.bincount([0, 2 * halves], [0.5, 0.5]))
    sums = np.arange(len(chance)) - len(chance) // 2
    assert close.p == pytest.approx(chance[np.abs(sums) >= abs(2 * pairs.sum())].sum(), abs=0.015)
    assert compared.p_holm.tolist() == pytest.approx(multipletests(compared.p, method="holm")[1])
    assert ", Holm, 60 questions" in close.told


def test_a_method_is_judged_over_training_seeds(tmp_path):
    """All of 40, of which b misses two more in one seed than in the other, c as many in each, d none."""
    for seed in (0, 1, 2):
        for arm, missed in (("a", 0), ("b", 8 + 2 * (seed == 1)), ("c", 4), ("d", 0)):
            write_answers(tmp_path, arm, seed, np.where(np.arange(40) < missed, 0, 1))
    found = compare_over_seeds(compare_probes(load_probes(tmp_path))).set_index(["arm_a", "arm_b"])
    row = found.loc[("a", "b")]
    assert row.differences == pytest.approx([0.2, 0.25, 0.2])
    test = scipy.stats.ttest_1samp(row.differences, 0)
    assert (row.p, row.low) == pytest.approx((test.pvalue, test.confidence_interval().low))
    assert row.p_holm > row.p and row.verdict.startswith("a better (p = ") and "Holm, 3 training seeds" in row.verdict
    assert found.loc[("a", "c")].verdict == "the same difference in all 3 training seeds: no test"
    assert found.loc[("a", "d")].verdict.startswith("not distinguishable")
    lines = StringIO()
    show_representations(Console(file=lines, width=200), tmp_path)
    assert "a vs b, gqa: a better" in lines.getvalue() and "(seeds: +0.200, +0.250, +0.200)" in lines.getvalue()
