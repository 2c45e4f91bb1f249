"""What was right before: the last right rationales of each problem, for steps in which it is solved no more.

A problem that no rationale of a step solves has no posterior sample, and no gradient. An earlier right
rationale is one, of an older policy: without a ratio there is nothing to correct, and a positive weight keeps
the bound. (TRICE keeps a chain of one right rationale a problem: Hoffman et al., arXiv 2312.02179.)
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Self

from empg_lite.rationale import Group, Rationale, group_rationales, parse_rationale_line, rationale_line


class SuccessMemory:
    """The last ``size`` right rationales of every problem, each completion once; size 0 keeps nothing."""

    def __init__(self, size: int, rationales: Sequence[Rationale] = ()) -> None:
        self._size = size
        self._kept: dict[str, tuple[Rationale, ...]] = {}
        self._add(rationales)

    def keep(self, groups: Sequence[Group]) -> None:
        """Remember what is right in a step's groups."""
        self._add([r for g in groups for r in g.rationales if r.right and not r.failed])

    def _add(self, rationales: Sequence[Rationale]) -> None:
        for r in rationales if self._size else ():
            older = [o for o in self._kept.get(r.problem_id, ()) if o.completion_ids != r.completion_ids]
            self._kept[r.problem_id] = (*older, r)[-self._size :]

    def recall(
        self, groups: Sequence[Group], *, policy_step: int, max_age: int | None = None
    ) -> tuple[Group, ...]:
        """What is remembered of the problems that earned nothing at all in ``groups``.

        They come as groups of their own, by the step they were drawn for: ages never mix within a group. A
        problem whose answers the grader failed on is not taken for unsolved.

        Args:
            policy_step: optimiser steps the policy about to be fitted has seen.
            max_age: leave out what is older than so many of them.
        """
        earned = {g.problem_id for g in groups if any(r.reward or r.failed for r in g.rationales)}
        unsolved = sorted({g.problem_id for g in groups} - earned)
        found = [
            replace(r, origin="memory")
            for pid in unsolved
            for r in self._kept.get(pid, ())
            if max_age is None or r.policy_step < 0 or policy_step - r.policy_step <= max_age
        ]
        return tuple(group_rationales(found))

    def encode(self) -> bytes:
        """As lines of a rollout file, oldest first within a problem."""
        rows = [r for kept in self._kept.values() for r in kept]
        return "".join(rationale_line(r) + "\n" for r in rows).encode()

    @classmethod
    def decode(cls, size: int, data: bytes) -> Self:
        """From ``encode``'s bytes.

        Raises:
            DataError: a line is not a rationale.
        """
        lines = data.decode().splitlines()
        return cls(size, [parse_rationale_line(line, f"memory:{n}") for n, line in enumerate(lines, 1)])
