"""``gym``: what the scorer of the problem's own Reasoning Gym task says."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from empg_lite.rewards.kind import Ask, Case, GradeMany, Kind, Outcome, WorkerRequest, expect
from empg_lite.rewards.math import extract, reading_steps

#: Lower scores count as 0: many tasks pay them for any answer at all, and weights compare the samples of a
#: problem, so a problem whose samples are all wrong would weigh as much as a solved one.
LEAST_SCORE = 0.1
#: A task that every version of Reasoning Gym has.
_KNOWN = {"kind": "gym", "task": "chain_sum", "params": {}}


class Gym(Kind):
    """Asks the task's scorer, in a worker, about the extracted answer."""

    name = "gym"
    written = r"\boxed{{{}}}"

    def grade(self, case: Case, argument: str) -> Outcome | WorkerRequest:
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
            score = result["score"] if result["score"] >= LEAST_SCORE else 0.0
            return Outcome("equal" if score == 1 else "different", answer, score)

        request = {
            "op": "score",
            "answer": answer.text,
            "gold": case.gold,
            "question": case.question or "",
            "metadata": carried["metadata"],
        }
        setup = {"kind": "gym", "task": carried["task"], "params": carried["params"]}
        return WorkerRequest(request, read, answer, setup)

    def explain(self, case: Case, argument: str) -> list[str]:
        answer = extract(case.prediction)
        steps = reading_steps(case.prediction, answer)[1:]
        if answer is None:
            return steps
        carried = (case.meta or {}).get("gym")
        asked = (
            "asked the task's own scorer about it" if carried else "not scored: the problem's meta is missing"
        )
        return [*steps, asked]

    def self_test(self, grade_many: GradeMany, ask: Ask) -> None:
        made = ask(_KNOWN, {"op": "entry", "index": 0})
        why = str(made.error or made.failure or made.result.get("refused"))
        expect("entry" in made.result, why, "gym:chain_sum")
        entry = dict(made.result["entry"])
        gold = entry.pop("answer")
        for answer, correct in ((gold, True), ("none", False)):
            request = {"op": "score", "gold": gold, "answer": answer, **entry}
            score = ask(_KNOWN, request).result.get("score")
            expect((score == 1) == correct, f"score {score} for {answer!r}", f"gym:chain_sum: gold {gold!r}")


KIND = Gym()
