"""Times of rivals measured in turn, and what their ratios say."""

from __future__ import annotations

import gc
import os
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any

import torch
from machine import machine, versions
from tables import table

__all__ = ["Spent", "Spread", "circumstances", "in_turn", "ratios", "settle", "spend", "table"]


@dataclass(frozen=True, slots=True)
class Spent:
    """Seconds of one run: by the clock, and of this process's processor time (all its threads)."""

    wall: float
    cpu: float


@dataclass(frozen=True, slots=True)
class Spread:
    """Median, least and greatest."""

    median: float
    low: float
    high: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread:
        """Of at least one value."""
        return cls(median(values), min(values), max(values))

    def __str__(self) -> str:
        return f"{self.median:.2f} ({self.low:.2f}-{self.high:.2f})"


def spend(work: Callable[[], Any]) -> Spent:
    """Do ``work`` and time it; a GPU's queue is emptied before and after."""
    settle()
    wall, cpu = time.perf_counter(), time.process_time()
    work()
    settle()
    return Spent(time.perf_counter() - wall, time.process_time() - cpu)


def settle() -> None:
    """Wait for the GPU's queue."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def in_turn(
    rivals: Mapping[str, Callable[[], Any]], *, repeats: int, warmups: int = 2
) -> dict[str, list[Spent]]:
    """Time each rival ``repeats`` times, one after the other round by round: A B A B.

    What else the machine does then weighs on all of them alike. The first ``warmups`` rounds do not count.
    """
    spent: dict[str, list[Spent]] = {name: [] for name in rivals}
    for n in range(warmups + repeats):
        gc.collect()
        for name, work in rivals.items():
            once = spend(work)
            if n >= warmups:
                spent[name].append(once)
    return spent


def ratios(slow: Sequence[Spent], fast: Sequence[Spent]) -> tuple[Spread, Spread]:
    """How many times faster, round by round: by the clock and by processor time."""
    pairs = list(zip(slow, fast, strict=True))
    return (
        Spread.of([a.wall / b.wall for a, b in pairs]),
        Spread.of([a.cpu / b.cpu for a, b in pairs]),
    )


def circumstances(*packages: str) -> dict[str, Any]:
    """Machine, commit, load, threads and the versions of ``packages``."""
    found = machine()
    kept = {name: found[name] for name in ("commit", "cpu", "load", "python")}
    return {**kept, "threads": torch.get_num_threads(), "nice": os.nice(0), **versions("torch", *packages)}
