"""The grader under attack: hostile texts earn nothing, stop at the limit, and leave the next answer alone."""

from __future__ import annotations

import os
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest
from adversarial import ATTACKS, CODE, GOLDS, QUICK, Attack
from processes import in_thread

from empg_lite.core.rationale import FAILURES, VERDICTS
from empg_lite.rewards import Grader, Verdict

ROOT = Path(__file__).resolve().parents[2]
#: Seconds of one verdict on any machine: the limit is one, the rest tells a hang from a busy machine.
BOUND = 30.0
QUICK_ATTACKS = [attack for attack in ATTACKS if attack.quick]
#: A crash is a bug in the grader; a prediction can only make it run out of time or memory.
REASONS = (VERDICTS | FAILURES) - {"equal", "crash", "truncated"}
WITHOUT_GMPY2 = {"SYMPY_GROUND_TYPES": "python", "MPMATH_NOGMPY": "1"}


def _normal(index: int) -> tuple[str, str, str | None]:
    """A correct answer that only the worker can decide."""
    return rf"{index + 2}\sqrt{{5}}", rf"\boxed{{\sqrt{{{5 * (index + 2) ** 2}}}}}", None


def _attack(attacks: Sequence[Attack], canary: Path, workers: int = 2) -> list[tuple[Attack, Verdict]]:
    """Grade every attack against each of its golds, a normal answer after each; one batch, so that the
    replacement of a killed worker starts while the other one works."""
    hostile = [(attack, item) for attack in attacks for item in attack.items(canary)]
    items = [each for index, (_, item) in enumerate(hostile) for each in (item, _normal(index))]
    with Grader(workers=workers) as grader:
        verdicts = grader.grade_many("math", items)
        assert [v.gold for v in verdicts] == [gold for gold, _, _ in items]
        assert grader.grade("math", "18", r"so \boxed{18}").reward == 1
    normal = [v.reason for v in verdicts[1::2]]
    assert normal == ["equal"] * len(hostile), Counter(normal)
    return [(attack, verdict) for (attack, _), verdict in zip(hostile, verdicts[::2], strict=True)]


def _check(attacks: Sequence[Attack], canary: Path) -> Counter[str]:
    graded = _attack(attacks, canary)
    wrong = [
        (attack.name, v.gold, v.reward, v.reason, round(v.seconds, 2))
        for attack, v in graded
        if v.reward or v.reason not in REASONS or v.seconds > BOUND
    ]
    assert not wrong, wrong
    assert not canary.exists()
    print(f"\nG1: {len(graded)} verdicts, the slowest after {max(v.seconds for _, v in graded):.2f} s")
    return Counter(verdict.reason for _, verdict in graded)


def _ground_types() -> list[str]:
    """What sympy and mpmath calculate with where the worker's own module is imported."""
    source = (
        "import empg_lite.rewards.worker.main, sympy.external.gmpy as g, mpmath.libmp as m;"
        "print(g.GROUND_TYPES, m.BACKEND)"
    )
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-c", source], env=environment, capture_output=True, text=True, check=True
    )
    return done.stdout.split()


