"""The rationales that a page shows: a balanced choice, cut into pieces that can be highlighted."""

from __future__ import annotations

from collections.abc import Iterable
from random import Random
from typing import TYPE_CHECKING, Any

from empg_lite.core.behaviors import BEHAVIORS, spans
from empg_lite.core.rationale import Rationale
from empg_lite.core.safe_text import safe

if TYPE_CHECKING:
    from empg_lite.tools.report.reading import StoredRun

#: Characters shown of one rationale, counted from its end, where the answer is.
LONGEST = 6000
#: Characters that an entry takes besides its completion, roughly.
_OVERHEAD = 300


class Questions:
    """Each problem once; the entries refer to it by number."""

    def __init__(self) -> None:
        self.entries: list[dict[str, str]] = []
        self._numbers: dict[tuple[str, str], int] = {}

    def number(self, r: Rationale) -> int:
        key = (r.problem_id, r.gold)
        if key not in self._numbers:
            self._numbers[key] = len(self.entries)
            text = safe(r.question or r.prompt)[:4000]
            self.entries.append({"id": r.problem_id, "text": text, "gold": safe(r.gold)[-400:]})
        return self._numbers[key]


def pieces(r: Rationale) -> list[list[str]]:
    """The completion, made safe to show, as ``[text]`` or ``[text, marks]`` pieces in order.

    Marks are space-separated: ``answer`` at the last occurrence of the extracted answer, and the behaviors of
    the sentence.
    """
    text = safe(r.completion)
    if len(text) > LONGEST:
        text = f"[{len(text) - LONGEST} characters omitted] ... {text[-LONGEST:]}"
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


def rationale_entry(r: Rationale, run: int, questions: Questions) -> dict[str, Any]:
    """A row of the table of rationales."""
    parts = pieces(r)
    marks = {mark for part in parts if len(part) > 1 for mark in part[1].split()}
    return {
        "run": run,
        "step": r.step,
        "q": questions.number(r),
        "k": r.sample_index,
        **({"try": r.tries} if r.tries else {}),
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


def answer_entries(run: StoredRun, number: int, questions: Questions, room: int) -> list[dict[str, Any]]:
    """Base and tuned answers to the same problems, changed outcomes first, within ``room`` characters."""
    entries: list[dict[str, Any]] = []
    for pair in sorted(run.answers, key=lambda pair: pair[0].right == pair[1].right):
        room -= _OVERHEAD + sum(len(r.completion) for r in pair)
        if room < 0:
            break
        sides = [
            {"right": r.right, "tokens": len(r.completion_ids), "rule": r.rule, "parts": pieces(r)}
            for r in pair
        ]
        entries.append({"run": number, "q": questions.number(pair[1]), "sides": sides})
    return entries


def choose(rows: Iterable[tuple[int, Rationale]], room: int, seed: int = 0) -> list[tuple[int, Rationale]]:
    """As many (run, rationale) pairs as fit in ``room`` characters.

    Runs, steps, and right and wrong answers take turns; within each, the draw is random but reproducible.
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
            room -= _OVERHEAD + min(len(members[-1][1].completion), LONGEST)
            if room < 0:
                return chosen
            chosen.append(members.pop())
    return chosen
