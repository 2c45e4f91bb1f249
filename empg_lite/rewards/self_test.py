"""Answers whose verdict is beyond doubt, graded before anything depends on the grader."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from empg_lite.core.errors import GraderUnusable
from empg_lite.rewards.spec import Spec
from empg_lite.rewards.verdict import Case, Verdict
from empg_lite.rewards.worker.pool import Reply

_REINSTALL = "reinstall empg-lite, math-verify and sympy"
_MATH = [
    ("18", "so 18.\n#### 18", "equal"),
    ("18", "so 17.\n#### 17", "different"),
    ("1,234", r"The total is \boxed{1234}.", "equal"),
    ("1234", r"\boxed{1,234}", "equal"),
    ("-3", r"\boxed{3}", "different"),
    ("-3", r"\boxed{-3}", "equal"),
    ("0.5", r"\boxed{\frac{1}{2}}", "equal"),
    ("1/3", r"\boxed{0.33}", "different"),
    ("7", r"\boxed{7.0}", "equal"),
    ("7", r"\boxed{70}", "different"),
    ("18", "", "no_answer"),
    ("18", r"\boxed{}", "no_answer"),
    # From here on in a worker.
    (r"3\sqrt{5}", r"\boxed{\sqrt{45}}", "equal"),
    (r"3\sqrt{5}", r"\boxed{\sqrt{46}}", "different"),
    (r"\frac{\sqrt{3}}{3}", r"\boxed{\frac{1}{\sqrt{3}}}", "equal"),
    (r"x^2+2x+1", r"\boxed{(x+1)^2}", "equal"),
    (r"x^2+2x+1", r"\boxed{(x-1)^2}", "different"),
    (r"2^{10}\pi", r"\boxed{1024\pi}", "equal"),
]
_EXACT = [
    ("olive", r"\boxed{olive}", "equal"),
    ("olive", "olive", "equal"),
    ("olive", r"\boxed{oil}", "different"),
    ("1/2", r"\boxed{0.5}", "different"),
    ("olive", "", "no_answer"),
]
_CHOICE = [
    ("B", "The answer is (B).", "equal"),
    ("(B)", r"\boxed{B}", "equal"),
    ("B", r"\boxed{C}", "different"),
    ("B", r"\boxed{B \text{ or } C}", "no_answer"),
]
_PATTERN = r"regex:n = (\d+)"
_REGEX = [
    ("7", "n = 3, then n = 7", "equal"),
    ("3", "n = 3, then n = 7", "different"),
    ("3", "m = 3", "no_answer"),
]
_KNOWN = {
    "gsm8k": ("gsm8k", _MATH),
    "math": ("math", _MATH),
    "exact": ("exact", _EXACT),
    "choice": ("choice", _CHOICE),
    "regex": (_PATTERN, _REGEX),
}
#: A task that every version of Reasoning Gym has.
_GYM = {"kind": "gym", "task": "chain_sum", "params": {}}

GradeMany = Callable[[str, Sequence[Case]], list[Verdict]]
Ask = Callable[[Mapping[str, Any], Mapping[str, Any]], Reply]


def self_test(spec: Spec, grade_many: GradeMany, ask: Ask) -> None:
    """Grade known answers of the kind that ``spec`` is.

    Args:
        grade_many: the grader's.
        ask: (what the worker has to load, request) -> reply.

    Raises:
        GraderUnusable: a verdict is wrong, or a worker does not start; it names what failed.
    """
    kind = spec.correctness.name
    if kind == "python":  # what it should say is the user's business; that it loads is ours
        _expect(
            ask({"kind": "python"}, {"op": "ping"}).failure is None, "the function's worker does not answer"
        )
    elif kind == "gym":
        _test_gym(ask)
    else:
        name, pairs = _KNOWN[kind]
        verdicts = grade_many(name, [Case(gold, prediction) for gold, prediction, _ in pairs])
        for (gold, prediction, reason), verdict in zip(pairs, verdicts, strict=True):
            said = f"{verdict.reason} ({verdict.error})" if verdict.error else verdict.reason
            where = f"{name}: gold {gold!r}, prediction {prediction!r}"
            _expect(verdict.reason == reason, f"{said} instead of {reason}", where)


def _test_gym(ask: Ask) -> None:
    made = ask(_GYM, {"op": "entry", "index": 0})
    _expect(
        "entry" in made.result, str(made.error or made.failure or made.result.get("refused")), "gym:chain_sum"
    )
    entry = made.result["entry"]
    for answer, right in ((entry["answer"], True), ("none", False)):
        request = {"op": "score", "gold": entry["answer"], "answer": answer, **_without_answer(entry)}
        score = ask(_GYM, request).result.get("score")
        _expect(
            (score == 1) == right, f"score {score} for {answer!r}", f"gym:chain_sum: gold {entry['answer']!r}"
        )


def _without_answer(entry: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in entry.items() if name != "answer"}


def _expect(holds: bool, what: str, where: str = "") -> None:
    if not holds:
        raise GraderUnusable(f"the grader fails its self-test: {what}", where, _REINSTALL)
