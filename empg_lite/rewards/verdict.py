"""What a grader is asked, and what it says."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from empg_lite.core.rationale import FAILURES, VERDICTS


class Case(NamedTuple):
    """One prediction to grade; a plain tuple of the first three works too.

    Attributes:
        question: the problem's text: whether it asks for a percentage, and its options, are read there.
        meta: what the data source knows of the problem (``Problem.meta``), as JSON types.
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
        reason: one of ``rationale.VERDICTS``, or of ``rationale.FAILURES`` when the grader found nothing. It
            speaks of correctness alone: ``equal`` where that is 1, whatever shaping makes of the reward.
        extracted: the answer read from the prediction.
        rule: name of the rule that found it (``extract.RULES``).
        gold: the gold answer as it was handed over.
        seconds: hand-over to verdict, without worker start-up and without waiting for a worker to be free.
        terms: parts of a combined reward, ``correct`` among them; empty for a plain reward.
        error: what a crash said.
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
