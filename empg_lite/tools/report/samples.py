"""The rationales that a page can hold: a fair choice of them, cut into pieces that can be marked."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from random import Random
from typing import Any

from empg_lite.core.behaviors import BEHAVIORS, spans
from empg_lite.core.rationale import Rationale
from empg_lite.core.safe_text import safe
from empg_lite.tools.report.reading import StoredRun

#: Characters of one rationale that are shown, from its end: the answer is there.
LONGEST = 6000


def pieces(r: Rationale) -> list[list[str]]:
    """The completion as ``[text]`` or ``[text, marks]`` pieces that give it back when joined.

    Marks are space-separated: ``answer`` where the extracted answer last stands in the text, and the
    behaviours of the sentence. Text is made safe to show first.
    """
    text = safe(r.completion)
    if len(text) > LONGEST:
        text = f"[{len(text) - LONGEST} characters left out] ... {text[-LONGEST:]}"
    marked = [(span.start, span.end, span.behavior) for span in spans(text)]
    wanted = safe(r.extracted or "")
    at = text.rfind(wanted) if wanted else -1
    if at >= 0:
        marked.append((at, at + len(wanted), "answer"))
    cuts = sorted({0, len(text), *(edge for start, end, _ in marked for edge in (start, end))})
    found = []
    for start, end in zip(cuts, cuts[1:], strict=False):
        marks = sorted({mark for a, b, mark in marked if a <= start and end <= b})
        found.append([text[start:end], " ".join(marks)] if marks else [text[start:end]])
    return found


def rationale_entry(r: Rationale, run: int, question: int) -> dict[str, Any]:
    """What the page's table needs of a rationale."""
    parts = pieces(r)
    marks = {mark for part in parts[:] if len(part) > 1 for mark in part[1].split()}
    return {
        "run": run,
        "step": r.step,
        "q": question,
        "k": r.sample_index,
        "reward": r.reward,
        "reason": r.reason,
        "weight": None if r.weight is None else round(r.weight, 3),
        "tokens": len(r.completion_ids),
        "cut": r.finish_reason == "length",
        "answer": None if r.extracted is None else safe(r.extracted)[:200],
        "rule": r.rule,
        "behaviors": [name for name in BEHAVIORS if name in marks],
        "parts": parts,
    }


def choose(rows: Iterable[tuple[int, Rationale]], room: int, seed: int = 0) -> list[tuple[int, Rationale]]:
    """Some of (run, rationale) pairs: as many as ``room`` characters of completions hold.

    Runs, steps, and right and wrong answers take turns; which of theirs is drawn is chance, always the same.
    """
    rng, strata = Random(seed), dict[tuple[int, int, bool], list[tuple[int, Rationale]]]()
    for run, r in rows:
        strata.setdefault((run, r.step, r.right), []).append((run, r))
    for members in strata.values():
        rng.shuffle(members)
    turns = [strata[key] for key in sorted(strata, key=lambda key: rng.random())]
    chosen: list[tuple[int, Rationale]] = []
    while turns:
        turns = [members for members in turns if members]
        for members in turns:
            room -= 300 + min(len(members[-1][1].completion), LONGEST)  # its other facts take some, too
            if room < 0:
                return chosen
            chosen.append(members.pop())
    return chosen


def stored(runs: Sequence[StoredRun]) -> list[tuple[int, Rationale]]:
    """Every stored rationale of training, with the number of its run."""
    return [(i, r) for i, run in enumerate(runs) for _, rows in run.rollouts() for r in rows]
