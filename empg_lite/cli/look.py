"""Commands that look: chat, grade, inspect, recipes, check, doctor."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from empg_lite.cli.options import (
    DebugOption,
    JsonOption,
    Output,
    RecipeOption,
    SeedOption,
    SetOption,
    TargetArgument,
)

if TYPE_CHECKING:
    from empg_lite.chat import Chat, Reply
    from empg_lite.rationale import Rationale
    from empg_lite.rewards import Grader, Verdict


def register(app: typer.Typer) -> None:
    """Add the commands of this module."""
    for command in (chat, grade, inspect, recipes, check, doctor):
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
    overrides: SetOption = None,
    seed: SeedOption = None,
    as_json: JsonOption = False,
    debug: DebugOption = False,
) -> None:
    """Ask a model and see its reasoning, the answer read from it, and its reward."""
    from empg_lite.target import resolve_target

    out = Output(as_json)
    chosen = resolve_target(target, recipe, overrides or [], seed)
    from empg_lite.chat import Chat
    from empg_lite.rewards import Grader

    with out.guarded(), Grader() as grader:
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
            _exchange(out, talk, grader, question.strip(), known.strip() or gold, compare)


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
    reward: Annotated[str, typer.Option(help="gsm8k, math, exact, regex:PATTERN.")] = "math",
    as_json: JsonOption = False,
    debug: DebugOption = False,
) -> None:
    """Why did this get that reward?"""
    from empg_lite.cli.work import check_reward_option
    from empg_lite.errors import UsageError
    from empg_lite.rewards import Grader

    out = Output(as_json)
    check_reward_option(reward)
    with Grader() as grader:
        if cases is not None:
            if gold is not None or prediction is not None:
                raise UsageError("--cases comes alone", "grade", "leave out --gold and --prediction")
            _grade_cases(out, grader, cases, reward)
            return
        if gold is None or prediction is None:
            raise UsageError("give --gold and --prediction, or --cases FILE", "grade")
        text = sys.stdin.read() if prediction == "-" else prediction
        verdict = grader.grade(reward, gold, text)
        if as_json:
            out.raw(_verdict_record(verdict))
        else:
            _say_verdict(out, verdict, reward)


def _verdict_record(v: Verdict) -> dict[str, Any]:
    return {
        "reward": v.reward,
        "reason": v.reason,
        "extracted": v.extracted,
        "rule": v.rule,
        "gold": v.gold,
        "seconds": v.seconds,
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


def _say_verdict(out: Output, v: Verdict, reward: str) -> None:
    from empg_lite.safe_text import safe

    read = "nothing" if v.extracted is None else f"{v.extracted!r} (rule: {v.rule})"
    out.print(
        safe(f"reward {v.reward:g} · {v.reason}: {_REASONS[v.reason]}"),
        style="bold",
        markup=False,
        highlight=False,
    )
    out.print(safe(f"read    {read}"), markup=False, highlight=False)
    out.print(safe(f"gold    {v.gold!r}"), markup=False, highlight=False)
    out.print(f"by      {reward}, in {v.seconds * 1000:.2f} ms", markup=False, highlight=False)


# --- inspect ------------------------------------------------------------------------------------------


def inspect(
    source: Annotated[
        Path | None, typer.Argument(metavar="[RUN|FILE]", help="Default: the newest run.")
    ] = None,
    step: Annotated[
        int | None, typer.Option(help="Step of a run; default: the last.", show_default=False)
    ] = None,
    reward: Annotated[
        float | None, typer.Option(help="Only rationales with this reward.", show_default=False)
    ] = None,
    problem: Annotated[
        str | None, typer.Option(help="Only this problem id (or its start).", show_default=False)
    ] = None,
    limit: Annotated[int, typer.Option(min=1, help="Show at most so many.")] = 8,
    as_json: JsonOption = False,
    debug: DebugOption = False,
) -> None:
    """Look through stored rationales."""
    from empg_lite.rationale import rationale_record
    from empg_lite.runs import find_rollouts

    out = Output(as_json)
    path, rows = find_rollouts(source, step)
    chosen = [
        r
        for r in rows
        if (reward is None or r.reward == reward) and (problem is None or r.problem_id.startswith(problem))
    ]
    shown = chosen[:limit]
    if as_json:
        for r in shown:
            out.line(rationale_record(r))
        out.line({"file": str(path), "shown": len(shown), "matching": len(chosen), "rationales": len(rows)})
        return
    for r in shown:
        _show_rationale(out, r)
    out.print(
        f"{len(shown)} of {len(chosen)} matching, {len(rows)} in {path}",
        style="dim",
        markup=False,
        highlight=False,
    )


def _show_rationale(out: Output, r: Rationale) -> None:
    from rich.panel import Panel
    from rich.text import Text

    from empg_lite.safe_text import safe

    score = "not graded" if r.reward is None else f"reward {r.reward:g} ({r.reason})"
    weight = "" if r.weight is None else f" · weight {r.weight:.3g}"
    answer = "" if r.extracted is None else f" · read {r.extracted} ({r.rule})"
    style = "none" if r.reward is None else "green" if r.reward == 1 else "red"
    body = Text(safe(r.question or r.prompt).strip() + "\n", style="italic")
    body.append(safe(r.completion).strip() or "(nothing)", style="not italic")
    facts = f"{score}{weight}{answer} · gold {r.gold} · {len(r.completion_ids)} tokens"
    body.append("\n" + safe(facts), style="not italic dim")
    title = Text(f"{r.problem_id} · step {r.step} · sample {r.sample_index}")
    out.print(Panel(body, title=title, border_style=style))


# --- recipes, check, doctor ---------------------------------------------------------------------------


def recipes(
    action: Annotated[str, typer.Argument(metavar="[list|show]", help="list them, or show one.")] = "list",
    name: Annotated[str | None, typer.Argument(help="Recipe to show.", show_default=False)] = None,
    as_json: JsonOption = False,
    debug: DebugOption = False,
) -> None:
    """The recipes that come with the package."""
    from empg_lite.errors import UsageError

    out = Output(as_json)
    if action == "list" and name is None:
        _list_recipes(out)
    elif action == "show" and name is not None:
        _show_recipe(out, name)
    else:
        raise UsageError("say `recipes`, `recipes list` or `recipes show NAME`", "recipes")


def _list_recipes(out: Output) -> None:
    from empg_lite.recipe_file import builtin_recipes, recipe_summary

    summaries = {name: recipe_summary(path) for name, path in builtin_recipes().items()}
    if out.as_json:
        out.line({"recipes": summaries})
        return
    width = max(map(len, summaries))
    for name, summary in summaries.items():
        out.print(f"{name:{width}}  {summary}", markup=False, highlight=False)


def _show_recipe(out: Output, name: str) -> None:
    from empg_lite.recipe import field_docs
    from empg_lite.recipe_file import find_recipe, load_recipe

    recipe = load_recipe(name).resolved()
    docs = field_docs()
    if out.as_json:
        fields = {d.key: {"type": d.type, "default": d.default, "description": d.description} for d in docs}
        out.line({"name": name, "recipe": recipe.model_dump(mode="json"), "fields": fields})
        return
    # The file as it stands, then every key as comments: `recipes show NAME > mine.yaml` is a recipe to edit.
    typer.echo(find_recipe(name).read_text("utf-8").rstrip() + "\n\n# --- every key ---")
    width = max(len(d.key) for d in docs)
    for d in docs:
        typer.echo(f"# {d.key:{width}}  {d.description} [{d.type}; default {d.default}]")


def check(
    recipe: RecipeOption = None,
    overrides: SetOption = None,
    seed: SeedOption = None,
    as_json: JsonOption = False,
    debug: DebugOption = False,
) -> None:
    """Data, prompts, and every gold answer against its own reward. Exit code 1 if something is wrong."""
    from dataclasses import asdict

    from empg_lite.check import check as run_check
    from empg_lite.recipe_file import load_recipe
    from empg_lite.safe_text import safe

    out = Output(as_json)
    plan = load_recipe(recipe or "tiny", overrides or [], seed)
    with out.guarded():
        report = run_check(plan, out.view())
        out.line({"ok": report.ok, **asdict(report)})
        rows = ", ".join(f"{n} {name}" for name, n in report.rows.items())
        dropped = ", ".join(f"{n} {cause}" for cause, n in report.dropped.items() if n) or "none"
        lines = [f"rows: {rows} · left out: {dropped} · in both train and evaluation: {report.overlap}"]
        if report.too_long is not None:
            lines.append(f"prompts over data.max_prompt_tokens: {report.too_long}")
        if report.gold_failures is not None:
            total = sum(report.rows.values())
            lines.append(f"gold answers that score 1: {total - len(report.gold_failures)} of {total}")
            lines += [
                f"  {f.problem_id}: gold {f.gold!r} -> {f.reason}, read {f.extracted!r}"
                for f in report.gold_failures
            ]
        lines += [f"note: {note}" for note in report.notes]
        lines += ["first prompt as the model sees it:", "-" * 60, report.prompt, "-" * 60]
        lines.append("ok" if report.ok else "something is wrong: see above")
        for line in lines:
            out.print(safe(line), markup=False, highlight=False)
    raise typer.Exit(0 if report.ok else 1)


def doctor(as_json: JsonOption = False, debug: DebugOption = False) -> None:
    """What is installed, what was tested, what to type."""
    from empg_lite.doctor import device, packages

    out = Output(as_json)
    with out.guarded():
        found, machine = packages(), device()
        bad = [f for f in found if not f.ok]
        if as_json:
            table = {f.name: {"installed": f.installed, "wanted": f.wanted, "ok": f.ok} for f in found}
            out.line({"ok": not bad, "packages": table, **machine})
            raise typer.Exit(1 if bad else 0)
        for f in found:
            state = "ok" if f.ok and f.installed else "optional, absent" if f.ok else "NOT TESTED WITH THIS"
            out.print(
                f"{f.name:14} {f.installed or '-':14} {f.wanted or 'any':18} {state}",
                markup=False,
                highlight=False,
            )
        out.print("", *(f"{name}: {value}" for name, value in machine.items()), sep="\n", highlight=False)
        fix = " ".join(f"'{f.name}{f.wanted}'" for f in bad)
        out.print(
            f"to fix: pip install {fix}" if bad else "all well; first try: empg-lite train --recipe tiny",
            style="bold",
            markup=False,
            highlight=False,
        )
        raise typer.Exit(1 if bad else 0)
