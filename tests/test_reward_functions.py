"""Rewards beyond plain mathematics: terms, multiple choice, your own function, Reasoning Gym."""

from __future__ import annotations

import hashlib
import json
import re
import threading
import time
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace

import pytest

from empg_lite.check import written_gold
from empg_lite.errors import DataError, GraderUnusable, MissingInput
from empg_lite.gym_tasks import SPLITS, gym_problems, parse_source
from empg_lite.rationale import read_rollouts
from empg_lite.recipe_file import load_recipe
from empg_lite.rewards import Case, Grader, check_reward, pin
from empg_lite.rewards.choice import options_of, read_letter
from empg_lite.rewards.gym_scorer import harmless
from empg_lite.rewards.pool import WorkerPool
from empg_lite.rewards.spec import parse_spec
from empg_lite.rewards.usercode import checked_terms


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
def test_specs_are_refused_in_one_line(text: str, message: str) -> None:
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
    with Grader(workers=1, time_limit=1.0) as grader:
        slow = grader.submit("regex:^(a+)+$", Case("5", "a" * 60 + "!"))
        cheap = grader.submit("math", ("7", r"\boxed{7}", None))
        assert cheap.done() and not slow.done()
        assert cheap.result().reward == 1.0 and slow.result().reason == "timeout"


def test_a_callback_may_ask_again() -> None:
    """Callbacks run in the pool's thread, without its lock."""
    with Grader(workers=1) as grader:
        seen: list[float] = []
        done = threading.Event()

        def again(_: object) -> None:
            inner = grader.submit("math", Case(r"3\sqrt{5}", r"\boxed{\sqrt{45}}"))
            inner.add_done_callback(lambda f: (seen.append(f.result().reward), done.set()))

        grader.submit("math", Case(r"2\sqrt{2}", r"\boxed{\sqrt{8}}")).add_done_callback(again)
        assert done.wait(30) and seen == [1.0]


def test_waiting_answers_fail_when_the_grader_closes() -> None:
    grader = Grader(workers=1, time_limit=30.0)
    futures = [grader.submit("regex:^(a+)+$", Case("5", "a" * 60 + "!")) for _ in range(3)]
    grader.close()
    for future in futures:
        failed = future.exception(timeout=5)
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
    monkeypatch.setattr("empg_lite.rewards.functions.compare", lambda *_: True)
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


def test_a_gold_that_is_no_letter_is_said(grader: Grader) -> None:
    verdict = grader.grade("choice", "42", r"\boxed{A}", QUESTION)
    assert (verdict.reason, verdict.failed) == ("crash", True) and "'42'" in str(verdict.error)


def test_options_are_read_in_order() -> None:
    assert options_of("A. one B. two C. three") == {"A": "one", "B": "two", "C": "three"}
    assert options_of("Vitamin A. What is it?\nA) x\nB) y\nThink well.") == {"A": "x", "B": "y"}
    assert options_of("Is it (A) only?") == {} and options_of("(B) x (C) y") == {}


def test_an_option_text_that_two_share_is_no_letter() -> None:
    assert read_letter("7", {"A": "7", "B": "7.0", "C": "8"}) is None
    assert read_letter("8", {"A": "7", "B": "7.0", "C": "8"}) == "C"


# ---- your own function -------------------------------------------------------------------------------

FUNCTION = """
import os, sys, time
print("loading")

def reward(completion, gold, question, meta):
    print("noise", flush=True)
    sys.stderr.write("noise")
    task, _, text = completion.partition(" ")
    if task == "say": return {"nan": float("nan"), "two": 2, "minus": -0.1, "text": "1", "none": None,
                              "list": [1], "no": {"short": 1}, "bad": {"correct": 1, "short": 3},
                              "half": 0.5, "true": True, "dict": {"correct": 1, "short": 0.5}}[text]
    if task == "raise": raise RuntimeError("two\\nlines")
    if task == "exit": sys.exit(3)
    if task == "_exit": os._exit(4)
    if task == "loop":
        while True: pass
    if task == "memory": return bytearray(4 << 30) and 1
    if task == "fork": return float(os.fork() >= 0)
    if task == "bomb":
        while True: os.fork()
    if task == "child":
        import subprocess
        subprocess.Popen(["sleep", "1000"], stdout=open(meta["pid"] + "x", "w"))
        child = subprocess.Popen(["sleep", "1000"])
        open(meta["pid"], "w").write(str(child.pid))
        time.sleep(1000)
    if task == "input": return float(len(input()))
    if task == "meta": return meta["wanted"] == text and question == "why?"
    return completion == gold

def other(completion, gold, question, meta):
    return 0.25
"""


