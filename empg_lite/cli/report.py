"""The report command."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from empg_lite.cli.options import DebugOption, JsonOption, Output, run_names


def register(app: typer.Typer) -> None:
    """Add the command of this module."""
    app.command()(report)


def report(
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
            help="The page; default: report.html in the run, in the sweep, or here.",
            show_default=False,
        ),
    ] = None,
    as_json: JsonOption = False,
    debug: DebugOption = False,
) -> None:
    """One HTML page of a run, or of several beside each other, with its figures as PNG and SVG."""
    from empg_lite.core.errors import UsageError
    from empg_lite.run.layout import newest_run, runs_of
    from empg_lite.tools.report import write_report

    out = Output(as_json)
    given = runs or [newest_run()]
    if out_file is not None and out_file.suffix not in (".html", ".htm"):
        raise UsageError("the page is HTML", f"--out {out_file}", "name a file that ends in .html")
    chosen = [run for folder in given for run in runs_of(folder)]
    if len({run.resolve() for run in chosen}) < len(chosen):
        raise UsageError("a run is named twice", "report")
    page = out_file or (given[0] if len(given) == 1 else Path()) / "report.html"
    with out.guarded():
        result = write_report(chosen, page, out.view())
        out.line(result)
        shown, stored = result["rationales"], result["rationales_stored"]
        out.print(
            f"{page}: {result['bytes'] / 1e6:.1f} MB, {shown} of {stored} rationales; "
            f"figures in {page.parent / 'figures'}",
            markup=False,
            highlight=False,
        )
