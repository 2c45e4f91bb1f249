"""Commands before training: recipes, check, plan, grade, doctor."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from empg_lite import api
from empg_lite.cli.options import (
    REWARDS,
    AllowCodeOption,
    RecipeOption,
    SeedOption,
    SetOption,
    changes,
    recipe_names,
    stdin_text,
)
from empg_lite.cli.output import Output
from empg_lite.core.errors import UsageError

if TYPE_CHECKING:
    from empg_lite.rewards import Verdict
    from empg_lite.tools.check import CheckReport

_ACTIONS = ("list", "show", "schema")


def recipes(
    out: Output,
    action: Annotated[
        str,
        typer.Argument(
            metavar="[list|show|schema]",
            help="list: all of them; show: one, with every key; schema: a JSON schema for editors.",
            autocompletion=lambda incomplete: [a for a in _ACTIONS if a.startswith(incomplete)],
        ),
    ] = "list",
    name: Annotated[
        str | None,
        typer.Argument(help="Recipe to show.", show_default=False, autocompletion=recipe_names),
    ] = None,
) -> None:
    """Built-in recipes, and every key a recipe can set."""
    if action == "list" and name is None:
        _list_recipes(out)
    elif action == "show" and name is not None:
        _show_recipe(out, name)
    elif action == "schema" and name is None:
        from empg_lite.recipe.schema import recipe_schema

        out.line(recipe_schema())
        if not out.as_json:
            typer.echo(json.dumps(recipe_schema(), indent=2))
    else:
        raise UsageError("use `recipes`, `recipes show NAME` or `recipes schema`", "recipes")


def _list_recipes(out: Output) -> None:
    summaries = api.list_recipes()
    out.line({"recipes": summaries})
    if not out.as_json:
        width = max(map(len, summaries))
        for name, summary in summaries.items():
            out.say(f"{name:{width}}  {summary}")


def _show_recipe(out: Output, name: str) -> None:
    from empg_lite.recipe.file import find_recipe
    from empg_lite.recipe.schema import field_docs

    recipe = api.read_recipe(name).resolved()
    docs = field_docs()
    if out.as_json:
        fields = {d.key: {"type": d.type, "default": d.default, "description": d.description} for d in docs}
        out.line({"name": name, "recipe": recipe.model_dump(mode="json"), "fields": fields})
        return
    # The file unchanged, then every key as a comment: `recipes show NAME > mine.yaml` is a recipe to edit.
    typer.echo(find_recipe(name).read_text("utf-8").rstrip() + "\n\n# --- every key ---")
    width = max(len(d.key) for d in docs)
    for d in docs:
        typer.echo(f"# {d.key:{width}}  {d.description} [{d.type}; default {d.default}]")


def check(
    out: Output,
    recipe: RecipeOption = None,
    preflight: Annotated[
        bool, typer.Option("--preflight", help="Also load the model and sample 16 problems.")
    ] = False,
    allow_code: AllowCodeOption = False,
    overrides: SetOption = None,
    seed: SeedOption = None,
) -> None:
    """Check data, prompts, and every gold answer against its own reward. Exit code 1 if not ok."""
    found = api.check_recipe(
        recipe,
        preflight=preflight,
        overrides=changes(overrides, seed),
        allow_code=allow_code,
        view=out.view(),
    )
    out.line(found.facts())
    lines, flight = _findings(found.report), found.preflight
    if flight:
        lines += [flight.seen, *map(str, flight.findings)]
    for line in [*lines, "ok" if found.ok else "not ok: see above"]:
        out.say(line)
    raise typer.Exit(0 if found.ok else 1)


def _findings(report: CheckReport) -> list[str]:
    """A check's report, line by line."""
    total = sum(report.rows.values())
    rows = ", ".join(f"{n} {name}" for name, n in report.rows.items())
    dropped = ", ".join(f"{n} {cause}" for cause, n in report.dropped.items() if n) or "none"
    lines = [f"rows: {rows} · dropped: {dropped} · in both training and evaluation: {report.overlap}"]
    if report.too_long is not None:
        lines.append(f"training prompts longer than data.max_prompt_tokens, dropped: {report.too_long}")
        lines.append(
            f"longest prompt: {report.longest} tokens; prompts without room for sampler.max_new_tokens "
            f"in the context of {report.context}: {report.over_context}"
        )
    if set(report.gold_rules) - {"whole"}:
        read = ", ".join(f"{n} by {rule}" for rule, n in report.gold_rules.items())
        shown = "; ".join(f"{cell[-60:]!r} read as {text[:60]!r}" for cell, text in report.gold_read)
        lines.append(f"gold answers read: {read}" + (f" ({shown})" if shown else ""))
    if report.gold_failures is not None:
        lines.append(f"gold answers that score 1: {total - len(report.gold_failures)} of {total}")
        lines += [
            f"  {f.problem_id}: gold {f.gold!r} -> {f.reason}, read {f.extracted!r}"
            for f in report.gold_failures
        ]
    lines += [f"note: {note}" for note in report.notes]
    lines += ["first prompt as the model sees it:", "-" * 60, report.prompt, "-" * 60]
    lines.append("an answer ends at " + " or ".join(map(repr, report.stops)))
    return lines


