"""How far a phase is, how fast it goes and how long it still takes."""

from __future__ import annotations

import time
from collections.abc import Callable

#: Rows that end before a speed is told. They run side by side: the shortest ones say little about the rest.
ENOUGH = 4

#: Seconds on a clock that never goes back.
Clock = Callable[[], float]


class Pace:
    """Counts the rows of a phase.

    Args:
        total: rows of the whole phase.
        done: rows finished before it began: progress, but no measure of speed.
    """

    def __init__(self, name: str, total: int, done: int = 0, clock: Clock = time.monotonic) -> None:
        self.name, self.total, self.done = name, total, done
        self._before, self._clock, self._started = done, clock, clock()

    def advance(self, rows: int) -> None:
        """So many more rows are finished."""
        self.done += rows

    def text(self) -> str:
        """``evaluating base: 120 of 1,319 · 3.2 a second · about 6:15 left``."""
        said = f"{self.name}: {self.done:,} of {self.total:,}"
        seconds, finished = self._clock() - self._started, self.done - self._before
        if finished < ENOUGH or seconds < 1:  # too early to tell
            return said
        rate, left = finished / seconds, max(0, self.total - self.done)
        speed = f"{rate:,.1f} a second" if rate >= 1 else f"{60 * rate:.1f} a minute"
        return f"{said} · {speed}" + (f" · about {clock_text(left / rate)} left" if left else "")


def clock_text(seconds: float) -> str:
    """``0:42``, ``12:05``, ``3:20:00``."""
    whole = round(seconds)
    hours, minutes = whole // 3600, whole // 60 % 60
    return f"{hours}:{minutes:02d}:{whole % 60:02d}" if hours else f"{minutes}:{whole % 60:02d}"
