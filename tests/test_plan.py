"""`dry_run=true`: what a command would run."""

from __future__ import annotations

import subprocess
import sys

import pytest

from vla import plan
from vla.cli import CONF, cell_of, choices, compose_config
from vla.experiment import expand
from vla.run_identity import run_dir


def configs(program: str, *words: str) -> list:
    cells = plan.jobs(expand(program, list(words), CONF))
    return [cell_of(compose_config(program, *cell), program) for cell in cells]


FAST = ("idl_table3", "genvla_table4")


@pytest.mark.parametrize(
    "name", [n if n in FAST else pytest.param(n, marks=pytest.mark.slow) for n in choices("experiment")]
)
def test_every_table_is_planned(name):
    """As a rehearsal; the full size differs in the numbers only."""
    runs = configs("train", f"experiment={name}", "size=tiny", plan.DRY_RUN)
    assert plan.training(runs).row_count == len(runs)
    policies = configs("evaluate", f"experiment={name}", "size=tiny", plan.DRY_RUN)
    table = plan.evaluation(policies)
    assert table.row_count == len(policies) >= len(runs)
    assert f"{len(policies)} policies are not trained yet" in table.caption


def test_gpu_hours_and_disk_by_hand():
    """OpenVLA full: 7.498 B parameters (fact sheet §6), ten epochs at batch 256, Adam, two checkpoints."""
    (cfg,) = configs("train", "baseline=openvla", "size=full", "benchmark=simpler_google_vm")
    assert plan.parameters("openvla", "full", False, "native", False)[1] == pytest.approx(7.498e9, rel=1e-3)
    flops = 6 * 7.498157728e9 * 300 * 147900 * 256
    assert plan.gpu_hours(cfg) == pytest.approx(flops / (0.4 * 989e12 * 3600), rel=1e-6)
    assert plan.gigabytes(cfg) == pytest.approx((2 * 12 + 4) * 7.498157728, rel=1e-6)


def test_a_frozen_encoder_is_held_and_not_trained():
    held, trained = plan.parameters("openvla", "full", True, "native", False)
    assert held == 7498157728 and 3.9e8 < held - trained < 4.0e8  # SigLIP without its last block and head: 0.397 B


def test_what_is_finished_is_not_counted(tmp_path):
    runs = configs("train", "-m", "seed=0,1,2", f"run_root={tmp_path}", plan.DRY_RUN)
    (run_dir(runs[0]) / "policy").mkdir(parents=True)
    (run_dir(runs[0]) / "policy" / "config.json").write_text("{}")
    (run_dir(runs[1]) / "checkpoints").mkdir(parents=True)
    for step in (500, 1000):
        (run_dir(runs[1]) / "checkpoints" / f"step={step}").mkdir()
    assert [plan.state_of(run_dir(cfg)) for cfg in runs] == ["finished", "unfinished, step 1000", "to run"]
    assert plan.training(runs).caption.startswith("2 to run: about 0 GPU hours")


@pytest.mark.slow
def test_the_command_runs_nothing(tmp_path):
    def run(script: str, *words: str) -> subprocess.CompletedProcess:
        command = [sys.executable, str(CONF.parent / script), *words, plan.DRY_RUN]
        return subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)

    done = run("train.py", "-m", "baseline=openvla", "ablation=vanilla,plus")
    assert done.returncode == 0 and "2 runs" in done.stdout and "openvla-tiny-plus-libero_goal-s0-" in done.stdout
    refused = run("scripts/collect.py")
    assert refused.returncode == 2 and "dry_run is of train.py and evaluate.py" in refused.stderr
    assert list(tmp_path.iterdir()) == []