def plan(
    out: Output,
    recipe: RecipeOption = None,
    gpu_memory: Annotated[
        str | None,
        typer.Option(
            "--gpu-memory",
            metavar="SIZE",
            help="Plan for a card of this size, like 8GB, instead of this machine.",
            show_default=False,
        ),
    ] = None,
    overrides: SetOption = None,
    seed: SeedOption = None,
) -> None:
    """Memory term by term, before anything is loaded. Exit code 1 if it does not fit."""
    from empg_lite.cli.tables import show_plan

    chosen = api.read_recipe(recipe, overrides=changes(overrides, seed))
    found = api.plan_memory(chosen, gpu_memory)
    change = api.advise_memory(found)
    out.line(found.facts() | {"change": change})
    if not out.as_json:
        show_plan(out, chosen.model.name, found, change)
    raise typer.Exit(0 if found.fits else 1)


def grade(
    out: Output,
    gold: Annotated[str | None, typer.Option(help="The right answer.", show_default=False)] = None,
    prediction: Annotated[
        str | None, typer.Option(help="What the model wrote; - reads stdin.", show_default=False)
    ] = None,
    cases: Annotated[
        Path | None,
        typer.Option(
            help="JSONL with `gold` and `prediction`; prints one verdict per line.", show_default=False
        ),
    ] = None,
    question: Annotated[
        str | None,
        typer.Option(
            help="The problem's text, for rewards that read its options or units.", show_default=False
        ),
    ] = None,
    reward: Annotated[str, typer.Option(help=f"{REWARDS}.")] = "math",
    allow_code: AllowCodeOption = False,
) -> None:
    """Grade one answer and explain the reward step by step."""
    if cases is not None:
        if gold is not None or prediction is not None or question is not None:
            raise UsageError(
                "--cases excludes --gold, --prediction and --question", "grade", "leave the others out"
            )
        for verdict in api.grade_cases(cases, reward, allow_code=allow_code):
            out.raw(_verdict_record(verdict))
        return
    if gold is None or prediction is None:
        raise UsageError("give --gold and --prediction, or --cases FILE", "grade")
    text = stdin_text("--prediction -") if prediction == "-" else prediction
    reward = api.pin_reward(reward, allow_code=allow_code)
    verdict = api.grade_answer(text, gold, reward, question=question, allow_code=allow_code)
    if out.as_json:
        out.raw(_verdict_record(verdict))
    else:
        _print_verdict(out, verdict, reward, api.explain_grade(verdict, text, reward, question=question))


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


_REASONS = {
    "equal": "the answer equals the gold answer",
    "different": "the answer differs from the gold answer",
    "no_answer": "no answer was found in the text",
    "parse": "an answer was found but could not be parsed",
    "too_long": "the text is too long to grade",
    "truncated": "the text was cut off before a stop",
    "timeout": "the grader timed out; such a row is left out of training",
    "memory": "the grader ran out of memory; such a row is left out of training",
    "crash": "the grader could not reach a verdict; such a row is left out of training",
}


def _print_verdict(out: Output, v: Verdict, reward: str, steps: list[str]) -> None:
    """The headline, the facts, then how the verdict came about."""
    reward_text = "no reward" if v.failed else f"reward {v.reward:g}"
    out.say(f"{reward_text} · {v.reason}: {_REASONS[v.reason]}", style="bold")
    out.say("read    " + ("nothing" if v.extracted is None else f"{v.extracted} (rule: {v.rule})"))
    if v.terms:
        out.say("terms   " + " · ".join(f"{name} {value:.3g}" for name, value in v.terms.items()))
    if v.error:
        out.say(f"error   {v.error}")
    out.say(f"gold    {v.gold}")
    out.say(f"by      {reward}, in {v.seconds * 1000:.2f} ms")
    for number, step in enumerate(steps, 1):
        out.say(f"  {number}. {step}")


def doctor(out: Output) -> None:
    """Installed packages against the tested versions, this machine, and how to fix what is wrong."""
    found = api.check_install()
    out.line(found)
    if not out.as_json:
        from empg_lite.cli.tables import show_install

        show_install(out, found)
    raise typer.Exit(0 if found["ok"] else 1)
