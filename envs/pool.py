"""The worker processes of a rollout: start them, hand them episodes, hear from them, end them.

A worker is spoken to over two pipes of its own (protocol: envs/worker.py). Whatever happens to it, dying, hanging or
raising, comes out of `wait` as an answer, so that the caller has one kind of event to handle.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from multiprocessing import connection
from pathlib import Path
from typing import Any

from envs.records import Key
from vla.errors import UserError


@dataclass(frozen=True)
class EpisodeSpec:
    """One episode to run; (benchmark, task, seed) is its identity."""

    benchmark: str
    task: str
    seed: int
    kwargs: dict[str, Any] = field(default_factory=dict)
    """Arguments of the environment factory that select the task, beside the run's own `env_kwargs`."""

    @property
    def key(self) -> Key:
        return Key(self.benchmark, self.task, self.seed)


class Worker:
    """A running envs/worker.py and the episode it has; its process group dies with `kill`."""

    def __init__(self, python: str, log: Path) -> None:
        root = str(Path(__file__).resolve().parents[1])
        path = os.pathsep.join(filter(None, [root, os.environ.get("PYTHONPATH")]))
        # One core a simulator: dozens of workers with a thread pool each would fight over the machine.
        environment = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1", "LP_NUM_THREADS": "1"}
        jobs, jobs_write = os.pipe()
        answers, answers_write = os.pipe()
        self.log, self.jobs, self.answers = log, os.fdopen(jobs_write, "w"), os.fdopen(answers, "rb", buffering=0)
        self.spec: EpisodeSpec | None = None
        self.kwargs: dict[str, Any] | None = None
        self.deadline = 0.0
        self._received = b""
        try:
            with log.open("ab") as output:
                self._log_start = output.tell()
                self.process = subprocess.Popen(
                    [python, "-m", "envs.worker", str(jobs), str(answers_write)],
                    stdin=subprocess.DEVNULL, stdout=output, stderr=subprocess.STDOUT, env=environment,
                    pass_fds=(jobs, answers_write), start_new_session=True,
                )  # fmt: skip
        except OSError as error:
            raise UserError(
                f"cannot start the workers' interpreter {python}: {error}; set python to an interpreter"
            ) from error
        finally:
            os.close(jobs)
            os.close(answers_write)

    def prepare(self, factory: str, kwargs: dict[str, Any], arguments: dict[str, Any]) -> None:
        """Build an environment before there is a policy to connect to; `kwargs` are of an episode of its task."""
        self.kwargs = kwargs
        self._send({"factory": factory, "kwargs": arguments})

    def connect(self, setup: dict[str, Any], log: Path) -> None:
        """To the policy; from now on its output goes to `log`, and what there is of it already too."""
        if log != self.log:
            with log.open("ab") as file:
                self._log_start = file.tell()
                file.write(self.log.read_bytes())
            self.log = log
            setup = setup | {"log": str(log)}
        self._send(setup)

    def start(self, spec: EpisodeSpec, job: dict[str, Any], timeout_s: float) -> None:
        self.spec, self.kwargs, self.deadline = spec, spec.kwargs, time.monotonic() + timeout_s
        self._send(job)

    def _send(self, message: dict[str, Any]) -> None:
        with contextlib.suppress(BrokenPipeError):  # it has died, which `_answers` reports
            self.jobs.write(json.dumps(message) + "\n")
            self.jobs.flush()

    def read(self) -> dict[str, Any] | None:
        """The answer once it has arrived whole."""
        self._received += self.answers.read(65536)
        line, newline, rest = self._received.partition(b"\n")
        if not newline:
            return None
        self._received = rest
        return json.loads(line)

    def obituary(self) -> str:
        code = self.process.returncode
        how = f"was killed by {signal.Signals(-code).name}" if code < 0 else f"exited with status {code}"
        lines = self.log.read_bytes()[self._log_start :].decode(errors="replace").split("\n")
        last = next((line.strip() for line in reversed(lines) if line.strip()), "")
        return f"the worker {how}" + (f", its last words: {last[-200:]}" if last else "")

    def kill(self) -> None:
        if self.answers.closed:
            return
        with contextlib.suppress(ProcessLookupError):  # it may be gone already
            os.killpg(self.process.pid, signal.SIGKILL)
        with contextlib.suppress(subprocess.TimeoutExpired):  # stuck in a driver: dies when the kernel lets it
            self.process.wait(10)
        with contextlib.suppress(BrokenPipeError):  # closing flushes what a dead worker never read
            self.jobs.close()
        self.answers.close()


def choose(pending: list[EpisodeSpec], worker: Worker, pool: list[Worker | None]) -> EpisodeSpec:
    """The next episode for `worker`: of the task it has built (takes seconds), else of one nobody has, or any."""
    held = [other.kwargs for other in pool if other is not None and other is not worker]
    return min(pending, key=lambda spec: 0 if spec.kwargs == worker.kwargs else 1 + (spec.kwargs in held))


def wait(pool: list[Worker | None], seconds: float = 0.2) -> Iterator[tuple[int, dict[str, Any]]]:
    """Listen to the busy workers for at most `seconds`; yields (index, answer), made up for a dead or a late worker."""
    busy = [(index, worker) for index, worker in enumerate(pool) if worker is not None and worker.spec is not None]
    # Death is asked for before the pipes, so that what a worker wrote before it died has arrived and is read first.
    dead = {index for index, worker in busy if worker.process.poll() is not None}
    readable = connection.wait([worker.answers for _, worker in busy], seconds)
    for index, worker in busy:
        answer = worker.read() if worker.answers in readable else None
        if answer is not None:
            yield index, answer
        elif index in dead:
            yield index, {"ok": False, "kind": "simulator", "error": worker.obituary()}
        elif time.monotonic() > worker.deadline:
            yield index, {"ok": False, "kind": "simulator", "error": "the episode timed out"}
