"""Stopping a run early: a signal, or the time limit.

A signal is recorded; long loops (decoding steps, micro-batches, grading, evaluation) call ``stop_point`` to
leave when one has arrived. The abandoned work has changed nothing and is repeated identically on resume.
"""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from types import FrameType

#: Called first at the first signal, to restore the terminal: the second signal kills the process.
AT_SIGNAL: list[Callable[[], None]] = []
#: What an interrupted run tells its user to do.
RESUME = "repeat the command with --resume to continue"


@dataclass(slots=True)
class Clock:
    """Wall-clock time of this invocation, and its limit."""

    max_minutes: float | None
    started: float = field(default_factory=time.monotonic)

    def seconds(self) -> float:
        return time.monotonic() - self.started

    def out_of_time(self) -> bool:
        return self.max_minutes is not None and self.seconds() >= 60 * self.max_minutes


class StopRequested(BaseException):
    """A signal arrived during long work. Like KeyboardInterrupt, not an error of the program."""

    def __init__(self, signum: int) -> None:
        super().__init__(signum)
        self.signum = signum


#: Signals received that allow ``stop_point`` to leave a loop.
_listened: list[int] = []


def stop_point() -> None:
    """Leave the current loop if a signal has arrived.

    Raises:
        StopRequested: one has, within ``stop_request(midway=True)``.
    """
    if _listened:
        raise StopRequested(_listened[0])


@contextmanager
def stop_request(*, announce: bool = True, midway: bool = False) -> Iterator[list[int]]:
    """A list that receives the first SIGINT or SIGTERM; the second kills the process.

    Args:
        announce: tell the user; one process of a launch does.
        midway: let ``stop_point`` abandon the current step. Otherwise it is finished first, because the
            processes of a launch can only stop together.
    """
    received: list[int] = []

    def on_signal(signum: int, frame: FrameType | None) -> None:
        received.append(signum)
        for call in list(AT_SIGNAL):
            call()
        if midway:
            _listened.append(signum)
        if announce:
            when = b"now" if midway else b"after this step"
            os.write(2, b"\nstopping " + when + b", saving progress; press Ctrl-C again to quit at once\n")
        for number in previous:
            signal.signal(number, signal.SIG_DFL)  # the kernel's: takes effect even while Python is busy

    try:
        previous = {n: signal.signal(n, on_signal) for n in (signal.SIGINT, signal.SIGTERM)}
    except ValueError:  # not the main thread: its owner handles signals
        yield received
        return
    try:
        yield received
    finally:
        _listened.clear()
        for number, handler in previous.items():
            signal.signal(number, handler)
