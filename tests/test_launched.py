"""Jobs of a cluster without the cluster: how they start and how they end. With one: tests/faults/test_slurm.py."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from hydra import compose, initialize_config_dir

from train import newest_checkpoint
from vla import launched
from vla.cli import CONF, compose_config
from vla.config import register
from vla.errors import UserError

ROOT = CONF.parent
SCRIPTS = ROOT / "scripts" / "slurm"


def test_launcher_composes_into_what_the_plugin_knows():
    """Requeueing is on, whatever the plugin's defaults are; the plugin's schema refuses an unknown key."""
    register()
    with initialize_config_dir(str(CONF), version_base="1.3"):
        words = ["hydra/launcher=slurm", "hydra.launcher.partition=gpu", "hydra.launcher.gpus_per_node=1"]
        launcher = compose("train", overrides=words, return_hydra_config=True).hydra.launcher
        with pytest.raises(Exception, match="Could not override"):
            compose("train", overrides=["hydra/launcher=slurm", "hydra.launcher.gpu=1"], return_hydra_config=True)
    assert launcher._target_.endswith("SlurmLauncher")
    assert (launcher.partition, launcher.gpus_per_node) == ("gpu", 1)
    assert launcher.max_num_timeout >= 10 and launcher.additional_parameters.requeue and launcher.signal_delay_s >= 60


def test_sweep_needs_slurm(tmp_path):
    done = subprocess.run(
        [sys.executable, ROOT / "train.py", "-m", "hydra/launcher=slurm", "seed=0,1"],
        cwd=tmp_path,
        env=os.environ | {"PATH": str(tmp_path)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 2 and done.stderr.startswith("error: hydra/launcher=slurm needs sbatch and srun on PATH")
    assert done.stderr.count("\n") == 1 and not list(tmp_path.iterdir())


@pytest.mark.parametrize("resume", [None, "never"])
def test_requeued_job_resumes(resume, tmp_path, monkeypatch):
    """`resume=never` is meant for the first start; taken again, a job would never get past its time limit."""
    asked = []
    monkeypatch.setattr("vla.saving.newest_checkpoint", lambda resume, run: asked.append(resume) or (None, set()))
    cfg = compose_config("train", *([f"resume={resume}"] if resume else []))
    for count in ("", "0", "1"):
        monkeypatch.setenv("SLURM_RESTART_COUNT", count)
        newest_checkpoint(cfg, tmp_path)
    assert asked == [resume, resume, "auto"]


def scontrol(folder: Path, state: str) -> None:
    """A scontrol that shows every job in `state` and notes in `folder` what else it is asked."""
    file = folder / "scontrol"
    file.write_text(f'#!/bin/sh\nif [ "$1" = show ]; then echo JobState={state}; else echo "$@" >>{folder}/asked; fi\n')
    file.chmod(0o755)


def asked(folder: Path) -> list[str]:
    return (folder / "asked").read_text().splitlines() if (folder / "asked").exists() else []


@pytest.mark.parametrize(("state", "put_back"), [("RUNNING", ["requeue 7"]), ("COMPLETING", [])])
def test_submitit_job_stopped_without_requeueing(state, put_back, tmp_path, monkeypatch):
    """As by SIGTERM in a preemption's grace; a job that is being cancelled must not come back."""
    scontrol(tmp_path, state)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    with pytest.raises(SystemExit) as left, launched.put_back():
        sys.exit(launched.AGAIN)
    assert left.value.code == launched.AGAIN and asked(tmp_path) == put_back


@pytest.mark.parametrize(("state", "expected"), [("PENDING", SystemExit), ("RUNNING", ArithmeticError)])
def test_failure_of_a_job_that_slurm_puts_back(state, expected, tmp_path, monkeypatch):
    """It is the signal's work, and no result of the run, which is started again; at any other time it is an error."""
    scontrol(tmp_path, state)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    with pytest.raises(expected), launched.put_back():
        raise ArithmeticError("an import that was interrupted")


