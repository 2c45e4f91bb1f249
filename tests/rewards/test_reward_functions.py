"""Rewards beyond plain mathematics: the language of specs, terms, the self-test, multiple choice."""

from __future__ import annotations

import json
import re
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from processes import HANGS

from empg_lite.core.errors import GraderUnusable
from empg_lite.rewards import Case, Grader, check_reward
from empg_lite.rewards.kinds.choice import options_of, read_letter
from empg_lite.rewards.spec import parse_spec


@pytest.fixture(scope="module")
def grader() -> Iterator[Grader]:
    with Grader(workers=1, time_limit=10.0) as shared_grader:
        yield shared_grader


# ---- the language ------------------------------------------------------------------------------------

HASH = "0123456789abcdef" * 4


@pytest.mark.parametrize(
    ("text", "correctness", "shaping", "added"),
    [
        ("math", "math", [], False),
        ("math * concise:600 * boxed", "math", ["concise:600", "boxed"], False),
        ("exact + boxed even when wrong", "exact", ["boxed"], True),
        (r"regex:a * b + c even when wrong", r"regex:a * b + c even when wrong", [], False),
        (r"concise:9 * regex:(a) * b", r"regex:(a) * b", ["concise:9"], False),
        ("boxed + regex:x y even when wrong", "regex:x y", ["boxed"], True),
        ("python:dir/my reward.py", "python:dir/my reward.py", [], False),
        (
            f"python:/a/b.py:other@sha256:{HASH} * boxed",
            f"python:/a/b.py:other@sha256:{HASH}",
            ["boxed"],
            False,
        ),
    ],
)
def test_specs_are_read(text: str, correctness: str, shaping: list[str], added: bool) -> None:
    spec = parse_spec(text)
    assert (str(spec.correctness), list(map(str, spec.shaping)), spec.added) == (correctness, shaping, added)
    assert str(spec) == text and parse_spec(str(spec)) == spec


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("math + concise:600", "would pay for wrong answers: write 'math * concise:600'"),
        ("math * concise:600 even when wrong", "belongs to terms joined by +"),
        ("math * boxed + concise:9", "mixes * and +"),
        ("math * boxd", "unknown reward 'boxd' in 'math * boxd'; did you mean 'boxed'?"),
        ("math*boxed", "joined by ' * ', with spaces"),
        ("math * exact", "math and exact both say what is right"),
        ("boxed * math", "begins with boxed, which does not say what is right"),
        ("concise:9", "begins with concise"),
        ("math * boxed * boxed", "names boxed twice"),
        ("math * concise", "needs a length"),
        ("math * concise:0", "needs a length"),
        ("math * concise:1e3", "needs a length"),
        ("python:reward", "needs a file"),
        ("python:x.py@sha256:12", "needs a file"),
        ("choice:4", "did you mean 'choice'?"),
        ("", "unknown reward ''"),
    ],
)
def test_invalid_specs_are_rejected_in_one_line(text: str, message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)) as caught:
        check_reward(text)
    assert "\n" not in str(caught.value)


# ---- terms -------------------------------------------------------------------------------------------


def test_terms_multiply(grader: Grader) -> None:
    text = r"I say that it is \boxed{7}"
    right = grader.grade("math * concise:10 * boxed", "7", text)
    assert right.terms == {"correct": 1.0, "concise": 10 / len(text), "boxed": 1.0}
    assert right.reward == pytest.approx(10 / len(text)) and right.reason == "equal"
    wrong = grader.grade("math * concise:1000 * boxed", "8", text)
    assert (wrong.reward, wrong.reason) == (0.0, "different")
    assert wrong.terms == {"correct": 0.0, "concise": 1.0, "boxed": 1.0}


def test_terms_add_only_where_asked(grader: Grader) -> None:
    verdict = grader.grade("math + concise:1000 + boxed even when wrong", "8", "the answer is 7")
    assert verdict.reward == pytest.approx((0 + 1 + 0.5) / 3) and verdict.reason == "different"


@pytest.mark.parametrize(
    ("spec", "prediction", "boxed"),
    [
        ("math * boxed", r"\boxed{7}", 1.0),
        ("math * boxed", "#### 7", 1.0),
        ("math * boxed", "the answer is 7", 0.5),
        ("math * boxed", r"\boxed{7", 0.5),  # never closed
        (r"boxed * regex:(\d)", r"\boxed{7}", 1.0),
        (r"boxed * regex:(\d)", "it is 7", 0.5),
    ],
)
def test_what_counts_as_boxed(grader: Grader, spec: str, prediction: str, boxed: float) -> None:
    verdict = grader.grade(spec, "7", prediction)
    assert (verdict.terms, verdict.reward) == ({"correct": 1.0, "boxed": boxed}, boxed)


def test_a_failure_has_no_terms_and_no_reward() -> None:
    with Grader(workers=1, time_limit=0.3) as grader:
        spec = "concise:1000 + regex:^(a+)+$ even when wrong"
        verdict = grader.grade(spec, "5", "a" * 60 + "!")
    assert (verdict.reason, verdict.reward, verdict.terms) == ("timeout", 0.0, {})


def test_a_plain_reward_has_no_terms(grader: Grader) -> None:
    assert grader.grade("math", "7", "7").terms == {}


# ---- answers later -----------------------------------------------------------------------------------


def test_cheap_answers_come_at_once_and_others_do_not_block() -> None:
    with Grader(workers=1, time_limit=2 * HANGS) as grader:
        slow = grader.submit("regex:^(a+)+$", Case("5", "a" * 60 + "!"))
        cheap = grader.submit("math", ("7", r"\boxed{7}", None))
        assert cheap.done() and not slow.done()
        assert cheap.result().reward == 1.0
    assert slow.exception() is not None or slow.result().failed


