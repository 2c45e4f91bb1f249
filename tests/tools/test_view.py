"""Views of a live run: the right numbers, few updates, and a terminal that is restored."""

from __future__ import annotations

import io
import os
import pty
import re
import select
import signal
import subprocess
import sys
import termios
import time
from pathlib import Path
from typing import Any

import pytest
from processes import HANGS
from rich.console import Console
from rich.text import Text
from stored_runs import rationale, record, step_rows, turn_record

from empg_lite.tools import view as views
from empg_lite.tools.pace import Pace, clock_text
from empg_lite.tools.view import ConsoleView, LiveView, NotebookView, Status, sparkline

HOSTILE = "\x1b]0;owned\x07\x1b[2J[bold red]\u202e" + "wide 好 " * 200 + "#### 7"


def told(status: Any, steps: int) -> None:
    for step in range(1, steps + 1):
        status.step({**record(step, step_rows(step)), "em/updates": 1, "em/staleness": 0.0}, 25)


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0, "0:00"), (41.6, "0:42"), (725, "12:05"), (12000, "3:20:00"), (3599.7, "1:00:00")],
)
def test_clock_text(seconds: float, text: str) -> None:
    assert clock_text(seconds) == text


def test_sparkline_has_a_fixed_scale() -> None:
    assert sparkline([0.0, 0.13, 0.5, 0.99, 1.0]) == "▁▂▅██"
    assert len(set(sparkline([0.50, 0.52, 0.54]))) == 1  # a tiny rise does not look like one
    assert sparkline([-1.0, 2.0]) == "▁█"


def test_status_shows_what_was_recorded() -> None:
    now = [0.0]
    status = Status(lambda: now[0])
    assert status.lines() == ["starting"]
    with status.phase("evaluating", 10) as advance:
        advance(3)
        advance(2)
        assert status.lines() == ["evaluating: 5 of 10"]
        now[0] = 10.0
        assert status.lines() == ["evaluating: 5 of 10 · 30.0 a minute · about 0:10 left"]
    told(status, 5)
    progress, learning, cost = status.lines()
    assert progress.startswith("step 5 of 25  ████░") and progress.endswith(
        "about 0:40 left"
    )  # 20 steps of 2 s
    assert "held-out 40.0% (step 4)" in learning and "reward 37.5% ▄▄▄▄▄" in learning
    assert "mixed in 75% of the problems" in learning
    assert cost == "50 tokens/s · sample 57%, score 14%, fit 29% · peak 0.9 GB"
    with status.phase("sampling", 128) as outer:
        outer(100)
        with status.phase("grading", 4):
            assert status.lines()[3] == "grading: 0 of 4"
        assert status.lines()[3] == "sampling: 100 of 128"
    assert len(status.lines()) == 3


def test_status_shows_the_peak_that_the_memory_plan_predicts() -> None:
    """The card's peak on a GPU, although the process's is recorded too; the process's on a CPU."""
    status, measured = Status(), {**record(1, step_rows(1)), "memory/peak_rss_mb": 5200.0}
    status.step(measured, 25)
    assert status.lines()[2].endswith("peak 5.5 GB")
    status.step({**measured, "memory/peak_gpu_mb": 3100.0}, 25)
    assert status.lines()[2].endswith("peak 3.3 GB")


def in_turns(step: int) -> dict[str, Any]:
    """A record of a step under ``sampler.tries``."""
    return {**record(step, step_rows(step)), "em/updates": 1, "em/staleness": 0.0, **turn_record(step)}


def test_status_of_tries_shows_first_tries_instead_of_the_reward() -> None:
    status = Status()
    status.step(in_turns(1), 25)
    assert "right at first try 12.5% ▂ · 3 solved, 1.5 tries each, 0 given up" in status.lines()[1]
    status.step(in_turns(2), 25)  # no problem was asked for the first time, none was solved
    assert "right at first try none asked ▂ · 0 solved, 1 given up" in status.lines()[1]
    status.step(in_turns(4), 25)
    assert "right at first try 50.0% ▂▅ · 6 solved, 1.5 tries each, 3 given up" in status.lines()[1]
    assert not any(word in status.lines()[1] for word in ("reward", "mixed"))


