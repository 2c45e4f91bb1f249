"""Properties of the gold answers of GSM8K and MATH: a sample in the quick set, all in the slow one."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from empg_lite.rewards import Grader
from empg_lite.rewards.math.exact import read_exact
from empg_lite.rewards.math.normalize import normalize

pytestmark = pytest.mark.shared

Pair = tuple[str, str, str | None]


@dataclass(frozen=True)
class Golds:
    """Every n-th row: (gold, worked solution, question)."""

    gsm8k: list[tuple[str, str, str]]
    math: list[tuple[str, str, str]]


@pytest.fixture(scope="module")
def grader() -> Iterator[Grader]:
    with Grader(workers=2, time_limit=10.0) as shared_grader:
        yield shared_grader


@pytest.fixture(scope="module", params=[40, pytest.param(1, marks=pytest.mark.slow)])
def golds(request: pytest.FixtureRequest, shared: Path) -> Golds:
    def rows(name: str) -> list[dict[str, str]]:
        found = []
        for part in ("train", "test"):
            with (shared / f"{name}_{part}.jsonl").open(encoding="utf-8") as lines:
                found += [json.loads(line) for line in lines]
        return found[:: request.param]

    gsm8k = [(r["answer"].rsplit("####", 1)[1].strip(), r["answer"], r["question"]) for r in rows("gsm8k")]
    math = [(last_box(r["solution"]), r["solution"], r["problem"]) for r in rows("math")]
    assert len(gsm8k) == -(-8_792 // request.param) and len(math) == -(-12_500 // request.param)
    return Golds(gsm8k, math)


def last_box(solution: str) -> str:
    """An independent reader of MATH's gold answers."""
    start = max(solution.rfind("\\boxed"), solution.rfind("\\fbox"))
    rest = solution[start:].removeprefix("\\boxed").removeprefix("\\fbox").lstrip()
    if not rest.startswith("{"):
        return rest.split("$")[0].strip()
    depth = 0
    for index, char in enumerate(rest):
        depth += (char == "{") - (char == "}")
        if depth == 0:
            return rest[1:index]
    raise AssertionError(solution)


def accepted(grader: Grader, spec: str, pairs: list[Pair]) -> list[bool]:
    return [v.reward == 1 for v in grader.grade_many(spec, pairs)]


def test_every_gold_equals_itself(grader: Grader, golds: Golds) -> None:
    assert all(accepted(grader, "gsm8k", [(gold, gold, None) for gold, _, _ in golds.gsm8k]))
    assert all(accepted(grader, "gsm8k", [(gold, text, None) for gold, text, _ in golds.gsm8k]))
    assert all(accepted(grader, "math", [(g, rf"so $\boxed{{{g}}}$.", q) for g, _, q in golds.math]))


