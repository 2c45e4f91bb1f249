"""Options of the commands, each defined once."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from empg_lite.core.errors import DataError, UsageError
from empg_lite.rewards.registry import REWARDS as KINDS


def recipe_names(incomplete: str) -> list[str]:
    """Built-in recipes, for shell completion; the shell completes files itself."""
    from empg_lite.recipe.file import builtin_recipes

    return [name for name in builtin_recipes() if name.startswith(incomplete)]


def run_names(incomplete: str) -> list[str]:
    """Runs under ``runs/``, for shell completion."""
    from empg_lite.run.layout import RUNS, is_run

    return [str(p) for p in sorted(RUNS.glob("*")) if is_run(p) and str(p).startswith(incomplete)]


RecipeOption = Annotated[
    str | None,
    typer.Option(
        "--recipe",
        "-r",
        help="Built-in recipe or YAML file.",
        show_default=False,
        autocompletion=recipe_names,
    ),
]
SetOption = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="KEY=VALUE", help="Override a recipe key; repeatable.", show_default=False),
]
SeedOption = Annotated[
    int | None, typer.Option("--seed", help="Short for --set run.seed=N.", show_default=False)
]
SeedsOption = Annotated[
    str | None,
    typer.Option(
        "--seeds", metavar="N,N,...", help="Train once per seed, into DIR/seed-N.", show_default=False
    ),
]
ForceOption = Annotated[
    bool,
    typer.Option(
        "--force",
        help="Skip the safety checks: refused sampling settings, memory plan, preflight, dead signal.",
    ),
]
ResumeOption = Annotated[
    bool, typer.Option("--resume", help="Continue the run in --output-dir; start it if there is none.")
]
OutputDirOption = Annotated[
    Path | None,
    typer.Option("--output-dir", "-o", help="Run directory; default runs/<recipe>-NNN.", show_default=False),
]
AllowChangeOption = Annotated[
    list[str] | None,
    typer.Option(
        "--allow-change",
        metavar="KEY",
        help="With --resume, accept a new value of this recipe key; repeatable.",
        show_default=False,
    ),
]
MaxMinutesOption = Annotated[
    float | None,
    typer.Option(
        "--max-minutes", min=0.0, help="Stop with a checkpoint after M minutes.", show_default=False
    ),
]
TrackOption = Annotated[
    list[str] | None,
    typer.Option(
        "--track",
        metavar="NAME",
        help="Also log to tensorboard, trackio or wandb; repeatable.",
        show_default=False,
    ),
]
AllowCodeOption = Annotated[
    bool,
    typer.Option("--allow-code", help="Let a python:FILE.py reward run that file. It is not a sandbox."),
]
TargetArgument = Annotated[
    str | None,
    typer.Argument(
        metavar="[RUN|ADAPTER|MODEL]",
        help="Default: the newest run.",
        show_default=False,
        autocompletion=run_names,
    ),
]
#: What --reward takes, for the help texts.
REWARDS = f"{', '.join(KINDS)}, or terms: math * concise:600"


def stdin_text(option: str) -> str:
    """What comes in on stdin, for an option's ``-``.

    Raises:
        UsageError: nothing can come in. DataError: it is not text.
    """
    if sys.stdin is None:
        raise UsageError("standard input is closed", option, "pipe the text in, or write it in place of -")
    try:
        return sys.stdin.read()
    except UnicodeDecodeError as error:
        raise DataError("not UTF-8 text", "stdin", "save it as UTF-8") from error


def changes(overrides: list[str] | None, seed: int | None) -> list[str]:
    """``--set`` and ``--seed`` as overrides."""
    return [*(overrides or ()), *(() if seed is None else (f"run.seed={seed}",))]
