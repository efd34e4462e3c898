"""Signals by which a scheduler ends an evaluation: stop the workers, exit with 75, "run me again".

There is nothing to save: every finished episode is on disk. A handler that is there already stays (submitit's, which
requeues the job and exits), and so does a signal that is ignored.
"""

from __future__ import annotations

import os
import signal
from types import FrameType

from vla.interruption import AGAIN, SIGNALS

_received: list[int] = []


def stop_on_signals() -> None:
    """From now on, in the main thread, each of SIGNALS that nobody handles or ignores raises SystemExit(75)."""
    for number in SIGNALS:
        if signal.getsignal(number) == signal.SIG_DFL:
            signal.signal(number, _stop)


def stop_if_asked() -> None:
    """SystemExit(75) after such a signal; Python drops what a handler raises in the midst of a callback of its own."""
    if _received:
        raise SystemExit(AGAIN)


def _stop(number: int, frame: FrameType | None) -> None:
    for other in SIGNALS:
        signal.signal(other, signal.SIG_IGN)  # a second one must not interrupt the cleaning up
    _received.append(number)
    # Not print: the signal may have interrupted one.
    os.write(2, f"{signal.Signals(number).name}: stopping; finished episodes are kept, run it again\n".encode())
    raise SystemExit(AGAIN)
