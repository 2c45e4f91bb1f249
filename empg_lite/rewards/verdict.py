"""What a grader says about one prediction."""

from __future__ import annotations

from dataclasses import dataclass

from empg_lite.rationale import FAILURES, VERDICTS


@dataclass(frozen=True, slots=True)
class Verdict:
    """A reward and why it was given.

    Attributes:
        reward: in [0, 1].
        reason: one of ``rationale.VERDICTS``, or of ``rationale.FAILURES`` when the grader found nothing.
        extracted: the answer read from the prediction.
        rule: name of the rule that found it (``extract.RULES``).
        gold: the gold answer as it was handed over.
        seconds: hand-over to verdict, without worker start-up.
    """

    reward: float
    reason: str
    extracted: str | None
    rule: str | None
    gold: str
    seconds: float

    def __post_init__(self) -> None:
        assert 0.0 <= self.reward <= 1.0, self.reward
        assert self.reason in VERDICTS or self.reason in FAILURES, self.reason

    @property
    def failed(self) -> bool:
        """True where the grader failed: the reward 0 is a placeholder, not a verdict."""
        return self.reason in FAILURES
