"""Scoring, the middle of the E-step: rationales get their rewards. Needs neither a model nor torch.

``train`` scores while it samples; ``score`` scores a file, on any machine, at any time.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from empg_lite.core.control import stop_point
from empg_lite.rewards.kind import Case, Verdict

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence
    from concurrent.futures import Future

    from empg_lite.core.rationale import Rationale
    from empg_lite.rewards.grader import Grader

#: (problem ID, completion): what identifies a graded completion.
VerdictKey = tuple[str, str]


class Scorer:
    """Grades rationales while others are still being sampled.

    Plain answers are graded at once, the others in the grader's processes, so little is left to do when the
    last sample ends. A truncated rationale is wrong without being read.

    Args:
        reward: the reward, as in a recipe's ``data.reward``.
        known: earlier verdicts, which are reused.
        on_done: called with 1 for each submitted rationale (progress).

    Attributes:
        error: message of the last grader failure, if it had one.
    """

    def __init__(
        self,
        grader: Grader,
        reward: str,
        known: Mapping[VerdictKey, Rationale] | None = None,
        on_done: Callable[[int], None] | None = None,
    ) -> None:
        self._grader, self._reward, self._known, self._on_done = grader, reward, known or {}, on_done
        self._submitted: dict[int, tuple[Rationale, Future[Verdict] | None]] = {}  # by id(): not hashable
        self.error: str | None = None

    def submit(self, r: Rationale) -> None:
        """Start grading a rationale.

        Raises:
            GraderUnusable: the grader cannot start.
        """
        future = None
        if r.finish_reason != "length" and self._before(r) is None:
            future = self._grader.submit(self._reward, Case(r.gold, r.completion, r.question or None, r.meta))
        self._submitted[id(r)] = r, future
        if self._on_done:
            self._on_done(1)

    def ready(self, r: Rationale) -> bool:
        """Whether the verdict on a submitted rationale is in."""
        future = self._submitted[id(r)][1]
        return future is None or future.done()

    def scored(self, rationales: Sequence[Rationale]) -> list[Rationale]:
        """The rationales with their verdicts, in order; waits for pending ones.

        Raises:
            GraderUnusable: the grader cannot start.
        """
        for r in rationales:
            if id(r) not in self._submitted:
                self.submit(r)
        found = []
        for r in rationales:
            stop_point()
            found.append(self._verdict(r))
        return found

    def _before(self, r: Rationale) -> Rationale | None:
        before = self._known.get((r.problem_id, r.completion))
        return None if before is None or before.failed or before.finish_reason != "stop" else before

    def _verdict(self, r: Rationale) -> Rationale:
        if r.finish_reason == "length":
            return replace(r, reward=0.0, reason="truncated", extracted=None, rule=None, terms={})
        future = self._submitted[id(r)][1]
        v: Verdict | Rationale | None = future.result() if future else self._before(r)
        assert v is not None and v.reward is not None
        if isinstance(v, Verdict):
            self.error = v.error or self.error
        return replace(r, reward=v.reward, reason=v.reason, extracted=v.extracted, rule=v.rule, terms=v.terms)


def score(rationales: Sequence[Rationale], grader: Grader, reward: str) -> list[Rationale]:
    """Grade complete rationales; see ``Scorer``."""
    return Scorer(grader, reward).scored(rationales)
