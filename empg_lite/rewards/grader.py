"""The grader: runs rewards by their spec, cheap answers at once, the rest in processes that can be killed."""

from __future__ import annotations

import json
import math
import threading
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import Future
from functools import lru_cache, partial
from statistics import fmean
from typing import Any, NamedTuple

from empg_lite.core.errors import GraderUnusable
from empg_lite.core.rationale import FAILURES
from empg_lite.rewards.functions import ALGEBRA, MAX_TEXT, Outcome, Question, Reward, reward_of
from empg_lite.rewards.math.extract import extract
from empg_lite.rewards.self_test import self_test
from empg_lite.rewards.spec import Part, Spec, parse_spec
from empg_lite.rewards.verdict import Case, Verdict
from empg_lite.rewards.worker.pool import Reply, WorkerPool
from empg_lite.rewards.worker.usercode import UserCode, refuse_code, worker_setup

_BOXED_RULES = frozenset({"boxed", "hash"})


class _Rule(NamedTuple):
    """A spec, ready to be applied."""

    spec: Spec
    reward: Reward


@lru_cache(maxsize=64)
def _rule(text: str) -> _Rule:
    spec = parse_spec(text)
    return _Rule(spec, reward_of(spec.correctness))


class Grader:
    """Grades predictions; a context manager that owns the worker processes.

    Plain answers are decided here. Workers start when the first answer needs one: algebra and regular
    expressions, a Reasoning Gym task's scorer, and the user's own function each have processes of their own.
    Usable from any thread, several at once.

    Args:
        workers: processes at most, of each kind.
        time_limit: wall-clock seconds one answer may take in a worker.
        memory_limit: bytes of address space of a worker; of a scorer or a function, beyond what loading took.
        code: the user's function, where it may run.
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
            ValueError: ``spec`` names no reward.
            UsageError: ``spec`` is a function that this grader was not given.
            GraderUnusable: workers are needed and do not start.
        """
        futures = [self.submit(spec, case) for case in cases]
        return [future.result() for future in futures]

    def submit(self, spec: str, case: Case | tuple[str, str, str | None]) -> Future[Verdict]:
        """One verdict, later: the cheap is decided before this returns, the rest while the caller goes on.

        Raises:
            ValueError: ``spec`` names no reward.
            UsageError: ``spec`` is a function that this grader was not given.
            GraderUnusable: the grader is closed. The future raises it where workers do not start.
        """
        rule, case = _rule(spec), Case(*case)
        self._check_code(rule.spec)
        start = time.perf_counter()
        outcome = Outcome("too_long") if len(case.prediction) > MAX_TEXT else rule.reward(case)
        verdict: Future[Verdict] = Future()
        if isinstance(outcome, Outcome):
            verdict.set_result(_verdict(rule.spec, case, outcome, time.perf_counter() - start))
            return verdict
        question, seconds = outcome, time.perf_counter() - start

        def finish(replied: Future[Reply]) -> None:
            try:  # whatever goes wrong here belongs to whoever waits
                reply = replied.result()
                found = _outcome(question, reply)
                verdict.set_result(_verdict(rule.spec, case, found, seconds + reply.seconds))
            except BaseException as error:
                verdict.set_exception(error)

        self._pool_for(question.setup).submit(question.request).add_done_callback(finish)
        return verdict

    def _pool_for(self, setup: Mapping[str, Any]) -> WorkerPool:
        """The workers that have loaded ``setup``."""
        key = json.dumps(dict(setup), sort_keys=True)
        with self._lock:
            if key not in self._pools:
                if self._closed:
                    raise GraderUnusable("the grader is closed")
                code = worker_setup(self._code) if self._code and setup["kind"] == "python" else {}
                self._pools[key] = self._new_pool(setup={**setup, **code})
            return self._pools[key]

    def _check_code(self, spec: Spec) -> None:
        """The function asked for is the one that was allowed, to the byte."""
        ref = spec.python
        if ref is None:
            return
        given = self._code.ref if self._code else None
        if given is None or (ref.file, ref.function) != (given.file, given.function):
            raise refuse_code(ref, "data.reward")
        if ref.sha256 not in (None, given.sha256):
            raise GraderUnusable(f"another file is loaded, sha256 {given.sha256}", f"reward {spec}")

    def self_test(self, spec: str) -> None:
        """Grade answers whose verdict is known, before anything depends on it.

        Raises:
            ValueError: ``spec`` names no reward.
            UsageError: ``spec`` is a function that this grader was not given.
            GraderUnusable: a verdict is wrong, or a worker does not start; it names what failed.
        """
        rule = _rule(spec)
        self._check_code(rule.spec)

        def ask(setup: Mapping[str, Any], request: Mapping[str, Any]) -> Reply:
            return self._pool_for(setup).submit(request).result()

        self_test(rule.spec, self.grade_many, ask)


def _outcome(question: Question, reply: Reply) -> Outcome:
    if reply.failure is None:
        return question.read(reply.result)
    return Outcome(reply.failure, question.answer, error=reply.error)


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
    """The reward and its named parts; a failure of the grader has neither."""
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
    answer = (
        outcome.answer if outcome.answer and outcome.answer.rule != "pattern" else extract(case.prediction)
    )
    return 1.0 if answer and answer.rule in _BOXED_RULES else 0.5
