"""A Slurm of one node for test_slurm.py, and the two ways of giving it a training run."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
SETUP = ROOT / "scripts" / "setup_slurm.sh"
DAEMONS = ("munged", "slurmctld", "slurmd", "sbatch")
DONE = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "PREEMPTED", "NODE_FAIL")


def lacking() -> str | None:
    """Why there can be no Slurm here, if so."""
    path = os.pathsep.join([os.environ.get("PATH", ""), "/usr/sbin"])
    missing = [name for name in DAEMONS if shutil.which(name, path=path) is None]
    return f"{', '.join(missing)} not installed; scripts/setup_slurm.sh install" if missing else None


SETTLED_S = 5


class Cluster:
    """Daemons of its own, in a folder of its own; used as a context manager, which ends all of them."""

    def __enter__(self) -> Cluster:
        self.folder = Path(tempfile.mkdtemp(prefix="slurm-", dir="/tmp"))  # short: a socket's path has 108 characters
        outside = {key: value for key, value in os.environ.items() if not key.startswith(("SLURM", "SBATCH", "SRUN"))}
        self.environment = outside | {
            "SLURM_CONF": str(self.folder / "slurm.conf"),
            "PATH": os.pathsep.join([os.environ["PATH"], "/usr/sbin"]),
            "PYTHONPATH": os.pathsep.join([str(Path(__file__).parent / "pause"), str(ROOT)]),
            "PYTHON": sys.executable,
            "PROJECT": str(ROOT),
            "OMP_NUM_THREADS": "1",
        }
        started = subprocess.run(
            [SETUP, "start", self.folder], env=self.environment | {"PORT": str(free_ports())}, capture_output=True
        )
        assert started.returncode == 0, started.stderr.decode()
        return self

    def __exit__(self, *_: object) -> None:
        subprocess.run([SETUP, "stop", self.folder], env=self.environment, check=True, capture_output=True)
        shutil.rmtree(self.folder)

    def __call__(self, *command: str, check: bool = True) -> str:
        done = subprocess.run(command, env=self.environment, capture_output=True, text=True, timeout=60)
        assert done.returncode == 0 or not check, f"{command}: {done.stderr}"
        return done.stdout

    def job(self, number: str) -> dict[str, str]:
        """scontrol's fields of a job: JobState, Restarts, ExitCode, …"""
        words = self("scontrol", "show", "job", "--oneliner", number).split()
        return dict(word.split("=", 1) for word in words if "=" in word)

    def wait(self, what: Callable[[], object], seconds: float) -> None:
        """Until `what()`. A job that was put back would wait two minutes; here it starts after SETTLED_S.

        Not at once: Slurm may take what its first life ended with for the end of the second.
        """
        end, since = time.monotonic() + seconds, {}
        while not what():
            for line in self("squeue", "--noheader", "--format=%A %T %r").splitlines():
                number = line.split()[0]
                if not line.endswith("PENDING BeginTime"):
                    since.pop(number, None)
                elif time.monotonic() > since.setdefault(number, time.monotonic()) + SETTLED_S:
                    self("scontrol", "update", f"JobId={number}", "StartTime=now", check=False)
            assert time.monotonic() < end, f"not within {seconds:.0f} s:\n" + self("scontrol", "show", "job")
            time.sleep(0.5)

    def without(self, command: str, folder: Path) -> dict[str, str]:
        """The environment in which one command is not to be found."""
        folder.mkdir()
        for place in reversed(self.environment["PATH"].split(os.pathsep)):
            for program in Path(place).iterdir() if Path(place).is_dir() else ():
                link = folder / program.name
                if program.name != command:
                    link.unlink(missing_ok=True)
                    link.symlink_to(program)
        return self.environment | {"PATH": str(folder)}


def free_ports() -> int:
    """The first of two ports beside each other that nobody listens on."""
    for port in range(26817, 28817, 2):
        with socket.socket() as one, socket.socket() as two:
            try:
                one.bind(("", port))
                two.bind(("", port + 1))
            except OSError:
                continue
            return port
    raise RuntimeError("no two free ports")


class Script:
    """Work given to scripts/slurm/*.sbatch. Its signals go to the batch shell only, as B: has it."""

    def __init__(
        self, cluster: Cluster, program: str, folder: Path, options: list[str], words: list[str], **environment: str
    ):
        self.cluster, self.folder = cluster, folder
        folder.mkdir()
        script = ROOT / "scripts" / "slurm" / f"{program}.sbatch"
        done = subprocess.run(
            ["sbatch", "--parsable", "--output=log", *options, script, *words],
            cwd=folder,
            env=cluster.environment | environment,
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stderr
        self.number = done.stdout.strip()

    def signal(self, name: str, element: str = "") -> None:
        """To the job, or to an element ("_0") of the array."""
        self.cluster("scancel", "--batch", f"--signal={name}", self.number + element)

    def log(self) -> str:
        return (self.folder / "log").read_text() if (self.folder / "log").exists() else ""

    def state(self) -> str:
        return self.cluster.job(self.number)["JobState"]

    def ended(self) -> bool:
        return self.state() in DONE

    def end(self) -> None:
        """Nothing is left outside Slurm."""

    def rows(self) -> int:
        """Steps in metrics.csv."""
        files = list(self.folder.glob("runs/*/metrics.csv"))
        return len(files[0].read_text().splitlines()) - 1 if files else 0


class Sweep(Script):
    """Work given to hydra/launcher=slurm. Its signals go to the job's steps, as submitit has it."""

    def __init__(
        self, cluster: Cluster, program: str, folder: Path, options: list[str], words: list[str], **environment: str
    ):
        self.cluster, self.folder = cluster, folder
        folder.mkdir()
        small = ["hydra.launcher.mem_gb=1", "hydra.launcher.cpus_per_task=1"]
        self.waiting = subprocess.Popen(
            [sys.executable, ROOT / f"{program}.py", "-m", "hydra/launcher=slurm", *small, *options, *words],
            cwd=folder,
            env=cluster.environment | environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        cluster.wait(lambda: self.submitted() or self.waiting.poll() is not None, 60)
        assert self.submitted(), self.waiting.communicate()[0]
        self.number = self.submitted()[0].name.removesuffix("_submission.sh")

    def submitted(self) -> list[Path]:
        return list(self.folder.glob(".submitit/*/*_submission.sh"))

    def signal(self, name: str, element: str = "") -> None:
        self.cluster("scancel", f"--signal={name}", self.number + element)

    def log(self) -> str:
        return "".join(path.read_text() for path in sorted(self.folder.glob(".submitit/*/*_log.*")))

    def end(self) -> None:
        if self.waiting.poll() is None:
            self.waiting.send_signal(signal.SIGINT)
        self.waiting.communicate()

    def told_within(self, seconds: float) -> tuple[int, str]:
        """How the command that waits for the job ended, and what it said."""
        output, _ = self.waiting.communicate(timeout=seconds)
        return self.waiting.returncode, output
