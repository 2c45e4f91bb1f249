"""Reasoning Gym: problems, guarded scorers, every task."""

from __future__ import annotations

import json
import re
from importlib.util import find_spec
from pathlib import Path

import pytest
from processes import one_line

from empg_lite.core.errors import DataError, GraderUnusable, MissingInput
from empg_lite.data.gym import SPLITS, gym_problems, parse_source
from empg_lite.rewards import Case, Grader
from empg_lite.rewards.spec import parse_spec
from empg_lite.rewards.worker.gym import harmless
from empg_lite.rewards.worker.pool import WorkerPool
from empg_lite.run.rollouts import read_rollouts

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
    """A minimal Reasoning Gym for this process and its workers."""
    folder = tmp_path / "lib" / "reasoning_gym"
    folder.mkdir(parents=True)
    (folder / "__init__.py").write_text("")
    (folder / "factory.py").write_text(STAND_IN)
    monkeypatch.setenv("PYTHONPATH", str(folder.parent))
    monkeypatch.syspath_prepend(str(folder.parent))


def gym_case(prediction: str, n: int = 5, task: str = "twice") -> Case:
    meta = {"gym": {"task": task, "params": {}, "metadata": {"n": n}}}
    return Case(str(2 * n), prediction, f"Twice {n}?", meta)


def test_gym_problems_are_reproducible(stand_in: None) -> None:
    problems, left_out = gym_problems("gym:twice", "test")
    assert len(problems) == SPLITS["test"][0] == 200 and left_out == {"duplicate": 0, "no_answer": 0}
    assert problems == gym_problems("gym:twice", "test")[0]  # including the noise of the global generator
    assert problems[3].question == "Twice 1000003?" and problems[3].gold == "2000006"
    assert problems[3].meta["gym"]["task"] == "twice" and problems[3].meta["gym"]["params"] == {}
    assert json.loads(json.dumps(problems[3].meta)) == problems[3].meta
    stepped, _ = gym_problems("gym:twice?step=3", "test")
    assert stepped[1].question == "Twice 3000003?" and stepped[1].meta["gym"]["params"] == {"step": 3}


def test_gym_splits_are_disjoint(stand_in: None) -> None:
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
def test_gym_errors_are_one_line(stand_in: None, source: str, message: str) -> None:
    with pytest.raises(DataError, match=re.escape(message)) as caught:
        gym_problems(source, "test")
    assert "\n" not in str(caught.value) and caught.value.exit_code == 65


def test_gym_not_installed_or_unknown_split(stand_in: None, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(MissingInput, match="train and test"):
        gym_problems("gym:twice", "validation")
    monkeypatch.setattr("empg_lite.data.gym.find_spec", lambda name: None)
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
        gym_case(r"\boxed{ten}"),  # the scorer raises, though it accepts its own answer
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
    """With 0.01 for any answer, a problem without a correct answer would weigh as much as a solved one."""
    from empg_lite.rewards.kind import WorkerRequest
    from empg_lite.rewards.kinds.gym import LEAST_SCORE

    meta = {"gym": {"task": "t", "params": {}, "metadata": {}}}
    question = parse_spec("gym").kind.grade(Case("5", r"\boxed{6}", "?", meta), "")
    assert isinstance(question, WorkerRequest)
    paid = [question.read({"score": s}) for s in (0.0, 0.01, 0.0999, LEAST_SCORE, 0.5, 1.0)]
    assert [o.score for o in paid] == [0.0, 0.0, 0.0, 0.1, 0.5, 1.0]
    assert [o.reason for o in paid] == ["different"] * 5 + ["equal"]


def test_gym_scorers_that_hang_or_leave_the_range(stand_in: None) -> None:
    with Grader(workers=1, time_limit=1.0) as grader:
        hung, after, outside = grader.grade_many(
            "gym",
            [gym_case(r"\boxed{0}", task="slow"), gym_case(r"\boxed{10}", task="slow"),
             gym_case(r"\boxed{1}", task="outside")],
        )  # fmt: skip
    assert (hung.reason, after.reason, outside.reason) == ("timeout", "equal", "crash")
    assert "outside [0, 1]" in str(outside.error)


def test_gym_through_the_command_line(stand_in: None, cli, recipe_file: Path, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    """`check` reads the task, `sample` stores the entry, `score` needs only the file."""
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


def test_gym_parameters_are_json_or_text() -> None:
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
def test_which_expressions_the_evaluator_accepts(source: str, fine: bool) -> None:
    assert harmless(source) is fine


# ---- Reasoning Gym itself ----------------------------------------------------------------------------

#: Unusable tasks; docs/rewards.md lists them too.
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
    """Entries do not depend on their order, their answers score 1 after JSON, and no answer runs as code."""
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
