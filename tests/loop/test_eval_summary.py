"""What the answers of an evaluation say, by hand."""

from __future__ import annotations

import pytest
from rationales import rationale

from empg_lite.core.rationale import Rationale
from empg_lite.core.stats import mcnemar, wilson
from empg_lite.loop.eval_summary import Evaluation, paired
from empg_lite.rewards.math import ballot


def votes(*answers: tuple[str | None, float]) -> tuple[Rationale, ...]:
    return tuple(rationale(extracted=a, reward=r, sample_index=i) for i, (a, r) in enumerate(answers))


def test_summary() -> None:
    greedy = (
        rationale(reward=1.0),
        rationale(
            reward=0.0, reason="truncated", finish_reason="length", completion_ids=(1,) * 9, extracted=None
        ),
    )
    sampled = (
        votes(("2", 1.0), ("3", 0.0), ("2.0", 1.0), ("4", 0.0)),
        votes(("3", 0.0), ("4", 0.0), ("5", 0.0), (None, 0.0)),
    )
    result = Evaluation(greedy, sampled).summary()
    assert (result["n"], result["pass@1"], result["truncated"]) == (2, 0.5, 0.5)
    assert (result["mean_length"], result["mean_length_right"]) == (6.0, 3.0)
    assert result["pass@1_ci95"] == pytest.approx(list(wilson(1, 2)))
    assert result["t1_accuracy"] == pytest.approx(2 / 8)
    # Two of four right: the pairs without a right one are 1 of 6.
    assert result["pass@2"] == pytest.approx((1 - 1 / 6) / 2) and result["pass@4"] == 0.5
    # Pairs: {2, 2.0} wins outright; of the five others four tie a right with a wrong answer.
    assert result["maj@2"] == pytest.approx((1 + 4 * 0.5) / 6 / 2) and result["maj@4"] == 0.5
    assert not {"by_level", "by_subject", "mean_reward", "pass@3"} & result.keys()
    assert all(0 <= share <= 1 for share in result["behaviors"].values())


def test_shaping_never_counts_as_accuracy() -> None:
    shaped = rationale(reward=0.4, terms={"correct": 1.0, "concise": 0.4})
    paid = rationale(reward=0.5, reason="different", terms={"correct": 0.0, "concise": 1.0})
    result = Evaluation((shaped, paid)).summary()
    assert result["pass@1"] == 0.5 and result["mean_reward"] == pytest.approx(0.45)


def test_a_grader_failure_is_wrong_and_said() -> None:
    result = Evaluation((rationale(), rationale(reward=0.0, reason="timeout"))).summary()
    assert (result["pass@1"], result["grader_failures"]) == (0.5, 1)


def test_breakdowns() -> None:
    def row(level: str, subject: str | None, right: bool) -> Rationale:
        meta = {"level": level} | ({"subject": subject} if subject else {})
        return rationale(meta=meta, reward=float(right))

    rows = (row("Level 5", "Algebra", True), row("Level 1", "Algebra", True), row("Level 5", None, False))
    result = Evaluation(rows).summary()
    assert list(result["by_level"]) == ["Level 1", "Level 5"]
    assert result["by_level"]["Level 5"] == {"n": 2, "pass@1": 0.5, "pass@1_ci95": list(wilson(1, 2))}
    assert result["by_subject"] == {"Algebra": {"n": 2, "pass@1": 1.0, "pass@1_ci95": list(wilson(2, 2))}}


def test_paired() -> None:
    def answers(word: str, length: int) -> list[Rationale]:
        return [
            rationale(problem_id=f"p{i}", reward=float(kind == "R"), completion_ids=(1,) * (length + i))
            for i, kind in enumerate(word)
        ]

    result = paired(answers("RRwwww", 10), answers("RwRRRw", 4))
    assert (result["only_first"], result["only_second"], result["both_right"]) == (1, 3, 1)
    assert result["gain"] == pytest.approx(2 / 6) and result["p_value"] == mcnemar(1, 3)
    assert (result["mean_length_first"], result["mean_length_second"]) == (10.0, 4.0)
    none = paired(answers("ww", 10), answers("ww", 4))
    assert none["mean_length_first"] is None and none["p_value"] == 1.0
    with pytest.raises(AssertionError, match="different problems"):
        paired(answers("RR", 1), answers("RR", 1)[::-1])


@pytest.mark.parametrize(
    ("one", "other", "same"),
    [
        ("1/2", "0.5", True),
        (r"\frac{1}{2}", r"50\%", True),
        ("1,000", "1000.00", True),
        ("18 eggs", "$18", True),
        (r"\text{ Evelyn}", "evelyn", False),  # set as text or not: words keep their markup
        ("x + 1", "x+1", True),
        ("x+1", "1+x", False),  # algebra is not asked
        ("5", "-5", False),
        ("5", "5%", False),
    ],
)
def test_ballots(one: str, other: str, same: bool) -> None:
    assert (ballot(one) == ballot(other)) is same
    assert ballot(None) is None
