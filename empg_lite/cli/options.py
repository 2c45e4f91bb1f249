"""Options that several commands share, and where their output goes."""

from __future__ import annotations

import contextlib
import json
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from empg_lite.run.parallel import speaks

if TYPE_CHECKING:
    from rich.console import Console

    from empg_lite.core.view import View
    from empg_lite.rewards import UserCode


def recipe_names(incomplete: str) -> list[str]:
    """Built-in recipes, for the shell's completion; files are the shell's own business."""
    from empg_lite.recipe.file import builtin_recipes

    return [name for name in builtin_recipes() if name.startswith(incomplete)]


def run_names(incomplete: str) -> list[str]:
    """Runs under ``runs/``, for the shell's completion."""
    from empg_lite.run.layout import RUNS, is_run

    return [str(p) for p in sorted(RUNS.glob("*")) if is_run(p) and str(p).startswith(incomplete)]


RecipeOption = Annotated[
    str | None,
    typer.Option(
        "--recipe",
        "-r",
        help="Built-in recipe or a YAML file.",
        show_default=False,
        autocompletion=recipe_names,
    ),
]
SetOption = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="KEY=VALUE", help="Change a recipe key; repeatable.", show_default=False),
]
SeedOption = Annotated[
    int | None, typer.Option("--seed", help="Shorthand for --set run.seed=N.", show_default=False)
]
JsonOption = Annotated[
    bool, typer.Option("--json", help="JSON only on stdout, the result on its last line; progress on stderr.")
]
DebugOption = Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")]
ForceOption = Annotated[
    bool,
    typer.Option(
        "--force",
        help="Go on despite refused sampling settings, a memory plan that says no, or a dead signal.",
    ),
]
ResumeOption = Annotated[bool, typer.Option("--resume", help="Go on where the run in --output-dir stopped.")]
OutputDirOption = Annotated[
    Path | None,
    typer.Option("--output-dir", "-o", help="Run directory; default runs/<recipe>-NNN.", show_default=False),
]
AllowChangeOption = Annotated[
    list[str] | None,
    typer.Option(
        "--allow-change", metavar="FIELD", help="Accept a changed recipe key on --resume.", show_default=False
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
#: What --reward takes, for the help texts.
REWARDS = "gsm8k, math, exact, choice, gym, python:FILE.py, regex:PATTERN, or terms: math * concise:600"
TargetArgument = Annotated[
    str | None,
    typer.Argument(
        metavar="[RUN|ADAPTER|MODEL]",
        help="Default: the newest run.",
        show_default=False,
        autocompletion=run_names,
    ),
]


class Output:
    """Where a command writes. With ``--json`` stdout is kept for JSON and everything else goes to stderr.

    Of several launched processes one writes.
    """

    def __init__(self, as_json: bool) -> None:
        from rich.console import Console

        self.as_json, self._quiet = as_json, not speaks()
        self._stdout = sys.stdout
        # A notebook's `!command` runs on a pseudo-terminal, and shows its control sequences as text.
        plain = False if "JPY_PARENT_PID" in os.environ else None
        self.console: Console = Console(stderr=as_json, quiet=self._quiet, force_terminal=plain)

    @contextlib.contextmanager
    def guarded(self) -> Iterator[Output]:
        """Libraries print what they like; with ``--json`` none of it reaches stdout."""
        if not self.as_json:
            yield self
            return
        with contextlib.redirect_stdout(sys.stderr):
            yield self

    def line(self, record: dict[str, Any]) -> None:
        """One JSON object on stdout (with ``--json``; nothing otherwise)."""
        if self.as_json:
            self.raw(record)

    def raw(self, record: dict[str, Any]) -> None:
        """One compact ASCII JSON object on stdout, whatever the mode."""
        if self._quiet:
            return
        self._stdout.write(json.dumps(record, separators=(",", ":")) + "\n")
        self._stdout.flush()

    def print(self, *objects: Any, **options: Any) -> None:
        """For people; model text must come as ``rich.text.Text`` of ``safe(...)``.

        A terminal gets lines wrapped by words, a log file gets them whole.
        """
        if all(isinstance(o, str) for o in objects):
            options.setdefault("soft_wrap", not self.console.is_terminal)
        self.console.print(*objects, **options)

    def view(self) -> View:
        """Plain lines on this console, on a terminal with bars for what is going on."""
        from empg_lite.core.view import ConsoleView

        return ConsoleView(self.console)

    def live_view(self) -> View:
        """The same for a run: on a terminal with a panel that says how it stands."""
        from empg_lite.core.view import LiveView

        return LiveView(self.console) if self.console.is_terminal else self.view()


def command_line() -> str:
    """What was typed, for the record."""
    import shlex

    return shlex.join(["empg-lite", *sys.argv[1:]])


def reward_option(reward: str, allow_code: bool) -> tuple[str, UserCode | None]:
    """The reward of ``--reward`` and the file it runs, pinned. An unknown one is refused before any work."""
    from empg_lite.core.errors import UsageError
    from empg_lite.rewards import pin, refuse_code
    from empg_lite.rewards.spec import with_absolute_file

    try:
        spec, code = pin(with_absolute_file(reward, Path.cwd()))
    except ValueError as error:
        raise UsageError(str(error), "--reward") from error
    if code is not None and not allow_code:
        raise refuse_code(code.ref, "--reward", UsageError)
    return spec, code
