"""Reasoning made visible on a terminal: what a sentence does, and where the answer was read."""

from __future__ import annotations

from rich.text import Text

from empg_lite.core.behaviors import spans
from empg_lite.core.safe_text import safe

#: Behaviour -> the mark before its sentence, its style, and what the legend says.
MARKS = {
    "decomposition": ("▸", "blue", "sets up a part"),
    "verification": ("✓", "green", "checks"),
    "backtracking": ("↶", "yellow", "turns back"),
    "backward_chaining": ("←", "magenta", "works backwards"),
}


def marked(completion: str, extracted: str | None = None) -> tuple[Text, list[str]]:
    """A completion with its marks, and the behaviours found. Readable without colours, safe to print."""
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
    """What the marks mean, for those that occur."""
    return " · ".join(f"{MARKS[name][0]} {MARKS[name][2]}" for name in names)
