"""Processes and threads in tests: start them, wait for them, read what they print."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

#: Seconds after which something hangs; no measurement. No test may depend on a machine's speed or load.
HANGS = 120.0


def alive(pid: int) -> bool:
    """Whether a process is running; one that has ended and was not asked how is not."""
    stat = Path(f"/proc/{pid}/stat")
    return stat.exists() and stat.read_text().rpartition(")")[2].split()[0] != "Z"


def wait_until(happened: Callable[[], object]) -> None:
    """Return once something has happened; an error where it never does."""
    deadline = time.monotonic() + HANGS
    while not happened():
        assert time.monotonic() < deadline, "it never happened"
        time.sleep(0.01)


def wait_until_busy(*pids: int) -> None:
    """Return once processes that were idle have calculated for a twentieth of a second."""

    def ticks() -> int:
        stats = [Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split() for pid in pids]
        return sum(int(n) for stat in stats for n in stat[11:13])

    before = ticks()
    wait_until(lambda: ticks() >= before + 0.05 * os.sysconf("SC_CLK_TCK"))


def in_thread(work: Callable[[], None]) -> None:
    """Do ``work`` in a thread of its own; what it raises is raised here."""
    with ThreadPoolExecutor(1) as pool:
        pool.submit(work).result()


def one_line(err: str) -> str:
    """The error line, which is the last one."""
    line = err.strip().splitlines()[-1]
    assert line.startswith("error: ")
    return line


def run_script(name: str, *arguments: str, cwd: Path, env: dict[str, str] | None = None) -> dict:  # type: ignore[type-arg]
    """The JSON object that a script beside the tests prints last, run in a process of its own."""
    support = Path(__file__).parent
    script = support / name
    paths = os.pathsep.join((str(support), str(support.parents[1])))
    done = subprocess.run(
        [sys.executable, str(script), *arguments],
        capture_output=True,
        text=True,
        cwd=cwd,
        env={**(env or os.environ), "HF_HUB_OFFLINE": "1", "PYTHONPATH": paths},
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])
