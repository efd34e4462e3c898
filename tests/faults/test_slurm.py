"""A real Slurm of one node: what a cluster does to a job, and that nothing is lost by it.

Each fault hits the same short run twice, submitted by hydra/launcher=slurm and by scripts/slurm/train.sbatch, and the
policy and the losses it ends with must be those of a run that nothing happened to, bit for bit. No checkpoint but the
signal's own is written, so that a run which goes on has gone on from that one.
"""

from __future__ import annotations

import csv
import getpass
import json
import subprocess
import sys
from pathlib import Path

import pytest

from data.store_writer import write_store
from tests.conftest import make_episodes
from tests.faults.slurm import DONE, ROOT, Cluster, Script, Sweep, lacking

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(lacking() is not None, reason=f"no Slurm: {lacking()}"),
]
ROUTES = [Sweep, Script]
STEPS = 120
TIMING = {"samples_per_s", "data_wait", "mfu"}


@pytest.fixture(scope="module")
def cluster():
    with Cluster() as started:
        yield started


@pytest.fixture(scope="module")
def words(tmp_path_factory) -> list[str]:
    """A run's overrides: seconds of work, a row of metrics.csv a step, and no checkpoint of its own accord."""
    path = tmp_path_factory.mktemp("data") / "store"
    write_store(make_episodes(), path, reader={"image_rotation": "rotate180"})
    small = ["batch_size=4", f"max_steps={STEPS}", "optim.warmup_steps=2", "trainer.log_every=1"]
    return [f"data.path={path}", *small, "trainer.precision=32-true", "trainer.checkpoint_every=100000"]


@pytest.fixture(scope="module")
def undisturbed(words, tmp_path_factory) -> Path:
    """The folder of the same run without Slurm."""
    folder = tmp_path_factory.mktemp("undisturbed")
    subprocess.run([sys.executable, ROOT / "train.py", *words], cwd=folder, check=True, capture_output=True)
    return next(folder.glob("runs/*"))


@pytest.fixture
def runs(cluster, words, tmp_path):
    """Makes the two jobs of a test; whatever is left of them in the end is cancelled."""
    jobs: list[Script] = []

    def submit(route: type[Script], options: list[str] = (), extra: list[str] = (), **environment: str) -> Script:
        environment = {"PAUSE_S": "0.5"} | environment
        job = route(cluster, "train", tmp_path / route.__name__, list(options), [*words, *extra], **environment)
        jobs.append(job)
        return job

    yield submit
    for job in jobs:
        job.end()
    cluster("scancel", f"--user={getpass.getuser()}", check=False)
    cluster.wait(lambda: not cluster("squeue", "--noheader"), 90)


def losses(run: Path) -> list[dict[str, str]]:
    """metrics.csv without what a clock measured."""
    with open(run / "metrics.csv", newline="") as file:
        return [{key: value for key, value in row.items() if key not in TIMING} for row in csv.DictReader(file)]


def check_as_undisturbed(job: Script, undisturbed: Path) -> None:
    (run,) = (job.folder / "runs").iterdir()
    assert run.name == undisturbed.name
    assert losses(run) == losses(undisturbed)
    assert weights(run) == weights(undisturbed)


def weights(run: Path) -> bytes:
    return (run / "policy" / "model.safetensors").read_bytes()


def checkpoints(job: Script) -> list[str]:
    return [path.parent.name for path in job.folder.glob("runs/*/checkpoints/step=*/manifest.json")]


def test_undisturbed_run_is_one_of_steps(undisturbed):
    assert len(losses(undisturbed)) == STEPS and len({row["loss"] for row in losses(undisturbed)}) > STEPS // 2


def test_multirun_is_an_array_of_two_jobs(runs, cluster, undisturbed):
    sweep = runs(Sweep, extra=["seed=0,1"], PAUSE_S="0")
    code, output = sweep.told_within(180)
    assert code == 0, output
    assert {path.name for path in (sweep.folder / ".submitit").glob("[0-9]*_*")} == {
        f"{sweep.number}_{n}" for n in (0, 1)
    }
    first, second = sorted((sweep.folder / "runs").iterdir(), key=lambda run: "-s1-" in run.name)
    assert losses(first) == losses(undisturbed) != losses(second)
    assert (second / "policy" / "config.json").exists()