@pytest.mark.parametrize("stopped", [lambda: sys.exit(launched.AGAIN), lambda: subprocess.check_call(["scontrol"])])
def test_missing_scontrol_is_one_line(stopped, tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(UserError, match=r"scontrol is not on PATH.*resume=auto"), launched.put_back():
        stopped()


STUBBORN = """
import signal, sys, time
signal.signal(signal.SIGUSR1, lambda *_: sys.exit({code}))
print("ready", flush=True)
time.sleep(60)
"""


def requeueing(folder: Path, program: str, told: signal.Signals | None, **environment: str) -> subprocess.Popen:
    """scripts/slurm/requeue.sh around a Python program, told to stop once that is ready."""
    command = f"source {SCRIPTS}/requeue.sh; requeueing {sys.executable} -c '{program}'"
    paths = {"PATH": f"{folder}{os.pathsep}{os.environ['PATH']}", "SLURM_JOB_ID": "7"}
    process = subprocess.Popen(
        ["bash", "-c", command],
        env=os.environ | paths | environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    assert process.stdout.readline() == "ready\n"
    if told is not None:
        process.send_signal(told)
    return process


def end_of(process: subprocess.Popen) -> tuple[int, str]:
    output, _ = process.communicate(timeout=30)
    return process.returncode, output


def test_script_passes_the_signal_on_and_requeues(tmp_path):
    scontrol(tmp_path, "RUNNING")
    code, output = end_of(requeueing(tmp_path, STUBBORN.format(code=75), signal.SIGUSR1))
    assert code == 75 and asked(tmp_path) == ["requeue 7"] and "put back into the queue, time 1" in output


def test_script_requeues_what_its_signal_killed(tmp_path):
    """Before Python could take it, or in the middle of an import, where it comes out as some error."""
    scontrol(tmp_path, "RUNNING")
    for told, code in ((signal.SIGUSR2, 75), (signal.SIGUSR1, 1)):
        ended, _ = end_of(requeueing(tmp_path, STUBBORN.format(code=code), told))
        assert ended == 75 and asked(tmp_path).pop() == "requeue 7"
    assert len(asked(tmp_path)) == 2


def test_script_keeps_other_exit_codes(tmp_path):
    """Bad input stays bad input, and a death that nobody ordered is an error."""
    scontrol(tmp_path, "RUNNING")
    assert end_of(requeueing(tmp_path, STUBBORN.format(code=2), signal.SIGUSR1))[0] == 2
    crash = 'import os; print("ready", flush=True); os.kill(os.getpid(), 10)'
    assert end_of(requeueing(tmp_path, crash, None))[0] == 128 + 10
    assert asked(tmp_path) == []


@pytest.mark.parametrize(
    ("state", "restarts", "says"),
    [("COMPLETING", "0", "because Slurm is ending it"), ("RUNNING", "3", "MAX_REQUEUES allows no more")],
)
def test_script_does_not_requeue(state, restarts, says, tmp_path):
    scontrol(tmp_path, state)
    limits = {"SLURM_RESTART_COUNT": restarts, "MAX_REQUEUES": "3"}
    code, output = end_of(requeueing(tmp_path, STUBBORN.format(code=75), signal.SIGUSR1, **limits))
    assert code == 75 and asked(tmp_path) == [] and says in output


def test_two_signals_at_once(tmp_path):
    """`wait` ends early twice; the child's own code counts."""
    scontrol(tmp_path, "RUNNING")
    slow = STUBBORN.format(code=75).replace("sys.exit(75)", "(time.sleep(1), sys.exit(75))")
    process = requeueing(tmp_path, slow, signal.SIGUSR1)
    time.sleep(0.3)
    process.send_signal(signal.SIGUSR1)
    assert end_of(process)[0] == 75 and asked(tmp_path) == ["requeue 7"]


@pytest.mark.parametrize("script", [*sorted(path.name for path in SCRIPTS.iterdir()), "../setup_slurm.sh"])
def test_scripts_are_valid_bash(script):
    subprocess.run(["bash", "-n", SCRIPTS / script], check=True)
