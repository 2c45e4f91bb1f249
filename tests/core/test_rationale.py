"""The carriers: groups, and the correct part of a reward."""

from __future__ import annotations

from rationales import rationale

from empg_lite.core.rationale import group_rationales


def test_groups_never_cross_steps_or_problems() -> None:
    rows = [
        rationale(problem_id=p, step=s, sample_index=k) for k in (1, 0) for s in (1, 2) for p in ("a", "b")
    ]
    groups = group_rationales(rows)
    assert [(g.problem_id, g.step, [r.sample_index for r in g.rationales]) for g in groups] == [
        ("a", 1, [0, 1]),
        ("b", 1, [0, 1]),
        ("a", 2, [0, 1]),
        ("b", 2, [0, 1]),
    ]


def test_correct_is_the_part_of_the_reward_without_shaping() -> None:
    shaped = rationale(reward=0.9, terms={"correct": 1.0, "concise": 0.5})
    assert shaped.correct == 1.0
    assert rationale(reward=0.25).correct == 0.25  # a plain reward is the correctness
    assert rationale(reward=None).correct == 0.0
