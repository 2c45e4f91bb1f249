"""Rationales on a terminal: what each sentence does, where the answer was read, how it was graded."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rich.panel import Panel
from rich.text import Text

from empg_lite.core.behaviors import spans
from empg_lite.core.safe_text import safe

if TYPE_CHECKING:
    from empg_lite.core.rationale import Rationale

#: Behavior -> the mark before its sentence, its style, and its legend.
MARKS = {
    "decomposition": ("▸", "blue", "sets up a part"),
    "verification": ("✓", "green", "checks"),
    "backtracking": ("↶", "yellow", "turns back"),
    "backward_chaining": ("←", "magenta", "works backwards"),
}


def marked(completion: str, extracted: str | None = None) -> tuple[Text, list[str]]:
    """A completion with its marks, and the behaviors found. Readable without color, safe to print."""
    text = safe(completion).strip()
    found = spans(text)
    out, at = Text(), 0
    for span in found:
        if span.start > at:
            out.append(text[at : span.start])
            at = span.start
        mark, style, _ = MARKS[span.behavior]
        out.append(f"{mark} ", style=f"bold {style}")
        if span.end > at:
            out.append(text[at : span.end], style=style)
            at = span.end
    out.append(text[at:])
    wanted = safe(extracted or "")
    if wanted and (place := out.plain.rfind(wanted)) >= 0:
        out.stylize("bold underline", place, place + len(wanted))
    return out, [name for name in MARKS if any(s.behavior == name for s in found)]


def legend(names: list[str]) -> str:
    """The legend of the marks that occur."""
    return " · ".join(f"{MARKS[name][0]} {MARKS[name][2]}" for name in names)


def _verdict(r: Rationale) -> str:
    return "" if r.reward is None else f"reward {r.reward:g} ({r.reason})"


def _style(r: Rationale) -> str:
    return "none" if r.reward is None else "green" if r.right else "red"


def sample_line(r: Rationale) -> Text:
    """A rationale on one line: verdict, answer, the end of its reasoning."""
    answer = "no answer" if r.extracted is None else safe(r.extracted)[:12]
    end = " ".join(safe(r.completion).split())[-60:]
    line = Text(f"{_verdict(r) or 'not graded':20} ", style=_style(r))
    return line.append(f"{answer:12} ", style="bold").append(end, style="dim")


def reply_panel(r: Rationale, title: str | None = None) -> Panel:
    """A chat reply with its marks and verdict."""
    body, found = marked(r.completion, r.extracted)
    facts = [
        f"{len(r.completion_ids)} tokens",
        "cut off" if r.finish_reason == "length" else "stopped",
        "no answer found" if r.extracted is None else f"answer {r.extracted} ({r.rule})",
        _verdict(r),
    ]
    body = body if body.plain else Text("(nothing)")
    body.append("\n" + safe(" · ".join(filter(None, facts))), style="dim")
    if found:
        body.append("\n" + legend(found), style="dim")
    return Panel(body, title=title, border_style=_style(r))


def stored_panel(r: Rationale) -> Panel:
    """A stored rationale with its question, weight and gold answer."""
    facts = [
        _verdict(r) or "not graded",
        "" if r.weight is None else f"weight {r.weight:.3g}",
        "from text" if r.origin == "text" else "",
        "" if r.extracted is None else f"read {r.extracted} ({r.rule})",
        f"gold {r.gold}",
        f"{len(r.completion_ids)} tokens",
    ]
    body = Text(safe(r.question or r.prompt).strip() + "\n", style="italic")
    body.append(safe(r.completion).strip() or "(nothing)", style="not italic")
    body.append("\n" + safe(" · ".join(filter(None, facts))), style="not italic dim")
    number = f"sample {r.sample_index}" + (f" · try {r.tries}" if r.tries else "")
    title = Text(f"{r.problem_id} · step {r.step} · {number}")
    style = "none" if r.reward is None else "green" if r.reward == 1 else "red"
    return Panel(body, title=title, border_style=style)