@pytest.mark.parametrize(("width", "height"), [(120, 40), (80, 24), (60, 20)])
def test_panel_fits_the_screen_and_escapes_model_text(width: int, height: int) -> None:
    console = Console(file=io.StringIO(), force_terminal=True, width=width, height=height)
    live = LiveView(console)
    told(live, 22)
    live.sampled([rationale(HOSTILE, HOSTILE, right=right, gold=HOSTILE, step=22) for right in (True, False)])
    live._asked = True
    with live._status.phase("sampling", 1000):
        lines = console.render_lines(live._panel(), pad=False)
    assert len(lines) <= height
    assert max(sum(segment.cell_length for segment in line) for line in lines) <= width
    text = "\n".join("".join(segment.text for segment in line) for line in lines)
    assert "\x1b" not in text and "\u202e" not in text and "#### 7" in text
    assert "right · step 22" in text and "wrong · step 22" in text and "step 22 of 25" in text


def test_log_gets_plain_lines() -> None:
    out = io.StringIO()
    plain = ConsoleView(Console(file=out, force_terminal=False, width=60))
    with plain, plain.phase("sampling", 5) as advance:
        advance(5)
        told(plain, 2)
        plain.note("a note that is longer than the width of the console is still printed on one line")
    lines = out.getvalue().splitlines()
    assert len(lines) == 4 and "\x1b" not in out.getvalue()
    assert lines[1].split()[:3] == ["1/25", "37.5%", "75%"]


def test_pace_counts_only_its_own_rows() -> None:
    """300 of 1,319 were there before: they are progress, but say nothing about the speed."""
    now = [5.0]
    pace = Pace("evaluating base", 1319, 300, lambda: now[0])
    assert pace.text() == "evaluating base: 300 of 1,319"
    now[0] += 10
    assert pace.text() == "evaluating base: 300 of 1,319"  # nothing to go by
    pace.advance(3)
    assert pace.text() == "evaluating base: 303 of 1,319"  # the first rows to end are the shortest
    pace.advance(22)
    assert pace.text() == "evaluating base: 325 of 1,319 · 2.5 a second · about 6:38 left"  # 994 / 2.5
    now[0] += 90
    pace.advance(994)
    assert pace.text() == "evaluating base: 1,319 of 1,319 · 10.2 a second"


def test_a_log_gets_a_line_when_nothing_was_said_for_a_while() -> None:
    """Progress goes to its own console, after 30 s without any other line, and never with control codes."""
    out, err, now = io.StringIO(), io.StringIO(), [0.0]
    consoles = (Console(file=file, force_terminal=False, width=60) for file in (out, err))
    plain = ConsoleView(*consoles, clock=lambda: now[0])
    with plain, plain.phase("evaluating [b]x[/b]", 100, 10) as advance:
        for _ in range(80):
            now[0] += 1
            advance(1)
            if now[0] == 45:
                plain.note("a note")  # the next line is due at 75, not at 60
    assert out.getvalue() == "a note\n"
    assert err.getvalue().splitlines() == [
        "evaluating [b]x[/b]: 40 of 100 · 1.0 a second · about 1:00 left",
        "evaluating [b]x[/b]: 85 of 100 · 1.0 a second · about 0:15 left",
    ]


def test_a_terminal_gets_a_bar_where_progress_goes() -> None:
    out, err, now = io.StringIO(), io.StringIO(), [0.0]
    bar = Console(file=err, force_terminal=True, width=100)
    plain = ConsoleView(Console(file=out, force_terminal=False), bar, clock=lambda: now[0])
    with plain, plain.phase("evaluating", 100) as advance:
        now[0] = 4.0
        advance(50)
    shown = Text.from_ansi(err.getvalue()).plain
    assert out.getvalue() == "" and "evaluating: 50 of 100 · 12.5 a second · about 0:04 left" in shown


def test_columns_of_tries() -> None:
    out = io.StringIO()
    plain = ConsoleView(Console(file=out, force_terminal=False, width=80))
    for step in (1, 2):
        plain.step(in_turns(step), 25)
    plain.note("a note; the columns are named again, their meaning is not")
    plain.step(in_turns(4), 25)
    legend, header, first, nothing, _, again, fourth = out.getvalue().splitlines()
    assert "2 given up" in legend and again == header and "given up" not in again
    assert header.split()[:4] == ["step", "1st", "try", "solved"] and "reward" not in header
    assert first.split()[:4] == ["1/25", "12.5%", "3/3", "1.5"]
    assert nothing.split()[:3] == ["2/25", "0/1", f"{record(2, step_rows(2))['completions/mean_length']:.0f}"]
    assert fourth.split()[:4] == ["4/25", "50.0%", "6/9", "1.5"]
    for line in (first, nothing, fourth):  # each figure ends where its name does
        for name in ("solved", "length", "tokens/s", "s/step"):
            end = header.index(name) + len(name)
            assert line[end - 1] != " " and line[end : end + 1] in (" ", "")
    assert max(map(len, (header, first, nothing, fourth))) <= 80
    plain.step(in_turns(6) | {"em/updates": 2, "em/ess": 0.5}, 25)
    header, sixth = out.getvalue().splitlines()[-2:]
    assert sixth[header.index("ess") :][:3] == "50%" and len(header) == len(sixth)


