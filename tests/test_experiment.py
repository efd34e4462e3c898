"""Experiment files: every cell composes, Hydra sweeps exactly the cells the file names, evaluation finds their runs."""

from __future__ import annotations

import itertools
import subprocess
import sys

import pytest
from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
from hydra.core.override_parser.overrides_parser import OverridesParser

from vla.cli import CONF, cell_of, choices, compose_config, multirun_first
from vla.errors import UserError
from vla.experiment import RUN, expand, policy_of_run, read
from vla.run_identity import run_dir


def cells(program: str, *arguments: str) -> list[list[str]]:
    """The jobs that Hydra's own sweeper makes of the expanded command line."""
    flags = {"-m"}
    words = [word for word in expand(program, list(arguments), CONF) if word not in flags]
    parsed = OverridesParser.create().parse_overrides(words)
    return [job for batch in BasicSweeper.split_arguments(parsed, max_batch_size=None) for job in batch]


FAST = ("idl_table3", "genvla_table4")  # one that is a product, one that is not


@pytest.mark.parametrize(
    "name", [n if n in FAST else pytest.param(n, marks=pytest.mark.slow) for n in choices("experiment")]
)
def test_every_cell_composes_and_is_another_run(name):
    """As a rehearsal, with the one override that makes it one."""
    size = "tiny"
    jobs = cells("train", "-m", f"experiment={name}", f"size={size}")
    blocks = [
        [v if isinstance(v, list) else [v] for key, v in block.items() if key != "size"]
        for block in read(name, CONF)["train"]
    ]
    assert len(jobs) == sum(len(list(itertools.product(*axes))) for axes in blocks)
    configs = [cell_of(compose_config("train", *job), "train") for job in jobs]
    assert all(cfg.size == size for cfg in configs)
    assert len({run_dir(cfg) for cfg in configs}) == len(jobs)
    evaluations = cells("evaluate", "-m", f"experiment={name}", f"size={size}")
    of_runs = {compose_config("evaluate", *job).policy for job in evaluations}
    assert len(of_runs) == len(jobs), "one evaluation or more per run"
    found = {run_dir(compose_config("train", *policy.removeprefix(RUN).split())) for policy in of_runs}
    assert found == {run_dir(cfg) for cfg in configs}


def test_command_line_replaces_what_the_file_says():
    jobs = cells("train", "-m", "experiment=idl_table6", "seed=7,8", "ablation=ptr", "optim.lr=1e-3")
    configs = [compose_config("train", *job) for job in jobs]
    assert [(c.seed, c.arm, c.optim.lr, c.benchmark.name) for c in configs] == [
        (7, "ptr", 1e-3, "calvin_abc_d"),
        (8, "ptr", 1e-3, "calvin_abc_d"),
    ]


def test_evaluation_divides_the_overrides():
    """max_steps and seed are of the runs, episodes of the evaluation, data.path of both."""
    arguments = ["experiment=idl_table6", "-m", "seed=1,2", "max_steps=30", "episodes=4", "data.path=d", "ablation=aux"]
    jobs = [compose_config("evaluate", *job) for job in cells("evaluate", *arguments)]
    assert [(job.episodes, job.data.path, job.evaluation.name) for job in jobs] == [(4, "d", "rollout")] * 2
    runs = [compose_config("train", *job.policy.removeprefix(RUN).split()) for job in jobs]
    assert [(r.seed, r.max_steps, r.data.path, r.arm) for r in runs] == [(1, 30, "d", "aux"), (2, 30, "d", "aux")]


def test_where_data_differ_they_are_the_evaluations():
    """IDL table 3 trains on LIBERO-90 and probes on four suites; what is for the runs alone says so."""
    arguments = [
        "experiment=idl_table3",
        "-m",
        "seed=1",
        "ablation=ptr",
        "data.path=d",
        "run.data.path=e",
        "run.max_steps=9",
    ]
    (job,) = cells("evaluate", *arguments)
    cfg = compose_config("evaluate", *job)
    run = compose_config("train", *cfg.policy.removeprefix(RUN).split())
    assert (cfg.benchmark.name, cfg.data.path) == ("libero_four", "d")
    assert (run.benchmark.name, run.data.path, run.max_steps, run.max_epochs) == ("libero_90", "e", 9, 1)


