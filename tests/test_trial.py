"""scripts/trial.py: trials of a real robot become records that the tables read; nothing is lost or counted twice."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from envs.records import load_records
from envs.trials import TrialLog, read_lines
from scripts.tables import main as tables
from scripts.trial import main as trial
from vla.cli import CONF
from vla.errors import UserError

TASKS = ["PickCarrot", "PickKnife"]


@pytest.fixture
def policy(tmp_path) -> Path:
    """As much of a policy directory as names it."""
    return make_policy(tmp_path / "policy", "plus")


def make_policy(folder: Path, arm: str) -> Path:
    folder.mkdir()
    about = {"arm": arm, "train_seed": 0, "config_hash": "k" + arm}
    config = {"format": 1, "baseline": "openvla", "arguments": {"chunk": 4}, "about": about}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "model.safetensors").write_bytes(arm.encode())
    return folder


def log(policy: Path, *arguments: str) -> Path:
    trial([str(policy), "--results", str(policy.parent / "results"), *arguments])
    return next((policy.parent / "results").rglob("trials.jsonl")).parent


def outcomes(folder: Path) -> list[tuple[str, int, bool]]:
    return list(load_records(folder)[["task", "seed", "success"]].itertuples(index=False, name=None))


def test_trials_are_records_and_undo_leaves_a_trace(policy, capsys):
    log(policy, "PickCarrot", "success")
    log(policy, "PickCarrot", "failure", "--note", "gripper slipped", "--steps", "80", "--seconds", "21.5")
    log(policy, "PickKnife", "failure", "--trial", "7")
    folder = log(policy, "PickCarrot", "success")
    assert outcomes(folder) == [("PickCarrot", 1, True), ("PickCarrot", 2, False), ("PickCarrot", 3, True), ("PickKnife", 7, False)]  # fmt: skip # noqa: E501
    second = load_records(folder).iloc[1]
    assert (second.steps, second.seconds, second.execute_steps, second.renderer) == (80, 21.5, 4, "real")
    assert second.checkpoint == hashlib.sha256(b"plus").hexdigest()
    summary = json.loads((folder / "summary.json").read_text())
    assert (summary["n"], summary["successes"], summary["missing"]) == (4, 2, 12 * 25 - 4)
    before = (folder / "trials.jsonl").read_text()

    capsys.readouterr()
    log(policy, "--undo")
    assert "taken back: trial 3 of PickCarrot, success" in capsys.readouterr().out
    log(policy, "--undo")
    assert "trial 7 of PickKnife" in capsys.readouterr().out  # the one logged before it
    assert outcomes(folder) == [("PickCarrot", 1, True), ("PickCarrot", 2, False)]
    trace = (folder / "trials.jsonl").read_text()
    assert trace.startswith(before) and [json.loads(line)["what"] for line in trace.splitlines()] == ["trial"] * 4 + ["undo"] * 2  # fmt: skip # noqa: E501
    log(policy, "PickKnife", "success", "--trial", "7")
    assert outcomes(folder)[-1] == ("PickKnife", 7, True)
    assert json.loads(trace.splitlines()[1])["note"] == "gripper slipped"


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["PickCarrot", "success", "--trial", "1"], "trial 1 of PickCarrot is logged already (failure)"),
        (["PickCarot", "success"], "'PickCarot' is not known; choose one of: PickCarrot"),
        (["PickCarrot", "success", "--trial", "26"], "not in 1 … 25"),
        (["PickCarrot", "success", "--trial", "0"], "not in 1 … 25"),
        (["PickCarrot", "success", "--benchmark", "libero_goal"], "no list `trials`"),
        (["PickCarrot", "success", "--benchmark", "nowhere"], "does not exist"),
    ],
)
def test_mistakes_are_one_line_and_change_nothing(policy, capsys, arguments, told):
    folder = log(policy, "PickCarrot", "failure")
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    with pytest.raises(SystemExit) as ended:
        log(policy, *arguments)
    error = capsys.readouterr().err
    assert ended.value.code == 2 and told in error and len(error.splitlines()) == 1
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before


@pytest.mark.parametrize("arguments", [["PickCarrot"], ["PickCarrot", "won"], ["PickCarrot", "success", "--undo"]])
def test_half_a_command_is_refused(policy, arguments):
    with pytest.raises(SystemExit) as ended:
        trial([str(policy), *arguments])
    assert ended.value.code == 2


def test_not_a_policy(tmp_path, capsys):
    with pytest.raises(SystemExit):
        trial([str(tmp_path), "PickCarrot", "success", "--results", str(tmp_path)])
    assert "is not an exported policy" in capsys.readouterr().err


def test_the_tables_pair_two_policies_on_the_trials(tmp_path, capsys):
    first, second = make_policy(tmp_path / "a", "plus"), make_policy(tmp_path / "b", "vanilla")
    for n in range(1, 7):
        log(first, "PickCarrot", "success", "--trial", str(n))
        log(second, "PickCarrot", "failure", "--trial", str(n))
    capsys.readouterr()
    tables([str(tmp_path / "results")])
    text = capsys.readouterr().out
    assert "(6/6)" in text and "(0/6)" in text and "plus vs vanilla" in text and "real_robot" in text
    assert "p = 0.03, n = 6 pairs" in text  # exact McNemar of 6 to 0: 2 / 2^6


def test_undoing_the_only_trial_leaves_results_that_can_be_read(tmp_path, capsys):
    first, second = make_policy(tmp_path / "a", "plus"), make_policy(tmp_path / "b", "vanilla")
    log(first, "PickCarrot", "success")
    log(second, "PickCarrot", "success")
    log(second, "--undo")
    tables([str(tmp_path / "results")])
    assert "(1/1)" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        log(second, "--undo")
    assert "no trial to take back" in capsys.readouterr().err


HEADER = {"benchmark": "real_robot", "arm": "plus", "checkpoint": "c", "config": "k", "execute_steps": 4}


def open_log(folder: Path) -> TrialLog:
    return TrialLog(folder, HEADER, TASKS, 3)


ACTS = st.lists(st.tuples(st.sampled_from(TASKS), st.booleans()) | st.just("undo"), max_size=12)


@settings(max_examples=25)
@given(acts=ACTS, cut=st.integers(0, 60))
def test_records_are_what_the_log_says_even_after_a_kill(tmp_path_factory, acts, cut):
    """Against a list kept by hand; then the last line is torn, as by a kill while it was written."""
    folder = tmp_path_factory.mktemp("log") / "run"
    expected: list[tuple[str, int, bool]] = []
    states = [list(expected)]
    for act in acts:
        with open_log(folder) as trials:
            try:
                if act == "undo":
                    trials.undo()
                    expected.pop()
                else:
                    number = next((n for n in (1, 2, 3) if not any(e[:2] == (act[0], n) for e in expected)), None)
                    trials.add(*act)
                    expected.append((act[0], number, act[1]))
                states.append(list(expected))
            except UserError:
                assert not expected if act == "undo" else sum(e[0] == act[0] for e in expected) == 3
    path = folder / "trials.jsonl"
    if path.exists():
        lines = path.read_text().splitlines(keepends=True)
        assert len(lines) == len(states) - 1
        path.write_text("".join(lines)[: -min(cut, len(lines[-1]))] if cut else "".join(lines))
        expected = states[-2 if cut else -1]
    with open_log(folder) as trials:
        rows = [(row["task"], row["seed"], row["success"]) for row in trials.records.rows.values()]
    assert rows == expected
    if expected:
        assert outcomes(folder) == sorted(expected)


def test_a_record_lost_between_the_two_files_is_made_again(tmp_path):
    with open_log(tmp_path / "run") as trials:
        trials.add("PickCarrot", True)
        trials.add("PickCarrot", False)
    records = tmp_path / "run" / "episodes.jsonl"
    records.write_text(records.read_text().splitlines(keepends=True)[0])
    with open_log(tmp_path / "run"):
        assert outcomes(tmp_path / "run") == [("PickCarrot", 1, True), ("PickCarrot", 2, False)]


def test_two_at_once_and_damaged_logs_are_refused(tmp_path):
    folder = tmp_path / "run"
    with open_log(folder) as trials:
        trials.add("PickCarrot", True)
        with pytest.raises(UserError, match="is being written"):
            open_log(folder)
    good = (folder / "trials.jsonl").read_text()
    for damaged in ("{}\n", "no JSON\n", good.replace('"trial": 1', '"trial": "1"'), good.replace('"what": "trial"', '"what": "undo"')):  # fmt: skip # noqa: E501
        (folder / "trials.jsonl").write_text(damaged)
        with pytest.raises(UserError, match="line 1"):
            open_log(folder)
    (folder / "trials.jsonl").write_text(good)
    open_log(folder).__exit__()
    assert len(read_lines(folder / "trials.jsonl")) == 1


def test_tasks_are_those_of_genvla_table_v():
    """Twelve rows, five of them with a distractor; 25 trials each (GenVLA §IV.C)."""
    benchmark = yaml.safe_load((CONF / "benchmark" / "real_robot.yaml").read_text())["benchmark"]
    assert len(set(benchmark["trials"])) == 12 and sum("+" in name for name in benchmark["trials"]) == 5
    assert benchmark["init_states"] == 25
