"""A success memory, which the package does not offer: measured, it did not help (docs/empg-vs-grpo.md).

A problem that no rationale of a step solves has no posterior sample, and no gradient. An earlier right
rationale is one, of an older policy, and a positive weight keeps the bound: TRICE keeps a chain of one right
rationale a problem (Hoffman et al., arXiv 2312.02179).
"""

from __future__ import annotations

from collections.abc import Sequence

from empg_lite.core.rationale import Group, Rationale, group_rationales


class SuccessMemory:
    """The last ``size`` right rationales of every problem, each completion once; size 0 keeps nothing."""

    def __init__(self, size: int) -> None:
        self._size = size
        self._kept: dict[str, tuple[Rationale, ...]] = {}

    def keep(self, groups: Sequence[Group]) -> None:
        """Remember what is right in a step's groups."""
        for r in (r for g in groups for r in g.rationales if self._size and r.right and not r.failed):
            older = [o for o in self._kept.get(r.problem_id, ()) if o.completion_ids != r.completion_ids]
            self._kept[r.problem_id] = (*older, r)[-self._size :]

    def recall(self, groups: Sequence[Group]) -> tuple[Group, ...]:
        """What is remembered of the problems that earned nothing at all in ``groups``.

        They come as groups of their own, by the step they were drawn for: ages never mix within a group. A
        problem whose answers the grader failed on is not taken for unsolved.
        """
        earned = {g.problem_id for g in groups if any(r.reward or r.failed for r in g.rationales)}
        unsolved = sorted({g.problem_id for g in groups} - earned)
        return tuple(group_rationales(r for pid in unsolved for r in self._kept.get(pid, ())))