def test_a_callback_may_ask_again() -> None:
    """Callbacks run in the pool's thread, without its lock."""
    with Grader(workers=1) as grader:
        seen: list[float] = []
        done = threading.Event()

        def again(_: object) -> None:
            inner = grader.submit("math", Case(r"3\sqrt{5}", r"\boxed{\sqrt{45}}"))
            inner.add_done_callback(lambda f: (seen.append(f.result().reward), done.set()))

        grader.submit("math", Case(r"2\sqrt{2}", r"\boxed{\sqrt{8}}")).add_done_callback(again)
        assert done.wait(HANGS) and seen == [1.0]


def test_waiting_answers_fail_when_the_grader_closes() -> None:
    grader = Grader(workers=1, time_limit=2 * HANGS)
    futures = [grader.submit("regex:^(a+)+$", Case("5", "a" * 60 + "!")) for _ in range(3)]
    grader.close()
    for future in futures:
        failed = future.exception(timeout=HANGS)
        assert isinstance(failed, GraderUnusable) or future.result().failed
    with pytest.raises(GraderUnusable, match="closed"):
        grader.submit("regex:^(a+)+$", Case("5", "a"))


# ---- self-test ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("spec", ["math", "gsm8k * boxed", "exact", "choice", "concise:9 * regex:(a)"])
def test_a_sound_grader_passes_its_self_test(grader: Grader, spec: str) -> None:
    grader.self_test(spec)


def test_the_self_test_finds_a_broken_import(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "math_verify.py").write_text("raise ImportError('half installed')\n")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    with Grader() as grader, pytest.raises(GraderUnusable, match="half installed") as caught:
        grader.self_test("math")
    assert caught.value.exit_code == 69


def test_the_self_test_finds_wrong_verdicts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("empg_lite.rewards.math.compare.compare", lambda *_: True)
    with Grader() as grader, pytest.raises(GraderUnusable, match="self-test: equal instead of different"):
        grader.self_test("math")


# ---- multiple choice ---------------------------------------------------------------------------------

QUESTION = "Which vitamin is made in sunlight?\n(A) vitamin C\n(B) vitamin D\n(C) 12\n(D) 0.5"


@pytest.mark.parametrize(
    ("prediction", "reason", "read"),
    [
        (r"\boxed{B}", "equal", "B"),
        ("The answer is (B).", "equal", "B"),
        ("Answer: b", "equal", "B"),
        ("B.", "equal", "B"),
        (r"Hence \boxed{\text{(B)}}", "equal", "B"),
        (r"\boxed{\textbf{(B)}\ vitamin D}", "equal", "B"),
        ("The answer is B) vitamin D", "equal", "B"),
        ("Option B", "equal", "B"),
        ("**(B)**", "equal", "B"),
        (r"\boxed{vitamin D}", "equal", "B"),
        ("The answer is 12.", "different", "C"),
        (r"\boxed{\frac{1}{2}}", "different", "D"),
        ("Of the 12 vitamins in 3 groups it has to be (B).", "equal", "B"),
        (r"\boxed{C}", "different", "C"),
        (r"\boxed{B \text{ or } C}", "no_answer", None),
        (r"\boxed{B}, \boxed{C}", "no_answer", None),
        ("The answer is A and B.", "no_answer", None),
        ("It is (A), or else it is (B).", "no_answer", None),
        (r"\boxed{vitamin E}", "no_answer", None),
        (r"\boxed{13}", "no_answer", None),
        ("", "no_answer", None),
    ],
)
def test_choice(grader: Grader, prediction: str, reason: str, read: str | None) -> None:
    (verdict,) = grader.grade_many("choice", [Case("B", prediction, QUESTION)])
    assert (verdict.reason, verdict.extracted) == (reason, read)
    assert verdict.reward == float(reason == "equal")


@pytest.mark.parametrize("gold", ["B", "(B)", "B) vitamin D", "b", "vitamin D"])
def test_gold_letters(grader: Grader, gold: str) -> None:
    assert grader.grade("choice", gold, r"\boxed{B}", QUESTION).reason == "equal"
    assert grader.grade("choice", gold, r"\boxed{A}", QUESTION).reason == "different"


def test_a_gold_that_is_not_a_letter_is_reported(grader: Grader) -> None:
    verdict = grader.grade("choice", "42", r"\boxed{A}", QUESTION)
    assert (verdict.reason, verdict.failed) == ("crash", True) and "'42'" in str(verdict.error)


def test_grade_by_choice(cli) -> None:  # type: ignore[no-untyped-def]
    args = ("grade", "--gold", "B", "--prediction", "vitamin D", "--question", QUESTION)
    code, out, _ = cli(*args, "--reward", "choice", "--json")
    assert code == 0 and json.loads(out)["reward"] == 1.0


def test_options_are_read_in_order() -> None:
    assert options_of("A. one B. two C. three") == {"A": "one", "B": "two", "C": "three"}
    assert options_of("Vitamin A. What is it?\nA) x\nB) y\nThink well.") == {"A": "x", "B": "y"}
    assert options_of("Is it (A) only?") == {} and options_of("(B) x (C) y") == {}


def test_a_text_that_two_options_share_is_no_letter() -> None:
    assert read_letter("7", {"A": "7", "B": "7.0", "C": "8"}) is None
    assert read_letter("8", {"A": "7", "B": "7.0", "C": "8"}) == "C"


def test_written_golds() -> None:
    def written(spec: str) -> str | None:
        return parse_spec(spec).kind.written_gold("7")

    assert written("gsm8k") == "#### 7" and written("exact") == "7"
    for spec in ("math", "choice", "gym", "math * boxed"):
        assert written(spec) == r"\boxed{7}"
    assert written("regex:(7)") is None and written("python:x.py") is None
