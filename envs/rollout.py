"""Roll a policy out in simulators: worker processes, one served policy, one record per episode.

    result = run_rollouts(policy, episodes, Path("results/x"), env="envs.libero:LiberoEnv", env_kwargs={...}, ...)

The parent (this file) owns the queue, the retries and the records; each worker (envs/worker.py) owns one simulator,
perhaps under its own Python interpreter, and asks the policy in the parent (envs/server.py) for action chunks over
vla-eval's protocol. vla-eval's own Orchestrator and SQLite queue are not used: they record a simulator's error as a
failed episode, and redo work at the granularity of a shard (anchors fact sheet §A.3). Here a simulator that dies,
hangs or raises is replaced and the same seed runs again on a fresh worker; what still fails is reported missing, and
a missing episode never counts as a failure of the policy.

Interrupted and called again with the same arguments, it runs only the episodes without a record. Several jobs can share
the episodes (envs/shards.py).
"""

from __future__ import annotations

import contextlib
import re
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from envs.pool import EpisodeSpec, Worker, choose, wait
from envs.records import Key, Records, ready_to_summarise
from envs.server import PolicyServer, Predictor, serve
from envs.shards import Shard, absorb, end, folders, joined, merge_when_last, records_of
from envs.stopping import stop_if_asked
from vla.errors import UserError

HOPELESS = 3
"""Episodes lost before any has finished after which the simulator is taken to be broken, not unlucky."""


@dataclass(frozen=True)
class RolloutResult:
    """`summary` is summary.json (see envs/records.py); the rest counts what this call did."""

    summary: dict[str, Any]
    whole: bool
    """Whether the summary is of the run; else it is of the shard, and others are to come."""
    finished: int
    env_steps: int
    seconds: float
    failures: int
    """Attempts that ended in a failure of the simulator, retried or not."""


def run_rollouts(
    policy: Predictor,
    episodes: list[EpisodeSpec],
    out: Path,
    *,
    env: str,
    env_kwargs: dict[str, Any],
    workers: int,
    execute_steps: int,
    episode_timeout_s: float,
    header: dict[str, Any],
    retries: int = 2,
    max_batch: int = 16,
    exact: bool = True,
    ensemble: float | None = None,
    videos: int = 0,
    python: str | None = None,
    progress: bool = True,
    shard: Shard | None = None,
    early: Sequence[Worker] = (),
) -> RolloutResult:
    """Run the episodes that have no record in `out` yet and summarise them all.

    Args:
        policy: `predict(observation) -> (B, chunk, 7)`; see envs/server.py for the observation.
        out: results folder (layout: envs/records.py); worker output in out/logs, films in out/videos.
        env: environment factory as "package.module:name", imported by the workers (protocol: envs/base.py).
        env_kwargs: JSON-able keyword arguments of the factory that all episodes share.
        workers: simulator processes.
        execute_steps: actions executed per chunk before the policy is asked again, 1..policy.chunk.
        episode_timeout_s: seconds after which an episode (building its simulator and the policy's time included) is
            taken to hang; its worker is then killed.
        header: JSON-able arguments that define the run; "checkpoint" and "config" (hashes) go into every row.
        retries: further attempts on fresh workers for an episode whose simulator failed.
        max_batch, exact, ensemble: see PolicyServer; with `exact` the records do not depend on `workers`.
        videos: films of the first so many of `episodes` (every step rendered, which changes no state).
        python: the workers' interpreter (needs vla-eval, the simulator, PyAV for videos); default this one.
        progress: bars on a terminal, else a line now and then.
        early: workers that run already (envs/early.py).
        shard: run this share of the missing episodes only; the last of the shards merges them all.

    Raises:
        UserError: no episodes, a chunk length that cannot be, a folder of another run or in use, an environment that
            does not load, a simulator that never completes an episode.
        RuntimeError: the policy raised; its exception is the cause. Records so far are kept, as on Ctrl-C.
    """
    _check(policy, episodes, workers, execute_steps, header)
    header = {
        **header,
        "env": env,
        "env_kwargs": env_kwargs,
        "execute_steps": execute_steps,
        "exact": exact,
        "ensemble": ensemble,
    }
    server = PolicyServer(policy, execute_steps, min(max_batch, workers), exact, ensemble)
    console = Console(stderr=True, quiet=not progress, highlight=False)

    def work(records: Records, mine: list[EpisodeSpec], logs: str) -> _Run:
        run = _Run(
            mine, records, out / "videos", {spec.key for spec in episodes[:videos]}, env_kwargs, retries, console
        )
        if run.pending:
            (out / "logs").mkdir(exist_ok=True)
            ready_to_summarise()
            with serve(server) as url, _progress(len(mine), len(run.pending), console) as show:
                setup = {"factory": env, "url": url, "timeout_s": episode_timeout_s}

                started = list(early)

                def spawn(index: int) -> Worker:
                    log = out / "logs" / f"{logs}worker_{index}.log"
                    worker = started.pop(0) if started else Worker(str(python or sys.executable), log)
                    worker.connect(setup, log)
                    return worker

                try:
                    run.drain(min(workers, len(run.pending)), spawn, server, episode_timeout_s, show)
                finally:
                    if records.rows:
                        records.summarise(run.missing)
            if not records.rows:
                raise UserError(f"no episode finished: {next(iter(run.missing.values()))}; see {out / 'logs'}")
        records.sort()
        return run

    if shard is None:
        with Records(out, header) as records:
            absorb(records, folders(out))
            run = work(records, episodes, "")
            return run.result(records.summarise(run.missing), True)
    with joined(out, header, shard) as done:
        mine = [spec for spec in episodes if spec.key not in done][shard.index :: shard.count]
        with records_of(out, header, shard) as records:
            run = work(records, mine, f"shard_{shard}_")
            own = records.summarise(run.missing)
            end(records, run.missing)
    merged = merge_when_last(out, header, shard, [spec.key for spec in episodes])
    return run.result(own if merged is None else merged, merged is not None)


