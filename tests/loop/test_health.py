"""What is said about a step's samples, and when a run is hopeless."""

from __future__ import annotations

from typing import Any

import pytest
from rationales import rationale

from empg_lite.core.rationale import Rationale, group_rationales
from empg_lite.loop.estep import weigh
from empg_lite.loop.health import diagnose, graded_failures
from empg_lite.loop.metrics import estep_metrics


def samples(*groups: str, **fields: Any) -> list[Rationale]:
    """One problem a word: R right, w wrong, n no answer, T truncated, c crash of the grader."""
    kinds = {
        "R": {"reward": 1.0, "reason": "equal"},
        "w": {"reward": 0.0, "reason": "different"},
        "n": {"reward": 0.0, "reason": "no_answer"},
        "T": {"reward": 0.0, "reason": "truncated", "finish_reason": "length"},
        "c": {"reward": 0.0, "reason": "crash"},
    }
    return [
        rationale(problem_id=f"p{p}", sample_index=k, **(kinds[kind] | fields))
        for p, word in enumerate(groups)
        for k, kind in enumerate(word)
    ]


def findings(rows: list[Rationale]) -> list[tuple[str, bool]]:
    record = estep_metrics(weigh(group_rationales(rows), weighting="posterior"))
    return [(f.kind, f.hopeless) for f in diagnose(record, rows=len(rows), max_new_tokens=64)]


@pytest.mark.parametrize(
    ("groups", "expected"),
    [
        (["RRww", "Rwww"], []),
        (["RRRT", "RwTw"], []),  # 25% truncated is healthy
        (["RwTT", "RwwT"], [("truncated", False)]),  # 37.5%
        (["T" * 10, "TTTTTTTTTR"], [("truncated", True)]),  # 95%
        (["TTww", "Twww"], [("truncated", False), ("all_wrong", True)]),
        (["TTTTTTTTTR"], [("truncated", False)]),  # 90% exactly: hopeless is above it
        (["RRRR", "RRRR"], [("all_right", False)]),
        (["wwww", "wnww"], [("all_wrong", True)]),
        (["RRRR"] * 19 + ["RRRw"], [("few_mixed", False)]),
        (["wwww"] * 19 + ["wwwR"], [("few_mixed", False)]),
        (["Rwcc", "Rwww"], [("grader_failures", False)]),  # 25%
        (["Rwcw", "Rwww"], []),  # 12.5%
        (["cccc"], [("grader_failures", False)]),
        (["cccw"], [("all_wrong", True), ("grader_failures", False)]),
    ],
)
def test_findings(groups: list[str], expected: list[tuple[str, bool]]) -> None:
    assert findings(samples(*groups)) == expected


def test_written_solutions_are_meant_to_be_right() -> None:
    """``fit`` on solutions that a person wrote: one right rationale a problem, here one of four is wrong."""
    for groups, text, said in (
        (["R", "R"], 1.0, []),
        (["R", "R", "R", "w"], 1.0, []),
        (["R", "R"], 0.5, ["all_right"]),
        (["w", "w"], 1.0, ["all_wrong"]),
    ):
        rows = samples(*groups)
        record = estep_metrics(weigh(group_rationales(rows), weighting="posterior")) | {"em/frac_text": text}
        assert [f.kind for f in diagnose(record, rows=len(rows), max_new_tokens=64)] == said


@pytest.mark.parametrize(
    ("right", "wrong", "said"),
    [(0.1, -2.1, True), (0.3, -2.1, False), (0.1, -1.9, False), (-3.0, -3.0, True)],
)
def test_a_fit_that_only_pushes_away_is_named(right: float, wrong: float, said: bool) -> None:
    record = estep_metrics(weigh(group_rationales(samples("RRww")), weighting="centered"))
    record |= {"em/dlogp_right": right, "em/dlogp_wrong": wrong}
    kinds = [f.kind for f in diagnose(record, rows=4, max_new_tokens=64)]
    assert kinds == (["collapse"] if said else [])


def test_what_helps_depends_on_the_cause() -> None:
    def advice(*groups: str) -> str:
        rows = samples(*groups)
        record = estep_metrics(weigh(group_rationales(rows), weighting="posterior"))
        (finding,) = diagnose(record, rows=len(rows), max_new_tokens=64)
        assert "\n" not in str(finding) and str(finding).startswith(finding.what)
        return str(finding)

    assert "to 128" in advice("TTRw") and "50% of the rationales were cut off at 64 tokens" in advice("TTRw")
    assert "data.prompt and data.reward expect different" in advice("nnnw")
    assert "easier problems or a stronger model" in advice("wwwn")
    assert "25% no_answer" in advice("wwwn")
    assert "harder" in advice(*["RRRR"] * 19, "RRRw") and "most are all right" in advice(*["RRRR"] * 19, "Rw")
    assert "samples_per_problem" in advice(*["wwww"] * 19, "wwwR")


def test_shaping_that_pays_for_wrong_answers_is_noticed() -> None:
    """An all-wrong problem whose rewards differ teaches to be wrong in the better paid way."""
    wrong = [
        rationale(sample_index=k, reward=pay, reason="different", terms={"correct": 0.0, "concise": pay})
        for k, pay in enumerate((0.2, 0.4, 0.4))
    ]
    right = samples("Rw")  # another problem, p0
    kinds = [kind for kind, _ in findings(wrong + right)]
    assert kinds == ["wrong_paid"]
    level = [rationale(sample_index=k, reward=0.2, terms={"correct": 0.0}) for k in range(3)]
    assert "wrong_paid" not in [kind for kind, _ in findings(level + right)]
    mixed = [*wrong, rationale(sample_index=9, reward=0.6, terms={"correct": 1.0, "concise": 0.2})]
    assert "wrong_paid" not in [kind for kind, _ in findings(mixed + right)]


def test_failures_are_a_share_of_what_was_handed_over() -> None:
    rows = samples("TTTTTTTTcw")
    record = estep_metrics(weigh(group_rationales(rows), weighting="posterior"))
    assert graded_failures(record) == pytest.approx(0.5)
    assert graded_failures(estep_metrics(weigh(group_rationales(samples("TT")), weighting="raw"))) == 0.0
