"""The views of a run: plain lines (a log, a pipe), a live panel (a terminal), one display (a notebook)."""

from __future__ import annotations

import html
import io
import os
import select
import sys
import time
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING, Any, Self

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.panel import Panel
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from rich.text import Text

from empg_lite.core import control
from empg_lite.core.safe_text import safe
from empg_lite.core.view import Advance, View
from empg_lite.tools.pace import Clock, Pace, clock_text

if TYPE_CHECKING:
    from empg_lite.core.rationale import Rationale


class ConsoleView(View):
    """Plain lines that read well in a log; on a terminal also a progress bar for the current phase.

    Args:
        progress: where progress goes, if not to ``console``. Where that is no terminal, it is a line whenever
            nothing was said for ``QUIET`` seconds.
    """

    QUIET = 30.0

    _COLUMNS = "   step   reward    mixed   length   loss      tokens/s   s/step   validation"
    _REUSE = "     ess      kl    age"
    _IN_TURNS = "   step    1st try  solved tries   length   loss      tokens/s   s/step   greedy    "
    _LEGEND = (
        "1st try: right at once, the accuracy at temperature 1 · solved 28/30: of 30 problems that ended "
        "28 are solved, 2 given up · tries: that a solved one took · greedy: accuracy on held-out problems"
    )

    def __init__(
        self, console: Console, progress: Console | None = None, clock: Clock = time.monotonic
    ) -> None:
        self.console, self.progress = console, progress or console
        self._clock, self._said = clock, clock()
        self._header_due = True
        self._reuse = self._explained = False

    def note(self, text: str) -> None:
        self._line(text)
        self._header_due = True

    def warn(self, text: str) -> None:
        self._line(f"warning: {text}", style="yellow")
        self._header_due = True

    def _line(self, text: str, style: str | None = None) -> None:
        """Wrapped at words on a terminal, unwrapped in a log."""
        soft, self._said = not self.console.is_terminal, self._clock()
        self.console.print(text, style=style, markup=False, highlight=False, soft_wrap=soft)

    def step(self, record: Mapping[str, Any], total: int) -> None:
        if not self._reuse and _reuses(record):
            self._reuse = self._header_due = True
        if self._header_due:
            self._header(in_turns=_in_turns(record))
        loss = f"{record['loss']:.4f}" if record["loss"] is not None else "no update"
        accuracy, speed = record.get("eval/accuracy"), record.get("time/tokens_per_second", 0.0)
        self._line(
            f"{record['step']:5d}/{total:<5d}{self._signal_columns(record)}"
            f"{record['completions/mean_length']:9.0f}   {loss:9s}{speed:9.0f}"
            f"{record['step_time']:9.2f}   {'' if accuracy is None else f'{accuracy:.1%}':10s}"
            f"{self._reuse_columns(record) if self._reuse else ''}".rstrip()
        )

    def _header(self, *, in_turns: bool) -> None:
        if in_turns and not self._explained:
            self._explained = True
            self._line(self._LEGEND)
        columns = self._IN_TURNS if in_turns else self._COLUMNS
        self._line((columns + (self._REUSE if self._reuse else "")).rstrip(), style="bold")
        self._header_due = False

    @staticmethod
    def _signal_columns(record: Mapping[str, Any]) -> str:
        """Reward and mixed groups; under ``sampler.tries`` how its problems fared.

        There the reward is not shown: hard problems are asked more often, so it is no accuracy.
        """
        if not _in_turns(record):
            return f"{record['reward']:7.1%}{record['em/frac_mixed']:9.0%}"
        first, tries = record.get("em/right_first"), record.get("em/tries_solved")
        solved = f"{record['em/solved']}/{record['em/finished']}"
        at_once, took = "" if first is None else f"{first:.1%}", "" if tries is None else f"{tries:.1f}"
        return f"{at_once:>7s}{solved:>8s}{took:>6s}"

    @staticmethod
    def _reuse_columns(record: Mapping[str, Any]) -> str:
        """Effective sample size, KL since the start of the fit, mean age in optimizer steps."""
        kl = record.get("em/kl_old")
        return f"{record['em/ess']:8.0%}{'' if kl is None else f'{kl:.4f}':>8s}{record['em/staleness']:7.1f}"

    @contextmanager
    def phase(self, name: str, total: int, done: int = 0) -> Iterator[Advance]:
        pace = Pace(name, total, done, self._clock)
        if not self.progress.is_terminal:
            yield lambda rows: self._tell_now_and_then(pace, rows)
            return
        columns = (
            BarColumn(bar_width=20),
            TextColumn("{task.description}", markup=False),
            TimeElapsedColumn(),
        )
        with Progress(*columns, console=self.progress, transient=True) as bar:
            task = bar.add_task(pace.text(), total=total, completed=done)

            def advance(rows: int) -> None:
                pace.advance(rows)
                bar.update(task, completed=pace.done, description=pace.text())

            yield advance

    def _tell_now_and_then(self, pace: Pace, rows: int) -> None:
        pace.advance(rows)
        if self._clock() - self._said >= self.QUIET:
            self._said = self._clock()
            self.progress.print(pace.text(), markup=False, highlight=False, soft_wrap=True)