def _check(
    policy: Predictor, episodes: list[EpisodeSpec], workers: int, execute_steps: int, header: dict[str, Any]
) -> None:
    if not episodes:
        raise UserError("there are no episodes to run; give episodes=1 or more")
    if repeated := [tuple(key) for key, n in Counter(spec.key for spec in episodes).items() if n > 1]:
        raise UserError(f"episode {repeated[0]} is asked for twice; give each (benchmark, task, seed) once")
    if workers < 1:
        raise UserError(f"workers={workers} cannot run episodes; give workers=1 or more")
    if not 1 <= execute_steps <= policy.chunk:
        raise UserError(
            f"execute_steps={execute_steps} is not in 1..{policy.chunk}, the length of the policy's chunk; change it"
        )
    for name in ("checkpoint", "config"):
        if not isinstance(header.get(name), str):
            raise TypeError(f"header[{name!r}] must be a hash, got {header.get(name)!r}")


class _Run:
    """What is still to do in one call, and what has come of it.

    Attributes:
        pending: episodes nobody works on yet.
        missing: {episode: why it has no row yet}, the pending and running ones included.
        tally: finished, env_steps, failures (attempts), lost (episodes) of this call; successes of all calls.
    """

    def __init__(
        self,
        episodes: list[EpisodeSpec],
        records: Records,
        films: Path,
        filmed: set[Key],
        env_kwargs: dict[str, Any],
        retries: int,
        console: Console,
    ) -> None:
        self.records, self.env_kwargs, self.retries, self.console = records, env_kwargs, retries, console
        self.films, self.filmed = films, filmed
        self.pending = [spec for spec in episodes if spec.key not in records.rows]
        self.missing = {spec.key: "not run" for spec in self.pending}
        self.attempts: Counter[Key] = Counter()
        self.tally: Counter[str] = Counter(successes=sum(row["success"] for row in records.rows.values()))
        self._started = time.monotonic()

    def seconds(self) -> float:
        return time.monotonic() - self._started

    def result(self, summary: dict[str, Any], whole: bool) -> RolloutResult:
        tally = self.tally
        return RolloutResult(
            summary, whole, tally["finished"], tally["env_steps"], self.seconds(), failures=tally["failures"]
        )

    def drain(
        self,
        slots: int,
        spawn: Callable[[int], Worker],
        server: PolicyServer,
        timeout_s: float,
        show: Callable[[Counter[str], float], None],
    ) -> None:
        """Keep `slots` workers busy until every episode is done or lost; they are killed whatever ends this."""
        pool: list[Worker | None] = [None] * slots
        try:
            while self.pending or any(worker and worker.spec for worker in pool):
                stop_if_asked()
                for index in range(slots):
                    if self.pending and (pool[index] is None or pool[index].spec is None):
                        pool[index] = pool[index] or spawn(index)
                        spec = choose(self.pending, pool[index], pool)
                        self.pending.remove(spec)
                        self.attempts[spec.key] += 1
                        pool[index].start(spec, self.job(spec), timeout_s)
                for index, answer in wait(pool):
                    spec, pool[index].spec = pool[index].spec, None
                    if answer["ok"]:
                        self.record(spec, answer)
                        show(self.tally, self.seconds())
                    elif answer["kind"] == "user":
                        raise UserError(answer["error"])
                    elif answer["kind"] == "policy":
                        raise _policy_error(server, answer["error"])
                    else:
                        pool[index].kill()
                        pool[index] = None
                        self.fail(spec, answer["error"])
        finally:
            for worker in pool:
                if worker is not None:
                    worker.kill()

    def job(self, spec: EpisodeSpec) -> dict[str, Any]:
        """The worker's order for one episode (protocol: envs/worker.py)."""
        film = self.films / re.sub(r"[^\w.-]+", "_", f"{spec.task}_seed{spec.seed}")
        return {
            "kwargs": {**self.env_kwargs, **spec.kwargs},
            "task": {"name": spec.task, "seed": spec.seed},
            "execute_steps": self.records.header["execute_steps"],
            "video": str(film) if spec.key in self.filmed else None,
        }

    def record(self, spec: EpisodeSpec, answer: dict[str, Any]) -> None:
        versions = dict(answer["versions"])
        row = {
            **spec.key._asdict(),
            **{name: answer[name] for name in ("success", "steps", "seconds", "subtasks")},
            "attempts": self.attempts[spec.key],
            **{name: self.records.header[name] for name in ("checkpoint", "config", "execute_steps")},
            "renderer": versions.pop("renderer"),
            "versions": versions,
        }
        self.records.append(row)
        del self.missing[spec.key]
        self.records.summarise(self.missing)
        self.tally.update(finished=1, env_steps=row["steps"], successes=row["success"])

    def fail(self, spec: EpisodeSpec, reason: str) -> None:
        """Note a failed attempt and queue the next one, first in line; UserError once the simulator is hopeless."""
        attempt, lost = self.attempts[spec.key], self.attempts[spec.key] > self.retries
        self.missing[spec.key] = reason
        self.tally.update(failures=1, lost=lost)
        verdict = "left missing" if lost else "trying again"
        line = f"{spec.task} seed {spec.seed}: {reason} (attempt {attempt} of {self.retries + 1}, {verdict})"
        self.console.print(line, style="yellow", markup=False, soft_wrap=True)
        if not lost:
            self.pending.insert(0, spec)
        elif self.tally["lost"] >= HOPELESS and not self.tally["finished"]:
            raise UserError(
                f"no episode finishes, the last one ended with: {reason}; see {self.records.folder / 'logs'}"
            )


