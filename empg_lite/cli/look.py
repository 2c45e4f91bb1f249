"""Commands that look: inspect, recipes, check, plan, doctor."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from empg_lite.cli.options import (
    AllowCodeOption,
    DebugOption,
    JsonOption,
    Output,
    RecipeOption,
    SeedOption,
    SetOption,
    recipe_names,
)

if TYPE_CHECKING:
    from empg_lite.core.rationale import Rationale
    from empg_lite.tools.check import CheckReport


def register(app: typer.Typer) -> None:
    """Add the commands of this module."""
    for command in (inspect, recipes, check, plan, doctor):
        app.command()(command)


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
    from empg_lite.run.layout import find_rollouts
    from empg_lite.run.rollouts import rationale_record

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

    from empg_lite.core.safe_text import safe

    score = "not graded" if r.reward is None else f"reward {r.reward:g} ({r.reason})"
    weight = "" if r.weight is None else f" · weight {r.weight:.3g}"
    answer = "" if r.extracted is None else f" · read {r.extracted} ({r.rule})"
    style = "none" if r.reward is None else "green" if r.reward == 1 else "red"
    body = Text(safe(r.question or r.prompt).strip() + "\n", style="italic")
    body.append(safe(r.completion).strip() or "(nothing)", style="not italic")
    origin = " · from text" if r.origin == "text" else ""
    facts = f"{score}{weight}{origin}{answer} · gold {r.gold} · {len(r.completion_ids)} tokens"
    body.append("\n" + safe(facts), style="not italic dim")
    title = Text(f"{r.problem_id} · step {r.step} · sample {r.sample_index}")
    out.print(Panel(body, title=title, border_style=style))


_ACTIONS = ("list", "show", "schema")

# --- recipes, check, plan, doctor ---------------------------------------------------------------------


def recipes(
    action: Annotated[
        str,
        typer.Argument(
            metavar="[list|show|schema]",
            help="list them; show one, with every key there is; print a JSON schema for editors.",
            autocompletion=lambda incomplete: [a for a in _ACTIONS if a.startswith(incomplete)],
        ),
    ] = "list",
    name: Annotated[
        str | None,
        typer.Argument(help="Recipe to show.", show_default=False, autocompletion=recipe_names),
    ] = None,
    as_json: JsonOption = False,
    debug: DebugOption = False,
) -> None:
    """The recipes that come with the package, and what may stand in one."""
    from empg_lite.core.errors import UsageError

    out = Output(as_json)
    if action == "list" and name is None:
        _list_recipes(out)
    elif action == "show" and name is not None:
        _show_recipe(out, name)
    elif action == "schema" and name is None:
        import json

        from empg_lite.recipe.schema import recipe_schema

        schema = recipe_schema()
        out.line(schema)
        if not as_json:
            typer.echo(json.dumps(schema, indent=2))
    else:
        raise UsageError("say `recipes`, `recipes show NAME` or `recipes schema`", "recipes")


def _list_recipes(out: Output) -> None:
    from empg_lite.recipe.file import builtin_recipes, recipe_summary

    summaries = {name: recipe_summary(path) for name, path in builtin_recipes().items()}
    if out.as_json:
        out.line({"recipes": summaries})
        return
    width = max(map(len, summaries))
    for name, summary in summaries.items():
        out.print(f"{name:{width}}  {summary}", markup=False, highlight=False)


def _show_recipe(out: Output, name: str) -> None:
    from empg_lite.recipe.file import find_recipe, load_recipe
    from empg_lite.recipe.schema import field_docs

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
    preflight: Annotated[
        bool, typer.Option("--preflight", help="Also load the model and sample 16 problems.")
    ] = False,
    allow_code: AllowCodeOption = False,
    overrides: SetOption = None,
    seed: SeedOption = None,
    as_json: JsonOption = False,
    debug: DebugOption = False,
) -> None:
    """Data, prompts, and every gold answer against its own reward. Exit code 1 if something is wrong."""
    from dataclasses import asdict

    from empg_lite.core.safe_text import safe
    from empg_lite.recipe.file import load_recipe
    from empg_lite.recipe.reward import pin_reward
    from empg_lite.rewards import Grader

    out = Output(as_json)
    plan = load_recipe(recipe or "tiny", overrides or [], seed)
    plan, code = pin_reward(plan, allow_code)
    from empg_lite.tools.check import check as run_check

    with out.guarded(), Grader(code=code) as grader:
        report = run_check(plan, grader, out.view())
        flight = None
        if preflight:
            from empg_lite.loop.preflight import preflight_recipe

            flight = preflight_recipe(plan, grader, out.view())
        ok = report.ok and not (flight and flight.hopeless)
        out.line({"ok": ok, **asdict(report), "preflight": flight and flight.facts()})
        lines = [*_findings(report), *([flight.seen, *map(str, flight.findings)] if flight else [])]
        lines.append("ok" if ok else "something is wrong: see above")
        for line in lines:
            out.print(safe(line), markup=False, highlight=False)
    raise typer.Exit(0 if ok else 1)


def _findings(report: CheckReport) -> list[str]:
    """A check's report, line by line."""
    total = sum(report.rows.values())
    rows = ", ".join(f"{n} {name}" for name, n in report.rows.items())
    dropped = ", ".join(f"{n} {cause}" for cause, n in report.dropped.items() if n) or "none"
    lines = [f"rows: {rows} · left out: {dropped} · in both train and evaluation: {report.overlap}"]
    if report.too_long is not None:
        lines.append(f"training prompts over data.max_prompt_tokens, left out: {report.too_long}")
        lines.append(
            f"longest prompt: {report.longest} tokens; prompts that leave no room for sampler.max_new_tokens "
            f"in the context of {report.context}: {report.over_context}"
        )
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
    recipe: RecipeOption = None,
    gpu_memory: Annotated[
        str | None,
        typer.Option(
            "--gpu-memory", metavar="SIZE", help="Plan for a card like 8GB, not this one.", show_default=False
        ),
    ] = None,
    overrides: SetOption = None,
    seed: SeedOption = None,
    as_json: JsonOption = False,
    debug: DebugOption = False,
) -> None:
    """Memory term by term, before anything is loaded. Exit code 1 where it does not fit."""
    from empg_lite.cli.plan_table import show_plan
    from empg_lite.loop import plan as planning
    from empg_lite.policy.memory import machine as machines
    from empg_lite.policy.memory.shape import read_shape
    from empg_lite.recipe.file import load_recipe

    out = Output(as_json)
    machine = machines.card(gpu_memory) if gpu_memory is not None else machines.this_machine()
    chosen = load_recipe(recipe or "tiny", overrides or [], seed)
    shape = read_shape(chosen.model.name, chosen.model.revision)
    found = planning.plan_recipe(chosen, shape, machine)
    change = planning.advise(found)
    out.line(found.facts() | {"change": None if change is None else planning.as_overrides(change)})
    show_plan(out, chosen, found, change)
    raise typer.Exit(0 if found.fits else 1)


