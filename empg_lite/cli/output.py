"""Where a command's output goes."""

from __future__ import annotations

import contextlib
import inspect
import json
import os
import sys
from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console

from empg_lite.core.safe_text import safe
from empg_lite.run.parallel import speaks

if TYPE_CHECKING:
    from empg_lite.core.view import View

JsonOption = Annotated[
    bool,
    typer.Option("--json", help="Print only JSON on stdout, the result last; progress goes to stderr."),
]
#: Read from argv by ``main``, so that parsing errors print a traceback too.
DebugOption = Annotated[bool, typer.Option("--debug", help="Print the traceback of an error.")]


class Output:
    """With ``--json``, stdout carries JSON only and everything else goes to stderr.

    In a multi-process launch only one process prints.
    """

    def __init__(self, as_json: bool) -> None:
        self.as_json, self._quiet = as_json, not speaks()
        self._stdout = sys.stdout
        self.console = _console(stderr=as_json, quiet=self._quiet)
        # What is written to a file or a pipe holds no progress.
        self.progress = self.console if self.console.is_terminal else _console(stderr=True, quiet=self._quiet)

    @contextlib.contextmanager
    def guarded(self) -> Iterator[None]:
        """Libraries print what they like; with ``--json`` none of it reaches stdout."""
        with contextlib.redirect_stdout(sys.stderr) if self.as_json else contextlib.nullcontext():
            yield

    def line(self, record: Mapping[str, Any]) -> None:
        """One JSON object on stdout with ``--json``; nothing otherwise."""
        if self.as_json:
            self.raw(record)

    def raw(self, record: Mapping[str, Any]) -> None:
        """One compact ASCII JSON object on stdout in either mode."""
        if self._quiet:
            return
        self._stdout.write(json.dumps(record, separators=(",", ":")) + "\n")
        self._stdout.flush()

    def say(self, text: str, style: str | None = None) -> None:
        """Plain text for people, made safe to print; wrapped at words on a terminal, unwrapped in a log."""
        soft = not self.console.is_terminal
        self.console.print(safe(text), style=style, markup=False, highlight=False, soft_wrap=soft)

    def show(self, *renderables: Any) -> None:
        """Tables and panels; model text in them must be ``rich.text.Text`` of ``safe(...)``."""
        self.console.print(*renderables)

    def view(self) -> View:
        """Lines on this console, and progress."""
        from empg_lite.tools.view import ConsoleView

        return ConsoleView(self.console, self.progress)

    def live_view(self) -> View:
        """For a training run: on a terminal also a live status panel."""
        from empg_lite.tools.view import LiveView

        return LiveView(self.console) if self.console.is_terminal else self.view()


def _console(*, stderr: bool, quiet: bool) -> Console:
    """A console that repaints only a terminal. ``FORCE_COLOR`` asks for colors in a log, not for frames."""
    stream = sys.stderr if stderr else sys.stdout
    colored = bool(os.environ.get("FORCE_COLOR")) and not (stream is not None and stream.isatty())
    # A notebook's `!command` runs on a pseudo-terminal and shows control sequences as text.
    plain = False if colored or "JPY_PARENT_PID" in os.environ else None
    color = "standard" if colored and "NO_COLOR" not in os.environ else "auto"
    return Console(stderr=stderr, quiet=quiet, force_terminal=plain, color_system=color)  # type: ignore[arg-type]


def with_output(command: Callable[..., None]) -> Callable[..., None]:
    """Give a command ``--json`` and ``--debug``, and pass it an ``Output`` as its first argument."""
    signature = inspect.signature(command, eval_str=True)

    def run(*, as_json: bool, debug: bool, **options: Any) -> None:
        out = Output(as_json)
        with out.guarded():
            command(out, **options)

    common = [
        inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=False, annotation=option)
        for name, option in (("as_json", JsonOption), ("debug", DebugOption))
    ]
    own = [p.replace(kind=inspect.Parameter.KEYWORD_ONLY) for p in list(signature.parameters.values())[1:]]
    run.__name__, run.__doc__ = command.__name__, command.__doc__
    run.__signature__ = signature.replace(parameters=[*own, *common])  # type: ignore[attr-defined]
    return run


def command_line() -> str:
    """The command as typed, for the record."""
    import shlex

    return shlex.join(["empg-lite", *sys.argv[1:]])
