"""A new reward takes one new file and one line in the registry; and the fence around the mathematics."""

from __future__ import annotations

import ast
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parents[2] / "empg_lite"

LENGTH = r"""
from empg_lite.rewards.kind import Case, Kind, Outcome
from empg_lite.rewards.math import Answer


class Length(Kind):
    name = "length"
    needs = "a unit, as in 'length:words'"
    written = "{}"
    known_answers = (("one two", "a b", "equal"), ("one two", "a", "different"))
    known_spec = "length:words"

    def grade(self, case: Case, argument: str) -> Outcome:
        same = len(case.gold.split()) == len(case.prediction.split())
        return Outcome("equal" if same else "different", Answer(case.prediction, "whole"))

    def explain(self, case: Case, argument: str) -> list[str]:
        return [f"counted the {argument}"]


KIND = Length()
"""

USE = r"""
import sys
from empg_lite.rewards import Grader, check_reward, parse_spec
from empg_lite.rewards.explain import explain
from empg_lite.recipe.schema import DataSection

with Grader() as grader:
    grader.self_test("length:words")
    verdict = grader.grade("length:words * boxed", "x y", "3 4")
print(verdict.reward, verdict.reason, dict(verdict.terms))
print(explain("length:words", "x y", "3 4", verdict=grader.grade("length:words", "x y", "3 4")))
print(parse_spec("length:words").kind.written_gold("7"))
for wrong in ("length", "lenght:words"):
    try:
        check_reward(wrong)
    except ValueError as error:
        print(error)
print("length:UNIT" in DataSection.model_fields["reward"].description)
"""


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    """A copy of the package with the reward ``length`` added to it."""
    package = tmp_path / "empg_lite"
    shutil.copytree(PACKAGE, package, ignore=shutil.ignore_patterns("__pycache__"))
    (package / "rewards" / "kinds" / "length.py").write_text(LENGTH, "utf-8")
    registry = package / "rewards" / "registry.py"
    text = registry.read_text("utf-8")
    assert text.count('    "gsm8k",\n') == 1
    registry.write_text(text.replace('    "gsm8k",\n', '    "gsm8k",\n    "length:UNIT",\n'), "utf-8")
    return tmp_path


def run(root: Path, source: str) -> str:
    environment = {**os.environ, "PYTHONPATH": str(root)}
    command = [sys.executable, "-c", source]
    return subprocess.run(
        command, env=environment, cwd=root, capture_output=True, text=True, check=True
    ).stdout


def test_a_reward_is_one_file_and_one_line(copy: Path) -> None:
    """It grades, combines with terms, tests itself, explains, writes golds, and recipes know it."""
    assert run(copy, USE).splitlines() == [
        "0.5 equal {'correct': 1.0, 'boxed': 0.5}",
        "['counted the words', 'reward 1: equal']",
        "7",
        "reward 'length' needs a unit, as in 'length:words'",
        "unknown reward 'lenght:words'; did you mean 'length'?",
        "True",
    ]


def test_the_self_test_of_a_wrong_reward_fails(copy: Path) -> None:
    """Control: the rows of the new file are the ones that are graded."""
    path = copy / "empg_lite" / "rewards" / "kinds" / "length.py"
    path.write_text(LENGTH.replace('"a", "different"', '"a", "equal"'), "utf-8")
    with pytest.raises(subprocess.CalledProcessError) as failed:
        run(copy, USE)
    assert "different instead of equal" in failed.value.stderr


def test_importing_rewards_imports_nothing_else() -> None:
    source = """
import sys, empg_lite.rewards, empg_lite.rewards.scorer
print(*sorted(name for name in sys.modules if name.startswith("empg_lite.rewards")))
"""
    loaded = run(PACKAGE.parent, source).split()
    assert loaded == ["empg_lite.rewards", "empg_lite.rewards.kind", "empg_lite.rewards.scorer"]


def test_the_mathematics_stays_behind_its_fence() -> None:
    """Outside ``rewards/math`` only its package is imported; the algebra worker alone takes ``symbolic``."""
    inside = PACKAGE / "rewards" / "math"
    found = {
        (path.relative_to(PACKAGE).as_posix(), node.module)
        for path in PACKAGE.rglob("*.py")
        if inside not in path.parents
        for node in ast.walk(ast.parse(path.read_text("utf-8")))
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("empg_lite.rewards.math.")
    }
    assert found == {("rewards/worker/algebra.py", "empg_lite.rewards.math.symbolic")}
