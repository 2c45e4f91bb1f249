"""``exact``: the whole text, or the answer read from it, is the gold answer to the letter."""

from __future__ import annotations

from empg_lite.rewards.kind import Case, Kind, Outcome
from empg_lite.rewards.math import Answer, extract, quoted, reading_steps


class Exact(Kind):
    """Compares text."""

    name = "exact"
    written = "{}"
    known_answers = (
        ("olive", r"\boxed{olive}", "equal"),
        ("olive", "olive", "equal"),
        ("olive", r"\boxed{oil}", "different"),
        ("1/2", r"\boxed{0.5}", "different"),
        ("olive", "", "no_answer"),
    )

    def grade(self, case: Case, argument: str) -> Outcome:
        whole, gold = case.prediction.strip(), case.gold.strip()
        if whole == gold:
            return Outcome("equal", Answer(whole, "whole")) if whole else Outcome("no_answer")
        answer = extract(case.prediction)
        if answer is None:
            return Outcome("no_answer")
        return Outcome("equal" if answer.text == gold else "different", answer)

    def explain(self, case: Case, argument: str) -> list[str]:
        gold = case.gold.strip()
        if case.prediction.strip() == gold:
            looked_at = reading_steps(case.prediction, None)[0]
            return [looked_at, "the whole text is the gold answer to the letter"]
        answer = extract(case.prediction)
        steps = reading_steps(case.prediction, answer)
        if answer is not None:
            steps.append(f"compared {quoted(answer.text)} with {quoted(gold)} to the letter")
        return steps


KIND = Exact()