@pytest.fixture
def function(tmp_path: Path) -> Path:
    path = tmp_path / "reward.py"
    path.write_text(FUNCTION)
    return path


@pytest.fixture
def own(function: Path) -> Iterator[SimpleNamespace]:
    """A grader that may run the file, and the pinned spec."""
    spec, code = pin(f"python:{function}")
    with Grader(workers=1, code=code) as grader:
        yield SimpleNamespace(grader=grader, spec=spec, code=code, grade=lambda p: grader.grade(spec, "g", p))


def test_own_function_values(own: SimpleNamespace) -> None:
    for said, reward, reason in (("half", 0.5, "different"), ("true", 1.0, "equal")):
        verdict = own.grade(f"say {said}")
        assert (verdict.reward, verdict.reason, verdict.terms) == (reward, reason, {})
    verdict = own.grade("say dict")
    assert (verdict.reward, verdict.reason) == (0.5, "equal")
    assert verdict.terms == {"correct": 1.0, "short": 0.5}
    assert own.grade("g").reward == 1.0 and own.grade("h").reason == "different"
    (verdict,) = own.grader.grade_many(own.spec, [Case("g", "meta x", "why?", {"wanted": "x"})])
    assert verdict.reward == 1.0
    shaped = own.grader.grade(f"{own.spec} * concise:4", "g", "say dict")
    assert shaped.terms == {"correct": 1.0, "short": 0.5, "concise": 0.5} and shaped.reward == 0.25


@pytest.mark.parametrize(
    ("prediction", "error"),
    [
        ("say nan", "outside [0, 1]"),
        ("say two", "outside [0, 1]"),
        ("say minus", "outside [0, 1]"),
        ("say text", "returned str"),
        ("say none", "returned NoneType"),
        ("say list", "returned list"),
        ("say no", "without 'correct'"),
        ("say bad", "term 'short'"),
        ("raise", "RuntimeError: two lines (reward.py:"),
        ("exit", "SystemExit: 3 (reward.py:"),
        ("_exit", "exit code 4"),
        ("input", "EOFError"),
        ("bomb", "signal 9"),
    ],
)
def test_own_function_crashes_are_told(own: SimpleNamespace, prediction: str, error: str) -> None:
    verdict = own.grade(prediction)
    assert (verdict.reward, verdict.reason, verdict.failed) == (0.0, "crash", True)
    assert error in str(verdict.error) and "\n" not in str(verdict.error)
    assert own.grade("g").reward == 1.0  # the next one is served


def test_own_function_limits(own: SimpleNamespace, tmp_path: Path) -> None:
    verdict = own.grade("loop")
    assert verdict.reason == "timeout" and 1.0 <= verdict.seconds <= 1.3
    assert own.grade("memory").reason == "memory"
    assert own.grade("fork").reward == 1.0  # the copy does not answer a second time
    assert own.grade("g").reward == 1.0
    note = tmp_path / "child"
    (verdict,) = own.grader.grade_many(own.spec, [Case("g", "child", None, {"pid": str(note)})])
    assert verdict.reason == "timeout"
    pid = int(note.read_text())
    deadline = time.monotonic() + 5
    while _alive(pid) and time.monotonic() < deadline:
        time.sleep(0.02)
    assert not _alive(pid)  # killed with the worker that started it


def _alive(pid: int) -> bool:
    stat = Path(f"/proc/{pid}/stat")
    return stat.exists() and stat.read_text().rpartition(")")[2].split()[0] != "Z"


def test_the_worker_runs_the_bytes_that_were_hashed(function: Path) -> None:
    spec, code = pin(f"python:{function}:other")
    digest = hashlib.sha256(FUNCTION.encode()).hexdigest()
    assert spec == f"python:{function}:other@sha256:{digest}"
    function.write_text("def other(completion, gold, question, meta):\n    return 1.0\n")
    with Grader(workers=1, code=code) as grader:
        assert grader.grade(spec, "g", "x").reward == 0.25
    assert not (function.parent / "__pycache__").exists()
    with pytest.raises(DataError, match="the reward file changed") as caught:
        pin(spec)
    assert caught.value.exit_code == 65 and "data.reward" in str(caught.value)
    again, _ = pin(spec, repin=True)
    assert again != spec and again.startswith(f"python:{function}:other@sha256:")


