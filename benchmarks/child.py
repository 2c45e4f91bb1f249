"""Run a command of the package in a process of its own, to its end or to a signal."""

from __future__ import annotations

import signal
import subprocess
import sys
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from machine import import_from

import empg_lite

#: The folder that the package runs from, here and in the child.
CODE = Path(empg_lite.__file__).resolve().parents[1]
#: Seconds between two calls of ``beat``.
BEAT = 10.0


@dataclass(frozen=True, slots=True)
class Ended:
    """How a command ended: its exit code (minus the signal that killed it), stdout, the signal passed on."""

    code: int
    out: str
    signum: int | None


def run_command(words: Sequence[str], *, cpu: bool, beat: Callable[[], None]) -> Ended:
    """``empg-lite WORDS``, stderr shown as it comes.

    The child has a session of its own: a signal at the keyboard reaches it once, from here, and it saves
    before it ends.

    Args:
        cpu: hide the GPU from it.
        beat: called every few seconds.
    """
    received: list[int] = []
    children: list[subprocess.Popen[str]] = []

    def forward(signum: int, frame: object) -> None:
        received.append(signum)
        for child in children:
            child.send_signal(signum)

    previous = {n: signal.signal(n, forward) for n in (signal.SIGINT, signal.SIGTERM)}
    try:
        children.append(_start(words, cpu))
        while True:
            with suppress(subprocess.TimeoutExpired):
                out, _ = children[0].communicate(timeout=BEAT)
                return Ended(children[0].returncode, out, received[-1] if received else None)
            beat()
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


def _start(words: Sequence[str], cpu: bool) -> subprocess.Popen[str]:
    environment = import_from(CODE, **({"CUDA_VISIBLE_DEVICES": ""} if cpu else {}))
    command = [sys.executable, "-P", "-m", "empg_lite", *words]  # -P: not what lies in the current folder
    return subprocess.Popen(
        command, stdout=subprocess.PIPE, text=True, env=environment, start_new_session=True
    )
