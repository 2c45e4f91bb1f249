"""The reward functions, by name, and the grader that runs them."""

from __future__ import annotations

import difflib
import re
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from empg_lite.rewards.compare import asks_percentage, cheap_leaf, compare, is_empty
from empg_lite.rewards.extract import Answer, extract
from empg_lite.rewards.normalize import normalize
from empg_lite.rewards.pool import Reply, WorkerPool
from empg_lite.rewards.verdict import Verdict

#: Characters of a prediction that are read at all: several times what a model writes in one answer.
MAX_TEXT = 200_000
#: Characters of an answer that are compared as mathematics.
MAX_ANSWER = 2_000


@dataclass(frozen=True, slots=True)
class Outcome:
    """A verdict without its time."""

    reason: str
    answer: Answer | None = None

    @property
    def reward(self) -> float:
        return 1.0 if self.reason == "equal" else 0.0


@dataclass(frozen=True, slots=True)
class Question:
    """What only the worker can decide: the request, and how its reply is read."""

    request: Mapping[str, Any]
    read: Callable[[Mapping[str, Any]], Outcome]
    answer: Answer | None = None


class Reward(Protocol):
    """A reward function: decides at once, or says what to ask the worker."""

    def __call__(self, gold: str, prediction: str, question: str | None) -> Outcome | Question: ...


def _gold_answer(gold: str, *, numeric: bool) -> str:
    """A gold answer may be given bare, boxed, or as a worked solution that ends in one."""
    if "####" in gold or "boxed" in gold or "fbox" in gold:
        answer = extract(gold, numeric=numeric)
        if answer is not None:
            return answer.text
    return gold.strip()


def _equivalent(gold: str, answer: Answer, question: str | None) -> Outcome | Question:
    """Whether an extracted answer means the same as the gold one."""
    if max(len(gold), len(answer.text)) > MAX_ANSWER:
        return Outcome("equal" if gold == answer.text else "too_long", answer)
    one, other = normalize(gold), normalize(answer.text)
    if is_empty(other):
        return Outcome("equal", answer) if one.lower() == other.lower() else Outcome("no_answer")
    percent = "%" in other and asks_percentage(question)
    equal = compare(one, other, cheap_leaf(percent))
    if equal is not None:
        return Outcome("equal" if equal else "different", answer)

    def read(result: Mapping[str, Any]) -> Outcome:
        if "unparsable" in result:
            return Outcome("parse", answer)
        return Outcome("equal" if result["equal"] else "different", answer)

    return Question({"op": "equal", "gold": one, "prediction": other, "percent": percent}, read, answer)


def _mathematical(numeric: bool) -> Reward:
    def reward(gold: str, prediction: str, question: str | None) -> Outcome | Question:
        answer = extract(prediction, numeric=numeric)
        if answer is None:
            return Outcome("no_answer" if prediction.strip() or gold.strip() else "equal")
        return _equivalent(_gold_answer(gold, numeric=numeric), answer, question)

    return reward


def _exact(gold: str, prediction: str, question: str | None) -> Outcome:
    """The whole prediction, or the answer read from it, is the gold to the letter."""
    whole = prediction.strip()
    if whole == gold.strip():
        return Outcome("equal", Answer(whole, "whole")) if whole else Outcome("no_answer")
    answer = extract(prediction)
    if answer is None:
        return Outcome("no_answer")
    return Outcome("equal" if answer.text == gold.strip() else "different", answer)


def _regex(pattern: str) -> Reward:
    def reward(gold: str, prediction: str, question: str | None) -> Outcome | Question:
        def read(result: Mapping[str, Any]) -> Outcome:
            match = result["match"]
            if match is None:
                return Outcome("no_answer")
            group = match["group"]
            if not has_group:
                return Outcome("equal", Answer("", "pattern"))
            if group is None or not group.strip():
                return Outcome("no_answer")
            same = group.strip() == gold.strip()
            return Outcome("equal" if same else "different", Answer(group.strip(), "pattern"))

        return Question({"op": "regex", "pattern": pattern, "text": prediction}, read)

    has_group = re.compile(pattern).groups > 0
    return reward