def test_a_grader_runs_no_other_file(function: Path, tmp_path: Path) -> None:
    spec, code = pin(f"python:{function}")
    with Grader() as grader, pytest.raises(DataError, match="--allow-code"):
        grader.grade(spec, "g", "g")
    other = tmp_path / "second.py"
    other.write_text("def reward(completion, gold, question, meta):\n    return 1.0\n")
    with Grader(code=code) as grader, pytest.raises(DataError, match="second.py"):
        grader.grade(f"python:{other}", "g", "g")


@pytest.mark.parametrize(
    ("text", "error", "message"),
    [
        (None, MissingInput, "cannot be read"),
        ("x = (\n", DataError, "not Python"),
        ("def score(): ...\n", DataError, "no function 'reward'"),
        ("def outer():\n    def reward(): ...\n", DataError, "no function 'reward'"),
    ],
)
def test_files_are_refused_before_any_work(
    tmp_path: Path, text: str | None, error: type[Exception], message: str
) -> None:
    path = tmp_path / "r.py"
    if text is not None:
        path.write_text(text)
    with pytest.raises(error, match=message) as caught:
        pin(f"python:{path}")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "text", ["from math import floor as reward\n", "reward = len\n", "if 1:\n    def reward(): ...\n"]
)
def test_other_ways_to_name_a_function(tmp_path: Path, text: str) -> None:
    (tmp_path / "r.py").write_text(text)
    assert pin(f"python:{tmp_path / 'r.py'}")[1] is not None


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("import nonesuch\nreward = 1\n", "ModuleNotFoundError"),
        ("raise SystemExit(0)\nreward = 1\n", "SystemExit"),
        ("reward = 1\n", "not a function"),
    ],
)
def test_a_file_that_does_not_load_is_said_by_the_self_test(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "r.py").write_text(text)
    spec, code = pin(f"python:{tmp_path / 'r.py'}")
    with Grader(workers=1, code=code) as grader, pytest.raises(GraderUnusable, match=message) as caught:
        grader.self_test(spec)
    assert caught.value.exit_code == 69


def test_a_file_that_never_loads_is_said_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("empg_lite.rewards.pool._START_SECONDS", 2.0)
    (tmp_path / "r.py").write_text("while True: pass\nreward = 1\n")
    spec, code = pin(f"python:{tmp_path / 'r.py'}")
    with Grader(workers=1, code=code) as grader, pytest.raises(GraderUnusable, match="not ready after 2 s"):
        grader.self_test(spec)


def test_loading_has_more_time_and_memory_than_a_verdict(tmp_path: Path) -> None:
    (tmp_path / "r.py").write_text(
        "import time\ntime.sleep(0.6)\nblob = bytearray(300 << 20)\n"
        "def reward(completion, gold, question, meta):\n    return len(blob) > 0\n"
    )
    spec, code = pin(f"python:{tmp_path / 'r.py'}")
    with Grader(workers=1, code=code, time_limit=0.5, memory_limit=200 << 20) as grader:
        assert grader.grade(spec, "g", "x").reward == 1.0


def test_numbers_of_array_libraries_are_numbers() -> None:
    numpy = pytest.importorskip("numpy")
    assert checked_terms(numpy.float32(0.5)) == {"correct": 0.5}
    assert checked_terms({"correct": numpy.bool_(True), "x": numpy.int64(0)}) == {"correct": 1.0, "x": 0.0}
    with pytest.raises(TypeError):
        checked_terms(numpy.array([0.5, 0.5]).tolist())


# ---- through the command line ------------------------------------------------------------------------


def one_line(err: str) -> str:
    line = err.strip().splitlines()[-1]
    assert line.startswith("error: ")
    return line


