"""Your own function as the reward: pinned, run in a worker, refused without a word from you."""

from __future__ import annotations

import base64
import hashlib
import json
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
from processes import HANGS, alive, one_line, wait_until

from empg_lite.core.errors import DataError, GraderUnusable, MissingInput
from empg_lite.recipe.file import load_recipe
from empg_lite.rewards import Case, Grader, pin
from empg_lite.rewards.worker.python import checked_terms, load_function
from empg_lite.run.rollouts import read_rollouts

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
def test_crashes_of_a_function_are_reported(own: SimpleNamespace, prediction: str, error: str) -> None:
    verdict = own.grade(prediction)
    assert (verdict.reward, verdict.reason, verdict.failed) == (0.0, "crash", True)
    assert error in str(verdict.error) and "\n" not in str(verdict.error)
    assert own.grade("g").reward == 1.0  # the next one is served


def test_own_function_limits(own: SimpleNamespace, tmp_path: Path) -> None:
    verdict = own.grade("loop")
    assert verdict.reason == "timeout" and 1.0 <= verdict.seconds <= HANGS
    assert own.grade("memory").reason == "memory"
    assert own.grade("fork").reward == 1.0  # the copy does not answer a second time
    assert own.grade("g").reward == 1.0
    note = tmp_path / "child"
    (verdict,) = own.grader.grade_many(own.spec, [Case("g", "child", None, {"pid": str(note)})])
    assert verdict.reason == "timeout"
    pid = int(note.read_text())
    wait_until(lambda: not alive(pid))  # killed with the worker that started it


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
def test_the_self_test_reports_a_file_that_does_not_load(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "r.py").write_text(text)
    spec, code = pin(f"python:{tmp_path / 'r.py'}")
    with Grader(workers=1, code=code) as grader, pytest.raises(GraderUnusable, match=message) as caught:
        grader.self_test(spec)
    assert caught.value.exit_code == 69


def test_a_file_that_never_loads_is_reported_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("empg_lite.rewards.worker.pool._START_SECONDS", 2.0)
    (tmp_path / "r.py").write_text("while True: pass\nreward = 1\n")
    spec, code = pin(f"python:{tmp_path / 'r.py'}")
    with Grader(workers=1, code=code) as grader, pytest.raises(GraderUnusable, match="not ready after 2 s"):
        grader.self_test(spec)


def test_loading_has_more_time_and_memory_than_a_verdict(tmp_path: Path) -> None:
    (tmp_path / "r.py").write_text(
        "import time\ntime.sleep(1.2)\nblob = bytearray(300 << 20)\n"
        "def reward(completion, gold, question, meta):\n    return len(blob) > 0\n"
    )
    spec, code = pin(f"python:{tmp_path / 'r.py'}")
    with Grader(workers=1, code=code, time_limit=1.0, memory_limit=200 << 20) as grader:
        assert grader.grade(spec, "g", "x").reward == 1.0


def test_numbers_of_array_libraries_are_numbers() -> None:
    numpy = pytest.importorskip("numpy")
    assert checked_terms(numpy.float32(0.5)) == {"correct": 0.5}
    assert checked_terms({"correct": numpy.bool_(True), "x": numpy.int64(0)}) == {"correct": 1.0, "x": 0.0}
    with pytest.raises(TypeError):
        checked_terms(numpy.array([0.5, 0.5]).tolist())


# ---- through the command line ------------------------------------------------------------------------


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
    from empg_lite.data.sources import load_problems
    from empg_lite.recipe.schema import DataSection

    rows = [
        {"question": f"q{i}", "answer": "1", "unit": "km", "tests": [1, 2], "odd": float("nan")}
        for i in range(20)
    ]
    (tmp_path / "d.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    problems = load_problems(DataSection(source="local", path=str(tmp_path / "d.jsonl")), "train")
    assert problems[0].meta == {"unit": "km", "tests": [1, 2]}


@pytest.mark.parametrize("signature", ["completion, gold", "completion, gold, question, meta, weight"])
def test_a_function_with_other_arguments_is_told_the_signature(signature: str) -> None:
    def setup(arguments: str) -> dict[str, str]:
        source = base64.b64encode(f"def reward({arguments}):\n    return 1\n".encode()).decode()
        return {"path": "mine.py", "function": "reward", "source": source}

    with pytest.raises(TypeError) as raised:
        load_function(setup(signature))
    said = str(raised.value)
    assert f"reward({signature})" in said and "define `def reward(completion, gold, question, meta)`" in said
    for fits in (
        "completion, gold, question, meta",
        "gold, **others",
        "completion, gold, question, meta, n=1",
    ):
        assert load_function(setup(fits))(completion="", gold="", question="", meta={}) == 1