def _policy_error(server: PolicyServer, text: str) -> Exception:
    """What the policy raised, a UserError as it is; vla-eval's text where the server failed before the policy."""
    error = server.error
    if isinstance(error, UserError):
        return error
    failure = RuntimeError(f"the policy failed: {text if error is None else f'{type(error).__name__}: {error}'}")
    failure.__cause__ = error
    return failure


@contextlib.contextmanager
def _progress(total: int, pending: int, console: Console) -> Iterator[Callable[[Counter[str], float], None]]:
    """Yields show(tally, seconds): bars on a terminal, elsewhere a line every half minute and at the end."""
    done = total - pending
    if console.is_terminal and not console.quiet:
        columns = (TextColumn("episodes"), BarColumn(), MofNCompleteColumn(), TextColumn("{task.description}"))
        with Progress(*columns, TimeElapsedColumn(), TimeRemainingColumn(), console=console) as bars:
            bar = bars.add_task("", total=total, completed=done)

            def show(tally: Counter[str], seconds: float) -> None:
                note = f"{tally['successes']} successes, {tally['env_steps'] / seconds:.0f} env steps/s"
                bars.update(bar, completed=done + tally["finished"], description=note)

            yield show
        return

    printed = time.monotonic()

    def show_line(tally: Counter[str], seconds: float) -> None:
        nonlocal printed
        left = pending - tally["finished"]
        if left and time.monotonic() - printed < 30:
            return
        printed = time.monotonic()
        console.print(
            f"{done + tally['finished']}/{total} episodes, {tally['successes']} successes, "
            f"{tally['env_steps'] / seconds:.0f} env steps/s, {seconds / tally['finished'] * left:.0f} s left",
            soft_wrap=True,
        )

    yield show_line
