"""The grader: decides cheap answers at once and the rest in processes that can be killed."""

from __future__ import annotations

import json
import math
import threading
import time
from concurrent.futures import Future
from functools import partial
from statistics import fmean
from typing import TYPE_CHECKING, Any

from empg_lite.core.errors import GraderUnusable
from empg_lite.core.rationale import FAILURES
from empg_lite.rewards.kind import ALGEBRA, MAX_TEXT, Case, Outcome, Verdict, WorkerRequest
from empg_lite.rewards.kinds.python import UserCode, python_ref, refuse_code
from empg_lite.rewards.spec import Part, Spec, parse_spec
from empg_lite.rewards.worker.pool import Reply, WorkerPool

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

_BOXED_RULES = frozenset({"boxed", "hash"})


class Grader:
    """Grades predictions; a context manager that owns the worker processes.

    Plain answers are decided in this process. Workers start when an answer first needs one: algebra,
    regular expressions, each Reasoning Gym task and the user's function have a pool each.
    Thread-safe.

    Args:
        workers: maximum number of processes per pool.
        time_limit: wall-clock seconds that one answer may take in a worker.
        memory_limit: address space of a worker in bytes; for a scorer or a function, in addition to what
            loading it took.
        code: the user's function, if it may run.
    """

    def __init__(
        self,
        *,
        workers: int = 2,
        time_limit: float = 1.0,
        memory_limit: int = 1 << 30,
        code: UserCode | None = None,
    ) -> None:
        self._new_pool = partial(
            WorkerPool, workers=workers, time_limit=time_limit, memory_limit=memory_limit
        )
        self._code = code
        self._lock, self._closed = threading.Lock(), False
        self._pools: dict[str, WorkerPool] = {}
        self._pool = self._pool_for(ALGEBRA)

    def __enter__(self) -> Grader:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()

    def close(self) -> None:
        """End the workers."""
        with self._lock:
            self._closed = True
        for pool in self._pools.values():
            pool.close()

    def worker_pids(self) -> list[int]:
        """Process ids of the running workers; empty until one was needed."""
        return [pid for pool in list(self._pools.values()) for pid in pool.pids()]

    def grade(self, spec: str, gold: str, prediction: str, question: str | None = None) -> Verdict:
        """One verdict. See ``grade_many``."""
        return self.grade_many(spec, [Case(gold, prediction, question)])[0]

    def grade_many(self, spec: str, cases: Sequence[Case | tuple[str, str, str | None]]) -> list[Verdict]:
        """Verdicts, in order.

        Raises:
            ValueError: ``spec`` is invalid.
            UsageError: ``spec`` is a function that this grader was not given.
            GraderUnusable: workers are needed and do not start.
        """
        futures = [self.submit(spec, case) for case in cases]
        return [future.result() for future in futures]

    def submit(self, spec: str, case: Case | tuple[str, str, str | None]) -> Future[Verdict]:
        """A verdict in the future. A cheap one is done when this returns; a worker decides the others.

        Raises:
            ValueError: ``spec`` is invalid.
            UsageError: ``spec`` is a function that this grader was not given.
            GraderUnusable: the grader is closed. The future raises it if workers do not start.
        """
        parsed, case = parse_spec(spec), Case(*case)
        self._check_code(parsed)
        start = time.perf_counter()
        if len(case.prediction) > MAX_TEXT:
            outcome: Outcome | WorkerRequest = Outcome("too_long")
        else:
            outcome = parsed.kind.grade(case, parsed.correctness.argument)
        verdict: Future[Verdict] = Future()
        if isinstance(outcome, Outcome):
            verdict.set_result(_verdict(parsed, case, outcome, time.perf_counter() - start))
            return verdict
        request, seconds = outcome, time.perf_counter() - start

        def finish(replied: Future[Reply]) -> None:
            try:  # an error in here belongs to whoever waits for the verdict
                reply = replied.result()
                found = _outcome(request, reply)
                verdict.set_result(_verdict(parsed, case, found, seconds + reply.seconds))
            except BaseException as error:
                verdict.set_exception(error)

        self._pool_for(request.setup).submit(request.request).add_done_callback(finish)
        return verdict

    def _pool_for(self, setup: Mapping[str, Any]) -> WorkerPool:
        """The workers that have loaded ``setup``."""
        key = json.dumps(dict(setup), sort_keys=True)
        with self._lock:
            if key not in self._pools:
                if self._closed:
                    raise GraderUnusable("the grader is closed")
                code = self._code.worker_setup() if self._code and setup["kind"] == "python" else {}
                self._pools[key] = self._new_pool(setup={**setup, **code})
            return self._pools[key]

    def _check_code(self, spec: Spec) -> None:
        """Raise unless the function in ``spec`` is, byte for byte, the one that was allowed."""
        ref = python_ref(spec)
        if ref is None:
            return
        given = self._code.ref if self._code else None
        if given is None or (ref.file, ref.function) != (given.file, given.function):
            raise refuse_code(ref, "data.reward")
        if ref.sha256 not in (None, given.sha256):
            raise GraderUnusable(f"another file is loaded, sha256 {given.sha256}", f"reward {spec}")

    def self_test(self, spec: str) -> None:
        """Grade answers whose verdict is known, before anything depends on the grader.

        Raises:
            ValueError: ``spec`` is invalid.
            UsageError: ``spec`` is a function that this grader was not given.
            GraderUnusable: a verdict is wrong, or a worker does not start; it names what failed.
        """
        parsed = parse_spec(spec)
        self._check_code(parsed)
        parsed.kind.self_test(
            self.grade_many, lambda setup, request: self._pool_for(setup).submit(request).result()
        )


def _outcome(request: WorkerRequest, reply: Reply) -> Outcome:
    if reply.failure is None:
        return request.read(reply.result)
    return Outcome(reply.failure, request.answer, error=reply.error)


def _verdict(spec: Spec, case: Case, outcome: Outcome, seconds: float) -> Verdict:
    answer = outcome.answer
    reward, terms = _combine(spec, case, outcome)
    return Verdict(
        reward,
        outcome.reason,
        answer.text if answer else None,
        answer.rule if answer else None,
        case.gold,
        seconds,
        terms,
        outcome.error,
    )


def _combine(spec: Spec, case: Case, outcome: Outcome) -> tuple[float, dict[str, float]]:
    """The reward and its named terms; 0 and none where the grader failed."""
    if outcome.reason in FAILURES:
        return 0.0, {}
    if not spec.shaping and not outcome.terms:
        return outcome.correct, {}
    shaping = {part.name: _shaping(part, case, outcome) for part in spec.shaping}
    terms = {"correct": outcome.correct, **outcome.terms, **shaping}
    return fmean(terms.values()) if spec.added else math.prod(terms.values()), terms


def _shaping(part: Part, case: Case, outcome: Outcome) -> float:
    """A shaping term, in [0, 1]."""
    if part.name == "concise":
        return min(1.0, int(part.argument) / max(1, len(case.prediction)))
    answer = outcome.answer
    if answer is None or answer.rule == "pattern":
        from empg_lite.rewards.math import extract

        answer = extract(case.prediction)
    return 1.0 if answer and answer.rule in _BOXED_RULES else 0.5
