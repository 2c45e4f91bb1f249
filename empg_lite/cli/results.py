"""Commands that look at a trained model: eval, inspect, report."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from empg_lite import api
from empg_lite.cli.options import (
    AllowCodeOption,
    RecipeOption,
    SeedOption,
    SetOption,
    TargetArgument,
    changes,
    run_names,
)
from empg_lite.cli.output import Output
from empg_lite.run.rollouts import rationale_record


def evaluate(
    out: Output,
    target: TargetArgument = None,
    recipe: RecipeOption = None,
    split: Annotated[
        str | None, typer.Option(help="Split to evaluate; default data.eval_split.", show_default=False)
    ] = None,
    limit: Annotated[
        int | None, typer.Option(min=1, help="Evaluate at most N problems.", show_default=False)
    ] = None,
    k: Annotated[int, typer.Option("--k", min=0, help="Also draw k samples at T=1: pass@k, maj@k.")] = 0,
    base: Annotated[
        bool, typer.Option("--base", help="Also evaluate with the adapter off, and compare.")
    ] = False,
    out_dir: Annotated[
        Path | None,
        typer.Option("--out", help="Folder for the answers; default RUN/eval.", show_default=False),
    ] = None,
    allow_code: AllowCodeOption = False,
    overrides: SetOption = None,
    seed: SeedOption = None,
) -> None:
    """Greedy accuracy with a 95% interval on held-out problems. If interrupted, repeat it to resume."""
    model = api.find_model(target, recipe=recipe, overrides=changes(overrides, seed))
    result = api.evaluate_model(
        model,
        split=split,
        limit=limit,
        k=k,
        base=base,
        out=out_dir,
        allow_code=allow_code,
        view=out.view(),
    )
    out.line(result)
    if not out.as_json:
        from empg_lite.cli.tables import show_evaluation

        show_evaluation(out, model.label, result)


def inspect(
    out: Output,
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
        str | None,
        typer.Option(help="Only the problem with this id, or ids that start like this.", show_default=False),
    ] = None,
    limit: Annotated[int, typer.Option(min=1, help="Show at most N rationales.")] = 8,
) -> None:
    """Show stored rationales."""
    from empg_lite.cli.marks import stored_panel

    path, rows = api.read_rationales(source, step)
    chosen = [
        r
        for r in rows
        if (reward is None or r.reward == reward) and (problem is None or r.problem_id.startswith(problem))
    ]
    shown = chosen[:limit]
    if out.as_json:
        for r in shown:
            out.raw(rationale_record(r))
        out.raw({"file": str(path), "shown": len(shown), "matching": len(chosen), "rationales": len(rows)})
        return
    out.show(*map(stored_panel, shown))
    out.say(f"showing {len(shown)} of {len(chosen)} matches; {path} has {len(rows)} rationales", style="dim")


def report(
    out: Output,
    runs: Annotated[
        list[Path] | None,
        typer.Argument(
            metavar="[RUN...]",
            help="Runs or sweeps; default: the newest run. Several are compared.",
            show_default=False,
            autocompletion=run_names,
        ),
    ] = None,
    out_file: Annotated[
        Path | None,
        typer.Option(
            "--out",
            metavar="FILE.html",
            help="The page; default: report.html in the run or sweep, or here for several.",
            show_default=False,
        ),
    ] = None,
) -> None:
    """One HTML page of a run, or comparing several, with its figures as PNG and SVG."""
    result = api.write_report(runs, out_file, out.view())
    out.line(result)
    out.say(
        f"{result['report']}: {result['bytes'] / 1e6:.1f} MB, {result['rationales']} of "
        f"{result['rationales_stored']} rationales; figures in {Path(result['report']).parent / 'figures'}"
    )
