"""The grade command: why did this get that reward."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from empg_lite.cli.options import REWARDS, AllowCodeOption, DebugOption, JsonOption, Output, reward_option

if TYPE_CHECKING:
    from empg_lite.rewards import Grader, Verdict


def register(app: typer.Typer) -> None:
    """Add the command of this module."""
    app.command()(grade)


def grade(
    gold: Annotated[str | None, typer.Option(help="The right answer.", show_default=False)] = None,
    prediction: Annotated[
        str | None, typer.Option(help="What the model wrote; - reads stdin.", show_default=False)
    ] = None,
    cases: Annotated[
        Path | None,
        typer.Option(help="JSONL with `gold` and `prediction`; one verdict a line.", show_default=False),
    ] = None,
    question: Annotated[
        str | None, typer.Option(help="The problem's text: its options, its percent.", show_default=False)
    ] = None,
    reward: Annotated[str, typer.Option(help=f"{REWARDS}.")] = "math",
    allow_code: AllowCodeOption = False,
    as_json: JsonOption = False,
    debug: DebugOption = False,
) -> None:
    """Why did this get that reward?"""
    from empg_lite.core.errors import UsageError
    from empg_lite.rewards import Grader

    out = Output(as_json)
    reward, code = reward_option(reward, allow_code)
    with Grader(code=code) as grader:
        if cases is not None:
            if gold is not None or prediction is not None or question is not None:
                raise UsageError("--cases comes alone", "grade", "leave out --gold, --prediction, --question")
            _grade_cases(out, grader, cases, reward)
            return
        if gold is None or prediction is None:
            raise UsageError("give --gold and --prediction, or --cases FILE", "grade")
        text = sys.stdin.read() if prediction == "-" else prediction
        verdict = grader.grade(reward, gold, text, question)
        if as_json:
            out.raw(_verdict_record(verdict))
        else:
            _say_verdict(out, verdict, reward, text, question)


def _verdict_record(v: Verdict) -> dict[str, Any]:
    return {
        "reward": v.reward,
        "reason": v.reason,
        "extracted": v.extracted,
        "rule": v.rule,
        "gold": v.gold,
        "seconds": v.seconds,
        **({"terms": dict(v.terms)} if v.terms else {}),
        **({"error": v.error} if v.error else {}),
    }


def _grade_cases(out: Output, grader: Grader, path: Path, reward: str) -> None:
    """One object a line, in order, no summary: whatever happens to a worker."""
    from empg_lite.run.rollouts import read_cases

    for gold, prediction in read_cases(path):
        out.raw(_verdict_record(grader.grade(reward, gold, prediction)))


_REASONS = {
    "equal": "the answer read equals the gold answer",
    "different": "the answer read differs from the gold answer",
    "no_answer": "no answer was found in the text",
    "parse": "an answer was found but could not be read as mathematics",
    "too_long": "the text is too long to be graded",
    "truncated": "the text was cut off before its stop",
    "timeout": "the grader ran out of time: no verdict, the row is left out of training",
    "memory": "the grader ran out of memory: no verdict, the row is left out of training",
    "crash": "the grader died: no verdict, the row is left out of training",
}


def _say_verdict(out: Output, v: Verdict, reward: str, text: str, question: str | None) -> None:
    """The headline, then how it came about, step by step."""
    from empg_lite.core.safe_text import safe
    from empg_lite.rewards.explain import explain

    read = "nothing" if v.extracted is None else f"{v.extracted} (rule: {v.rule})"
    out.print(
        safe(f"reward {v.reward:g} · {v.reason}: {_REASONS[v.reason]}"),
        style="bold",
        markup=False,
        highlight=False,
    )
    out.print(safe(f"read    {read}"), markup=False, highlight=False)
    if v.terms:
        terms = " · ".join(f"{name} {value:.3g}" for name, value in v.terms.items())
        out.print(safe(f"terms   {terms}"), markup=False, highlight=False)
    if v.error:
        out.print(safe(f"error   {v.error}"), markup=False, highlight=False)
    out.print(safe(f"gold    {v.gold}"), markup=False, highlight=False)
    out.print(f"by      {reward}, in {v.seconds * 1000:.2f} ms", markup=False, highlight=False)
    for number, step in enumerate(explain(reward, v.gold, text, question, verdict=v), 1):
        out.print(safe(f"  {number}. {step}"), markup=False, highlight=False)