def test_bad_run_of_a_sweep_fails_for_slurm_too(runs, cluster):
    """The other one is done all the same; the line is where the sweep waits and in the job's log."""
    sweep = runs(Sweep, extra=["batch_size=4,0", "max_steps=2"], PAUSE_S="0")
    code, output = sweep.told_within(180)
    line = "error: max_steps=2 and batch_size=0 must both be at least 1"
    assert code == 2 and line in output and "Traceback" not in output, output
    assert line in sweep.log()
    numbers = [f"{sweep.number}_{index}" for index in (0, 1)]
    cluster.wait(lambda: all(cluster.job(number)["JobState"] in DONE for number in numbers), 60)
    ends = [(job["JobState"], job["ExitCode"]) for job in map(cluster.job, numbers)]
    assert ends == [("COMPLETED", "0:0"), ("FAILED", "2:0")]
    assert len(list(sweep.folder.glob("runs/*/policy/config.json"))) == 1


def test_time_out(runs, cluster, undisturbed):
    """Of two minutes. Slurm looks every 30 s and gives the signal at the look before the last: after 90 to 120 s."""
    slow = {"PAUSE_S": "1"}
    jobs = [
        runs(Sweep, ["hydra.launcher.timeout_min=2", "hydra.launcher.signal_delay_s=1"], **slow),
        runs(Script, ["--time=2", "--signal=B:USR1@1"], **slow),
    ]
    cluster.wait(lambda: all(job.ended() for job in jobs), 400)
    for job in jobs:
        assert job.state() == "COMPLETED", job.log()
        assert int(cluster.job(job.number)["Restarts"]) >= 1
        assert "stopped by SIGUSR" in job.log()
        check_as_undisturbed(job, undisturbed)
    assert jobs[0].told_within(60)[0] == 0


@pytest.mark.parametrize("partition", ["low", "abrupt"])
def test_preemption(runs, cluster, undisturbed, partition):
    """By a job of a partition with more priority that wants the whole node: after a grace of 30 s, and without one."""
    jobs = [runs(Sweep, [f"hydra.launcher.partition={partition}"]), runs(Script, [f"--partition={partition}"])]
    cluster.wait(lambda: all(job.rows() > 3 for job in jobs), 120)
    urgent = cluster("sbatch", "--parsable", "--partition=high", "--exclusive", "--output=/dev/null", "--wrap=true")
    cluster.wait(lambda: cluster.job(urgent.strip())["JobState"] == "COMPLETED", 90)
    assert all(checkpoints(job) and job.rows() < STEPS for job in jobs)
    cluster.wait(lambda: all(job.ended() for job in jobs), 180)
    for job in jobs:
        assert (job.state(), cluster.job(job.number)["Restarts"]) == ("COMPLETED", "1"), job.log()
        check_as_undisturbed(job, undisturbed)
    assert jobs[0].told_within(60)[0] == 0


def test_sigterm_alone(runs, cluster, undisturbed):
    """To the batch shell only; and to the steps of submitit's job, which has no requeueing for it."""
    jobs = [runs(route) for route in ROUTES]
    cluster.wait(lambda: all(job.rows() > 3 for job in jobs), 120)
    for job in jobs:
        job.signal("TERM")
    cluster.wait(lambda: all(job.ended() for job in jobs), 180)
    for job in jobs:
        assert (job.state(), cluster.job(job.number)["Restarts"]) == ("COMPLETED", "1"), job.log()
        check_as_undisturbed(job, undisturbed)
    assert jobs[0].told_within(60)[0] == 0


def test_two_processes(runs, cluster):
    """A task each, of one job; both are told, agree on a step, and the first one puts the job back."""
    words = ["trainer=ddp", "trainer.accelerator=cpu", "trainer.devices=2", "trainer.num_workers=0", "max_steps=40"]
    words += ["trainer.precision=32-true"]
    jobs = [runs(Sweep, ["hydra.launcher.tasks_per_node=2"], words), runs(Script, ["--ntasks-per-node=2"], words)]
    cluster.wait(lambda: all(job.rows() > 3 for job in jobs), 180)
    for job, name in zip(jobs, ("USR2", "USR1"), strict=True):
        job.signal(name)
    cluster.wait(lambda: all(job.ended() for job in jobs), 240)
    for job in jobs:
        assert (job.state(), restarts(cluster, job)) == ("COMPLETED", 1), job.log()
    first, second = (next(job.folder.glob("runs/*")) for job in jobs)
    assert losses(first) == losses(second) and len(losses(first)) == 40
    assert weights(first) == weights(second)
    assert jobs[0].told_within(60)[0] == 0


def test_cancelled_job_stays_cancelled(runs, cluster):
    """Its SIGTERM is a preemption's too; taken for one, a job could not be got rid of."""
    jobs = [runs(route) for route in ROUTES]
    cluster.wait(lambda: all(job.rows() > 3 for job in jobs), 120)
    for job in jobs:
        cluster("scancel", job.number)
    cluster.wait(lambda: all(job.ended() for job in jobs), 90)
    for job in jobs:
        assert (job.state(), cluster.job(job.number)["Restarts"]) == ("CANCELLED", "0"), job.log()
        assert checkpoints(job)


