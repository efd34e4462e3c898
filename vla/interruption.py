"""A scheduler's signals: finish the step, save, and leave so that the job is run again.

SIGTERM, SIGUSR1 and SIGUSR2 announce a preemption or the end of the allotted time. While a run trains they only raise a
flag, which `Checkpoints` (vla/callbacks.py) reads after each optimiser step, on all processes together: it saves and
ends the training. Before the first step there is nothing to save and the run ends at once. Then
  - a Python handler that was there before ours is called (submitit's, which requeues the job),
  - else, or where that handler returns, the process exits with `AGAIN`, on which scripts/slurm/*.sbatch requeue.
SIGINT stays Ctrl-C. A signal that the process was told to ignore stays ignored.
"""

from __future__ import annotations

import inspect
import signal
import sys
import threading
from types import FrameType, TracebackType
from typing import TYPE_CHECKING

from vla.saving import rank

if TYPE_CHECKING:
    import lightning as L

AGAIN = 75
"""EX_TEMPFAIL of sysexits.h: not finished, run me again."""
SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2)
PATIENCE_S = 600.0
"""How long a step under way may still take; a loader that hangs must not keep the job until it is killed."""
WORKER_S = 60
"""How long a loader's worker outlives a signal that the scheduler sent to every process of the job."""


class Interrupted(BaseException):
    """The run leaves because of a signal. Not an Exception, so that nothing on the way takes it for a failed read."""


class Interruption:
    """Handles SIGNALS for the length of a `with` block, and leaves the process at its end where one came.

    Attributes:
        received: the signals so far, without repetition.
        training: from the first finished step on, a signal waits for the end of the step under way.
        stopped: the training ended before its time because of one.
    """

    def __init__(self) -> None:
        self.received: list[int] = []
        self.training = self.stopped = False
        self.before: dict[int, object] = {}

    def __enter__(self) -> Interruption:
        if threading.current_thread() is threading.main_thread():  # others may not set handlers
            handlers = {number: signal.getsignal(number) for number in SIGNALS}
            self.before = {number: was for number, was in handlers.items() if was is not signal.SIG_IGN}
        self.install()
        return self

    def install(self) -> None:
        """Set our handlers; again once Lightning has put its own in front, which would end the run without a save."""
        for number in self.before:
            signal.signal(number, self._receive)

    def _receive(self, number: int, frame: FrameType | None) -> None:
        first = not self.received
        if number not in self.received:
            self.received.append(number)
        if not self.training:
            raise Interrupted
        if first:
            signal.signal(signal.SIGALRM, _give_up)
            signal.setitimer(signal.ITIMER_REAL, PATIENCE_S)

    def agreed(self, trainer: L.Trainer) -> bool:
        """After a step: whether any process of the run got a signal. One process asks nobody."""
        self.training = True
        stop = bool(self.received)
        if trainer.world_size > 1:
            stop = trainer.strategy.reduce_boolean_decision(stop, all=False)
        if stop:
            self.stopped = True
            signal.setitimer(signal.ITIMER_REAL, 0)
        return stop

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        # Before the first step what the signal interrupted, such as an import, may have turned it into another error.
        ours = kind is Interrupted or (self.received and (kind is None or not self.training))
        if not ours:
            for number, was in self.before.items():
                signal.signal(number, was)
            return
        for number in self.before:
            signal.signal(number, signal.SIG_IGN)  # a further one must not kill what is on its way out
        signal.setitimer(signal.ITIMER_REAL, 0)
        if rank() == 0:
            names = ", ".join(signal.Signals(number).name for number in self.received) or "a signal to another process"
            print(f"stopped by {names}; what was saved is kept, and resume=auto goes on", file=sys.stderr, flush=True)
            if error is not None and kind is not Interrupted:
                print(f"warning: what it interrupted ended with {error!r}", file=sys.stderr, flush=True)
        for number in self.received:
            if callable(was := self.before[number]):
                signal.signal(number, was)
                was(number, inspect.currentframe())
        # Of several processes the first one speaks: Lightning kills all others where a child ends with another code.
        sys.exit(AGAIN if rank() == 0 else 0)


def _give_up(number: int, frame: FrameType | None) -> None:
    raise Interrupted


def outlive(worker: int) -> None:
    """Of a loader's worker process: let the step under way have its data when a signal goes to the whole job."""
    for number in SIGNALS:
        signal.signal(number, _linger)


def _linger(number: int, frame: FrameType | None) -> None:
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    signal.alarm(WORKER_S)