_REWARDS: dict[str, Reward] = {"gsm8k": _mathematical(True), "math": _mathematical(False), "exact": _exact}


def reward_names() -> tuple[str, ...]:
    """What may be asked for; ``regex`` takes a pattern, as in ``regex:answer: (\\d+)``."""
    return (*_REWARDS, "regex")


def _reward(spec: str) -> Reward:
    name, _, pattern = spec.partition(":")
    if name in _REWARDS and name == spec:
        return _REWARDS[name]
    if name == "regex" and pattern:
        try:
            return _regex(pattern)
        except (re.error, RecursionError, OverflowError) as error:
            raise ValueError(f"reward {spec!r}: not a regular expression: {error}") from None
    if name == "regex":
        raise ValueError(r"reward 'regex' needs a pattern, as in 'regex:answer: (\d+)'")
    close = difflib.get_close_matches(name, reward_names(), n=1)
    hint = f"did you mean {close[0]!r}?" if close else f"there are: {', '.join(reward_names())}"
    raise ValueError(f"unknown reward {spec!r}; {hint}")


def check_reward(spec: str) -> None:
    """Raise ValueError, with one line saying what is wrong, unless ``spec`` names a reward."""
    _reward(spec)


class Grader:
    """Grades predictions; a context manager that owns the worker processes.

    Plain answers are decided here. Workers start when the first answer needs algebra (or a user's regular
    expression). Usable from any thread, several at once.

    Args:
        workers: processes at most.
        time_limit: wall-clock seconds one answer may take in a worker.
        memory_limit: bytes of address space of a worker.
    """

    def __init__(self, *, workers: int = 2, time_limit: float = 1.0, memory_limit: int = 1 << 30) -> None:
        self._pool = WorkerPool(workers=workers, time_limit=time_limit, memory_limit=memory_limit)

    def __enter__(self) -> Grader:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()

    def close(self) -> None:
        """End the workers."""
        self._pool.close()

    def worker_pids(self) -> list[int]:
        """Process ids of the running workers; empty until one was needed."""
        return self._pool.pids()

    def grade(self, spec: str, gold: str, prediction: str, question: str | None = None) -> Verdict:
        """One verdict. See ``grade_many``."""
        return self.grade_many(spec, [(gold, prediction, question)])[0]

    def grade_many(self, spec: str, items: Sequence[tuple[str, str, str | None]]) -> list[Verdict]:
        """Verdicts for (gold, prediction, question or None), in order.

        Raises:
            ValueError: ``spec`` names no reward.
            GraderUnusable: workers are needed and do not start.
        """
        reward = _reward(spec)
        verdicts: list[Verdict | None] = []
        waiting: list[tuple[int, Question, float]] = []
        for gold, prediction, problem in items:
            start = time.perf_counter()
            outcome = Outcome("too_long") if len(prediction) > MAX_TEXT else reward(gold, prediction, problem)
            seconds = time.perf_counter() - start
            if isinstance(outcome, Question):
                waiting.append((len(verdicts), outcome, seconds))
                verdicts.append(None)
            else:
                verdicts.append(_verdict(outcome, gold, seconds))
        if waiting:
            replies = self._pool.run([question.request for _, question, _ in waiting])
            for (index, question, seconds), reply in zip(waiting, replies, strict=True):
                verdicts[index] = _verdict(
                    _outcome(question, reply), items[index][0], seconds + reply.seconds
                )
        return [verdict for verdict in verdicts if verdict is not None]


def _outcome(question: Question, reply: Reply) -> Outcome:
    return Outcome(reply.failure, question.answer) if reply.failure else question.read(reply.result)


def _verdict(outcome: Outcome, gold: str, seconds: float) -> Verdict:
    answer = outcome.answer
    return Verdict(
        outcome.reward,
        outcome.reason,
        answer.text if answer else None,
        answer.rule if answer else None,
        gold,
        seconds,
    )
