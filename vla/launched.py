"""What differs when a job of a cluster does the work instead of the process that was asked for it (docs/cluster.md).

A sweep with hydra/launcher=slurm hands each run to a Slurm job, waits, and gets back what the runs returned or raised.
"""

from __future__ import annotations

import atexit
import contextlib
import os
import shutil
import subprocess
import sys
import traceback
from collections.abc import Iterator
from pathlib import Path

from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode

from vla.errors import UserError
from vla.interruption import AGAIN

ROOT = Path(__file__).resolve().parent.parent


def requeued() -> bool:
    """Whether Slurm has started this very job before: it was preempted, out of time, or its node failed."""
    return int(os.environ.get("SLURM_RESTART_COUNT") or 0) > 0


def before_launch(words: list[str]) -> None:
    """Of a command line that Slurm's jobs will do: see that Slurm is there, tell them where the project is.

    Raises:
        UserError: this machine cannot submit jobs.
    """
    if "hydra/launcher=slurm" not in words:
        return
    if lacking := [command for command in ("sbatch", "srun") if shutil.which(command) is None]:
        raise UserError(f"hydra/launcher=slurm needs {' and '.join(lacking)} on PATH; run it on a login node")
    paths = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    os.environ["PYTHONPATH"] = os.pathsep.join(paths)  # jobs inherit it; they do not start in the project's folder
    print("jobs: squeue --me; their logs: .submitit/; this command waits for them, without it they go on", flush=True)


def in_own_job() -> bool:
    """Whether this process runs one run of a sweep for a launcher that waits elsewhere."""
    job = HydraConfig.get()
    return job.mode == RunMode.MULTIRUN and not job.launcher._target_.endswith("BasicLauncher")


@contextlib.contextmanager
def as_job() -> Iterator[None]:
    """A failure in here is also written to the job's log and makes the job's exit code, 2 for bad input, else 1.

    Hydra would hand the exception to the waiting sweep only and end the job as if all were well: nobody would know of
    it once the sweep's terminal is closed, and Slurm would start what depends on the job.
    """
    codes: list[int] = []
    atexit.register(_leave, codes)  # registered first, so run last: after the result is on disk and loggers are closed
    try:
        with put_back():
            yield
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        codes.append(2)
        raise
    except Exception:
        traceback.print_exc()
        codes.append(1)
        raise


def _leave(codes: list[int]) -> None:
    if codes:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(codes[0])


@contextlib.contextmanager
def put_back() -> Iterator[None]:
    """What submitit lacks in putting a job back that was told to stop.

    It does so at SIGUSR2 only, where a preemption may come as SIGTERM alone. Where Slurm is putting the job back itself
    its own attempt fails; and its signal handler leaves by an exception that whatever it interrupts, such as an import,
    may turn into another: either would end the job for the sweep that waits.

    Raises:
        UserError: scontrol is missing, as in some containers, or the job was put back too often.
    """
    from submitit.core.utils import UncompletedJobError

    try:
        yield
    except SystemExit as left:
        if left.code == AGAIN and wanted():
            requeue()
        raise
    except UserError:
        raise
    except UncompletedJobError as error:
        raise UserError(
            f"{error} What was finished is kept; start the sweep again with resume=auto (and, if this is too soon, a "
            "larger hydra.launcher.max_num_timeout)"
        ) from error
    except Exception as error:
        if isinstance(error, FileNotFoundError) and error.filename == "scontrol":
            requeue()  # says what is wrong
        if wanted():
            raise
        traceback.print_exc()
        sys.exit(AGAIN)


def wanted() -> bool:
    """Whether Slurm means this job to run: not where it is ending it, as cancelled, or preempted and then put back."""
    if shutil.which("scontrol") is None or "SLURM_JOB_ID" not in os.environ:
        return True
    job = ["scontrol", "show", "job", "--oneliner", os.environ["SLURM_JOB_ID"]]
    return "JobState=RUNNING" in subprocess.run(job, capture_output=True, text=True).stdout


def requeue() -> None:
    """Put this job back into Slurm's queue.

    Raises:
        UserError: scontrol is missing.
    """
    if shutil.which("scontrol") is None:
        raise UserError(
            "scontrol is not on PATH, so this job cannot put itself back into the queue; what was finished is kept; "
            "start the sweep again with resume=auto"
        )
    subprocess.run(["scontrol", "requeue", os.environ["SLURM_JOB_ID"]], check=True)
