"""The benchmark counts what it says: on made-up rows whose right counts are known."""

from __future__ import annotations

import importlib
from dataclasses import replace
from pathlib import Path
from types import ModuleType

import pytest

PAIRS = [
    {"gold": "1", "prediction": "1.0", "equal": True},
    {"gold": "2", "prediction": "3", "equal": False},
    {"gold": "4", "prediction": "4", "equal": None},
    {"gold": "5", "prediction": "6", "equal": True, "label_note": "about the extractor"},
    {"gold": "7", "prediction": "8", "equal": True},
    {"gold": "7", "prediction": "8", "equal": False},
    {"gold": "10", "prediction": r"10\%", "equal": True},
    {"gold": "x", "prediction": "y", "equal": False},
]


@pytest.fixture
def grading(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(Path(__file__).parents[2] / "benchmarks"))
    return importlib.import_module("grading")


def test_what_counts(grading: ModuleType) -> None:
    counted, aside = grading.set_aside(PAIRS)
    assert [(row.gold, row.label) for row in counted] == [("1", True), ("2", False), ("x", False)]
    reasons = [why for _, why in aside]
    assert reasons[:2] == ["no label", "about the extractor"]
    assert reasons[2:4] == ["stands with both labels"] * 2
    assert reasons[4].startswith("contradicts a convention") and len(reasons) == 5


def test_a_changed_label_changes_the_count(grading: ModuleType) -> None:
    counted, _ = grading.set_aside(PAIRS)
    with grading.Grader(workers=1) as grader:
        verdicts = grading.ours(grader, "math")(counted)
    assert verdicts == [True, False, False]
    assert grading.errors(counted, verdicts) == ([], [])
    for index, expected in ((0, (1, 0)), (1, (0, 1)), (2, (0, 1))):
        changed = [replace(r, label=not r.label) if i == index else r for i, r in enumerate(counted)]
        positive, negative = grading.errors(changed, verdicts)
        assert (len(positive), len(negative)) == expected


def test_rivals(grading: ModuleType) -> None:
    rows = [
        grading.Row("1,200", "so 1200."),
        grading.Row(r"\frac{1}{2}", r"\boxed{\frac{1}{2}}"),
        grading.Row("0.5", r"\boxed{1/2}"),
        grading.Row("7", "8"),
    ]
    assert grading.rival(grading.naive)(rows) == [True, True, False, False]
    assert grading.rival(grading.math_verify, "${}$")(rows) == [True, True, True, False]
    assert grading.last_box(r"\boxed{1}, \fbox{\frac{1}{2}} {}") == r"\frac{1}{2}"


def test_the_mix_is_what_it_says(grading: ModuleType) -> None:
    row = grading.Row("1", r"\boxed{1}")
    solutions, outputs, golds = [row] * 2000, [row] * 392, [row] * 3000
    rows = grading.mixed(solutions, outputs, golds)
    assert len(rows) == 5000
    algebra = rows[1500:2500]
    with grading.Grader(workers=2) as grader:
        assert grading.ours(grader, "math")(algebra[:100]) == [r.label for r in algebra[:100]]
    assert sum(r.label for r in algebra) == 500
