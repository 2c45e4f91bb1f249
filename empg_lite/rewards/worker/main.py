"""The grading worker: one process that can be killed at any instant.

Reads one JSON message per line on stdin and answers each with one JSON line on stdout. It keeps no time: the
parent does, and kills. It sees to it that it dies with its parent, ignores Ctrl-C, and cannot take more
memory or processor time than it was given.

The first message is the setup; its ``kind`` names the module in this folder whose ``load(setup)`` returns
the function that answers requests. The reply is ``{"ready": true}`` or ``{"broken": {"what", "where",
"todo"}}``. Then each module documents its own requests, and every one answers ``{"op": "ping"}`` with
``{}``. Any reply may be ``{"error": why}``, or ``{"memory": true}``, after which the worker ends.
"""

from __future__ import annotations

import ctypes
import json
import math
import os
import resource
import signal
import sys
from collections.abc import Callable, Mapping
from importlib import import_module
from typing import Any

_PR_SET_PDEATHSIG = 1
#: How often one request may fork the worker.
_MAX_FORKS = 8

#: What a module's ``load`` returns: request -> reply.
Answer = Callable[[Mapping[str, Any]], dict[str, Any]]


class Broken(Exception):
    """The setup cannot be loaded: (what, where, what to do)."""


def _die_with_parent(parent: int) -> None:
    """On Linux the kernel kills us with the thread that started us; elsewhere we end with our input."""
    if sys.platform == "linux":
        ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        sys.exit("the parent ended while the worker was starting")


def _limit(which: int, soft: int) -> None:
    hard = resource.getrlimit(which)[1]
    resource.setrlimit(which, (soft if hard == resource.RLIM_INFINITY else min(soft, hard), hard))


def _limit_cpu(seconds: float) -> None:
    """Allow the next request ``seconds`` of processor time, in case the parent itself is stopped."""
    used = resource.getrusage(resource.RUSAGE_SELF)
    _limit(resource.RLIMIT_CPU, math.ceil(used.ru_utime + used.ru_stime + seconds) + 1)


def _address_space() -> int:
    """Bytes that the process has mapped; 0 where the system does not tell."""
    try:
        with open("/proc/self/statm", encoding="ascii") as file:
            return int(file.read().split()[0]) * resource.getpagesize()
    except OSError:
        return 0


class _Pipes:
    """Private copies of stdin and stdout, which neither a stray print nor a forked copy of us can reach."""

    def __init__(self) -> None:
        self._requests, self._replies = os.fdopen(os.dup(0), "rb"), os.fdopen(os.dup(1), "wb")
        self._pid, self._forks = os.getpid(), 0
        self.null = os.open(os.devnull, os.O_RDWR)
        os.dup2(self.null, 0)
        os.dup2(self.null, 1)
        os.register_at_fork(before=self._before_fork, after_in_child=self._in_child)

    def receive(self) -> bytes:
        """The next message; empty at the end. A forked copy of us that gets here exits."""
        if os.getpid() != self._pid:
            os._exit(1)
        self._forks = 0
        return self._requests.readline()

    def send(self, message: Mapping[str, Any]) -> None:
        if os.getpid() != self._pid:
            os._exit(1)
        self._replies.write(json.dumps(message).encode("ascii") + b"\n")
        self._replies.flush()

    def _before_fork(self) -> None:
        """Stop a fork bomb: kill all copies, and ourselves."""
        self._forks += 1
        if self._forks > _MAX_FORKS:
            os.killpg(0, signal.SIGKILL)

    def _in_child(self) -> None:
        os.close(self._requests.fileno())
        os.close(self._replies.fileno())


def main() -> None:
    """``parent_pid time_limit memory_limit``: serve until stdin ends."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    parent, time_limit, memory_limit = int(sys.argv[1]), float(sys.argv[2]), int(sys.argv[3])
    _die_with_parent(parent)
    pipes = _Pipes()
    setup = json.loads(pipes.receive())
    try:
        answer: Answer = import_module(f"empg_lite.rewards.worker.{setup['kind']}").load(setup)
    except Broken as broken:
        pipes.send({"broken": dict(zip(("what", "where", "todo"), broken.args, strict=True))})
        return
    # The libraries of a scorer or a user may have mapped gigabytes before the first request.
    taken = 0 if setup["kind"] == "algebra" else _address_space()
    _limit(resource.RLIMIT_AS, memory_limit + taken)
    _limit(resource.RLIMIT_CORE, 0)
    pipes.send({"ready": True})
    os.dup2(pipes.null, 2)
    reply: dict[str, Any] = {}
    while "memory" not in reply:
        try:
            line = pipes.receive()
            if not line:
                return
            _limit_cpu(time_limit + 1)
            request = json.loads(line)
            reply = {} if request["op"] == "ping" else answer(request)
        except MemoryError:
            reply = {"memory": True}
        except Exception as error:  # a bug of ours or of a library: reported and counted as a crash
            reply = {"error": f"{type(error).__name__}: {error}"[:300]}
        pipes.send(reply)
