"""The tables of docs/grading.md row by row, what wrapping must not change, and the steps of a verdict."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from empg_lite.rewards import Grader
from empg_lite.rewards.explain import explain
from empg_lite.rewards.math.boxes import RULES
from empg_lite.rewards.math.extraction import extract

PAGE = Path(__file__).parents[2] / "docs" / "grading.md"


def read_table(page: str, header: list[str]) -> list[list[str]]:
    r"""The rows below the one table with that header; code spans lose their marks, ``\|`` is a bar.

    Raises:
        ValueError: no such table, or a row that does not fit it.
    """
    lines = page.splitlines()
    start = lines.index("| " + " | ".join(header) + " |") + 2
    rows = []
    for number, line in enumerate(lines[start:], start + 1):
        if not line.strip():
            break
        if not (line.startswith("| ") and line.endswith(" |")):
            raise ValueError(f"line {number}: no row of a table: {line}")
        cells = [cell.strip().replace(r"\|", "|") for cell in re.split(r"(?<!\\)\|", line)[1:-1]]
        if len(cells) != len(header) or not all(cells):
            raise ValueError(f"line {number}: {len(cells)} cells, not {len(header)}: {line}")
        if any((cell[0] == "`") != (cell[-1] == "`") or cell.count("`") not in (0, 2) for cell in cells):
            raise ValueError(f"line {number}: a code span is not closed: {line}")
        rows.append([cell.strip("`") for cell in cells])
    return rows


TEXT = PAGE.read_text("utf-8")
CONVENTIONS = read_table(TEXT, ["convention", "gold", "prediction", "verdict"])
EXTRACTIONS = read_table(TEXT, ["text", "answer", "rule"])


@pytest.fixture(scope="module")
def grader() -> Iterator[Grader]:
    with Grader(workers=1, time_limit=10.0) as shared_grader:
        yield shared_grader


@pytest.mark.parametrize(
    "row", ["| a | `b` | `c` |", "| a | `b` | `c | equal |", "a | `b` | `c` | equal", "| a | | `c` | equal |"]
)
def test_a_row_that_cannot_be_read_is_an_error(row: str) -> None:
    header = ["convention", "gold", "prediction", "verdict"]
    good = (
        "| "
        + " | ".join(header)
        + " |\n|---|---|---|---|\n| a | `|b|` | `c` | equal |".replace("|b|", r"\|b\|")
    )
    assert read_table(good, header) == [["a", "|b|", "c", "equal"]]
    with pytest.raises(ValueError, match="line 4"):
        read_table(good + "\n" + row, header)


def test_the_tables_are_complete() -> None:
    assert len(CONVENTIONS) >= 220 and len(EXTRACTIONS) >= 48
    assert {verdict for *_, verdict in CONVENTIONS} == {"equal", "different"}
    assert len({(gold, prediction) for _, gold, prediction, _ in CONVENTIONS}) == len(CONVENTIONS)


@pytest.mark.parametrize(("convention", "gold", "prediction", "verdict"), CONVENTIONS)
def test_conventions(grader: Grader, convention: str, gold: str, prediction: str, verdict: str) -> None:
    """Also: the steps end in what the grader said, and never decide otherwise before."""
    found = grader.grade("math", gold, prediction)
    assert found.reward == (verdict == "equal"), (convention, found)
    assert found.reason in ({"equal"} if found.reward else {"different", "no_answer", "parse"})
    assert found.rule is None or found.rule in RULES
    steps = explain("math", gold, prediction, verdict=found)
    assert steps[-1].startswith(f"reward {found.reward:g}")
    last = steps[-2]
    if ": not equal (" in last or "structure differs" in last:
        assert found.reward == 0, steps
    if "the same text" in last:
        assert found.reward == 1, steps


@pytest.mark.parametrize(("text", "answer", "rule"), EXTRACTIONS)
def test_extraction(text: str, answer: str, rule: str) -> None:
    found = extract(text.replace("⏎", "\n"))
    assert found is not None and (found.text, found.rule) == (answer, rule)


WRAPS = ["${}$", r"\boxed{{{}}}", "  {}  ", "{}.", r"so $\boxed{{{}}}$.", "<answer>{}</answer>"]


@pytest.mark.parametrize("wrap", WRAPS)
def test_wrapping_changes_no_verdict(grader: Grader, wrap: str) -> None:
    """Equal and unequal pairs alike; a prediction that is itself fenced, boxed or ends oddly is left out."""
    pairs = [row for row in CONVENTIONS if not re.search(r"boxed|\$|align|\.\.\.|^\d+\.$", row[2])]
    items = [(gold, wrap.format(prediction), None) for _, gold, prediction, _ in pairs]
    verdicts = grader.grade_many("math", items)
    changed = [v for row, v in zip(pairs, verdicts, strict=True) if v.reward != (row[3] == "equal")]
    assert len(pairs) > 200 and not changed, changed


STEPS = [
    (r"(1,2)", r"\boxed{\{1,2\}}", "an ordered pair in () against an unordered list or set of 2"),
    (r"(0,9)", r"\boxed{[0,9)}", "closed below and open above"),
    (r"18", r"\boxed{3}. Then \boxed{18}.", "passed over 1 earlier box: '3'"),
    (r"18", "<think>17</think>It is 18", "before a closing thinking tag"),
    (r"18", "He has 18", "a fallback: the last number"),
    (r"18", r"\boxed{17}", "exact numbers: 18 and 17"),
    (r"1/2", r"\boxed{0.5}", "exact numbers: 1/2 and 1/2"),
    (r"2\sqrt{3}", r"\boxed{\sqrt{12}}", "left to algebra in the worker"),
    (r"\text{red}", r"\boxed{blue}", "not equal (words)"),
    (r"3", r"\boxed{3} or \boxed{4}", "joined by 'or'"),
    (r"3", r"maybe \boxed{3}", "does not commit to one"),
    (r"C", r"\boxed{(D) 12}", "letters of a choice"),
    (r"101_2", r"\boxed{5}", "numerals of a base"),
    (r"3:2", r"\boxed{2:3}", "not equal (ratios)"),
    (r"5", r"\boxed{}", "an empty answer"),
    ("9 * 2 = 18\n#### 18", "#### 18", "from a worked solution"),
]


@pytest.mark.parametrize(("gold", "prediction", "cause"), STEPS)
def test_steps_name_the_cause(grader: Grader, gold: str, prediction: str, cause: str) -> None:
    steps = explain("math", gold, prediction, verdict=grader.grade("math", gold, prediction))
    assert cause in "\n".join(steps), steps


def test_steps_of_the_other_rewards(grader: Grader) -> None:
    assert "to the letter" in explain("exact", "1/2", r"\boxed{0.5}")[-1]
    assert r"n = (\d+)" in explain(r"regex:n = (\d+)", "7", "n = 7")[0]
    asking = "What percentage of the eggs are brown?"
    steps = explain(
        "math", "20", r"\boxed{20\%}", asking, verdict=grader.grade("math", "20", r"\boxed{20\%}", asking)
    )
    assert any("asks for a percentage" in step for step in steps) and steps[-1] == "reward 1: equal"
    question = "Which is prime? (A) 4 (B) 7"
    steps = explain("choice", "B", "It is 7.", question)
    assert steps[0] == "the question lists the options A, B" and "the letter B" in steps[1]
    spec = "math * concise:20 * boxed"
    steps = explain(
        spec, "18", "it is certainly 18 eggs", verdict=grader.grade(spec, "18", "it is certainly 18 eggs")
    )
    assert steps[-2] == "multiplied its terms: correct 1 * concise 0.87 * boxed 0.5"
    assert explain("math", "5", "x" * 300_000) == ["a text over 200000 characters is not read"]