def _reuses(record: Mapping[str, Any]) -> bool:
    """Whether the step fitted samples more than once, or samples of an older policy."""
    return record["em/updates"] > 1 or record["em/staleness"] > 0


def _in_turns(record: Mapping[str, Any]) -> bool:
    """Whether the step asked each problem until it was right (``sampler.tries``)."""
    return "em/finished" in record


class Status:
    """The state of a run in a few lines, most important first."""

    def __init__(self, clock: Clock = time.monotonic) -> None:
        self._clock = clock
        self._record: Mapping[str, Any] = {}
        self._total = 0
        self._held_out: tuple[float, int] | None = None
        self._shares: deque[float] = deque(maxlen=40)  # rewards, or right at first try
        self._seconds: deque[float] = deque(maxlen=10)
        self._pace: Pace | None = None

    def step(self, record: Mapping[str, Any], total: int) -> None:
        """Remember a step's record."""
        self._record, self._total = record, total
        share = record.get("em/right_first") if _in_turns(record) else record["reward"]
        self._shares.extend([] if share is None else [share])
        self._seconds.append(record["step_time"])
        if record.get("eval/accuracy") is not None:
            self._held_out = record["eval/accuracy"], record["step"]

    @contextmanager
    def phase(self, name: str, total: int, done: int = 0) -> Iterator[Advance]:
        """The current phase; phases may nest."""
        before, self._pace = self._pace, (pace := Pace(name, total, done, self._clock))
        try:
            yield pace.advance
        finally:
            self._pace = before

    def lines(self) -> list[str]:
        """At most four lines."""
        found = [self._progress(), self._learning(), self._cost()] if self._record else []
        if self._pace is not None:
            found.append(self._pace.text())
        return found or ["starting"]

    def _progress(self) -> str:
        step = self._record["step"]
        left = (self._total - step) * sum(self._seconds) / len(self._seconds)
        full = round(20 * step / self._total)
        eta = f"about {clock_text(left)} left" if step < self._total else "all steps done"
        return f"step {step} of {self._total}  {'█' * full}{'░' * (20 - full)}  {eta}"

    def _learning(self) -> str:
        r, held_out = self._record, "not yet"
        if self._held_out is not None:
            held_out = f"{self._held_out[0]:.1%} (step {self._held_out[1]})"
        return f"held-out {held_out} · {self._signal()} · {r['completions/mean_length']:.0f} tokens"

    def _signal(self) -> str:
        r, line = self._record, sparkline(self._shares)
        if not _in_turns(r):
            return f"reward {r['reward']:.1%} {line} · mixed in {r['em/frac_mixed']:.0%} of the problems"
        first = f"{r['em/right_first']:.1%}" if "em/right_first" in r else "none asked"
        took = f", {r['em/tries_solved']:.1f} tries each" if "em/tries_solved" in r else ""
        return (
            f"right at first try {first} {line} · {r['em/solved']} solved{took}, {r['em/given_up']} given up"
        )

    def _cost(self) -> str:
        r = self._record
        parts = {name: r.get(f"time/{name}", 0.0) for name in ("sample", "score", "fit")}
        whole = sum(parts.values()) or 1.0
        shares = ", ".join(f"{name} {seconds / whole:.0%}" for name, seconds in parts.items())
        # As in the memory plan: the card's peak on a GPU, the process's on a CPU.
        memory = r.get("memory/peak_gpu_mb") or r.get("memory/peak_rss_mb")
        peak = "" if memory is None else f" · peak {memory * 2**20 / 1e9:.1f} GB"
        return f"{r.get('time/tokens_per_second', 0.0):,.0f} tokens/s · {shares}{peak}"


def sparkline(shares: Sequence[float] | deque[float]) -> str:
    """A line of bars for shares from 0 to 1, on a fixed scale: a small rise looks small."""
    return "".join("▁▂▃▄▅▆▇█"[min(7, max(0, int(8 * share)))] for share in shares)


