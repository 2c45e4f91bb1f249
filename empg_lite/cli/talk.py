"""Commands that answer: chat and grade."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from empg_lite.cli.options import (
    REWARDS,
    AllowCodeOption,
    DebugOption,
    JsonOption,
    Output,
    RecipeOption,
    SeedOption,
    SetOption,
    TargetArgument,
    reward_option,
)

if TYPE_CHECKING:
    from empg_lite.chat import Chat, Reply
    from empg_lite.rationale import Rationale
    from empg_lite.rewards import Grader, Verdict


def register(app: typer.Typer) -> None:
    """Add the commands of this module."""
    for command in (chat, grade):
        app.command()(command)


# --- chat ---------------------------------------------------------------------------------------------


def chat(
    target: TargetArgument = None,
    recipe: RecipeOption = None,
    prompt: Annotated[
        str | None, typer.Option(help="Ask this and stop; - reads stdin.", show_default=False)
    ] = None,
    gold: Annotated[
        str | None, typer.Option(help="Known answer: the reply is graded.", show_default=False)
    ] = None,
    compare: Annotated[bool, typer.Option("--compare", help="Base and tuned side by side.")] = False,
    temperature: Annotated[float, typer.Option(min=0.0, help="0 is greedy.")] = 0.0,
    max_new_tokens: Annotated[
        int | None, typer.Option(min=1, help="Default: the recipe's.", show_default=False)
    ] = None,
    allow_code: AllowCodeOption = False,
    overrides: SetOption = None,
    seed: SeedOption = None,
    as_json: JsonOption = False,
    debug: DebugOption = False,
) -> None:
    """Ask a model and see its reasoning, the answer read from it, and its reward."""
    from empg_lite.errors import DataError
    from empg_lite.safe_text import safe
    from empg_lite.scoring import with_code
    from empg_lite.target import resolve_target

    out = Output(as_json)
    chosen = resolve_target(target, recipe, overrides or [], seed)
    plan, code = with_code(chosen.recipe, allow_code)
    chosen = replace(chosen, recipe=plan)
    from empg_lite.chat import Chat
    from empg_lite.rewards import Grader

    with out.guarded(), Grader(code=code) as grader:
        talk = Chat(chosen, temperature=temperature, max_new_tokens=max_new_tokens)
        if prompt is not None:
            question = sys.stdin.read().strip() if prompt == "-" else prompt
            _exchange(out, talk, grader, question, gold, compare)
            return
        out.print(
            f"{chosen.label} · an empty line or Ctrl-D ends · a question may end in '=> ANSWER'",
            style="dim",
            markup=False,
        )
        while question := _read_question(out):
            question, _, known = question.partition("=>")
            try:
                _exchange(out, talk, grader, question.strip(), known.strip() or gold, compare)
            except DataError as error:  # of this question alone
                out.print(safe(str(error)), style="yellow", markup=False, highlight=False)


def _read_question(out: Output) -> str:
    try:
        return out.console.input("\n[bold]you>[/] ").strip()
    except (EOFError, KeyboardInterrupt):
        return ""


def _exchange(
    out: Output, talk: Chat, grader: Grader, question: str, gold: str | None, compare: bool
) -> None:
    replies = talk.ask(question, grader, gold=gold, compare=compare)
    if out.as_json:
        result = {reply.speaker: _reply_record(reply.rationale) for reply in replies}
        out.line({"question": question, "gold": gold, **result})
        return
    from rich.table import Table

    side_by_side = Table.grid(expand=True)
    for _ in replies:
        side_by_side.add_column(ratio=1)
    side_by_side.add_row(*(_reply_panel(reply, alone=len(replies) == 1) for reply in replies))
    out.print(side_by_side)


def _reply_record(r: Rationale) -> dict[str, Any]:
    return {
        "completion": r.completion,
        "tokens": len(r.completion_ids),
        "finish_reason": r.finish_reason,
        "extracted": r.extracted,
        "rule": r.rule,
        "reward": r.reward,
        "reason": r.reason,
    }


def _reply_panel(reply: Reply, *, alone: bool) -> Any:
    from rich.panel import Panel
    from rich.text import Text

    from empg_lite.safe_text import safe

    r = reply.rationale
    answer = "no answer found" if r.extracted is None else f"answer {r.extracted} ({r.rule})"
    facts = [
        f"{len(r.completion_ids)} tokens",
        "cut off" if r.finish_reason == "length" else "stopped",
        answer,
    ]
    if r.reward is not None:
        facts.append(f"reward {r.reward:g} ({r.reason})")
    style = "none" if r.reward is None else "green" if r.reward == 1 else "red"
    body = Text(safe(r.completion).strip() or "(nothing)")
    body.append("\n" + safe(" · ".join(facts)), style="dim")
    return Panel(body, title=None if alone else reply.speaker, border_style=style)


# --- grade --------------------------------------------------------------------------------------------


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
    from empg_lite.errors import UsageError
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
    from empg_lite.rationale import read_cases

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
    from empg_lite.rewards.explain import explain
    from empg_lite.safe_text import safe

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