def test_worked_solutions_earn_their_gold(grader: Grader, golds: Golds) -> None:
    """MATH's solutions, read as a model's: the exceptions box several values, and the gold is the last."""
    verdicts = accepted(grader, "math", golds.math)
    refused = [row for row, right in zip(golds.math, verdicts, strict=True) if not right]
    print(f"{len(refused)} of {len(golds.math)} solutions do not earn their own gold")
    assert len(refused) <= max(2, len(golds.math) // 500)
    assert all(solution.count("boxed") > 1 for _, solution, _ in refused)


WRAPS = [
    "${}$",
    "\\boxed{{{}}}",
    "  {}  ",
    "{}.",
    "$\\boxed{{{}}}$.",
    "The final answer is ${}$.",
    "\\( {} \\)",
    "The answer is ${}$!",
]
MORE_WRAPS = [
    "The answer is ${}$ \u2705",
    "$\\text{{Answer: }} {}$",
    "<b>${}$</b>",
    "**Answer:** ${}$",
    "$\\underline{{{}}}$",
]
UNITS = ["{} cm", "{}\\text{{ apples}}", "{}\\ \\text{{dollars}}", "${}$ miles per hour"]


@pytest.mark.parametrize("wrap", [*WRAPS, *MORE_WRAPS, *UNITS])
def test_wrapping_changes_no_verdict(grader: Grader, golds: Golds, wrap: str) -> None:
    """Of equal and of unequal pairs; units are put behind plain numbers only."""
    texts = [gold for gold, _, _ in (*golds.gsm8k[::2], *golds.math) if gold.strip()]
    if wrap in UNITS:
        texts = [t for t in texts if re.fullmatch(r"-?[\d.,]+", t) and read_exact(normalize(t)) is not None]
    changed = []
    for other in (texts, texts[1:] + texts[:1]):
        pairs: list[Pair] = list(zip(texts, other, [None] * len(texts), strict=True))
        bare = accepted(grader, "math", [(g, f"\\boxed{{{p}}}", None) for g, p, _ in pairs])
        wrapped = accepted(grader, "math", [(g, wrap.format(p), None) for g, p, _ in pairs])
        changed += [pair for pair, a, b in zip(pairs, bare, wrapped, strict=True) if a != b]
        assert (other is texts) == all(bare), "the first round is equal, the second mostly not"
    print(f"{len(changed)} of {2 * len(texts)} verdicts changed under {wrap}: {changed[:5]}")
    assert len(changed) <= len(texts) // 1000, changed[:5]


WORDS = ["minus {}", "{} thousand", "{} dozen", "at least {}", "more than {}", "not {}", "{} or more", "{}%"]
BESIDE = [
    r"at least $\boxed{{{}}}$",
    r"$\boxed{{{}}}$ thousand",
    r"$\boxed{{{}}}$ or more",
    r"$-\boxed{{{}}}$",
]


@pytest.mark.parametrize("word", WORDS)
def test_a_word_that_changes_a_number_makes_it_wrong(grader: Grader, golds: Golds, word: str) -> None:
    """Behind "the answer is" and in a sentence; 0 is left out, which minus and thousand leave as it is."""
    numbers = [g for g, _, _ in (*golds.gsm8k, *golds.math) if re.fullmatch(r"-?[\d.,]*[1-9][\d.,]*", g)]
    numbers = [g for g in numbers if read_exact(normalize(g))]  # not "0,1", two values
    assert len(numbers) > len(golds.gsm8k)
    numbers = numbers[:: 4 if len(golds.gsm8k) > 1000 else 16]
    for spec in ("gsm8k", "math"):
        for text in ("The answer is {}.", "So it is {}.", r"\boxed{{{}}}"):
            pairs: list[Pair] = [(n, text.format(word.format(n)), None) for n in numbers]
            kept = [p for p, right in zip(pairs, accepted(grader, spec, pairs), strict=True) if right]
            assert not kept, (spec, kept[:5])


@pytest.mark.parametrize("beside", BESIDE)
def test_what_stands_beside_a_box_makes_it_wrong(grader: Grader, golds: Golds, beside: str) -> None:
    """Whatever is in the box; 0 is left out. Control: in the sentence alone the box is right."""
    texts = [g for g, _, _ in (*golds.gsm8k, *golds.math)][:: 4 if len(golds.gsm8k) > 1000 else 16]
    texts = [
        g for g in texts if re.search("[1-9]", g) and not re.search(r"[-+]|\\pm|infty|text|[=<>]|\\[gl]e", g)
    ]
    pairs: list[Pair] = [(g, f"So it is {beside.format(g)}.", None) for g in texts]
    kept = [p for p, right in zip(pairs, accepted(grader, "math", pairs), strict=True) if right]
    assert not kept, kept[:5]
    assert all(accepted(grader, "math", [(g, rf"So it is $\boxed{{{g}}}$.", None) for g in texts]))


def test_a_dropped_sign_makes_it_wrong(grader: Grader, golds: Golds) -> None:
    """The first minus sign of every gold of MATH that has one (GSM8K's three are among numbers)."""
    signed = [g for g, _, _ in (*golds.gsm8k, *golds.math) if "-" in re.sub(r"\\text\{[^{}]*\}", "", g)]
    pairs: list[Pair] = [(g, f"\\boxed{{{g.replace('-', '', 1)}}}", None) for g in signed]
    kept = [g for (g, _, _), right in zip(pairs, accepted(grader, "math", pairs), strict=True) if right]
    print(f"{len(kept)} of {len(signed)} golds without their sign still accepted: {kept}")
    assert len(signed) > 0.05 * len(golds.math) and not kept, kept


def test_a_changed_digit_makes_it_wrong(grader: Grader, golds: Golds) -> None:
    """One digit of each gold, another place in each; leading zeros are not made."""
    kept: dict[str, list[str]] = {}
    for spec, rows in (("gsm8k", golds.gsm8k), ("math", golds.math)):
        pairs: list[Pair] = []
        for index, (gold, _, _) in enumerate(rows):
            places = [i for i, char in enumerate(gold) if char.isdigit()]
            if not places:
                continue
            at = places[index % len(places)]
            digit = str((int(gold[at]) + index % 8) % 9 + 1)
            if digit != gold[at]:
                pairs.append((gold, f"\\boxed{{{gold[:at]}{digit}{gold[at + 1 :]}}}", None))
        assert len(pairs) > 0.7 * len(rows)
        kept[spec] = [
            g for (g, _, _), right in zip(pairs, accepted(grader, spec, pairs), strict=True) if right
        ]
        print(f"{spec}: {len(kept[spec])} of {len(pairs)} changed golds still accepted: {kept[spec][:5]}")
    assert kept["gsm8k"] == [] and len(kept["math"]) <= len(golds.math) // 2500, kept
