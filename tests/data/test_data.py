"""Data: what each format gives, who trains and who is held out, the order. Refusals: test_broken_inputs."""

from __future__ import annotations

import csv
import hashlib
import io
import json
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from empg_lite.core.errors import DataError, MissingInput
from empg_lite.core.rationale import Problem, problem_id
from empg_lite.data.rows import last_boxed
from empg_lite.data.sources import (
    ProblemStream,
    Splits,
    find_overlap,
    load_problems,
    load_splits,
    subset,
)
from empg_lite.recipe.schema import DataSection, ModelSection, Recipe, RunSection


def a_recipe(seed: int = 0, **data: Any) -> Recipe:
    return Recipe(model=ModelSection(name="m"), data=DataSection(**data), run=RunSection(seed=seed))


def problems(n: int) -> list[Problem]:
    return [Problem(problem_id(f"q{i}"), f"q{i}", str(i)) for i in range(n)]


def jsonl(path: Path, rows: Sequence[dict[str, Any]]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
    return str(path)


def numbered(n: int, start: int = 0) -> list[dict[str, Any]]:
    return [{"question": f"q{i}", "answer": str(i)} for i in range(start, start + n)]


def load_one(tmp_path: Path, row: dict[str, Any], source: str = "local", **data: Any) -> Problem:
    path = jsonl(tmp_path / "one.jsonl", [row])
    held_out = jsonl(tmp_path / "held_out.jsonl", numbered(1))
    section = DataSection(source=source, path=path, eval_path=held_out, **data)
    return load_problems(section, "train")[0]


# --- rows and formats -----------------------------------------------------------------------------

ROWS: list[dict[str, Any]] = [
    {"question": 'Two "quoted" lines,\nwith a comma?', "answer": "1,000"},
    {"question": "Été — ½ of 𝟜\u2028?", "answer": "\\frac{1}{2}"},
    {"question": "plain", "answer": "7"},
]


def as_csv(rows: list[dict[str, Any]]) -> bytes:
    out = io.StringIO(newline="")
    writer = csv.DictWriter(out, ["answer", "question"], lineterminator="\r\n")
    writer.writeheader()
    writer.writerows(rows)
    return out.getvalue().encode()


def as_parquet(rows: list[dict[str, Any]]) -> bytes:
    import pyarrow
    import pyarrow.parquet

    out = io.BytesIO()
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), out)
    return out.getvalue()


FORMATS = {
    "a.jsonl": "\n\n".join(json.dumps(row, ensure_ascii=False) for row in ROWS).encode(),
    "crlf.jsonl": "\ufeff".encode() + "\r\n".join(json.dumps(row) for row in ROWS).encode(),
    "a.json": json.dumps(ROWS, indent=2).encode(),
    "compact.json": json.dumps(ROWS, ensure_ascii=False, separators=(",", ":")).encode(),
    "a.csv": as_csv(ROWS),
    "mark.csv": "\ufeff".encode() + as_csv(ROWS),
    "a.parquet": as_parquet(ROWS),
}


