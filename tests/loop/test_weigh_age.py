"""Groups that are too old to teach."""

from __future__ import annotations

from rationales import rationale

from empg_lite.core.rationale import Group
from empg_lite.loop.estep import weigh


def group(policy_step: int) -> Group:
    """One right, one wrong."""
    rows = [
        rationale(problem_id="a", step=1, policy_step=policy_step, sample_index=k, reward=r)
        for k, r in enumerate((1.0, 0.0))
    ]
    return Group("a", 1, tuple(rows))


def test_old_groups_weigh_nothing() -> None:
    def weights(*ages: int, **options: int) -> list[list[float | None]]:
        groups = [group(age) for age in ages]
        weighed = weigh(groups, weighting="posterior", current_step=8, **options)
        return [[r.weight for r in g.rationales] for g in weighed]

    # policy_step 2 is six steps old, 3 five; -1 is text, which has no age
    assert weights(2, 3, 8, -1, max_age=5) == [[0.0, 0.0], [2.0, 0.0], [2.0, 0.0], [2.0, 0.0]]
    assert weights(2, 3) == [[2.0, 0.0]] * 2
