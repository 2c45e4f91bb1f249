"""The command line: the only place that imports typer. Each command parses its options and calls ``api``."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from io import TextIOWrapper
from typing import Any

import typer

from empg_lite.cli import chat, export, prepare, results, train
from empg_lite.cli.output import with_output
from empg_lite.core.errors import EmpgError, UsageError, explained
from empg_lite.run.parallel import GRACE, leave, processes, speaks

#: The commands in the order of the help, by purpose.
COMMANDS: dict[str, dict[str, Callable[..., None]]] = {
    "Train and evaluate": {
        "train": train.train,
        "eval": results.evaluate,
        "chat": chat.chat,
        "inspect": results.inspect,
        "report": results.report,
        "export": export.export,
    },
    "The loop in parts": {"sample": train.sample, "score": train.score, "fit": train.fit},
    "Before training": {
        "recipes": prepare.recipes,
        "check": prepare.check,
        "plan": prepare.plan,
        "grade": prepare.grade,
        "doctor": prepare.doctor,
    },
}

app = typer.Typer(
    name="empg-lite",
    help="Teach a small language model to reason with the EM Policy Gradient, on one GPU.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    epilog="First try: empg-lite train --recipe tiny   (any CPU, two minutes, no download)",
)
for panel, commands in COMMANDS.items():
    for name, command in commands.items():
        app.command(name, rich_help_panel=panel)(with_output(command))


def main(argv: list[str] | None = None) -> None:
    """Run a command; every failure is one line on stderr and an exit code."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, TextIOWrapper) and "utf" not in stream.encoding.lower():
            stream.reconfigure(errors="backslashreplace")  # PYTHONIOENCODING=ascii, an old terminal
    arguments = sys.argv[1:] if argv is None else argv
    try:
        refuse_launcher(arguments)
        code = app(args=arguments, standalone_mode=False)
    except BaseException as error:  # the last line of defense: any failure becomes a line and a code
        if "--debug" in arguments and not isinstance(error, (SystemExit, typer.Exit)):
            import traceback

            from empg_lite.core.safe_text import safe, without_passwords

            print(without_passwords(safe(traceback.format_exc())), end="", file=sys.stderr)
        code = _report(error)
    code = code if isinstance(code, int) else 0
    if argv is None and processes() > 1:  # the command itself, not a call from within a process
        leave(code)
    raise SystemExit(code)


def refuse_launcher(arguments: list[str]) -> None:
    """Only ``train`` can share its work among processes.

    Raises:
        UsageError: N processes would do the same work N times and overwrite each other's files.
    """
    if processes() > 1 and arguments[:1] != ["train"]:
        raise UsageError(
            f"{processes()} processes were launched, and only train shares its work",
            " ".join(["empg-lite", *arguments[:1]]),
            "run it without the launcher",
        )


def _report(error: BaseException) -> int:
    """Print the error line; the exit code."""
    if isinstance(error, SystemExit):
        return error.code if isinstance(error.code, int) else 0
    if isinstance(error, typer.Exit):
        return error.exit_code
    if isinstance(error, BrokenPipeError):  # the reader of a pipe closed it
        sys.stdout = sys.stderr  # so that the interpreter does not flush into it again
        return 0
    known = _translated(error)
    if speaks():
        from empg_lite.core.safe_text import safe, without_passwords

        print("error:", *without_passwords(safe(str(known))).split(), file=sys.stderr)
    else:
        time.sleep(GRACE)
    return known.exit_code


def _translated(error: BaseException) -> EmpgError:
    """Any exception as an ``EmpgError``; typer's are usage errors."""
    if isinstance(error, typer.BadParameter | typer.Abort) or type(error).__module__.startswith("typer."):
        message = getattr(error, "format_message", lambda: str(error) or type(error).__name__)()
        return UsageError(message.rstrip(".") or "no command given", _usage_context(error), "see --help")
    return explained(error)


def _usage_context(error: Any) -> str:
    context = getattr(error, "ctx", None)
    return context.command_path if context is not None else ""
