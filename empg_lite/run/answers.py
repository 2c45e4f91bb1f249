"""Answer files of an evaluation, one rollout file per pass, written answer by answer.

While the evaluation runs, the file is a journal: answers stand in the order in which they ended, so a kill
costs only those in flight. With the last one the file is put in problem order, the same bytes however often
it was interrupted.
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

#: What a header begins with.
_BEGIN = b'{"model": '
#: Which answer: problem ID and sample index.
AnswerKey = tuple[str, int]


class AnswerFile:
    """The answers of one pass over the problems, k per problem.

    Args:
        path: may be absent, complete, or cut off anywhere; None keeps the answers in memory only.
        header: who answers, and how; ``sampler`` contains ``batch_rows``.
        problems: IDs, in the order of the finished file.
        k: answers per problem.
        replace_other: start over if the file belongs to another evaluation, instead of refusing it.

    Attributes:
        answers: the answers so far, in the order in which they ended.

    Raises:
        UsageError: the file belongs to another evaluation.
        DataError: a line before the last is broken.
    """

    def __init__(
        self,
        path: Path | None,
        header: RolloutHeader,
        *,
        problems: Sequence[str],
        k: int,
        replace_other: bool = False,
    ) -> None:
        self.path = path
        self._order = [(p, i) for p in problems for i in range(k)]
        found = _read(path) if path else None
        if found is not None and _settings(found.header) != _settings(header):
            if not replace_other:
                raise UsageError("the file belongs to another evaluation", str(path), "move it away")
            found = None
        self._header = found.header if found else header
        rows = {(r.problem_id, r.sample_index): r for r in found.rationales} if found else {}
        self.answers = {key: rows[key] for key in self._order if key in rows}
        if path is not None and not _holds(path, text := self._text()):
            store.write_file(path, text)

    @property
    def rows(self) -> list[Rationale]:
        """The answers so far, in the order of the finished file."""
        return [self.answers[key] for key in self._order if key in self.answers]

    def add(self, row: Rationale) -> None:
        """Append an answer that is not there yet; the last one puts the file in order."""
        key = row.problem_id, row.sample_index
        if key in self.answers:
            return
        self.answers[key] = row
        if self.path is None:
            return
        # A sync takes 1-50 ms and a GPU finishes hundreds of rows a second: only the finished file is synced.
        store.append_text(self.path, rationale_line(row) + "\n", sync=False)
        if len(self.answers) == len(self._order):
            store.write_file(self.path, self._text())

    def _text(self) -> str:
        return encode_rollouts(self._header, self.rows)


def _read(path: Path) -> Segment | None:
    """The file's content; None if not even its header was completed.

    Raises:
        UsageError: it is a file of the user's.
    """
    if not store.size(path):
        return None
    segment = read_rollouts(path, torn_tail=True)[0]
    if segment.header != RolloutHeader():
        return segment
    with open(path, "rb") as file:
        torn = _BEGIN.startswith(file.read(len(_BEGIN)))
    if segment.rationales or not torn:
        raise UsageError("the file is not from an evaluation", str(path), "move it away")
    return None


def _holds(path: Path, text: str) -> bool:
    """Whether that is the file's content; the lines are ASCII, one byte per character."""
    return store.size(path) == len(text) and path.read_bytes() == text.encode("ascii")


def _settings(header: RolloutHeader) -> RolloutHeader:
    return replace(header, sampler={k: v for k, v in header.sampler.items() if k != _LAYOUT})
