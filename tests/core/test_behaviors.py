"""Reasoning behaviors: sentences, detection, and its precision and recall on labeled sentences."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from behavior_harness import always, keywords, own_sentences, real_sentences, score
from hypothesis import given
from hypothesis import strategies as st

from empg_lite.core.behaviors import BEHAVIORS, behavior_counts, behavior_rates, detect, sentences, spans

ANY = st.text(alphabet=st.characters(exclude_categories=()))  # lone surrogates included
WORDY = st.lists(
    st.sampled_from(
        [
            "Wait, no.",
            "Step 1:",
            "\n",
            " ",
            "$3.50",
            "\\[",
            "\\]",
            "x=2.",
            "$$",
            "Mr.",
            "Check: 2.",
            "\ud800",
            "\x00",
        ]
    )
).map("".join)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("He pays $3.50. Then 3.14 is left.", ["He pays $3.50.", "Then 3.14 is left."]),
        ("Mr. Lee is at home, i.e. here. Ok.", ["Mr. Lee is at home, i.e. here.", "Ok."]),
        ("1. Find x.\n2. Then y.", ["1. Find x.", "2. Then y."]),
        ("So 6/2 = <<6/2=3.0>>3.0 cats\n#### 3", ["So 6/2 = <<6/2=3.0>>3.0 cats", "#### 3"]),
        ("Since 5! = 120, we stop. Good!", ["Since 5! = 120, we stop.", "Good!"]),
        ("We get \\[x\n= 3.\\]Then $a=b.$ Next", ["We get \\[x\n= 3.\\]", "Then $a=b.$", "Next"]),
        ("Hmm... maybe. Is it? Yes", ["Hmm... maybe.", "Is it?", "Yes"]),
        ("left \\[open.\nNext", ["left \\[open.", "Next"]),
        ("a\r\nb\u2028c\n\n", ["a", "b", "c"]),
        ("", []),
    ],
)
def test_sentences(text: str, expected: list[str]) -> None:
    assert sentences(text) == expected


@given(ANY | WORDY)
def test_sentences_lose_only_whitespace(text: str) -> None:
    assert "".join("".join(sentences(text)).split()) == "".join(text.split())


@given(ANY | WORDY)
def test_spans_agree_with_detect(text: str) -> None:
    found = [(text[s.start : s.end], s.behavior) for s in spans(text)]
    assert found == [
        (piece, name) for piece in sentences(text) for name in BEHAVIORS if name in detect(piece)
    ]
    assert behavior_counts(text) == {n: sum(n == name for _, name in found) for n in BEHAVIORS}


def test_rates() -> None:
    texts = [
        "Wait, that is wrong. Wait, no.",
        "So 2 + 2 = 4.",
        "Step 1: add.\nHmm, that can't be right.",
        "x",
    ]
    rates = behavior_rates(texts)
    assert rates == {
        "decomposition": 0.25,
        "verification": 0.0,
        "backtracking": 0.5,
        "backward_chaining": 0.0,
    }
    assert behavior_counts(texts[0])["backtracking"] == 2
    assert behavior_rates([]) == dict.fromkeys(BEHAVIORS, 0.0)


@pytest.mark.parametrize(
    ("behavior", "shows", "look_alike"),
    [
        ("backtracking", "Wait, he sold two of them.", "They wait 5 minutes."),
        ("backtracking", "Actually, that's not it.", "Actually he has 5."),
        ("backtracking", "Let's go back to the first equation.", "He drove back to the shop."),
        ("verification", "Let me check the answer.", "He got a $50 check."),
        ("verification", "Substituting x = 3 back, 9 = 9 holds.", "Substituting x = 3 gives y = 2."),
        ("verification", "Let's verify: 2 + 3 = 5.", "Verify that the sum is even."),
        ("decomposition", "First, find the price of a pen.", "On the first day she read 5 pages."),
        ("decomposition", "There are two cases.", "Two cases of soda cost 20 dollars."),
        ("decomposition", "Let me break this into two steps.", "Let's think step by step."),
        ("backward_chaining", "To find the profit we need the cost.", "We need 5 eggs."),
        ("backward_chaining", "Working backwards, he had 8.", "He works back at the shop."),
    ],
)
def test_look_alikes(behavior: str, shows: str, look_alike: str) -> None:
    assert behavior in detect(shows) and behavior not in detect(look_alike)


#: On these a pattern with nested repetition never returns; a quadratic one would need hours for 1 MB.
HOSTILE = [
    "wait ",
    "to find x we ",
    "(" * 9 + " ",
    "\\[",
    "$",
    "$a",
    "\\begin{a}",
    "<<",
    "!",
    ". ",
    "let's ",
    "for a to ",
    "so and ",
    "a",
]


@pytest.mark.slow
def test_linear_time_on_hostile_text() -> None:
    """A megabyte of each, and many sentences of all: takes seconds; the limit only catches a blow-up."""
    code = (
        "import sys, empg_lite.core.behaviors as b\n"
        f"for unit in {HOSTILE!r}:\n"
        "    b.behavior_counts(unit * (10**6 // len(unit)))\n"
        f"b.behavior_counts(' '.join({HOSTILE!r}) * 2000)\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=300)


#: (precision, recall) as measured, minus a few hundredths; docs/behaviors.md has the figures.
OWN_TEST = {
    "decomposition": (0.93, 0.93),
    "verification": (0.95, 0.95),
    "backtracking": (0.93, 0.93),
    "backward_chaining": (0.95, 0.92),
}
OWN_FRESH = {
    "decomposition": (0.95, 0.80),
    "verification": (0.95, 0.60),
    "backtracking": (0.95, 0.80),
    "backward_chaining": (0.95, 0.95),
}
REAL_TEST = {
    "decomposition": (0.93, 0.93),
    "verification": (0.75, 0.90),
    "backtracking": (0.85, 0.95),
    "backward_chaining": (0.88, 0.95),
}
REAL_DEV = dict.fromkeys(BEHAVIORS, (0.93, 0.93))


def check(measured: dict, bounds: dict[str, tuple[float, float]]) -> None:
    for name, (precision, recall) in bounds.items():
        assert measured[name].precision >= precision, (name, measured[name])
        assert measured[name].recall >= recall, (name, measured[name])


@pytest.mark.parametrize(("part", "bounds"), [("test", OWN_TEST), ("fresh", OWN_FRESH)])
def test_own_sentences(part: str, bounds: dict[str, tuple[float, float]]) -> None:
    check(score(detect, own_sentences(part)), bounds)


@pytest.mark.shared
@pytest.mark.parametrize(("part", "bounds"), [("dev", REAL_DEV), ("test", REAL_TEST)])
def test_real_sentences(part: str, bounds: dict[str, tuple[float, float]], shared: Path) -> None:
    check(score(detect, real_sentences(part, shared)), bounds)


def test_negative_controls_are_less_precise() -> None:
    labeled = own_sentences("test")
    ours = score(detect, labeled)
    for control in (keywords, always):
        theirs = score(control, labeled)
        assert all(theirs[name].precision < ours[name].precision - 0.2 for name in BEHAVIORS), theirs
    assert all(s.recall == 1 for s in score(always, labeled).values())


def test_every_part_has_enough_sentences() -> None:
    parts = {part: own_sentences(part) for part in ("dev", "test", "fresh")}
    texts = [text for rows in parts.values() for text, _ in rows]
    assert len(texts) == len(set(texts)) >= 260
    for part in ("dev", "test"):
        assert all(sum(name in labels for _, labels in parts[part]) >= 20 for name in BEHAVIORS)
    assert {label for rows in parts.values() for _, labels in rows for label in labels} == set(BEHAVIORS)