def test_without_scontrol(runs, cluster, tmp_path):
    """As in a container: the checkpoint is kept, the job says what is wrong and fails."""
    environment = cluster.without("scontrol", tmp_path / "programs")
    jobs = [runs(route, PATH=environment["PATH"]) for route in ROUTES]
    cluster.wait(lambda: all(job.rows() > 3 for job in jobs), 120)
    for job, name in zip(jobs, ("USR2", "USR1"), strict=True):
        job.signal(name)
    cluster.wait(lambda: all(job.ended() for job in jobs), 90)
    for job, code in zip(jobs, ("2:0", "75:0"), strict=True):
        assert (job.state(), cluster.job(job.number)["ExitCode"]) == ("FAILED", code), job.log()
        assert "error: scontrol is not on PATH" in job.log() and "resume=auto" in job.log()
        assert checkpoints(job)
    code, output = jobs[0].told_within(60)
    assert code == 2 and "error: scontrol is not on PATH" in output, output


def test_requeueing_is_bounded(runs, cluster):
    """Put back once as allowed, then the job fails; the checkpoints are kept."""
    slow = {"PAUSE_LIVES": "2"}
    # With ten minutes or less submitit takes every SIGUSR2 for a time-out's.
    limits = ["hydra.launcher.max_num_timeout=1", "hydra.launcher.timeout_min=5", "hydra.launcher.signal_delay_s=10"]
    jobs = [runs(Sweep, limits, **slow), runs(Script, MAX_REQUEUES="1", **slow)]
    for times, names in enumerate((("USR2", "USR1"), ("USR2", "USR1"))):
        for job, name in zip(jobs, names, strict=True):
            cluster.wait(lambda job=job, times=times: job.state() == "RUNNING" and restarts(cluster, job) == times, 240)
            lines = job.log().count("stopped by")
            before = job.rows()
            cluster.wait(lambda job=job, before=before: job.rows() > before, 240)
            job.signal(name)
            cluster.wait(lambda job=job, lines=lines: job.log().count("stopped by") > lines, 240)
    cluster.wait(lambda: all(job.ended() for job in jobs), 240)
    for job in jobs:
        assert (job.state(), restarts(cluster, job)) == ("FAILED", 1), job.log()
        assert checkpoints(job)
    assert "MAX_REQUEUES allows no more" in jobs[1].log()
    code, output = jobs[0].told_within(60)
    assert code == 2 and "timed-out too many times" in output and "Traceback" not in output, output


EVALUATION = ["policy=nothing", "benchmark=libero_goal", "evaluation.workers=1"]


def test_evaluation_in_an_array_of_two(cluster, tmp_path):
    """One of the two is put back on the way; the merged records are those of one job without Slurm."""
    environment = {"JOURNAL": str(tmp_path / "journal"), "PAUSE_S": "0"}
    one = [sys.executable, ROOT / "evaluate.py", *EVALUATION]
    subprocess.run(one, cwd=tmp_path, env=cluster.environment | environment, check=True, capture_output=True)
    environment["PAUSE_S"] = "0.2"
    jobs = [
        Sweep(cluster, "evaluate", tmp_path / "sweep", [], [*EVALUATION, "shard=0,1", "shards=2"], **environment),
        Script(cluster, "evaluate", tmp_path / "script", ["--array=0-1"], EVALUATION, **environment),
    ]
    elements = [f"{job.number}_{index}" for job in jobs for index in (0, 1)]
    try:
        for job, name in zip(jobs, ("USR2", "USR1"), strict=True):
            cluster.wait(lambda job=job: any(job.folder.glob("results/*/*/shards/0-of-2/shard.jsonl")), 240)
            job.signal(name, "_0")
        cluster.wait(lambda: all(cluster.job(element)["JobState"] in DONE for element in elements), 300)
        assert jobs[0].told_within(60)[0] == 0
    finally:
        jobs[0].end()
        cluster("scancel", *elements, check=False)
    ends = [(cluster.job(element)["JobState"], cluster.job(element)["Restarts"]) for element in elements]
    assert ends == [("COMPLETED", "1"), ("COMPLETED", "0")] * 2
    expected = records(tmp_path)
    assert len(expected) == 8 and all(records(job.folder) == expected for job in jobs)


def records(folder: Path) -> list[dict]:
    """The episodes of the one evaluation in results/, without what a clock measured."""
    (file,) = folder.glob("results/*/*/episodes.jsonl")
    assert not (file.parent / "shards").exists()
    return [json.loads(line) | {"seconds": None} for line in file.read_text().splitlines()]


def restarts(cluster: Cluster, job: Script) -> int:
    return int(cluster.job(job.number)["Restarts"])
