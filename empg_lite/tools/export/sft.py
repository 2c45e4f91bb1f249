"""The right rationales of a run as a data set for supervised fine-tuning: the by-product of every EM run."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from empg_lite.core.errors import MissingInput
from empg_lite.core.rationale import Rationale
from empg_lite.run import store
from empg_lite.run.rollouts import read_rollouts


def export_sft(run: Path, out: Path) -> dict[str, Any]:
    """Write every different right rationale of a run's training steps as JSON lines.

    ``prompt`` and ``completion`` are the texts as the model saw and wrote them, which is what TRL's
    ``SFTTrainer`` and most others take; beside them ``question``, ``gold``, ``problem_id``, ``step`` and
    ``tokens``. Truncated rationales and such as the grader failed on are not among them.

    Returns:
        ``export`` (the file), ``rows``, ``problems`` (with at least one), ``duplicates`` (left out).

    Raises:
        MissingInput: the run stored no right rationale.
    """
    seen: set[tuple[str, str]] = set()
    lines, problems, duplicates = [], set(), 0
    for r in _right(run):
        key = (r.problem_id, r.completion)
        if key in seen:
            duplicates += 1
            continue
        seen.add(key)
        problems.add(r.problem_id)
        row = {
            "prompt": r.prompt,
            "completion": r.completion,
            "question": r.question,
            "gold": r.gold,
            "problem_id": r.problem_id,
            "step": r.step,
            "tokens": len(r.completion_ids),
        }
        lines.append(json.dumps(row) + "\n")
    if not lines:
        raise MissingInput("no right rationale is stored", str(run / "rollouts"), "let it train first")
    store.write_file(out, "".join(lines))
    return {"export": str(out), "rows": len(lines), "problems": len(problems), "duplicates": duplicates}


def _right(run: Path) -> Iterator[Rationale]:
    for path in sorted((run / "rollouts").glob("step-*.jsonl")):
        if int(path.stem[5:]):  # 0 is the preflight's
            for segment in read_rollouts(path, torn_tail=True):
                yield from (r for r in segment.rationales if r.right and r.finish_reason == "stop")