@pytest.mark.parametrize("name", FORMATS)
def test_every_format_gives_the_same_problems(name: str, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(FORMATS[name])
    held_out = jsonl(tmp_path / "held_out.jsonl", numbered(1))
    data = DataSection(source="local", path=str(tmp_path / name), eval_path=held_out)
    got = load_problems(data, "train")
    assert [(p.question, p.gold) for p in got] == [(r["question"], r["answer"]) for r in ROWS]
    assert [p.id for p in got] == [hashlib.sha256(r["question"].encode()).hexdigest()[:16] for r in ROWS]


@pytest.mark.parametrize(
    ("row", "gold"),
    [
        ({"question": "q", "answer": "So 3 + 4.\n#### 7"}, "7"),
        ({"question": "q", "answer": "#### 1\n#### 1,234 "}, "1,234"),
        ({"problem": "q", "solution": r"$\boxed{1}$, no: $\boxed{\frac{1}{2}}$."}, r"\frac{1}{2}"),
        ({"prompt": "q", "gold": "x^2"}, "x^2"),
        ({"question": "q", "solution": r"work \boxed{3}", "answer": "3"}, "3"),
        ({"question": "q", "answer": "wordy #### 9", "gold": "8"}, "8"),
        ({"question": " q\n", "answer": 72}, "72"),
        ({"question": "q", "answer": 72.0}, "72"),
        ({"question": "q", "answer": 0.125}, "0.125"),
        ({"question": "q", "answer": -(10**30)}, "-1" + "0" * 30),
    ],
)
def test_golds(row: dict[str, Any], gold: str, tmp_path: Path) -> None:
    problem = load_one(tmp_path, row)
    assert (problem.question, problem.gold) == ("q", gold)


def test_named_columns_win(tmp_path: Path) -> None:
    row = {"question": "no", "answer": "0", "task": "yes", "result": "1"}
    problem = load_one(tmp_path, row, question_column="task", answer_column="result")
    assert (problem.question, problem.gold) == ("yes", "1")


@pytest.mark.parametrize("level", ["Level 5", 5])
def test_level_and_subject_are_kept(level: object, tmp_path: Path) -> None:
    row = {"problem": "q", "solution": r"\boxed{1}", "level": level, "type": "Algebra"}
    assert load_one(tmp_path, row, "math-hard").meta == {"level": "Level 5", "subject": "Algebra"}


@pytest.mark.parametrize(
    ("text", "content"),
    [
        (r"\boxed{1}", "1"),
        (r"\boxed{a} and \boxed{\sqrt{\frac{1}{2}}}.", r"\sqrt{\frac{1}{2}}"),
        (r"$\boxed 9$.", "9"),
        (r"\boxed  \pi", r"\pi"),
        (r"\boxed{\left\{ 1, 2 \right.}", r"\left\{ 1, 2 \right."),
        (r"\boxed{\{1\}}", r"\{1\}"),
        (r"\boxed{x \\{y}}", r"x \\{y}"),
        (r"\boxed{}", ""),
        ("\\boxed{a\n}", "a\n"),
        (r"\boxed{1", None),
        (r"\boxed", None),
        ("no box", None),
    ],
)
def test_last_boxed(text: str, content: str | None) -> None:
    assert last_boxed(text) == content


# --- splits ---------------------------------------------------------------------------------------


def ids(splits: Splits) -> tuple[set[str], set[str], set[str]]:
    return tuple({p.id for p in part} for part in (splits.train, splits.validation, splits.evaluation))  # type: ignore[return-value]


def last_of_shuffle(names: Sequence[str], count: int, salt: str) -> set[str]:
    """The same choice, written differently: the ``count`` largest hashes."""
    hashes = {hashlib.sha256(f"{salt}/{problem_id(n)}".encode()).hexdigest(): n for n in names}
    return {hashes[h] for h in sorted(hashes, reverse=True)[:count]}


@pytest.mark.parametrize(
    ("n", "evaluation", "validation"), [(1000, 100, 90), (4000, 200, 100), (25, 2, 2), (5, 1, 0)]
)
def test_a_single_file_is_cut(n: int, evaluation: int, validation: int, tmp_path: Path) -> None:
    data = {"source": "local", "path": jsonl(tmp_path / "d.jsonl", numbered(n))}
    splits = load_splits(a_recipe(**data))
    names = [f"q{i}" for i in range(n)]
    held = last_of_shuffle(names, evaluation, "evaluation")
    rest = [name for name in names if name not in held]
    validated = last_of_shuffle(rest, validation, "validation") if validation else set()
    assert [p.question for p in splits.evaluation] == [name for name in names if name in held]
    assert [p.question for p in splits.validation] == [name for name in rest if name in validated]
    assert [p.question for p in splits.train] == [name for name in rest if name not in validated]
    section = a_recipe(**data).data
    assert tuple(load_problems(section, "test")) == splits.evaluation
    assert {p.id for p in load_problems(section, "train")} == ids(splits)[0] | ids(splits)[1]


def test_the_cut_does_not_depend_on_the_seed_nor_on_the_order(tmp_path: Path) -> None:
    path, turned = (jsonl(tmp_path / f"{i}.jsonl", numbered(300)[:: 1 - 2 * i]) for i in (0, 1))
    assert load_splits(a_recipe(0, source="local", path=path)) == load_splits(
        a_recipe(5, source="local", path=path)
    )
    assert ids(load_splits(a_recipe(source="local", path=turned))) == ids(
        load_splits(a_recipe(source="local", path=path))
    )


def test_a_new_row_moves_hardly_any_other(tmp_path: Path) -> None:
    before = load_splits(a_recipe(source="local", path=jsonl(tmp_path / "a.jsonl", numbered(300))))
    after = load_splits(a_recipe(source="local", path=jsonl(tmp_path / "b.jsonl", numbered(301))))
    assert len(ids(before)[2] - ids(after)[2]) <= 1


def test_validation_may_be_chosen(tmp_path: Path) -> None:
    path, held_out = jsonl(tmp_path / "a.jsonl", numbered(50)), jsonl(tmp_path / "b.jsonl", numbered(7, 100))
    for asked, got in ((None, 5), (0, 0), (49, 49)):
        splits = load_splits(a_recipe(source="local", path=path, eval_path=held_out, validation=asked))
        assert (len(splits.train), len(splits.validation), len(splits.evaluation)) == (50 - got, got, 7)
        assert not (ids(splits)[0] | ids(splits)[2]) & ids(splits)[1]


def test_duplicates_and_evaluation_rows_leave_the_training_rows(tmp_path: Path) -> None:
    train = numbered(20) + numbered(3) + [{"question": "  Q21 ", "answer": "21"}]
    test = [*numbered(4, 18), *numbered(1, 18), *numbered(2, 100), {"question": "q21", "answer": "21"}]
    data = {"path": jsonl(tmp_path / "a.jsonl", train), "eval_path": jsonl(tmp_path / "b.jsonl", test)}
    splits = load_splits(a_recipe(source="local", validation=2, **data))
    # training: q0..q19 and Q21; q18, q19 and (but for its case) Q21 are evaluation rows
    assert {p.question for p in (*splits.train, *splits.validation)} == {f"q{i}" for i in range(18)}
    assert [p.question for p in splits.evaluation] == ["q18", "q19", "q20", "q21", "q100", "q101"]
    assert splits.dropped == {"duplicate": 3 + 2, "evaluation": 3}


def test_math_rows_published_without_an_answer_are_dropped(tmp_path: Path) -> None:
    row = {"level": "Level 5", "type": "Algebra"}
    solved = [{"problem": f"p{i}", "solution": f"\\boxed{{{i}}}", **row} for i in range(30)]
    (tmp_path / "m").mkdir()
    jsonl(tmp_path / "m" / "train.jsonl", [*solved, {"problem": "x", "solution": r"\boxed{}", **row}])
    jsonl(tmp_path / "m" / "test.jsonl", [{"problem": "t", "solution": r"\boxed{1}", **row}])
    for source in ("math", "math-hard"):
        splits = load_splits(a_recipe(source=source, path=str(tmp_path / "m")))
        assert splits.dropped == {"no_answer": 1} and len(splits.train) + len(splits.validation) == 30


# --- where the files are --------------------------------------------------------------------------


@pytest.fixture
def no_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    def refuse(*args: object, **kwargs: object) -> None:
        raise AssertionError("the hub was asked")

    monkeypatch.setattr(datasets, "load_dataset", refuse)


@pytest.mark.usefixtures("no_hub")
def test_a_folder_stands_in_for_the_hub(tmp_path: Path) -> None:
    jsonl(tmp_path / "gsm8k_train.jsonl", numbered(20))
    jsonl(tmp_path / "gsm8k_test.jsonl", numbered(3, 100))
    data = DataSection(source="gsm8k", path=str(tmp_path))
    assert len(load_problems(data, "train")) == 20 and len(load_problems(data, "test")) == 3
    jsonl(tmp_path / "train.jsonl", numbered(4))  # the plain name comes first
    assert len(load_problems(data, "train")) == 4
    assert len(load_problems(DataSection(source="owner/gsm8k", path=str(tmp_path)), "test")) == 3
    (tmp_path / "dev.csv").write_bytes(as_csv(ROWS))
    assert len(load_problems(data, "dev")) == 3
    with pytest.raises(MissingInput, match=r"split 'val'.*put val\.jsonl or gsm8k_val\.jsonl"):
        load_problems(data, "val")


@pytest.mark.usefixtures("no_hub")
def test_math_hard_reads_math_files_and_keeps_level_5(tmp_path: Path) -> None:
    rows = [{"problem": f"p{i}", "solution": r"\boxed{1}", "level": f"Level {i % 5 + 1}"} for i in range(50)]
    rows.append({"problem": "?", "solution": r"\boxed{1}", "level": "Level ?"})
    jsonl(tmp_path / "math_train.jsonl", rows)
    got = load_problems(DataSection(source="math-hard", path=str(tmp_path)), "train")
    assert [p.question for p in got] == [f"p{i}" for i in range(4, 50, 5)]
    assert len(load_problems(DataSection(source="math", path=str(tmp_path)), "train")) == 51


@pytest.mark.usefixtures("no_hub")
def test_evaluation_rows_come_from_a_file_or_a_folder(tmp_path: Path) -> None:
    path = jsonl(tmp_path / "mine.jsonl", numbered(20))
    (tmp_path / "e").mkdir()
    other = jsonl(tmp_path / "e" / "test.jsonl", numbered(3, 100))
    for eval_path in (other, str(tmp_path / "e")):
        splits = load_splits(a_recipe(source="local", path=path, eval_path=eval_path))
        assert [p.question for p in splits.evaluation] == ["q100", "q101", "q102"]
        assert len(splits.train) + len(splits.validation) == 20
    with pytest.raises(MissingInput, match="no split 'dev'"):
        load_problems(DataSection(source="local", path=path), "dev")


@pytest.mark.parametrize("broken", ["path", "eval_path"])
def test_absent_files(broken: str, tmp_path: Path) -> None:
    sound = jsonl(tmp_path / "a.jsonl", numbered(20))
    for path, reason in (
        (str(tmp_path / "none.jsonl"), "no such data file"),
        (f"/{'x' * 300}.jsonl", "too long"),
    ):
        with pytest.raises(MissingInput, match=reason) as caught:
            load_splits(a_recipe(source="local", **({"path": sound} | {broken: path})))
        assert path in str(caught.value) and caught.value.exit_code == 66


@pytest.mark.parametrize(
    ("data", "asked"),
    [
        ({"source": "gsm8k"}, ("openai/gsm8k", "main", "test")),
        ({"source": "math-hard"}, ("DigitalLearningGmbH/MATH-lighteval", None, "test")),
        ({"source": "a/gsm8k", "hub_config": "c"}, ("a/gsm8k", "c", "test")),
        ({"source": "a/b", "eval_split": "val"}, ("a/b", None, "val")),
    ],
)
def test_the_hub_is_asked(
    data: dict[str, Any], asked: tuple[Any, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    import datasets

    calls = []

    def load(name: str, config: str | None, *, split: str) -> Any:
        calls.append((name, config, split))
        return datasets.Dataset.from_list([{"problem": "q", "solution": r"\boxed{1}", "level": "Level 5"}])

    monkeypatch.setattr(datasets, "load_dataset", load)
    section = DataSection(**data)
    assert load_problems(section, section.eval_split)[0].gold == "1"
    assert calls == [asked]


def test_an_absent_dataset_says_what_to_do() -> None:
    """The real ``datasets``, offline (conftest)."""
    with pytest.raises(
        MissingInput, match=r"empg-lite/no-such-set cannot be loaded.*set data\.path"
    ) as caught:
        load_problems(DataSection(source="empg-lite/no-such-set"), "train")
    assert "\n" not in str(caught.value)


def test_the_bundled_problems() -> None:
    splits = load_splits(a_recipe(source="tiny"))
    assert len(splits.evaluation) == 500 and len(splits.validation) == 100 and not splits.dropped
    with pytest.raises(MissingInput, match="unknown split 'dev'"):
        load_problems(DataSection(source="tiny"), "dev")


# --- helpers --------------------------------------------------------------------------------------


def test_overlap_ignores_case_spacing_and_width() -> None:
    texts = ["How  many\tEGGS?", "Straße １", "How many hens?", "ﬁve"]
    a = [Problem(problem_id(t), t, "1") for t in texts]
    b = [Problem("b", t, "2") for t in ("how many eggs? ", "STRASSE 1", "five", "How many hens")]
    assert find_overlap(a, b) == [a[0], a[1], a[3]]
    assert find_overlap(b, a) == b[:3]


def test_subset_is_spread_nested_and_in_order() -> None:
    rows = problems(1000)
    some, more = subset(rows, 50), subset(rows, 100)
    assert len(some) == 50 and set(p.id for p in some) < set(p.id for p in more)
    positions = [rows.index(p) for p in some]
    assert positions == sorted(positions) and max(positions) > 900 and min(positions) < 100
    assert subset(rows, None) == subset(rows, 5000) == rows


# --- the stream -----------------------------------------------------------------------------------


def questions(taken: Sequence[Problem]) -> list[str]:
    return [p.question for p in taken]


def test_every_epoch_is_a_fresh_permutation() -> None:
    rows = problems(40)
    stream = ProblemStream(rows, seed=3)
    epochs = [
        [q for at in range(e * 40, e * 40 + 40, 8) for q in questions(stream.take(at, 8))] for e in range(6)
    ]
    assert all(sorted(epoch) == sorted(questions(rows)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 6
    assert epochs[0] != questions(ProblemStream(rows, seed=4).take(0, 40))
    assert questions(rows) not in epochs


@given(st.integers(1, 12), st.integers(0, 3), st.lists(st.integers(0, 60), max_size=6), st.data())
def test_the_position_is_the_whole_state(n: int, seed: int, earlier: list[int], data: st.DataObject) -> None:
    rows = problems(n)
    size, position = data.draw(st.integers(0, n)), data.draw(st.integers(0, 60))
    used = ProblemStream(rows, seed)
    for at in earlier:
        used.take(at, size)
    taken = used.take(position, size)
    assert taken == ProblemStream(rows, seed).take(position, size)
    assert taken == ProblemStream(rows[::-1], seed).take(position, size), "the file's order does not matter"
    assert len({p.id for p in taken}) == len(taken) == size, "no problem twice in a step"


def test_steps_that_do_not_divide_the_rows_still_reach_all() -> None:
    stream = ProblemStream(problems(50), seed=0)
    seen = Counter(q for at in range(0, 50 * 32, 32) for q in questions(stream.take(at, 32)))
    assert len(seen) == 50 and min(seen.values()) >= 24 and max(seen.values()) <= 42  # 32 on average


def test_the_order_is_fair() -> None:
    """Which of 5 problems comes first, over 1,000 seeds: 200 each, standard deviation 12.6."""
    rows = problems(5)
    first = Counter(ProblemStream(rows, seed).take(0, 1)[0].question for seed in range(1000))
    assert len(first) == 5 and all(abs(count - 200) < 5 * 12.6 for count in first.values())


def test_more_problems_a_step_than_there_are() -> None:
    with pytest.raises(
        DataError, match=r"9 problems per step, but only 8 training rows · sampler\.problems_per_step"
    ):
        ProblemStream(problems(8), 0).take(0, 9)


# --- the real data --------------------------------------------------------------------------------


@pytest.mark.shared
@pytest.mark.usefixtures("no_hub")
@pytest.mark.parametrize(
    ("source", "train", "test", "dropped"),
    [
        ("gsm8k", 7473, 1319, {}),
        # 7,500 training rows: two solutions box nothing, one problem is a test row but for its spacing
        ("math", 7498, 5000, {"no_answer": 2, "evaluation": 1}),
        ("math-hard", 2302, 1324, {"no_answer": 2}),
    ],
)
def test_gsm8k_and_math_load(
    source: str, train: int, test: int, dropped: dict[str, int], shared: Path
) -> None:
    recipe = a_recipe(source=source, path=str(shared))
    assert len(load_problems(recipe.data, "train")) == train
    splits = load_splits(recipe)
    assert len(splits.evaluation) == test and len(splits.validation) == 100 and splits.dropped == dropped
    assert len(splits.train) == train - 100 - dropped.get("evaluation", 0)
    assert not ids(splits)[0] & ids(splits)[1] and not (ids(splits)[0] | ids(splits)[1]) & ids(splits)[2]
    if source != "gsm8k":
        levels = Counter(p.meta["level"] for p in splits.evaluation)
        assert levels["Level 5"] == 1324 and all(p.meta["subject"] for p in splits.train)


@pytest.mark.shared
def test_math_golds_agree_with_those_of_math_500(shared: Path) -> None:
    """MATH-500 carries the answers that others extracted."""
    rows = [json.loads(line) for line in (shared / "math500_test.jsonl").read_text("utf-8").splitlines()]
    golds = {p.question: p.gold for p in load_problems(DataSection(source="math", path=str(shared)), "test")}
    assert [row["answer"] for row in rows] == [golds[row["problem"].strip()] for row in rows]
    assert len(rows) == 500


@pytest.mark.parametrize(
    ("reward", "answer", "said"),
    [
        ("choice", "Z", "is no letter A-J and no option"),
        ("choice * concise:600", "12", "is no letter A-J and no option"),
        ("gsm8k", "?", "the gsm8k reward reads no answer in '?'"),
    ],
)
def test_a_gold_that_nothing_could_earn_is_an_error_of_its_line(
    reward: str, answer: str, said: str, tmp_path: Path
) -> None:
    rows = ['{"question": "a?", "answer": "%s"}' % ("B" if reward.startswith("choice") else "3"), "", ""]
    rows += [
        json.dumps({"question": "b?", "answer": answer}),
        json.dumps({"question": "c?", "answer": answer}),
    ]
    path = tmp_path / "data.jsonl"
    path.write_text("\n".join(rows) + "\n", "utf-8")
    data = DataSection(
        source="local", path=str(path), eval_path=jsonl(tmp_path / "e.jsonl", numbered(1)), reward=reward
    )
    with pytest.raises(DataError) as raised:
        load_problems(data, "train")
    assert said in str(raised.value) and f"{path}:4: answer" in str(raised.value)
    assert "also unusable: lines 5" in str(raised.value)  # all of them at once
    kept = load_problems(data.model_copy(update={"skip_bad_rows": True}), "train")
    assert [p.question for p in kept] == ["a?"]


@pytest.mark.parametrize(
    ("reward", "gold"),
    [
        ("gsm8k", "1,234"),
        ("gsm8k", "$5.00"),
        ("gsm8k", "-0.5"),
        ("gsm8k", "1/2"),
        ("gsm8k", "purple"),  # a word that is written behind #### is read, and equal
        ("math", r"\text{purple}"),
        ("math", "purple"),
        ("math", r"\begin{pmatrix} 1 \\ 2 \end{pmatrix}"),
        ("math", "x \\in [0, \\infty)"),
        ("exact", "anything at all"),
        ("choice", "(c)"),
        ("regex:colour (.*)", "purple"),
        (None, "purple"),
    ],
)
def test_a_gold_that_can_be_earned_is_none(reward: str | None, gold: str, tmp_path: Path) -> None:
    path = jsonl(tmp_path / "d.jsonl", [{"question": "Which? (A) 1 (B) 2 (C) 3", "answer": gold}])
    data = DataSection(
        source="local", path=path, eval_path=jsonl(tmp_path / "e.jsonl", numbered(1)), reward=reward
    )
    assert [p.gold for p in load_problems(data, "train")] == [gold]


@pytest.mark.shared
@pytest.mark.parametrize(("source", "reward"), [("gsm8k", "gsm8k"), ("math", "math")])
def test_no_published_gold_is_refused(source: str, reward: str, shared: Path) -> None:
    for split in ("train", "test"):
        plain = DataSection(source=source, path=str(shared))
        assert load_problems(plain.model_copy(update={"reward": reward}), split) == load_problems(
            plain, split
        )
