"""What the loop tells whoever is watching. The views that show it are in ``tools/view.py``."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Self

if TYPE_CHECKING:
    from empg_lite.core.rationale import Rationale

#: Reports how many more rows of a phase are done.
Advance = Callable[[int], None]


class View:
    """Receives a run's progress. This base class shows nothing."""

    def note(self, text: str) -> None:
        """Something worth one line."""

    def warn(self, text: str) -> None:
        """Something that needs attention."""

    def step(self, record: Mapping[str, Any], total: int) -> None:
        """A step was recorded; ``total`` is ``run.steps``."""

    def sampled(self, rows: Sequence[Rationale]) -> None:
        """The graded rationales of the current step."""

    @contextmanager
    def phase(self, name: str, total: int, done: int = 0) -> Iterator[Advance]:
        """Work on ``total`` rows; yields a function to call with the number of rows that finished.

        Args:
            done: rows that were finished before.
        """
        yield lambda done: None

    def __enter__(self) -> Self:
        """Start showing."""
        return self

    def __exit__(self, *exc_info: object) -> None:
        """Stop showing."""
