"""The grading worker: one process that can be killed at any instant.

Reads one JSON request a line on stdin and answers with one JSON line on stdout. It has no clock of its
own: the parent keeps the time and kills. What it does see to is that it dies with its parent, ignores
Ctrl-C, and cannot take more memory or processor time than it was given.

Requests: ``{"op": "equal", "gold", "prediction", "percent"}`` and ``{"op": "regex", "pattern", "text"}``.
Replies: ``{"equal": bool}``, ``{"match": null | {"group": str | null}}``, ``{"unparsable": why}``,
``{"error": why}``, or ``{"memory": true}``, after which the worker ends.
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
from collections.abc import Mapping
from typing import Any

_PR_SET_PDEATHSIG = 1


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
    from empg_lite.rewards.compare import compare
    from empg_lite.rewards.symbolic import symbolic_leaf

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


def answer(request: Mapping[str, Any]) -> dict[str, Any]:
    """The reply to one request."""
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


def main() -> None:
    """``parent_pid time_limit memory_limit``: serve until stdin ends."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    parent, time_limit, memory_limit = int(sys.argv[1]), float(sys.argv[2]), int(sys.argv[3])
    _die_with_parent(parent)
    replies = os.fdopen(os.dup(1), "w", encoding="ascii")
    null = os.open(os.devnull, os.O_RDWR)
    os.dup2(null, 1)  # a stray print must not look like a reply
    _warm_up()
    _limit(resource.RLIMIT_AS, memory_limit)
    _limit(resource.RLIMIT_CORE, 0)
    print(json.dumps({"ready": True}), file=replies, flush=True)
    os.dup2(null, 2)
    reply: dict[str, Any] = {}
    while "memory" not in reply:
        try:
            line = sys.stdin.buffer.readline()
            if not line:
                return
            _limit_cpu(time_limit + 1)
            reply = answer(json.loads(line))
        except MemoryError:
            reply = {"memory": True}
        except Exception as error:  # a fault of ours or of sympy's: reported, counted as a crash
            reply = {"error": f"{type(error).__name__}: {error}"[:300]}
        print(json.dumps(reply), file=replies, flush=True)


if __name__ == "__main__":
    main()