def test_grade_refuses_code_without_the_flag(cli, function: Path, tmp_path: Path, monkeypatch) -> None:  # type: ignore[no-untyped-def]
    function.write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\n{FUNCTION}")
    monkeypatch.chdir(tmp_path)
    args = ("grade", "--gold", "g", "--prediction", "g", "--reward", "python:reward.py")
    code, out, err = cli(*args)
    digest = hashlib.sha256(function.read_bytes()).hexdigest()
    assert code == 2 and out == "" and not (tmp_path / "ran").exists()
    assert all(part in one_line(err) for part in (str(function), digest, "--allow-code", "function reward"))
    code, out, _ = cli(*args, "--allow-code", "--json")
    assert code == 0 and json.loads(out)["reward"] == 1.0 and (tmp_path / "ran").exists()


def test_grade_shows_terms_and_errors(cli, function: Path) -> None:  # type: ignore[no-untyped-def]
    args = ("grade", "--gold", "g", "--reward", f"python:{function}", "--allow-code")
    code, out, _ = cli(*args, "--prediction", "say dict", "--json")
    assert code == 0 and json.loads(out)["terms"] == {"correct": 1.0, "short": 0.5}
    code, out, _ = cli(*args, "--prediction", "raise", "--json")
    assert code == 0 and "RuntimeError: two lines" in json.loads(out)["error"]
    code, out, _ = cli(*args, "--prediction", "raise")
    assert "RuntimeError: two lines" in out
    args = ("grade", "--gold", "B", "--prediction", "vitamin D", "--question", QUESTION)
    code, out, _ = cli(*args, "--reward", "choice", "--json")
    assert json.loads(out)["reward"] == 1.0


@pytest.mark.parametrize(
    ("reward", "code"), [("math + boxed", 2), ("mth", 2), ("python:absent.py", 66), ("python:broken.py", 65)]
)
def test_grade_refuses_in_one_line(cli, tmp_path: Path, monkeypatch, reward: str, code: int) -> None:  # type: ignore[no-untyped-def]
    monkeypatch.chdir(tmp_path)
    (tmp_path / "broken.py").write_text("def\n")
    got, out, err = cli("grade", "--gold", "g", "--prediction", "g", "--reward", reward, "--allow-code")
    assert (got, out) == (code, "") and one_line(err)


OWN = """\
def reward(completion, gold, question, meta):
    return any(c in completion for c in "abcdefghijklm")
"""


