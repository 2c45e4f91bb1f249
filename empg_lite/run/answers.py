"""The files of an evaluation's answers, written as they come: a kill costs at most the batch at hand.

One rollout file a pass. Opening it again finds the answers that a killed process left, whole batches only, so
that what follows is drawn in the same batches as it would have been.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from empg_lite.core.errors import UsageError
from empg_lite.core.rationale import Rationale
from empg_lite.run import store
from empg_lite.run.rollouts import RolloutHeader, Segment, encode_rollouts, rationale_line, read_rollouts

#: The one setting that never changes an answer: a file begun with another value keeps it.
_LAYOUT = "batch_rows"


class AnswerFile:
    """The answers of one pass over the problems, k a problem, in the order they are asked for.

    Args:
        path: may be absent, whole, or cut off anywhere; None keeps the answers in memory alone.
        header: who answers, and how; ``sampler`` holds ``batch_rows``.
        total: answers of the whole pass.
        k: answers a problem.
        replace_other: begin anew where the file holds another evaluation, instead of refusing it.

    Attributes:
        rows: the answers so far.
        batch: problems of a batch.

    Raises:
        UsageError: the file holds another evaluation.
        DataError: a line in the middle of it is broken.
    """

    def __init__(
        self, path: Path | None, header: RolloutHeader, *, total: int, k: int, replace_other: bool = False
    ) -> None:
        self.path, self.rows = path, list[Rationale]()
        found = _read(path) if path else None
        if found is not None and _settings(found.header) != _settings(header):
            if not replace_other:
                raise UsageError("the file holds another evaluation", str(path), "move it away")
            found = None
        header = found.header if found else header
        self.batch = max(1, int(header.sampler[_LAYOUT]) // k)
        if found is not None:
            unit, left = self.batch * k, len(found.rationales)
            self.rows = list(found.rationales[: total if left >= total else left // unit * unit])
        if path is not None:
            text = encode_rollouts(header, self.rows)
            if store.size(path) != len(text):  # one byte a character: the lines are ASCII
                store.write_file(path, text)

    def add(self, rows: Sequence[Rationale]) -> None:
        """Keep the answers of a batch."""
        self.rows += rows
        if self.path is not None:
            store.append_text(self.path, "".join(rationale_line(r) + "\n" for r in rows))


def _read(path: Path) -> Segment | None:
    """What the file holds; None where not even its header was written."""
    if not store.size(path):
        return None
    segment = read_rollouts(path, torn_tail=True)[0]
    return segment if segment.header != RolloutHeader() else None


def _settings(header: RolloutHeader) -> RolloutHeader:
    return replace(header, sampler={k: v for k, v in header.sampler.items() if k != _LAYOUT})