def doctor(as_json: JsonOption = False, debug: DebugOption = False) -> None:
    """What is installed, what was tested, what to type."""
    from empg_lite.tools.doctor import device, packages

    out = Output(as_json)
    with out.guarded():
        found, machine = packages(), device()
        bad = [f for f in found if not f.ok]
        if as_json:
            table = {f.name: {"installed": f.installed, "wanted": f.wanted, "ok": f.ok} for f in found}
            out.line({"ok": not bad, "packages": table, **machine})
            raise typer.Exit(1 if bad else 0)
        from rich.table import Table

        listing = Table("package", "installed", "tested with", "", box=None, pad_edge=False)
        for f in found:
            state = "ok" if f.ok and f.installed else "optional, absent" if f.ok else "NOT TESTED WITH THIS"
            style = "bold red" if not f.ok else "dim" if f.installed is None else None
            listing.add_row(f.name, f.installed or "-", f.wanted or "any", state, style=style)
        out.print(listing)
        out.print("", *(f"{name}: {value}" for name, value in machine.items()), sep="\n", highlight=False)
        fix = " ".join(f"'{f.name}{f.wanted}'" for f in bad)
        out.print(
            f"to fix: pip install {fix}" if bad else "all well; first try: empg-lite train --recipe tiny",
            style="bold",
            markup=False,
            highlight=False,
        )
        raise typer.Exit(1 if bad else 0)
