"""Extraction and equivalence: properties and labeled data.

The conventions are in test_conventions.py, properties of the real gold answers in test_gold_properties.py.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from fractions import Fraction
from pathlib import Path

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from empg_lite.rewards import Grader, check_reward
from empg_lite.rewards.math.compare import asks_percentage, cheap_leaf, compare
from empg_lite.rewards.math.exact import read_exact
from empg_lite.rewards.math.extraction import extract
from empg_lite.rewards.math.normalize import normalize
from empg_lite.rewards.registry import NAMES


@pytest.fixture(scope="module")
def grader() -> Iterator[Grader]:
    # The limit is wide because CI machines are slow; the limits themselves are tested with the worker.
    with Grader(workers=1, time_limit=10.0) as shared_grader:
        yield shared_grader


# ---- percent and extraction beside the tables of docs/grading.md ----


def test_percent_follows_the_question(grader: Grader) -> None:
    """20% = 20 only where the problem asks for a percentage, or the gold has the sign."""
    asking = "What percentage of the eggs are brown?"
    assert grader.grade("math", "20", r"\boxed{20\%}", asking).reward == 1
    assert grader.grade("math", "20", r"\boxed{20\%}", None).reward == 0
    assert grader.grade("math", "20", r"\boxed{20\%}", "What is 20 percent of 100?").reward == 0
    assert grader.grade("math", r"20\%", r"\boxed{20}", asking).reward == 1
    assert grader.grade("math", r"20\%", r"\boxed{20}").reward == 1
    assert grader.grade("math", r"20\%", r"\boxed{2}", asking).reward == 0
    assert grader.grade("math", r"20\%", r"\boxed{0.2}", asking).reward == 1
    assert grader.grade("math", r"20\%", r"\boxed{2000\%}", asking).reward == 0
    for question in ("How many % are brown?", "Give the share in %.", "Write it as a percentage (%)."):
        assert grader.grade("math", "20", r"\boxed{20\%}", question).reward == 1, question
    for question in ("What is 20% of 100?", r"What is $20\%$ of 100?", "He pays 5 % more. How much?"):
        assert grader.grade("math", "20", r"\boxed{20\%}", question).reward == 0, question
    assert grader.grade("math", "0.2", r"\boxed{20\%}").reward == 1
    assert not asks_percentage("He pays 5% interest. How many dollars is that?")


@pytest.mark.parametrize(
    "text",
    [
        r"\boxed{3} or \boxed{4}",
        r"The answer could be \boxed{3}",
        r"maybe \boxed{3}",
        r"Is it \boxed{3}?",
        r"<think>\boxed{3}</think> I really do not know what to say",
        "I really do not know what to say",
        "",
    ],
)
def test_no_answer(grader: Grader, text: str) -> None:
    verdict = grader.grade("math", "3", text)
    assert (verdict.reward, verdict.reason, verdict.extracted) == (0.0, "no_answer", None)


def test_spraying_boxes_earns_nothing(grader: Grader) -> None:
    assert grader.grade("math", "3", r"\boxed{1} \boxed{2} \boxed{3}").reward == 0
    assert grader.grade("gsm8k", "3", r"It is \boxed{1}, \boxed{2} or \boxed{3}").reward == 0


def test_gold_may_be_a_worked_solution(grader: Grader) -> None:
    assert grader.grade("gsm8k", "9 * 2 = <<9*2=18>>18 dollars.\n#### 18", "A: 18").reward == 1
    assert grader.grade("math", r"Thus $x = \boxed{\frac12}$.", "0.5").reward == 1


# ---- exact values ----------------------------------------------------------------------------------


def _tree(depth: int) -> st.SearchStrategy[tuple[str, Fraction]]:
    """LaTeX arithmetic beside its value, computed independently with Fraction."""
    integer = st.integers(-999, 999).map(lambda n: (str(n) if n >= 0 else f"({n})", Fraction(n)))
    decimal = st.integers(0, 9999).map(lambda n: (f"{n // 100}.{n % 100:02d}", Fraction(n, 100)))
    if depth == 0:
        return st.one_of(integer, decimal)
    pairs = st.tuples(_tree(depth - 1), _tree(depth - 1))
    return st.one_of(
        integer,
        decimal,
        pairs.map(lambda p: (f"({p[0][0]}+{p[1][0]})", p[0][1] + p[1][1])),
        pairs.map(lambda p: (f"({p[0][0]} - {p[1][0]})", p[0][1] - p[1][1])),
        pairs.map(lambda p: (rf"({p[0][0]} \cdot {p[1][0]})", p[0][1] * p[1][1])),
        pairs.filter(lambda p: p[1][1] != 0).map(
            lambda p: (rf"\frac{{{p[0][0]}}}{{{p[1][0]}}}", p[0][1] / p[1][1])
        ),
        st.tuples(_tree(depth - 1).filter(lambda p: p[1] != 0), st.integers(0, 4)).map(
            lambda p: (f"({p[0][0]})^{{{p[1]}}}", p[0][1] ** p[1])
        ),
    )


@given(_tree(3))
@settings(deadline=None)
def test_exact_arithmetic(pair: tuple[str, Fraction]) -> None:
    read = read_exact(normalize(pair[0]))
    assert read is not None and read.value == pair[1]


@given(st.integers(-(10**12), 10**12), st.integers(0, 6))
def test_spellings_of_a_number(number: int, places: int) -> None:
    value = Fraction(number, 10**places)
    digits = f"{abs(number):0{places + 1}d}"
    whole, decimals = digits[: len(digits) - places], digits[len(digits) - places :]
    plain = ("-" if number < 0 else "") + f"{int(whole):,}" + (f".{decimals}" if decimals else "")
    for spelling in (plain, plain.replace("-", "−"), f"${plain}$", f"{plain}.", f"{plain}\\text{{ units}}"):
        read = read_exact(normalize(spelling).replace(r"\text{ units}", ""))
        assert read is not None and read.value == value, spelling
    assert compare(str(value), normalize(plain), cheap_leaf(False)) is True


@given(st.integers(0, 10**9), st.data())
def test_changing_a_digit_changes_the_verdict(number: int, data: st.DataObject) -> None:
    digits = str(number)
    at = data.draw(st.integers(0, len(digits) - 1))
    other = data.draw(st.sampled_from([d for d in "0123456789" if d != digits[at]]))
    changed = digits[:at] + other + digits[at + 1 :]
    assert compare(digits, changed, cheap_leaf(False)) is False


@pytest.mark.parametrize(
    "text", ["10^10^10", "9" * 5000, "200000000!", "1/0", "2^{99999}", "(" * 5000, "x", ""]
)
def test_exact_leaves_the_rest_undecided(text: str) -> None:
    assert read_exact(normalize(text)) is None


@given(st.text(max_size=60))
@example(r"\sqrt")
@example(r"5\,")
@example("6\u2668")
@example("\u017f\\ ")
@example("\u221a(")
@example("Answer: ")
@settings(max_examples=150, deadline=None)
def test_any_text_is_read_without_an_error(text: str) -> None:
    extract(text)
    extract("\\boxed{" + text + "}", numeric=True)
    assert compare(normalize(text), normalize(text + "."), cheap_leaf(False)) is True


# ---- reward specs ----------------------------------------------------------------------------------


def test_reward_names_and_specs() -> None:
    assert NAMES == ("gsm8k", "math", "exact", "choice", "gym", "python", "regex")
    for spec in ("gsm8k", "math", "exact", r"regex:answer: (\d+)"):
        check_reward(spec)
    for spec, message in {
        "gms8k": "did you mean 'gsm8k'?",
        "zzz": "there are: gsm8k, math, exact, choice, gym, python, regex",
        "regex:(": "not a regular expression",
        "regex": "needs a pattern",
        "math:x": "unknown reward",
    }.items():
        with pytest.raises(ValueError, match=re.escape(message)) as caught:
            check_reward(spec)
        assert "\n" not in str(caught.value)


def test_exact_reward(grader: Grader) -> None:
    assert grader.grade("exact", "olive", " olive\n").rule == "whole"
    assert grader.grade("exact", "olive", r"It is \boxed{olive}.").reward == 1
    assert grader.grade("exact", "1/2", r"\boxed{0.5}").reason == "different"


def test_regex_reward(grader: Grader) -> None:
    verdict = grader.grade(r"regex:n = (\d+)", "7", "n = 3, then n = 7")
    assert (verdict.reward, verdict.extracted, verdict.rule) == (1.0, "7", "pattern")
    assert grader.grade(r"regex:n = (\d+)", "3", "n = 3, then n = 7").reason == "different"
    assert grader.grade(r"regex:n = (\d+)", "3", "m = 3").reason == "no_answer"
    assert grader.grade(r"regex:(?i)done", "", "all DONE").reward == 1


def test_grade_many_keeps_the_order(grader: Grader) -> None:
    items = [(str(n), rf"\boxed{{{n if n % 3 else n + 1}}}", None) for n in range(30)]
    items[7] = (r"\sqrt{8}", r"\boxed{2\sqrt2}", None)  # decided by the worker
    verdicts = grader.grade_many("math", items)
    assert [v.reward for v in verdicts] == [float(n % 3 > 0) for n in range(30)]
    assert [v.gold for v in verdicts] == [gold for gold, _, _ in items]


def test_long_and_odd_texts(grader: Grader) -> None:
    assert grader.grade("math", "5", "x" * 1_000_000).reason == "too_long"
    assert grader.grade("math", "5", "\\boxed{" + "x+" * 5000 + "}").reason == "too_long"
    digits = "7" * 5000  # Python refuses to convert these to an integer
    assert grader.grade("math", digits, f"\\boxed{{{digits}}}").reward == 1
    for text in ("\ud800", "\x00", "\ufffe"):
        assert grader.grade("math", "5", f"\\boxed{{5 + \\sqrt{{{text}}}}}").reward == 0


# ---- real data -------------------------------------------------------------------------------------


def _load(path: Path) -> list[dict]:
    with path.open(encoding="utf-8") as lines:  # str.splitlines would also cut at U+2028
        return [json.loads(line) for line in lines]


#: Rows whose label contradicts a convention: a percent sign matters, and decimals are not rounded.
CONTRADICTED = {
    ("10", r"10\%"),
    (r"$\frac{1}{3}$", "0.3333$"),
    (r"$\frac{1}{12}$", "$0.0833333333333333$"),
}


@pytest.mark.shared
def test_labeled_pairs(grader: Grader, shared: Path) -> None:
    rows = _load(shared / "grader_cases_dev.jsonl")
    labels: dict[tuple[str, str], set] = {}
    for row in rows:
        labels.setdefault((row["gold"], row["prediction"]), set()).add(row["equal"])
    counted = [
        row
        for row in rows
        if row["equal"] is not None
        and "label_note" not in row
        and len(labels[row["gold"], row["prediction"]]) == 1
        and (row["gold"], row["prediction"]) not in CONTRADICTED
    ]
    verdicts = grader.grade_many("math", [(row["gold"], row["prediction"], None) for row in counted])
    wrong = [(row, v) for row, v in zip(counted, verdicts, strict=True) if (v.reward == 1) != row["equal"]]
    false_positives = [case for case in wrong if not case[0]["equal"]]
    assert len(counted) > 130
    assert len(false_positives) == 0 and len(wrong) - len(false_positives) <= 1, wrong


@pytest.mark.shared
@pytest.mark.parametrize("spec", ["gsm8k", "math"])
def test_human_labels_of_gsm8k_solutions(grader: Grader, shared: Path, spec: str) -> None:
    items, labels = [], []
    for row in _load(shared / "gsm8k_model_solutions_dev.jsonl"):
        for answer in row.values():
            if isinstance(answer, dict):
                items.append(
                    (row["ground_truth"].rsplit("A:", 1)[1].strip(), answer["solution"], row["question"])
                )
                labels.append(answer["is_correct"])
    verdicts = grader.grade_many(spec, items)
    assert len(items) == 2536
    assert [v.reward == 1 for v in verdicts] == labels


@pytest.mark.shared
def test_recorded_verdicts_on_math_outputs(grader: Grader, shared: Path) -> None:
    """The recorded verdicts are a program's; it is wrong on 10{,}000 and on a time of day."""
    rows = _load(shared / "math_model_outputs_dev.jsonl")
    verdicts = grader.grade_many("math", [(row["gold"], row["response"], row["question"]) for row in rows])
    disagree = [
        row["gold"]
        for row, verdict in zip(rows, verdicts, strict=True)
        if (verdict.reward == 1) != row["score_qwen_grader"]
    ]
    assert sorted(set(disagree)) == ["10{,}000", r"\text{4:30 p.m.}"] and len(disagree) == 9
