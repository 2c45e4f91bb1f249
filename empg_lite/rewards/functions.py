"""The kinds of correctness, by name: each decides at once, or says what to ask a worker."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any, Protocol

from empg_lite.rewards.choice import options_of, read_choice, read_letter
from empg_lite.rewards.math.compare import asks_percentage, cheap_leaf, compare, is_empty
from empg_lite.rewards.math.extract import Answer, extract
from empg_lite.rewards.math.normalize import normalize
from empg_lite.rewards.spec import Part
from empg_lite.rewards.verdict import Case

#: Characters of a prediction that are read at all: several times what a model writes in one answer.
MAX_TEXT = 200_000
#: Scores below this are what many Reasoning Gym tasks pay for any answer at all. A problem whose samples are
#: all wrong would then weigh as much as a solved one: weights compare samples of a problem, not their worth.
GYM_LEAST = 0.1
#: Characters of an answer that are compared as mathematics.
MAX_ANSWER = 2_000


#: What a worker that compares mathematics has to load.
ALGEBRA: Mapping[str, Any] = MappingProxyType({"kind": "algebra"})


@dataclass(frozen=True, slots=True)
class Outcome:
    """What was found out about one prediction.

    Attributes:
        score: correctness in [0, 1]; None is 1 where the reason is ``equal`` and 0 elsewhere.
        terms: shaping terms that the reward itself gave, each in [0, 1].
        error: what a crash said.
    """

    reason: str
    answer: Answer | None = None
    score: float | None = None
    terms: Mapping[str, float] = field(default_factory=dict)
    error: str | None = None

    @property
    def correct(self) -> float:
        return self.score if self.score is not None else float(self.reason == "equal")


@dataclass(frozen=True, slots=True)
class Question:
    """What only a worker can decide: the request, how its reply is read, and what the worker has to load."""

    request: Mapping[str, Any]
    read: Callable[[Mapping[str, Any]], Outcome]
    answer: Answer | None = None
    setup: Mapping[str, Any] = field(default_factory=lambda: ALGEBRA)


class Reward(Protocol):
    """A reward function: decides at once, or says what to ask a worker."""

    def __call__(self, case: Case) -> Outcome | Question: ...


def gold_answer(gold: str, *, numeric: bool) -> str:
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
    def reward(case: Case) -> Outcome | Question:
        answer = extract(case.prediction, numeric=numeric)
        if answer is None:
            return Outcome("no_answer" if case.prediction.strip() or case.gold.strip() else "equal")
        return _equivalent(gold_answer(case.gold, numeric=numeric), answer, case.question)

    return reward


def _exact(case: Case) -> Outcome:
    """The whole prediction, or the answer read from it, is the gold to the letter."""
    whole, gold = case.prediction.strip(), case.gold.strip()
    if whole == gold:
        return Outcome("equal", Answer(whole, "whole")) if whole else Outcome("no_answer")
    answer = extract(case.prediction)
    if answer is None:
        return Outcome("no_answer")
    return Outcome("equal" if answer.text == gold else "different", answer)


def _regex(pattern: str) -> Reward:
    def reward(case: Case) -> Outcome | Question:
        def read(result: Mapping[str, Any]) -> Outcome:
            match = result["match"]
            if match is None:
                return Outcome("no_answer")
            group = match["group"]
            if not has_group:
                return Outcome("equal", Answer("", "pattern"))
            if group is None or not group.strip():
                return Outcome("no_answer")
            same = group.strip() == case.gold.strip()
            return Outcome("equal" if same else "different", Answer(group.strip(), "pattern"))

        return Question({"op": "regex", "pattern": pattern, "text": case.prediction}, read)

    has_group = re.compile(pattern).groups > 0
    return reward


def _python(case: Case) -> Outcome | Question:
    """The user's function decides; the answer is read for the record only."""
    answer = extract(case.prediction)

    def read(result: Mapping[str, Any]) -> Outcome:
        terms = dict(result["terms"])
        score = terms.pop("correct")
        return Outcome("equal" if score == 1 else "different", answer, score, terms)

    request = {
        "op": "call",
        "completion": case.prediction,
        "gold": case.gold,
        "question": case.question or "",
        "meta": dict(case.meta or {}),
    }
    return Question(request, read, answer, {"kind": "python"})


def _gym(case: Case) -> Outcome | Question:
    """The scorer of the Reasoning Gym task that the problem comes from decides."""
    carried = (case.meta or {}).get("gym")
    if not isinstance(carried, Mapping) or not {"task", "params", "metadata"} <= set(carried):
        return Outcome(
            "crash", error="the problem's meta carries no Reasoning Gym entry: see source gym:TASK"
        )
    answer = extract(case.prediction)
    if answer is None:
        return Outcome("no_answer")

    def read(result: Mapping[str, Any]) -> Outcome:
        if "unreadable" in result:
            return Outcome("parse", answer)
        score = result["score"] if result["score"] >= GYM_LEAST else 0.0
        return Outcome("equal" if score == 1 else "different", answer, score)

    request = {
        "op": "score",
        "answer": answer.text,
        "gold": case.gold,
        "question": case.question or "",
        "metadata": carried["metadata"],
    }
    return Question(
        request, read, answer, {"kind": "gym", "task": carried["task"], "params": carried["params"]}
    )


def _choice(case: Case) -> Outcome:
    """The letter read from the prediction is the gold one."""
    options = options_of(case.question or "")
    gold = read_letter(case.gold, options)
    if gold is None:
        return Outcome("crash", error=f"the gold answer {case.gold!r} is no letter A-J and no option")
    answer = read_choice(case.prediction, options)
    if answer is None:
        return Outcome("no_answer")
    return Outcome("equal" if answer.text == gold else "different", answer)


_KINDS: dict[str, Reward] = {
    "gsm8k": _mathematical(True),
    "math": _mathematical(False),
    "exact": _exact,
    "choice": _choice,
    "gym": _gym,
    "python": _python,
}


#: How a gold answer is written by a model that knows it; other rewards alone know how theirs is.
_WRITTEN: Mapping[str, str] = {"gsm8k": "#### {}", "math": "\\boxed{{{}}}", "choice": "{}"}


def unreadable_gold(part: Part, gold: str, question: str) -> str | None:
    """Why no answer could ever earn this gold, or None. Cheap: what only a worker could tell passes.

    A solution that ends in nothing but the gold answer, written the way the reward asks for, is read; where
    not even that has an answer the gold is no number, no letter, nothing.
    """
    written = _WRITTEN.get(part.name)
    if written is None:
        return None
    plain = gold_answer(gold, numeric=part.name == "gsm8k") if part.name != "choice" else gold
    outcome = reward_of(part)(Case(gold, written.format(plain), question))
    if isinstance(outcome, Question) or outcome.reason not in ("no_answer", "crash"):
        return None
    return outcome.error or f"the {part.name} reward reads no answer in {gold[:80]!r}"


def reward_of(part: Part) -> Reward:
    """The reward function that a part of a spec names."""
    return _regex(part.argument) if part.name == "regex" else _KINDS[part.name]
