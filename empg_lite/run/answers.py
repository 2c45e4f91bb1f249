"""Answer files of an evaluation, one rollout file per pass, written batch by batch.

A kill costs at most the current batch. Reopening the file keeps only whole batches, so that the remaining
answers are sampled in the same batches as in an uninterrupted evaluation.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from empg_lite.core.errors import UsageError
from empg_lite.core.rationale import Rationale
from empg_lite.run import store
from empg_lite.run.rollouts import RolloutHeader, Segment, encode_rollouts, rationale_line, read_rollouts

#: The one sampler setting that never changes an answer: a file started with another value keeps it.
_LAYOUT = "batch_rows"


class AnswerFile:
    """The answers of one pass over the problems, k per problem, in problem order.

    Args:
        path: may be absent, complete, or cut off anywhere; None keeps the answers in memory only.
        header: who answers, and how; ``sampler`` contains ``batch_rows``.
        total: number of answers in the whole pass.
        k: answers per problem.
        replace_other: start over if the file belongs to another evaluation, instead of refusing it.

    Attributes:
        rows: the answers so far.
        batch: problems per batch.

    Raises:
        UsageError: the file belongs to another evaluation.
        DataError: a line before the last is broken.
    """

    def __init__(
        self, path: Path | None, header: RolloutHeader, *, total: int, k: int, replace_other: bool = False
    ) -> None:
        self.path, self.rows = path, list[Rationale]()
        found = _read(path) if path else None
        if found is not None and _settings(found.header) != _settings(header):
            if not replace_other:
                raise UsageError("the file belongs to another evaluation", str(path), "move it away")
            found = None
        header = found.header if found else header
        self.batch = max(1, int(header.sampler[_LAYOUT]) // k)
        if found is not None:
            unit, left = self.batch * k, len(found.rationales)
            self.rows = list(found.rationales[: total if left >= total else left // unit * unit])
        if path is not None:
            text = encode_rollouts(header, self.rows)
            if store.size(path) != len(text):  # the lines are ASCII: one byte per character
                store.write_file(path, text)

    def add(self, rows: Sequence[Rationale]) -> None:
        """Append the answers of a batch."""
        self.rows += rows
        if self.path is not None:
            store.append_text(self.path, "".join(rationale_line(r) + "\n" for r in rows))


def _read(path: Path) -> Segment | None:
    """The file's content; None if not even its header was completed."""
    if not store.size(path):
        return None
    segment = read_rollouts(path, torn_tail=True)[0]
    return segment if segment.header != RolloutHeader() else None


def _settings(header: RolloutHeader) -> RolloutHeader:
    return replace(header, sampler={k: v for k, v in header.sampler.items() if k != _LAYOUT})