@pytest.fixture(params=["gmpy2", "python"])
def arithmetic(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """Workers with gmpy2, whose C code no signal interrupts, and without it."""
    for name, value in WITHOUT_GMPY2.items():
        if request.param == "python":
            monkeypatch.setenv(name, value)
        else:
            monkeypatch.delenv(name, raising=False)
    expected = {"gmpy2": ["gmpy", "gmpy"], "python": ["python", "python"]}[request.param]
    assert _ground_types() == expected
    yield request.param


# ---- the corpus --------------------------------------------------------------------------------------


def test_the_corpus() -> None:
    names = [attack.name for attack in ATTACKS]
    assert len(names) == len(set(names)) >= 140
    assert {attack.name for attack in QUICK_ATTACKS} == QUICK and len(QUICK) >= 30
    assert {attack.kind for attack in QUICK_ATTACKS} == {attack.kind for attack in ATTACKS}
    assert len({attack.text for attack in ATTACKS}) > 0.98 * len(ATTACKS)


@pytest.mark.parametrize("name", ["import, bare", "exec", "dunder chain"])
def test_these_texts_create_the_canary_when_run(name: str, tmp_path: Path) -> None:
    """Control: run as Python, these do create the file."""
    canary = tmp_path / "canary"
    text = CODE[name]
    source = text.removeprefix(r"\boxed{").removesuffix("}" if "boxed" in text else "")
    victim = "import os\nclass Y:\n def __init__(self): pass\nclass X(Y): pass\nx = X()\n"
    subprocess.run([sys.executable, "-c", victim + source.replace("CANARY", str(canary))], check=True)
    assert canary.exists()


def test_golds_are_answered_by_themselves() -> None:
    """Control: the gold answers that no attack may match are matched by themselves."""
    with Grader(workers=1) as grader:
        for gold in GOLDS.values():
            assert grader.grade("math", gold, rf"\boxed{{{gold}}}").reward == 1


# ---- attacks -----------------------------------------------------------------------------------------


def test_some_of_every_kind(tmp_path: Path) -> None:
    reasons = _check(QUICK_ATTACKS, tmp_path / "canary")
    assert reasons["timeout"] >= 5  # control: some do hang
    assert set(reasons) >= {"different", "parse", "no_answer", "too_long"}


@pytest.mark.slow
@pytest.mark.parametrize("where", ["main thread", "another thread"])
def test_every_attack(where: str, arithmetic: str, tmp_path: Path) -> None:
    def work() -> None:
        reasons = _check(ATTACKS, tmp_path / "canary")
        assert reasons["timeout"] >= 30, reasons

    if where == "main thread":
        work()
    else:
        in_thread(work)


def test_off_the_main_thread(tmp_path: Path) -> None:
    """The limit does not rely on signals: grading in a thread is limited, and right, like any other."""
    few = [attack for attack in QUICK_ATTACKS if attack.name in {"calculus: long sum", "code: import"}]
    assert len(few) == 2

    def work() -> None:
        assert _check(few, tmp_path / "canary")["timeout"] == 2

    in_thread(work)


def test_a_hang_with_and_without_gmpy2(arithmetic: str) -> None:
    """The worker computes with the library it was told to use, and either way is stopped."""
    with Grader(workers=1) as grader:
        assert grader.grade("math", *_normal(0)).reward == 1
        (pid,) = grader.worker_pids()
        maps = Path(f"/proc/{pid}/maps")
        if maps.exists():
            assert ("gmpy2" in maps.read_text()) == (arithmetic == "gmpy2")
        verdict = grader.grade("math", GOLDS["numeric"], r"\boxed{\sum_{k=1}^{10^{9}} \sin k}")
        assert verdict.reason == "timeout" and verdict.seconds <= BOUND
        assert grader.grade("math", *_normal(1)).reward == 1


def test_the_limits_are_exact() -> None:
    named = {attack.name.removeprefix("length: "): attack for attack in ATTACKS if attack.kind == "length"}
    with Grader(workers=1) as grader:

        def reason(name: str) -> str:
            (item, *_) = named[name].items(Path("canary"))
            return grader.grade("math", *item).reason

        for limit in ("text", "answer"):
            assert reason(f"one over the {limit} limit") == "too_long"
            assert reason(f"one under the {limit} limit") != "too_long"
            assert reason(f"the {limit} limit") != "too_long"


# ---- every spelling of a long text is read in linear time ----------------------------------------------

_FRAGMENTS = (
    *r"{ } [ ] ( ) $ $$ \$ \( \) \[ \] \boxed{ \boxed \fbox{ #### # - % \% ! = \frac{ \sqrt{ ^{ _{".split(),
    *r"\left( \text{ </think> * ** ` ' \ \\ & ; : ? . ½ é < > \le ~ \, {,} \! \begin{ \end{ \cup \pm".split(),
    *("1", "1,", "1/", "0.", "a1", "1 ", "1 - ", ". ", "\n", "\r", " ", "\t", "\u202e", "\u0301", "\ud800"),
    *(
        "answer is ",
        "final answer is ",
        "A: ",
        "\nA: ",
        "or ",
        "so ",
        "and ",
        "maybe ",
        "could be ",
        "percent ",
    ),
)


@pytest.mark.slow
@pytest.mark.parametrize("before", ["", r"\boxed{", "$", "#### ", "answer is "])
def test_repeated_fragments(before: str) -> None:
    """The parent reads a text without a time limit: 200,000 characters of anything must cost it little."""
    with Grader(workers=1) as grader:
        for fragment in _FRAGMENTS:
            for after in ("", "}", "$", r"\boxed{1}"):
                count = (199_000 - len(before)) // len(fragment)
                verdict = grader.grade("math", GOLDS["numeric"], before + fragment * count + after)
                assert verdict.seconds <= BOUND and not verdict.reward, (
                    before,
                    fragment,
                    after,
                    verdict.seconds,
                )
