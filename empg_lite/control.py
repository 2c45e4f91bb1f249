"""When a run should end early: a signal, or its time is up."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from types import FrameType

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


@contextmanager
def stop_request(*, announce: bool = True) -> Iterator[list[int]]:
    """A list that the first SIGINT or SIGTERM is put into; the second ends the process at once.

    The step at hand is finished and saved first: interrupting it would lose it, and gain seconds. One process
    of a launch announces it.
    """
    received: list[int] = []

    def on_signal(signum: int, frame: FrameType | None) -> None:
        received.append(signum)
        if announce:
            os.write(2, b"\nstopping after this step, which is saved; once more to stop at once\n")
        for number, handler in previous.items():
            signal.signal(number, handler)

    try:
        previous = {n: signal.signal(n, on_signal) for n in (signal.SIGINT, signal.SIGTERM)}
    except ValueError:  # not the main thread: signals go to whoever runs it
        yield received
        return
    try:
        yield received
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