@pytest.mark.parametrize(
    ("words", "runs"),
    [
        ("baseline=openvla ablation=dual_string", ["openvla dual_string 0"]),
        ("ablation=plus", ["openvla plus 0", "pi0 plus 0"]),
        ("ablation=plus,dual seed=1,2", [f"{run} {seed}" for run in ("openvla dual", "openvla plus", "pi0 plus") for seed in "12"]),  # noqa: E501
        ("baseline=pi0 ablation=ptr", ["pi0 ptr 0"]),
        ("baseline=flower ablation=ptr", ["flower ptr 0", "flower ptr 0"]),
    ],
)  # fmt: skip
def test_a_key_on_which_blocks_differ_picks_among_them(words, runs):
    """GenVLA table II: seven arms of OpenVLA, two of π0, which alone has chunk=1."""
    for program in ("train", "evaluate"):
        found = []
        for job in cells(program, "-m", "experiment=genvla_table2", "size=tiny", *words.split()):
            cfg = compose_config(program, *job)
            if program == "evaluate":
                cfg = compose_config("train", *cfg.policy.removeprefix(RUN).split())
            cfg = cell_of(cfg, "train")
            assert cfg.policy.name != "pi0" or cfg.chunk == 1
            found.append(f"{cfg.policy.name} {cfg.arm} {cfg.seed}")
        assert sorted(found) == runs


def test_multirun_may_stand_anywhere():
    assert multirun_first(["seed=0,1", "-m", "size=tiny", "--cfg", "job"]) == [
        "-m",
        "seed=0,1",
        "size=tiny",
        "--cfg",
        "job",
    ]
    assert multirun_first(["seed=0"]) == ["seed=0"]


def test_lists_are_one_value():
    jobs = cells("evaluate", "-m", "experiment=idl_table6", "benchmark.tasks=[1,2]", "ablation=ptr", "seed=0")
    assert len(jobs) == 1
    cfg = compose_config("evaluate", *jobs[0])
    assert cfg.benchmark.tasks == [1, 2]
    assert compose_config("train", *cfg.policy.removeprefix(RUN).split()).benchmark.tasks == [1, 2]


def test_a_policy_given_is_the_only_one():
    jobs = cells("evaluate", "experiment=idl_table6", "-m", "policy=weights/x", "evaluation.workers=3")
    assert [job for job in jobs[0] if job.startswith("policy")] == ["policy=weights/x"] and len(jobs) == 1


def test_the_command_line_is_in_hydras_order(tmp_path):
    """Flags anywhere; each run that is missing is one line that says how to train it, and stops no other."""
    words = ["experiment=idl_table6", "size=tiny", "-m", "trainer=cpu", "seed=0", "episodes=2"]
    done = subprocess.run(
        [sys.executable, CONF.parent / "evaluate.py", *words], cwd=tmp_path, capture_output=True, text=True
    )
    assert done.returncode == 2
    told = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert told.pop() == "error: 3 of the sweep's runs ended with the errors above"
    for arm, line in zip(("vanilla", "aux", "ptr"), told, strict=True):
        assert f"-{arm}-" in line and "does not exist yet; train it: python train.py benchmark=calvin_abc_d" in line


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["experiment=idl_table9"], "experiment=idl_table9 does not exist; choose one of: genvla_fig3"),
        (["experiment=idl_table1"], "experiment=idl_table1 has 12 runs; add -m"),
    ],
)
def test_mistakes_end_as_one_line(arguments, message):
    with pytest.raises(UserError, match=message.replace(".", r"\.")):
        expand("train", arguments, CONF)


def test_a_run_that_was_not_trained_is_named(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=r"runs/flower-tiny-ptr-libero_goal-s3-\w+/policy does not exist yet; train it"):
        policy_of_run("run:baseline=flower ablation=ptr seed=3")


def test_how_a_rollout_is_run_does_not_name_the_run():
    plain = compose_config("train", "benchmark=calvin_abc_d")
    assert run_dir(plain) == run_dir(compose_config("train", "benchmark=calvin_abc_d", "benchmark.renderer=tiny"))
    assert run_dir(plain) != run_dir(compose_config("train", "benchmark=calvin_abc_d", "benchmark.resolution=100"))
