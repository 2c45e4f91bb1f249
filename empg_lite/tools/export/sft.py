"""The right rationales of a run as a data set for supervised fine-tuning: the by-product of every EM run."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from empg_lite.core.errors import MissingInput, UsageError
from empg_lite.run import store
from empg_lite.run.rollouts import read_rollouts

if TYPE_CHECKING:
    from empg_lite.core.rationale import Rationale
    from empg_lite.core.view import View
    from empg_lite.run.target import Target


def export(target: Target, out: Path, grader: None = None, view: View | None = None) -> dict[str, Any]:
    """Write the distinct right rationales of a run's training steps as JSON lines.

    ``prompt`` and ``completion``, the names that TRL's ``SFTTrainer`` uses, are the texts as the model saw
    and wrote them; ``question``, ``gold``, ``problem_id``, ``step`` and ``tokens`` come with them. Truncated
    rationales and those that the grader failed on are left out.

    Returns:
        ``export`` (the file), ``rows``, ``problems`` (with at least one row), ``duplicates`` (left out).

    Raises:
        MissingInput: the run stored no right rationale.
        UsageError: another file exists at ``out``.
    """
    assert target.run is not None
    found = list(_right(target.run))
    distinct: dict[tuple[str, str], Rationale] = {}
    for r in found:
        distinct.setdefault((r.problem_id, r.completion), r)
    rows = list(distinct.values())
    if not rows:
        raise MissingInput(
            "the run has no right rationales", str(target.run / "rollouts"), "train longer first"
        )
    text = "".join(json.dumps(_record(r)) + "\n" for r in rows)
    if out.exists() and out.read_bytes() != text.encode("ascii"):
        raise UsageError("another file exists", str(out), "choose another --out, or move it away")
    store.write_file(out, text)
    return {
        "export": str(out),
        "rows": len(rows),
        "problems": len({r.problem_id for r in rows}),
        "duplicates": len(found) - len(rows),
    }


def _record(r: Rationale) -> dict[str, Any]:
    return {
        "prompt": r.prompt,
        "completion": r.completion,
        "question": r.question,
        "gold": r.gold,
        "problem_id": r.problem_id,
        "step": r.step,
        "tokens": len(r.completion_ids),
    }


def _right(run: Path) -> Iterator[Rationale]:
    for path in sorted((run / "rollouts").glob("step-*.jsonl")):
        if int(path.stem[5:]):  # step 0 is the preflight
            for segment in read_rollouts(path, torn_tail=True):
                yield from (r for r in segment.rationales if r.right and r.finish_reason == "stop")