def test_a_run_with_its_own_reward(cli, recipe_file: Path, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    """Refused without the flag; pinned with it; a changed file is a changed data.reward."""
    function = tmp_path / "mine.py"
    function.write_text(OWN)
    text = recipe_file.read_text().replace('"regex:[a-m]"', "python:mine.py")  # beside the recipe
    assert "python:mine.py" in text
    recipe_file.write_text(text.replace("eval_every: 2", "eval_every: 0"))
    run = tmp_path / "run"
    train = ("train", "--recipe", recipe_file, "--output-dir", run, "--json")
    code, out, err = cli(*train, "--max-steps", 1)
    assert code == 65 and out == "" and "--allow-code" in one_line(err) and not run.exists()
    code, out, _ = cli(*train, "--dry-run")
    pinned = json.loads(out)["data"]["reward"]
    assert code == 0 and pinned == f"python:{function}@sha256:{hashlib.sha256(OWN.encode()).hexdigest()}"

    assert cli(*train, "--max-steps", 1, "--allow-code")[0] == 0
    assert load_recipe(str(run / "recipe.yaml")).data.reward == pinned
    first = run / "rollouts" / "step-000001.jsonl"
    (segment,) = read_rollouts(first)
    assert segment.header.reward_name == pinned and {r.reward for r in segment.rationales} == {0.0, 1.0}

    function.write_text(OWN + "# changed\n")
    again = ("train", "--output-dir", run, "--resume", "--max-steps", 2, "--allow-code", "--json")
    for command in (again, (*again, "--recipe", recipe_file)):
        code, _, err = cli(*command)
        assert code == 65 and "data.reward" in one_line(err), err
    assert sorted(p.name for p in (run / "rollouts").iterdir()) == ["step-000000.jsonl", first.name]
    code, out, err = cli(*again, "--allow-change", "data.reward")
    assert code == 0 and json.loads(out.splitlines()[-1])["steps"] == 2, err
    events = [json.loads(line) for line in (run / "events.jsonl").read_text().splitlines()]
    assert [e["field"] for e in events if e["event"] == "changed"] == ["data.reward"]


def test_score_with_your_own_reward(cli, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    (tmp_path / "mine.py").write_text(
        "def reward(completion, gold, question, meta):\n"
        "    return {'correct': completion == gold, 'kind': meta.get('kind', 0)}\n"
    )
    rows = [{"question": "q", "gold": "a", "completion": c, "meta": {"kind": 0.5}} for c in "ab"]
    file = tmp_path / "r.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    before = file.read_bytes()
    args = ("score", file, "--reward", f"python:{tmp_path / 'mine.py'}", "--json")
    assert cli(*args)[0] == 2 and file.read_bytes() == before
    code, out, _ = cli(*args, "--allow-code")
    assert code == 0 and json.loads(out.splitlines()[-1])["reward"] == 0.25
    (segment,) = read_rollouts(file)
    assert [r.terms for r in segment.rationales] == [{"correct": 1, "kind": 0.5}, {"correct": 0, "kind": 0.5}]
    stored = file.read_bytes()
    code, _, err = cli("score", file)  # the header names the function now
    assert code == 65 and "--allow-code" in one_line(err) and file.read_bytes() == stored
    (tmp_path / "mine.py").write_text("def reward(completion, gold, question, meta): return 1\n")
    code, _, err = cli("score", file, "--allow-code")
    assert code == 65 and "changed" in one_line(err) and file.read_bytes() == stored


def test_check_with_your_own_reward(cli, recipe_file: Path, function: Path) -> None:  # type: ignore[no-untyped-def]
    args = ("check", "--recipe", recipe_file, "--set", f"data.reward=python:{function}", "--json")
    assert cli(*args)[0] == 65
    code, out, _ = cli(*args, "--allow-code")
    report = json.loads(out.splitlines()[-1])
    assert code == 0 and report["ok"] and report["gold_failures"] is None and report["notes"]
    function.write_text("1 / 0\nreward = 1\n")
    code, _, err = cli(*args, "--allow-code")
    assert code == 69 and "ZeroDivisionError" in one_line(err)


def test_relative_paths_in_overrides_are_the_shells(recipe_file: Path, tmp_path: Path, monkeypatch) -> None:  # type: ignore[no-untyped-def]
    (tmp_path / "sub").mkdir()
    monkeypatch.chdir(tmp_path / "sub")
    recipe = load_recipe(str(recipe_file), ["data.reward=python:f.py:g * boxed"])
    assert recipe.data.reward == f"python:{tmp_path / 'sub' / 'f.py'}:g * boxed"


def test_other_columns_reach_the_function(tmp_path: Path) -> None:
    from empg_lite.data import load_problems
    from empg_lite.recipe import DataSection

    rows = [
        {"question": f"q{i}", "answer": "1", "unit": "km", "tests": [1, 2], "odd": float("nan")}
        for i in range(20)
    ]
    (tmp_path / "d.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    problems = load_problems(DataSection(source="local", path=str(tmp_path / "d.jsonl")), "train")
    assert problems[0].meta == {"unit": "km", "tests": [1, 2]}


def test_written_golds() -> None:
    assert written_gold("7", "gsm8k") == "#### 7" and written_gold("7", "exact") == "7"
    for spec in ("math", "choice", "gym", "math * boxed"):
        assert written_gold("7", spec) == r"\boxed{7}"
    assert written_gold("7", "regex:(7)") is None and written_gold("7", "python:x.py") is None


# ---- Reasoning Gym: a stand-in -----------------------------------------------------------------------

STAND_IN = """
import json, random, time

class Made:
    def __init__(self, seed, size, step=1, **rest):
        if rest: raise TypeError("unexpected " + ", ".join(rest))
        if step < 1: raise ValueError("step must be >= 1")
        self.seed, self.size, self.step = seed, size, step
    def __getitem__(self, i):
        n = (self.seed + i) * self.step
        metadata = {"n": n, "noise": random.random()}
        return {"question": f"Twice {n}?", "answer": str(2 * n), "metadata": metadata}
    def score_answer(self, answer, entry):
        value = int(eval(answer)) if answer.startswith("[") is False else -1
        right = 2 * entry["metadata"]["n"]
        return 1.0 if value == right else 0.5 if value == right + 1 else 0.0

class Open(Made):
    def __getitem__(self, i): return {**super().__getitem__(i), "answer": None}
class Odd(Made):
    def __getitem__(self, i): return {**super().__getitem__(i), "metadata": {"n": {1, 2}}}
class Tuples(Made):
    def score_answer(self, answer, entry): return float(isinstance(entry["metadata"]["n"], tuple))
class Generous(Made):
    def score_answer(self, answer, entry): return 1.0
class Slow(Made):
    def score_answer(self, answer, entry):
        if answer == "0": time.sleep(60)
        return float(answer == entry["answer"])
class Outside(Made):
    def score_answer(self, answer, entry): return 1.0 if answer == entry["answer"] else 7.0

DATASETS = dict(twice=Made, open=Open, odd=Odd, tuples=Tuples, generous=Generous, slow=Slow, outside=Outside)
DATASETS["chain_sum"] = Made  # the self-test's
def create_dataset(name, **params): return DATASETS[name](**params)
"""


@pytest.fixture
def stand_in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A Reasoning Gym of a few lines, for this process and its workers."""
    folder = tmp_path / "lib" / "reasoning_gym"
    folder.mkdir(parents=True)
    (folder / "__init__.py").write_text("")
    (folder / "factory.py").write_text(STAND_IN)
    monkeypatch.setenv("PYTHONPATH", str(folder.parent))
    monkeypatch.syspath_prepend(str(folder.parent))


def gym_case(prediction: str, n: int = 5, task: str = "twice") -> Case:
    meta = {"gym": {"task": task, "params": {}, "metadata": {"n": n}}}
    return Case(str(2 * n), prediction, f"Twice {n}?", meta)


def test_gym_problems_are_the_same_every_time(stand_in: None) -> None:
    problems, left_out = gym_problems("gym:twice", "test")
    assert len(problems) == SPLITS["test"][0] == 200 and left_out == {"duplicate": 0, "no_answer": 0}
    assert problems == gym_problems("gym:twice", "test")[0]  # noise of the shared generator included
    assert problems[3].question == "Twice 1000003?" and problems[3].gold == "2000006"
    assert problems[3].meta["gym"]["task"] == "twice" and problems[3].meta["gym"]["params"] == {}
    assert json.loads(json.dumps(problems[3].meta)) == problems[3].meta
    stepped, _ = gym_problems("gym:twice?step=3", "test")
    assert stepped[1].question == "Twice 3000003?" and stepped[1].meta["gym"]["params"] == {"step": 3}


def test_gym_splits_share_nothing(stand_in: None) -> None:
    train, _ = gym_problems("gym:twice", "train")
    test, _ = gym_problems("gym:twice", "test")
    assert len(train) == 1000 and not {p.id for p in train} & {p.id for p in test}


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("gym:open", "no single right answer"),
        ("gym:odd", "cannot be carried as JSON"),
        ("gym:tuples", "its own answer scores 0 once"),
        ("gym:generous", "nonsense scores 1"),
        ("gym:twicee", "did you mean twice?"),
        ("gym:twice?step=0", "step must be >= 1"),
        ("gym:twice?foo=1", "unexpected foo"),
        ("gym:twice?seed=1", "seed is fixed"),
        ("gym:twice?step", "is not NAME=VALUE"),
        ("gym:twice?step=1&step=2", "given twice"),
        ("gym:", "no task"),
    ],
)
def test_gym_refuses_in_one_line(stand_in: None, source: str, message: str) -> None:
    with pytest.raises(DataError, match=re.escape(message)) as caught:
        gym_problems(source, "test")
    assert "\n" not in str(caught.value) and caught.value.exit_code == 65


def test_gym_is_missing_or_has_no_such_split(stand_in: None, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(MissingInput, match="train and test"):
        gym_problems("gym:twice", "validation")
    monkeypatch.setattr("empg_lite.gym_tasks.find_spec", lambda name: None)
    with pytest.raises(MissingInput, match=re.escape("pip install 'empg-lite[gym]'")) as caught:
        gym_problems("gym:twice", "test")
    assert caught.value.exit_code == 66


def test_gym_scores(stand_in: None, tmp_path: Path) -> None:
    canary = tmp_path / "canary"
    attack = rf"\boxed{{__import__('os').system('touch {canary}')}}"
    cases = [
        gym_case(r"\boxed{10}"),
        gym_case(r"\boxed{11}"),
        gym_case(r"\boxed{12}"),
        gym_case(r"\boxed{2*5}"),
        gym_case(r"\boxed{ten}"),  # the scorer raises: its own answer it reads
        gym_case(attack),
        gym_case(""),
        Case("10", r"\boxed{10}"),
    ]
    with Grader(workers=1) as grader:
        verdicts = grader.grade_many("gym", cases)
        broken = gym_case(r"\boxed{10}")
        assert broken.meta is not None
        broken.meta["gym"]["metadata"] = {}
        lost = grader.grade_many("gym", [broken])[0]
    got = [(v.reward, v.reason) for v in verdicts]
    assert got == [
        (1.0, "equal"),
        (0.5, "different"),
        (0.0, "different"),
        (1.0, "equal"),
        (0.0, "parse"),
        (0.0, "parse"),
        (0.0, "no_answer"),
        (0.0, "crash"),
    ]
    assert not canary.exists() and "carries no Reasoning Gym entry" in str(verdicts[-1].error)
    assert lost.reason == "crash" and "KeyError" in str(lost.error)


def test_gym_pay_for_nothing_is_nothing() -> None:
    """0.01 for any answer would make a problem without a right answer weigh as much as a solved one."""
    from empg_lite.rewards.functions import GYM_LEAST, Question, reward_of

    meta = {"gym": {"task": "t", "params": {}, "metadata": {}}}
    question = reward_of(parse_spec("gym").correctness)(Case("5", r"\boxed{6}", "?", meta))
    assert isinstance(question, Question)
    paid = [question.read({"score": s}) for s in (0.0, 0.01, 0.0999, GYM_LEAST, 0.5, 1.0)]
    assert [o.score for o in paid] == [0.0, 0.0, 0.0, 0.1, 0.5, 1.0]
    assert [o.reason for o in paid] == ["different"] * 5 + ["equal"]


def test_gym_scorers_can_be_killed_and_lie(stand_in: None) -> None:
    with Grader(workers=1, time_limit=0.5) as grader:
        hung, after, outside = grader.grade_many(
            "gym",
            [gym_case(r"\boxed{0}", task="slow"), gym_case(r"\boxed{10}", task="slow"),
             gym_case(r"\boxed{1}", task="outside")],
        )  # fmt: skip
    assert (hung.reason, after.reason, outside.reason) == ("timeout", "equal", "crash")
    assert "outside [0, 1]" in str(outside.error)


def test_gym_through_the_command_line(stand_in: None, cli, recipe_file: Path, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    """check reads the task; sample carries the entry; score needs nothing but the file."""
    sets = ("--set", "data.source=gym:twice", "--set", "data.path=null", "--set", "data.reward=gym")
    code, out, err = cli("check", "--recipe", recipe_file, *sets, "--json")
    report = json.loads(out.splitlines()[-1])
    assert code == 0 and report["rows"] == {"train": 998, "validation": 2, "evaluation": 200}, err
    assert report["gold_failures"] == []
    file = tmp_path / "r.jsonl"
    assert cli("sample", "--recipe", recipe_file, *sets, "--out", file, "--problems", 3)[0] == 0
    (segment,) = read_rollouts(file)
    assert {r.meta["gym"]["task"] for r in segment.rationales} == {"twice"}
    assert cli("score", file, "--reward", "gym")[0] == 0
    assert {r.reason for r in read_rollouts(file)[0].rationales} <= {
        "truncated",
        "no_answer",
        "parse",
        "different",
    }


def test_reward_gym_needs_a_gym_source(cli, recipe_file: Path) -> None:  # type: ignore[no-untyped-def]
    code, _, err = cli("check", "--recipe", recipe_file, "--set", "data.reward=gym")
    assert code == 65 and "gym:TASK" in one_line(err)


def test_parameters_are_json_or_text() -> None:
    assert parse_source("gym:t?a=2&b=[1,2]&c=x%26y&d=true") == (
        "t",
        {"a": 2, "b": [1, 2], "c": "x&y", "d": True},
    )


@pytest.mark.parametrize(
    ("source", "fine"),
    [
        ("[1, 2]", True),
        ("Symbol ('x' )**Integer (2 )+sin (Symbol ('x' ))", True),
        ("-3.5e2/(2)", True),
        ("x", True),
        ("open('x')", False),
        ("__import__ ('os').system ('true')", False),
        ("[].__class__", False),
        ("(lambda: 1)()", False),
        ("[x for x in (1,)]", False),
        ("f'{1}'", False),
        ("sin(x)(y)", False),
        ("sqrt(x=1)", False),
        ("(x := 1)", False),
        ("1 +", False),
        ("(" * 5000, False),
    ],
)
def test_what_the_evaluator_may_see(source: str, fine: bool) -> None:
    assert harmless(source) is fine


# ---- Reasoning Gym itself ----------------------------------------------------------------------------

#: Tasks that are refused; docs/rewards.md lists them too.
UNUSABLE = set(
    "arc_agi boxnet composite game_of_life_halting graph_color propositional_logic rearc rubiks_cube "
    "rush_hour".split()
)


@pytest.fixture
def reasoning_gym() -> None:
    if find_spec("reasoning_gym") is None:
        pytest.skip("the `gym` extra is not installed")


@pytest.mark.gym
def test_a_real_task(reasoning_gym: None) -> None:
    problems, _ = gym_problems("gym:chain_sum?min_terms=2&max_terms=3&max_digits=2", "test")
    assert len({p.id for p in problems}) == len(problems) > 150
    right = [Case(p.gold, rf"\boxed{{{p.gold}}}", p.question, p.meta) for p in problems[:20]]
    wrong = [c._replace(prediction=rf"\boxed{{{int(c.gold) + 1}}}") for c in right]
    with Grader(workers=1, time_limit=10.0) as grader:
        grader.self_test("gym")
        assert {v.reward for v in grader.grade_many("gym", right)} == {1.0}
        assert all(v.reward < 1 for v in grader.grade_many("gym", wrong))


def _entries(task: str, order: list[int]) -> dict[int, dict]:  # type: ignore[type-arg]
    setup = {"kind": "gym", "task": task, "params": {}, "seed": 0, "size": len(order)}
    pool = WorkerPool(workers=1, time_limit=60.0, memory_limit=1 << 30, setup=setup)
    try:
        replies = pool.run([{"op": "entry", "index": index} for index in order])
        return {index: dict(reply.result) for index, reply in zip(order, replies, strict=True)}
    finally:
        pool.close()


@pytest.mark.gym
@pytest.mark.slow
def test_every_task_round_trips(reasoning_gym: None, tmp_path: Path) -> None:
    """Entries are the same in any order; their answers score 1 from JSON; no answer runs as code."""
    from reasoning_gym.factory import DATASETS

    canary = tmp_path / "canary"
    attacks = [f"__import__('os').system('touch {canary}')", f"[open('{canary}', 'w')]"]
    unusable, faults, kept = set(), [], {}
    for task in sorted(DATASETS):
        try:
            made = _entries(task, list(range(8)))
        except GraderUnusable:
            unusable.add(task)
            continue
        entries = [r["entry"] for r in made.values() if "entry" in r]
        if not entries or any(r.get("altogether") for r in made.values()):
            unusable.add(task)
            continue
        if _entries(task, list(range(8))[::-1]) != made:
            faults.append(f"{task}: other entries in another order")
        kept[task] = len(entries)
        meta = [{"gym": {"task": task, "params": {}, "metadata": e["metadata"]}} for e in entries]
        with Grader(workers=1, time_limit=10.0) as grader:
            cases = [
                Case(e["answer"], rf"\boxed{{{e['answer']}}}", e["question"], m)
                for e, m in zip(entries, meta, strict=True)
            ]
            wrong = sum(v.reward != 1 for v in grader.grade_many("gym", cases))
            bad = [cases[0]._replace(prediction=rf"\boxed{{{attack}}}") for attack in attacks]
            verdicts = grader.grade_many("gym", bad)
        if wrong > (1 if task == "codeio" else 0):  # codeio has answers with lone braces
            faults.append(f"{task}: {wrong} of {len(cases)} boxed answers do not score 1")
        if canary.exists() or any(v.reward == 1 or v.failed for v in verdicts):
            faults.append(f"{task}: {verdicts}")
    assert not faults, faults
    assert unusable == UNUSABLE
    assert {task: n for task, n in kept.items() if n != 8} == {"gsm_symbolic": 7}  # one holds a Fraction