class LiveView(ConsoleView):
    """The lines of ``ConsoleView`` above a live status panel.

    Where keys can be read, ``r`` shows and hides the latest right and the latest wrong rationale.
    """

    def __init__(self, console: Console) -> None:
        super().__init__(console)
        self._status = Status()
        self._live: Live | None = None
        self._latest: dict[bool, Rationale] = {}
        self._asked, self._keys = False, _Keys()

    def __enter__(self) -> Self:
        self._keys.listen()
        self._live = Live(
            console=self.console, get_renderable=self._panel, refresh_per_second=4, transient=True
        )
        self._live.start()
        return self

    def __exit__(self, *exc_info: object) -> None:
        if self._live is not None:
            self._live.stop()
            self._live = None
        self._keys.restore()

    def step(self, record: Mapping[str, Any], total: int) -> None:
        self._status.step(record, total)
        super().step(record, total)

    def sampled(self, rows: Sequence[Rationale]) -> None:
        for r in rows:
            self._latest[r.right] = r

    @contextmanager
    def phase(self, name: str, total: int, done: int = 0) -> Iterator[Advance]:
        if self._live is None:
            with super().phase(name, total, done) as advance:
                yield advance
        else:
            with self._status.phase(name, total, done) as advance:
                yield advance

    def _panel(self) -> RenderableType:
        if "r" in self._keys.pressed():
            self._asked = not self._asked
        hint = "r hides them" if self._asked else "r shows a right and a wrong rationale"
        body = Panel(
            Text("\n".join(self._status.lines())),
            border_style="dim",
            subtitle=hint if self._keys.listening and self._latest else None,
            subtitle_align="left",
        )
        return Group(*(self._rationales() if self._asked else ()), body)

    def _rationales(self) -> list[RenderableType]:
        """Each cut to a few lines: the panel must not be taller than the screen."""
        room = max(2, (self.console.height - 13) // 2)
        shown = []
        for right in (True, False):
            r = self._latest.get(right)
            if r is None:
                continue
            text = Text(safe(f"{r.question.strip()}\n{r.completion.strip()}"))
            lines = text.wrap(self.console, max(10, self.console.width - 4))
            title = f"{'right' if right else 'wrong'} · step {r.step} · "
            title += f"try {r.tries} · " if r.tries else ""
            title += f"read {safe(str(r.extracted))[:30]}, gold {safe(r.gold)[:30]}"
            shown.append(
                Panel(
                    Text("\n").join(lines[-room:] if len(lines) > room else lines),
                    title=Text(title),
                    border_style="green" if right else "red",
                )
            )
        return list(shown)


class _Keys:
    """Key presses without echo; the terminal is restored at the end and at the first signal."""

    def __init__(self) -> None:
        self._before: Any = None

    @property
    def listening(self) -> bool:
        return self._before is not None

    def listen(self) -> None:
        """Start, if stdin is a terminal that this process may read."""
        with suppress(Exception):  # not a terminal, not in the foreground, or no termios: no keys
            import termios
            import tty

            fd = sys.stdin.fileno()
            if not os.isatty(fd) or os.tcgetpgrp(fd) != os.getpgrp():
                return
            before = termios.tcgetattr(fd)
            tty.setcbreak(fd)
            self._before = before
            control.AT_SIGNAL.append(self.restore)

    def pressed(self) -> str:
        """The keys pressed since the last call."""
        if not self.listening or not select.select([sys.stdin], [], [], 0)[0]:
            return ""
        return os.read(sys.stdin.fileno(), 64).decode("utf-8", "ignore")

    def restore(self) -> None:
        """Restore the terminal's settings."""
        if self._before is None:
            return
        import termios

        before, self._before = self._before, None
        control.AT_SIGNAL.remove(self.restore)
        with suppress(Exception):
            termios.tcsetattr(sys.stdin.fileno(), termios.TCSADRAIN, before)


class NotebookView(View):
    """One display, rewritten at most once a second: the last lines and the status."""

    #: Lines shown; ``metrics.jsonl`` has them all.
    LINES = 30

    def __init__(self) -> None:
        from IPython.display import HTML, display

        self._html = HTML
        self._status, self._lines = Status(), deque[str](maxlen=self.LINES)
        self._console = Console(
            width=110, color_system=None, force_terminal=False, force_jupyter=False, file=_Lines(self._lines)
        )
        self._printer = ConsoleView(self._console)
        self._shown = time.monotonic()
        self._display = display(HTML("starting"), display_id=True)

    def note(self, text: str) -> None:
        self._printer.note(text)
        self._update()

    def warn(self, text: str) -> None:
        self._printer.warn(text)
        self._update()

    def step(self, record: Mapping[str, Any], total: int) -> None:
        self._status.step(record, total)
        self._printer.step(record, total)
        self._update()

    @contextmanager
    def phase(self, name: str, total: int, done: int = 0) -> Iterator[Advance]:
        with self._status.phase(name, total, done) as advance:

            def advance_and_show(rows: int) -> None:
                advance(rows)
                self._update()

            yield advance_and_show

    def __exit__(self, *exc_info: object) -> None:
        self._update(now=True)

    def _update(self, now: bool = False) -> None:
        if not now and time.monotonic() - self._shown < 1.0:
            return
        self._shown = time.monotonic()
        text = "\n".join([*self._lines, "", *self._status.lines()])
        self._display.update(self._html(f"<pre>{html.escape(safe(text))}</pre>"))


class _Lines(io.StringIO):
    """A text file that appends its lines to a deque."""

    def __init__(self, lines: deque[str]) -> None:
        super().__init__()
        self._lines, self._rest = lines, ""

    def write(self, text: str) -> int:
        *whole, self._rest = (self._rest + text).split("\n")
        self._lines.extend(whole)
        return len(text)


def in_notebook() -> bool:
    """Whether this process is a notebook kernel."""
    shell = sys.modules.get("IPython")
    running = shell.get_ipython() if shell is not None else None
    return type(running).__name__ in ("ZMQInteractiveShell", "Shell")  # Colab's is called Shell


def view_here() -> View:
    """A notebook display in a notebook, else lines on the console."""
    return NotebookView() if in_notebook() else ConsoleView(Console())