class Screen:
    """A fake notebook front end."""

    def __init__(self) -> None:
        self.shown: list[str] = []

    def display(self, thing: Any, display_id: bool) -> Screen:
        assert display_id
        self.shown.append(thing.data)
        return self

    def update(self, thing: Any) -> None:
        self.shown.append(thing.data)


def test_notebook_rewrites_one_display_once_a_second(monkeypatch: pytest.MonkeyPatch) -> None:
    import IPython.display

    screen, now = Screen(), [0.0]
    monkeypatch.setattr(IPython.display, "display", screen.display)
    monkeypatch.setattr(views.time, "monotonic", lambda: now[0])
    with NotebookView() as shown:
        with shown.phase("sampling", 100_000) as advance:
            for _ in range(100_000):
                now[0] += 0.0001
                advance(1)
        assert len(screen.shown) in (10, 11)  # ten seconds
        assert "sampling:" in screen.shown[-1]
        for _ in range(10):
            told(shown, 25)
        shown.warn("<b>x</b> \x1b[31m")
    last = screen.shown[-1]
    assert last.count("\n") < NotebookView.LINES + 10
    assert "&lt;b&gt;x&lt;/b&gt; \\x1b[31m" in last and "<b>" not in last
    assert "step 25 of 25" in last and "25/25" in last


CHILD = """
import sys, time
sys.path.insert(0, {tests!r})
from rich.console import Console
sys.path.insert(1, {tests!r} + "/..")
from stored_runs import record, rationale, step_rows
from empg_lite.core.control import stop_request
from empg_lite.tools.view import LiveView
view = LiveView(Console())
with stop_request(announce=False) as stop, view:
    view.step({{**record(1, step_rows(1)), "em/updates": 1, "em/staleness": 0.0}}, 9)
    view.sampled([rationale("What now?", "so #### 7", right=True)])
    print("ready", flush=True)
    while not stop:
        time.sleep(0.02)
    print("stopped", flush=True)
    time.sleep(600)
"""


def test_keys_are_read_and_the_terminal_is_restored_at_the_first_signal() -> None:
    child, fd = pty.fork()
    if child == 0:
        code = CHILD.format(tests=str(Path(__file__).parents[1] / "support"))
        os.environ["TERM"] = "xterm"
        os.execv(sys.executable, [sys.executable, "-c", code])
    try:
        before = termios.tcgetattr(fd)[3]
        assert before & termios.ECHO and before & termios.ICANON
        read_until(fd, "ready")
        assert not termios.tcgetattr(fd)[3] & (termios.ECHO | termios.ICANON)
        os.write(fd, b"r")
        assert "right · step 1" in read_until(fd, "What now?")
        os.kill(child, signal.SIGINT)
        read_until(fd, "stopped")
        assert termios.tcgetattr(fd)[3] == before
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        os.close(fd)


def read_until(fd: int, wanted: str, seconds: float = HANGS) -> str:
    """Terminal output up to a text, without control sequences."""
    found, end = "", time.monotonic() + seconds
    while wanted not in found:
        assert time.monotonic() < end, found
        if select.select([fd], [], [], 0.1)[0]:
            found += re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", os.read(fd, 65536).decode("utf-8", "replace"))
    return found


def test_output_in_a_notebook_is_plain() -> None:
    """`!empg-lite` runs on a pseudo-terminal, and a notebook would print its control sequences."""
    shown = {}
    for name, extra in (("terminal", {}), ("notebook", {"JPY_PARENT_PID": "1"})):
        ours, theirs = pty.openpty()
        code = (
            "from empg_lite.cli.output import Output; from rich.text import Text;"
            "Output(False).show(Text('hello', style='bold red'))"
        )
        subprocess.run(
            [sys.executable, "-c", code],
            stdout=theirs,
            env={**os.environ, "TERM": "xterm", **extra},
            check=True,
        )
        shown[name] = os.read(ours, 4096).decode()
        os.close(ours)
        os.close(theirs)
    assert "\x1b[" in shown["terminal"] and "\x1b" not in shown["notebook"]


def test_without_safe_the_escape_would_be_printed() -> None:
    """The negative control of the panel test."""
    console = Console(file=io.StringIO(), force_terminal=True, width=80)
    assert "\u202e" in "".join(s.text for line in console.render_lines(Text(HOSTILE)) for s in line)
