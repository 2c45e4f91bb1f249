"""The command line: the only place that imports typer. Each command imports what it needs when it runs."""

from __future__ import annotations

import sys
import time
from typing import Any

import typer
from typer.models import CommandInfo

from empg_lite.cli import chat, export, grade, look, report, work
from empg_lite.core.errors import EmpgError, UsageError, explained
from empg_lite.run.parallel import GRACE, leave, processes, speaks

app = typer.Typer(
    name="empg-lite",
    help="Teach a small language model to reason with the EM Policy Gradient, on one GPU.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    epilog="First try: empg-lite train --recipe tiny   (any CPU, two minutes, no download)",
)
for commands in (work, chat, report, export, grade, look):
    commands.register(app)
#: Commands by what they are for, in the order of the help.
PANELS = {
    "Train, and look at it": ("train", "eval", "chat", "inspect", "report", "export"),
    "The loop in parts": ("sample", "score", "fit"),
    "Before training": ("recipes", "check", "plan", "grade", "doctor"),
}


def _arrange() -> None:
    panel_of = {name: panel for panel, names in PANELS.items() for name in names}
    order = list(panel_of)

    def name(command: CommandInfo) -> str:
        return command.name or str(getattr(command.callback, "__name__", ""))

    app.registered_commands.sort(key=lambda command: order.index(name(command)))
    for command in app.registered_commands:
        command.rich_help_panel = panel_of[name(command)]


_arrange()


def main(argv: list[str] | None = None) -> None:
    """Run a command; every failure is one line on stderr and an exit code."""
    arguments = sys.argv[1:] if argv is None else argv
    try:
        refuse_launcher(arguments)
        code = app(args=arguments, standalone_mode=False)
    except BaseException as error:  # the last line of defence: whatever it is, it gets a line and a code
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
    """Only ``train`` knows how to share its work with other processes.

    Raises:
        UsageError: N processes would do the same thing N times, over each other's files.
    """
    if processes() > 1 and arguments[:1] != ["train"]:
        raise UsageError(
            f"{processes()} processes were launched, and only train shares its work",
            " ".join(["empg-lite", *arguments[:1]]),
            "start it without the launcher",
        )


def _report(error: BaseException) -> int:
    if isinstance(error, SystemExit):
        return error.code if isinstance(error.code, int) else 0
    if isinstance(error, typer.Exit):
        return error.exit_code
    if isinstance(error, BrokenPipeError):  # the reader of a pipe went away
        sys.stdout = sys.stderr  # so that the interpreter does not flush into it again
        return 0
    known = _translate(error)
    if speaks():
        print(f"error: {_one_line(known)}", file=sys.stderr)
    else:
        time.sleep(GRACE)
    return known.exit_code


def _one_line(error: EmpgError) -> str:
    from empg_lite.core.safe_text import safe, without_passwords

    return " ".join(without_passwords(safe(str(error))).split())


def _translate(error: BaseException) -> EmpgError:
    """Errors of others as ours."""
    if isinstance(error, typer.BadParameter | typer.Abort) or type(error).__module__.startswith("typer."):
        message = getattr(error, "format_message", lambda: str(error) or type(error).__name__)()
        return UsageError(message.rstrip("."), _usage_context(error), "see --help")
    return explained(error)


def _usage_context(error: Any) -> str:
    context = getattr(error, "ctx", None)
    return context.command_path if context is not None else ""
