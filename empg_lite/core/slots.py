"""Slots of the E-step: each asks one problem after another, and each problem until it is answered.

With R in {0, 1}, every right rationale is an exact sample of q(z|x), however many wrong ones came before it.
So a rule that may stop only after a right one leaves the expected EM gradient of a problem as it is, at 1/J
samples instead of a fixed number (J: the policy's success rate). Weights that compare the samples of a
problem have no such property: how many there are depends on what they compare. The proof: docs/adaptive.md.

A slot's transitions depend on rewards alone, never on timing, batch layout or other slots.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from empg_lite.core.rationale import Rationale

#: Rewards that add up to this free a slot; the rest is rounding.
ANSWERED = 1 - 1e-9


@dataclass(frozen=True, slots=True)
class Slot:
    """A place that holds a problem.

    Attributes:
        position: of the problem in the stream. Slot i of P holds those at i, i + P, i + 2P, ...
        tries: graded rationales of this problem so far; grader failures do not count.
        credit: sum of their rewards.
    """

    position: int
    tries: int = 0
    credit: float = 0.0


@dataclass(frozen=True, slots=True)
class Ended:
    """A problem that left its slot: after how many tries, and whether it was answered."""

    tries: int
    solved: bool


@dataclass(frozen=True, slots=True)
class Tries:
    """The rule: P slots draw K rationales each in a step; a problem gets at most M tries.

    Attributes:
        slots, draws, tries: P, K, M.
    """

    slots: int
    draws: int
    tries: int

    def opened(self, first: int) -> tuple[Slot, ...]:
        """P slots at the P positions of the stream from ``first`` on."""
        return tuple(Slot(first + i) for i in range(self.slots))

    def after(self, slot: Slot, row: Rationale) -> tuple[Slot, Ended | None]:
        """The slot after a graded rationale, and the problem that left it, if one did."""
        if row.failed:
            return slot, None
        assert row.reward is not None, "graded rows only"
        tries, credit = slot.tries + 1, slot.credit + row.reward
        if credit < ANSWERED and tries < self.tries:
            return Slot(slot.position, tries, credit), None
        return Slot(slot.position + self.slots), Ended(tries, credit >= ANSWERED)

    def after_step(
        self, slots: Sequence[Slot], rows: Iterable[Rationale]
    ) -> tuple[tuple[Slot, ...], list[Ended]]:
        """All slots after a step's rows, whose ``position`` and ``sample_index`` say whose they are.

        Rows that were graded again keep the problems that they were drawn for.
        """
        now, ended = list(slots), list[Ended]()
        for row in sorted(rows, key=lambda r: r.sample_index):
            i = row.sample_index // self.draws
            assert row.position is not None, "drawn in turns"
            slot = now[i] if now[i].position == row.position else Slot(row.position)
            now[i], done = self.after(slot, row)
            ended += [done] if done else []
        return tuple(now), ended
