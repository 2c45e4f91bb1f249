"""What a kind of reward defines, what it is asked, and what it answers."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple

from empg_lite.core.errors import GraderUnusable
from empg_lite.core.rationale import FAILURES, VERDICTS

if TYPE_CHECKING:
    from empg_lite.rewards.math import Answer
    from empg_lite.rewards.worker.pool import Reply

#: Longest prediction that is read, in characters: several times what a model writes in one answer.
MAX_TEXT = 200_000
#: What a worker that compares mathematics has to load.
ALGEBRA: Mapping[str, Any] = MappingProxyType({"kind": "algebra"})


class Case(NamedTuple):
    """One prediction to grade; a plain tuple of the first three works too.

    Attributes:
        question: the problem's text, which may ask for a percentage or list the options.
        meta: what the data source knows about the problem (``Problem.meta``), as JSON types.
    """

    gold: str
    prediction: str
    question: str | None = None
    meta: Mapping[str, Any] | None = None


@dataclass(frozen=True, slots=True)
class Verdict:
    """A reward and why it was given.

    Attributes:
        reward: in [0, 1].
        reason: one of ``rationale.VERDICTS``, or of ``rationale.FAILURES`` when the grader failed. It
            describes correctness alone: ``equal`` where that is 1, whatever shaping does to the reward.
        extracted: the answer read from the prediction.
        rule: name of the rule that found it (``math.boxes.RULES``).
        gold: the gold answer as it was passed in.
        seconds: from submission to verdict, excluding worker start-up and the wait for a free worker.
        terms: parts of a combined reward, including ``correct``; empty for a plain reward.
        error: the message of a crash.
    """

    reward: float
    reason: str
    extracted: str | None
    rule: str | None
    gold: str
    seconds: float
    terms: Mapping[str, float] = field(default_factory=dict)
    error: str | None = None

    def __post_init__(self) -> None:
        assert 0.0 <= self.reward <= 1.0, self.reward
        assert self.reason in VERDICTS or self.reason in FAILURES, self.reason

    @property
    def failed(self) -> bool:
        """True where the grader failed: the reward 0 is a placeholder, not a verdict."""
        return self.reason in FAILURES


@dataclass(frozen=True, slots=True)
class Outcome:
    """What a kind of reward found out about one prediction.

    Attributes:
        score: correctness in [0, 1]; None means 1 where the reason is ``equal`` and 0 elsewhere.
        terms: shaping terms that the reward itself returned, each in [0, 1].
        error: the message of a crash.
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
class WorkerRequest:
    """What only a worker process can decide.

    Attributes:
        request: sent to the worker as JSON.
        read: turns the worker's reply into an outcome.
        answer: the answer read from the prediction, reported where the worker fails.
        setup: what the worker has to load; ``kind`` names a module in ``worker/``.
    """

    request: Mapping[str, Any]
    read: Callable[[Mapping[str, Any]], Outcome]
    answer: Answer | None = None
    setup: Mapping[str, Any] = field(default_factory=lambda: ALGEBRA)


GradeMany = Callable[[str, Sequence[Case]], list[Verdict]]
#: (what the worker has to load, request) -> reply
Ask = Callable[[Mapping[str, Any], Mapping[str, Any]], "Reply"]


class Kind(ABC):
    """One way to decide whether an answer is right.

    Attributes:
        name: as a spec spells it; also the name of its file in ``kinds/``, which ends in ``KIND = ...``.
        needs: what has to follow the colon, for error messages; empty where nothing may.
        written: how a model that knows the answer writes it, with ``{}`` for the gold answer; None where
            only the reward itself can tell.
        known_answers: rows of (gold, prediction, reason) that the self-test grades.
        known_spec: the spec that grades those rows; the name where empty.
    """

    name: ClassVar[str]
    needs: ClassVar[str] = ""
    written: ClassVar[str | None] = None
    known_answers: ClassVar[Sequence[tuple[str, str, str]]] = ()
    known_spec: ClassVar[str] = ""

    @abstractmethod
    def grade(self, case: Case, argument: str) -> Outcome | WorkerRequest:
        """Decide now, or say what to ask a worker. ``argument`` is what follows the colon in the spec."""

    @abstractmethod
    def explain(self, case: Case, argument: str) -> list[str]:
        """The steps that lead to the verdict, in plain words."""

    def argument_error(self, argument: str) -> str | None:
        """What is wrong with the text after the colon, continuing "reward '...'"; None where it is valid."""
        return f" needs {self.needs}" if self.needs and not argument else None

    def read_gold(self, gold: str) -> tuple[str, str]:
        """The answer that predictions are compared with, and the rule that read it from the gold cell."""
        return gold.strip(), "whole"

    def unreadable_gold(self, gold: str, question: str) -> str | None:
        """Why no answer could ever match this gold answer, or None. Cheap: asks no worker."""
        return None

    def written_gold(self, gold: str) -> str | None:
        """The gold answer as a model would write it; see ``written``."""
        return None if self.written is None else self.written.format(gold)

    def self_test(self, grade_many: GradeMany, ask: Ask) -> None:
        """Grade ``known_answers``.

        Raises:
            GraderUnusable: a verdict is wrong, or a worker does not start.
        """
        spec = self.known_spec or self.name
        verdicts = grade_many(spec, [Case(gold, prediction) for gold, prediction, _ in self.known_answers])
        for (gold, prediction, reason), verdict in zip(self.known_answers, verdicts, strict=True):
            got = f"{verdict.reason} ({verdict.error})" if verdict.error else verdict.reason
            where = f"{spec}: gold {gold!r}, prediction {prediction!r}"
            expect(verdict.reason == reason, f"{got} instead of {reason}", where)


def expect(holds: bool, what: str, where: str = "") -> None:
    """Fail a self-test unless ``holds``.

    Raises:
        GraderUnusable: naming ``what`` went wrong and ``where``.
    """
    if not holds:
        todo = "reinstall empg-lite, math-verify and sympy"
        raise GraderUnusable(f"the grader fails its self-test: {what}", where, todo)
