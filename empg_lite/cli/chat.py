"""The chat command: one question, questions from a pipe, or a conversation with commands."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from shlex import quote
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.live import Live
from rich.table import Table
from rich.text import Text

from empg_lite import api
from empg_lite.cli.options import (
    AllowCodeOption,
    RecipeOption,
    SeedOption,
    SetOption,
    TargetArgument,
    changes,
    stdin_text,
)
from empg_lite.cli.output import Output
from empg_lite.core.errors import DataError, EmpgError, UsageError
from empg_lite.core.rationale import Problem
from empg_lite.core.safe_text import safe

if TYPE_CHECKING:
    from empg_lite.core.rationale import Rationale
    from empg_lite.rewards import Grader
    from empg_lite.tools.chat import Chat, OnText, Reply

HELP = """\
QUESTION [=> ANSWER]  ask it; with the right answer, the reply is graded
/problem [ID|SPLIT]   ask an evaluation problem (or one of that split) with its answer
/again [K]            ask the last question again: K samples (8) at temperature 1, and their vote
/compare on|off       base and tuned side by side
/temperature X        0 is greedy;  /max N  limit answers to N tokens
/show                 print the last replies again in full
/save FILE            save the conversation as a rollout file
/help, /quit          an empty line or Ctrl-D also quits; Ctrl-C stops an answer"""


def chat(
    out: Output,
    target: TargetArgument = None,
    recipe: RecipeOption = None,
    prompt: Annotated[
        str | None, typer.Option(help="Ask this and exit; - reads stdin.", show_default=False)
    ] = None,
    gold: Annotated[
        str | None, typer.Option(help="The right answer: the reply is graded.", show_default=False)
    ] = None,
    compare: Annotated[bool, typer.Option("--compare", help="Show base and tuned side by side.")] = False,
    temperature: Annotated[float, typer.Option(min=0.0, help="0 is greedy.")] = 0.0,
    max_new_tokens: Annotated[
        int | None, typer.Option(min=1, help="Default: the recipe's.", show_default=False)
    ] = None,
    allow_code: AllowCodeOption = False,
    overrides: SetOption = None,
    seed: SeedOption = None,
) -> None:
    """Ask a model; see its reasoning, the answer that was read, and its reward. /help lists more."""
    if prompt is None and sys.stdin is None:
        raise UsageError("standard input is closed", "chat", "give the question with --prompt")
    model = api.find_model(target, recipe=recipe, overrides=changes(overrides, seed))
    opened = api.open_chat(
        model, temperature=temperature, max_new_tokens=max_new_tokens, allow_code=allow_code
    )
    with opened as (talk, grader):
        conversation = _Conversation(out, talk, grader, compare, gold)
        if prompt is not None:
            conversation.ask_text(stdin_text("--prompt -").strip() if prompt == "-" else prompt, gold)
        else:
            conversation.run(model.label)
    if conversation.failed:
        raise typer.Exit(conversation.failed)


class _Conversation:
    """Answers lines until the input ends."""

    def __init__(self, out: Output, talk: Chat, grader: Grader, compare: bool, gold: str | None) -> None:
        self.out, self.talk, self.grader, self.compare, self.gold = out, talk, grader, compare, gold
        self.person = sys.stdin is not None and sys.stdin.isatty()
        self.problem: Problem | None = None
        self.prompt, self.failed = "you> ", 0
        self.shown: list[Reply] = []
        self.commands: dict[str, Callable[[str], None]] = {
            "problem": self._problem,
            "again": self._again,
            "compare": self._compare,
            "temperature": self._temperature,
            "max": self._max,
            "show": self._show,
            "save": self._save,
            "help": lambda _: self._say(HELP),
        }

    def run(self, label: str) -> None:
        """A conversation; from a pipe, one question per line."""
        if self.person:
            with contextlib.suppress(ImportError):
                import readline  # noqa: F401  (arrow keys and history, where the system has it)

                if sys.stdout.isatty() and self.out.console.color_system:
                    # It redraws the line, so it needs the prompt, with its escape codes marked as zero-width.
                    self.prompt = "\x01\x1b[1m\x02you> \x01\x1b[0m\x02"
            self._say(f"{label} · /help lists the commands, an empty line quits")
        for line in self._lines():
            if line in ("/quit", "/exit"):
                return
            try:
                self._take(line)
            except KeyboardInterrupt:
                if not self.person:  # a script stops as a whole
                    raise
                self._say("stopped")

    def ask_text(self, question: str, gold: str | None) -> None:
        self.ask(Problem.asked(question, gold or ""))

    def ask(self, problem: Problem) -> None:
        """Ask one question and show the replies.

        Raises:
            DataError: it is too long for the model.
        """
        self.problem = problem
        with self._streaming() as on_text:
            replies = self.talk.ask(problem, self.grader, compare=self.compare, on_text=on_text)
        self.shown = list(replies)
        if self.out.as_json:
            result = {reply.speaker: _record(reply.rationale) for reply in replies}
            self.out.line({"question": problem.question, "gold": problem.gold or None, **result})
        else:
            self._print_replies()

    def _lines(self) -> Iterator[str]:
        while True:
            try:
                line = self._read()
            except EOFError:
                return
            except UnicodeDecodeError as error:
                raise DataError("not UTF-8 text", "stdin", "save it as UTF-8") from error
            except KeyboardInterrupt:
                if self.person:
                    return
                raise
            if not line.strip():
                if not self.person and line:  # empty lines of a file are skipped
                    continue
                return
            yield line.strip()

    def _read(self) -> str:
        if not self.person:
            return sys.stdin.readline()
        self._say("")
        return input(self.prompt)

    def _take(self, line: str) -> None:
        """A question or a command. An error is reported and the conversation continues.

        A script also gets a JSON object in place of the answer, and at the end the first error's exit code.
        """
        try:
            name, _, rest = line[1:].partition(" ")
            if line.startswith("/") and name in self.commands:
                self.commands[name](rest.strip())
            elif line.startswith("/"):
                self._say(f"no command /{name}; /help lists them")
            else:
                question, _, known = line.partition("=>")
                self.ask_text(question.strip(), known.strip() or self.gold)
        except EmpgError as error:  # only this line fails
            if self.person:
                self._say(str(error), style="yellow")
                return
            print(f"error: {' '.join(safe(str(error)).split())}", file=sys.stderr)
            self.out.line({"question": line, "error": str(error)})
            self.failed = self.failed or error.exit_code

    # --- commands ---------------------------------------------------------------------------------

    def _problem(self, wanted: str) -> None:
        problem = self.talk.draw_problem(wanted)
        self._say(f"{problem.id}, gold {problem.gold}\n{problem.question}", style="italic")
        self.ask(problem)

    def _again(self, count: str) -> None:
        samples = _number(count or "8", int, 1, 256)
        problem = self.problem
        if samples is None or problem is None:
            self._say("ask something first" if problem is None else "how many samples? /again 8")
            return
        replies, vote = self.talk.again(problem, self.grader, samples)
        self.shown = list(replies)
        if self.out.as_json:
            rows = [_record(r.rationale) for r in replies]
            facts = {"answer": vote.answer, "votes": vote.votes, "right": vote.right}
            asked = {"question": problem.question, "gold": problem.gold or None}
            self.out.line({**asked, "samples": rows, "vote": facts})
            return
        from empg_lite.cli.marks import sample_line

        for reply in replies:
            self.out.console.print(sample_line(reply.rationale), no_wrap=True, overflow="ellipsis", crop=True)
        right = "" if vote.right is None else f" · {vote.right:.0%} right"
        answer = "no answer" if vote.answer is None else f"{vote.answer}, {vote.votes} of {samples}"
        self._say(f"vote: {answer}{right}", style="bold")

    def _compare(self, word: str) -> None:
        if word in ("on", "off"):
            self.compare = word == "on"
        self._say(f"compare is {'on' if self.compare else 'off'}: /compare on|off")

    def _temperature(self, word: str) -> None:
        value = _number(word, float, 0.0, 100.0)
        if value is not None:
            self.talk.decoding = replace(self.talk.decoding, temperature=value)
        self._say(f"temperature is {self.talk.decoding.temperature:g}: /temperature X, 0 is greedy")

    def _max(self, word: str) -> None:
        value = _number(word, int, 1, 32_768)
        if value is not None:
            self.talk.decoding = replace(self.talk.decoding, max_new_tokens=value)
        self._say(f"answers have at most {self.talk.decoding.max_new_tokens} tokens: /max N")

    def _show(self, _: str) -> None:
        if self.shown:
            self._print_replies()
        else:
            self._say("no replies yet")

    def _save(self, name: str) -> None:
        if not name or not self.talk.replies:
            self._say("no replies yet" if name else "which file? /save FILE.jsonl")
            return
        count = self.talk.save(Path(name).expanduser())
        self._say(f"{count} replies in {name}: empg-lite inspect {name if name[:1] == '~' else quote(name)}")

    # --- showing ----------------------------------------------------------------------------------

    def _say(self, text: str, style: str = "dim") -> None:
        self.out.say(text, style)

    @contextlib.contextmanager
    def _streaming(self) -> Iterator[OnText | None]:
        """Show the replies as they grow, on a terminal; removed when they are complete."""
        if self.out.as_json or not self.out.console.is_terminal:
            yield None
            return
        texts: dict[str, str] = {}
        room = max(4, self.out.console.height - 4)

        def shown() -> Text:
            said = (f"{name}> " * self.compare + text.strip() for name, text in list(texts.items()))
            lines = Text(safe("\n".join(said))).wrap(self.out.console, self.out.console.width)
            return Text("\n").join(lines[-room:])

        def grew(speaker: str, text: str) -> None:
            texts[speaker] = text

        with Live(console=self.out.console, get_renderable=shown, refresh_per_second=12, transient=True):
            yield grew

    def _print_replies(self) -> None:
        from empg_lite.cli.marks import reply_panel

        if len({r.speaker for r in self.shown}) == 1:
            for reply in self.shown:
                self.out.show(reply_panel(reply.rationale))
            return
        side_by_side = Table.grid(expand=True)
        for _ in self.shown:
            side_by_side.add_column(ratio=1)
        side_by_side.add_row(*(reply_panel(r.rationale, r.speaker) for r in self.shown))
        self.out.show(side_by_side)


def _number(text: str, kind: Callable[[str], Any], least: float, most: float) -> Any:
    """The number in ``text``, if it is one within the bounds."""
    try:
        value = kind(text)
    except ValueError:
        return None
    return value if least <= value <= most else None


def _record(r: Rationale) -> dict[str, Any]:
    return {
        "completion": r.completion,
        "tokens": len(r.completion_ids),
        "finish_reason": r.finish_reason,
        "extracted": r.extracted,
        "rule": r.rule,
        "reward": r.reward,
        "reason": r.reason,
    }
