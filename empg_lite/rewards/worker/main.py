"""The grading worker: one process that can be killed at any instant.

Reads one JSON message a line on stdin and answers with one JSON line on stdout. It has no clock of its
own: the parent keeps the time and kills. What it does see to is that it dies with its parent, ignores
Ctrl-C, and cannot take more memory or processor time than it was given.

The first message says what to load; the reply is ``{"ready": true}``, or ``{"broken": {"what", "where",
"todo"}}``. What is asked then, and what is answered, depends on the kind:

* ``{"kind": "algebra"}``:
  ``{"op": "equal", "gold", "prediction", "percent"}`` -> ``{"equal": bool}`` or ``{"unparsable": why}``,
  ``{"op": "regex", "pattern", "text"}`` -> ``{"match": null | {"group": str | null}}``.
* ``{"kind": "gym", "task", "params", "seed", "size"}``:
  ``{"op": "entry", "index"}`` -> ``{"entry": {...}}`` or ``{"refused": why, "altogether": bool}``,
  ``{"op": "score", "answer", "gold", "question", "metadata"}`` -> ``{"score": number}`` or
  ``{"unreadable": why}``.
* ``{"kind": "python", "path", "function", "source"}``:
  ``{"op": "call", "completion", "gold", "question", "meta"}`` -> ``{"terms": {name: number}}``.
* any: ``{"op": "ping"}`` -> ``{}``; and any reply may be ``{"error": why}``, or ``{"memory": true}``, after
  which the worker ends.
"""

from __future__ import annotations

import ctypes
import json
import math
import os
import re
import resource
import signal
import sys
from collections.abc import Callable, Mapping
from typing import Any

_PR_SET_PDEATHSIG = 1
#: Copies of the worker that one request may make.
_MAX_FORKS = 8

Answer = Callable[[Mapping[str, Any]], dict[str, Any]]


def _die_with_parent(parent: int) -> None:
    """On Linux the kernel kills us with the thread that started us; elsewhere end of input must do."""
    if sys.platform == "linux":
        ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        sys.exit("the parent ended while the worker was starting")


def _limit(which: int, soft: int) -> None:
    hard = resource.getrlimit(which)[1]
    resource.setrlimit(which, (soft if hard == resource.RLIM_INFINITY else min(soft, hard), hard))


def _limit_cpu(seconds: float) -> None:
    """Allow the next request ``seconds`` of processor time: for a parent that is itself stopped."""
    used = resource.getrusage(resource.RUSAGE_SELF)
    _limit(resource.RLIMIT_CPU, math.ceil(used.ru_utime + used.ru_stime + seconds) + 1)


def _equal(request: Mapping[str, Any]) -> dict[str, Any]:
    from empg_lite.rewards.math.compare import compare
    from empg_lite.rewards.math.symbolic import symbolic_leaf

    leaf = symbolic_leaf(request["percent"])
    try:
        return {"equal": bool(compare(request["gold"], request["prediction"], leaf))}
    # Not mathematics, no value, or one too large: sympy says it in these ways. The warm-up has shown that
    # the grader itself works, so the answer is at fault: a verdict, which no policy can dodge by it.
    except (ValueError, TypeError, NotImplementedError, RecursionError, ArithmeticError) as error:
        return {"unparsable": f"{type(error).__name__}: {error}"[:300]}


def _regex(request: Mapping[str, Any]) -> dict[str, Any]:
    pattern = re.compile(request["pattern"])
    if not pattern.groups:
        return {"match": {"group": None} if pattern.search(request["text"]) else None}
    groups = [match.group(1) for match in pattern.finditer(request["text"])]
    return {"match": {"group": groups[-1]} if groups else None}


def _algebra(request: Mapping[str, Any]) -> dict[str, Any]:
    return {"equal": _equal, "regex": _regex}[request["op"]](request)


def _warm_up() -> None:
    """Import and run what the first request would otherwise wait for."""
    for gold, prediction in (
        (r"3\sqrt{5}", r"\sqrt{45}"),
        (r"\frac{x^2}{2}+1", r"(x^2+2)/2"),
        ("2x+y=1", "y=1-2x"),
        (r"\mathbb{R}\setminus\{1\}", r"(-\infty,1)\cup(1,\infty)"),
    ):
        assert _equal({"gold": gold, "prediction": prediction, "percent": False}) == {"equal": True}, gold


class _Broken(Exception):
    """What was to be loaded cannot be: what, where, what to do."""


def _load(setup: Mapping[str, Any]) -> Answer:
    """Everything that takes long, before any clock runs.

    Raises:
        _Broken: with what the parent should say.
    """
    if setup["kind"] == "algebra":
        _warm_up()
        return _algebra
    if setup["kind"] == "gym":
        from empg_lite.rewards.worker.gym import Task, TaskUnusable

        try:
            task = Task(setup["task"], setup["params"], setup.get("seed", 0), setup.get("size", 1))
        except TaskUnusable as error:
            raise _Broken(error.args[0], f"gym:{setup['task']}", error.args[1]) from None
        return task.answer
    from empg_lite.rewards.worker.usercode import call_function, describe, load_function

    path = setup["path"]
    try:
        function = load_function(setup)
    except BaseException as error:  # SystemExit too
        todo = "repair it; `empg-lite grade --reward python:FILE.py --allow-code` tries it alone"
        raise _Broken(f"the reward file cannot be loaded: {describe(error, path)}", path, todo) from None
    return lambda request: call_function(function, request, path)


def _address_space() -> int:
    """Bytes that the process has mapped; 0 where the system does not say."""
    try:
        with open("/proc/self/statm", encoding="ascii") as file:
            return int(file.read().split()[0]) * resource.getpagesize()
    except OSError:
        return 0


class _Pipes:
    """The protocol's own two descriptors, which neither a stray print nor a forked copy of us can reach."""

    def __init__(self) -> None:
        self._requests, self._replies = os.fdopen(os.dup(0), "rb"), os.fdopen(os.dup(1), "wb")
        self._pid, self._forks = os.getpid(), 0
        self.null = os.open(os.devnull, os.O_RDWR)
        os.dup2(self.null, 0)
        os.dup2(self.null, 1)
        os.register_at_fork(before=self._before_fork, after_in_child=self._in_child)

    def receive(self) -> bytes:
        """The next message; empty at the end. A copy of us that comes here ends."""
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
        """Copies that copy themselves are stopped before the machine stops: all of them, and us."""
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
        answer = _load(setup)
    except _Broken as broken:
        pipes.send({"broken": dict(zip(("what", "where", "todo"), broken.args, strict=True))})
        return
    # A scorer's or a user's libraries may have mapped gigabytes before the first question.
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
        except Exception as error:  # a fault of ours or of a library's: reported, counted as a crash
            reply = {"error": f"{type(error).__name__}: {error}"[:300]}
        pipes.send(reply)


if __name__ == "__main__":
    main()
