"""When a run should end early: a signal, or its time is up.

A signal is noted; the loops that may take long (decoding steps, micro-batches, grading, evaluation) ask
``stop_point`` whether one came. What they leave has changed nothing, and is done again on resume, the same.
"""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from types import FrameType

#: Called at the first signal, before all else, to put a terminal back: the second ends the process at once.
AT_SIGNAL: list[Callable[[], None]] = []
#: What an interrupted run tells its user to do.
RESUME = "repeat the command with --resume to go on"


@dataclass(slots=True)
class Clock:
    """Wall time of this invocation, and its limit."""

    max_minutes: float | None
    started: float = field(default_factory=time.monotonic)

    def seconds(self) -> float:
        return time.monotonic() - self.started

    def out_of_time(self) -> bool:
        return self.max_minutes is not None and self.seconds() >= 60 * self.max_minutes


class StopRequested(BaseException):
    """A signal came while something long was going on. Like KeyboardInterrupt no error of the program."""

    def __init__(self, signum: int) -> None:
        super().__init__(signum)
        self.signum = signum


#: What ``stop_point`` looks at: the signals received, where loops may be left because of them.
_listened: list[int] = []


def stop_point() -> None:
    """Leave the loop at hand if a signal came.

    Raises:
        StopRequested: one did, and ``stop_request(midway=True)`` is in force.
    """
    if _listened:
        raise StopRequested(_listened[0])


@contextmanager
def stop_request(*, announce: bool = True, midway: bool = False) -> Iterator[list[int]]:
    """A list that the first SIGINT or SIGTERM is put into; the second ends the process at once.

    Args:
        announce: say so; one process of a launch does.
        midway: ``stop_point`` leaves the step at hand. Else it is finished first: the processes of a launch
            can only stop together.
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
            os.write(2, b"\nstopping " + when + b", what is done is saved; once more to stop at once\n")
        for number in previous:
            signal.signal(number, signal.SIG_DFL)  # the kernel's own: no handler has to wait for its turn

    try:
        previous = {n: signal.signal(n, on_signal) for n in (signal.SIGINT, signal.SIGTERM)}
    except ValueError:  # not the main thread: signals go to whoever runs it
        yield received
        return
    try:
        yield received
    finally:
        _listened.clear()
        for number, handler in previous.items():
            signal.signal(number, handler)
