"""Splits and order: which rows train, which are held out, and how the stream shuffles."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from local_data import a_recipe, jsonl, numbered

from empg_lite.core.errors import DataError, MissingInput
from empg_lite.core.rationale import Problem, problem_id
from empg_lite.data import sources
from empg_lite.data.sources import (
    ProblemStream,
    Splits,
    find_overlap,
    load_problems,
    load_splits,
    subset,
)
from empg_lite.recipe.schema import DataSection


def problems(n: int) -> list[Problem]:
    return [Problem(problem_id(f"q{i}"), f"q{i}", str(i)) for i in range(n)]


# --- splits ---------------------------------------------------------------------------------------


def ids(splits: Splits) -> tuple[set[str], set[str], set[str]]:
    return tuple({p.id for p in part} for part in (splits.train, splits.validation, splits.evaluation))  # type: ignore[return-value]


def last_of_shuffle(names: Sequence[str], count: int, salt: str) -> set[str]:
    """The same choice, computed independently: the ``count`` largest hashes."""
    hashes = {hashlib.sha256(f"{salt}/{problem_id(n)}".encode()).hexdigest(): n for n in names}
    return {hashes[h] for h in sorted(hashes, reverse=True)[:count]}


@pytest.mark.parametrize(
    ("n", "evaluation", "validation"), [(1000, 100, 90), (4000, 200, 100), (25, 2, 2), (5, 1, 0)]
)
def test_a_single_file_is_split(n: int, evaluation: int, validation: int, tmp_path: Path) -> None:
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


def test_the_split_depends_on_neither_seed_nor_order(tmp_path: Path) -> None:
    path, turned = (jsonl(tmp_path / f"{i}.jsonl", numbered(300)[:: 1 - 2 * i]) for i in (0, 1))
    assert load_splits(a_recipe(0, source="local", path=path)) == load_splits(
        a_recipe(5, source="local", path=path)
    )
    assert ids(load_splits(a_recipe(source="local", path=turned))) == ids(
        load_splits(a_recipe(source="local", path=path))
    )


def test_a_new_row_moves_almost_no_other(tmp_path: Path) -> None:
    before = load_splits(a_recipe(source="local", path=jsonl(tmp_path / "a.jsonl", numbered(300))))
    after = load_splits(a_recipe(source="local", path=jsonl(tmp_path / "b.jsonl", numbered(301))))
    assert len(ids(before)[2] - ids(after)[2]) <= 1


def test_validation_size(tmp_path: Path) -> None:
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
    # training: q0..q19 and Q21; q18, q19 and (ignoring case) Q21 are evaluation rows
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


def test_the_bundled_problems() -> None:
    splits = load_splits(a_recipe(source="tiny"))
    assert len(splits.evaluation) == 500 and len(splits.validation) == 100 and not splits.dropped
    with pytest.raises(MissingInput, match="unknown split 'dev'"):
        load_problems(DataSection(source="tiny"), "dev")


@pytest.mark.shared
@pytest.mark.usefixtures("no_hub")
@pytest.mark.parametrize(
    ("source", "train", "test", "dropped"),
    [
        ("gsm8k", 7473, 1319, {}),
        # 7,500 training rows: two solutions have an empty box, one problem is a test row up to spacing
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
    assert taken == ProblemStream(rows[::-1], seed).take(position, size), "file order does not matter"
    assert len({p.id for p in taken}) == len(taken) == size, "no repeats within a step"


def test_steps_that_do_not_divide_the_rows_still_reach_all() -> None:
    stream = ProblemStream(problems(50), seed=0)
    seen = Counter(q for at in range(0, 50 * 32, 32) for q in questions(stream.take(at, 32)))
    assert len(seen) == 50 and min(seen.values()) >= 24 and max(seen.values()) <= 42  # 32 on average


def test_the_order_is_fair() -> None:
    """Which of 5 problems comes first, over 1,000 seeds: 200 each, standard deviation 12.6."""
    rows = problems(5)
    first = Counter(ProblemStream(rows, seed).take(0, 1)[0].question for seed in range(1000))
    assert len(first) == 5 and all(abs(count - 200) < 5 * 12.6 for count in first.values())


def test_reading_two_epochs_in_turn_shuffles_each_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """As slots do that have drifted apart: shuffling a large data set takes longer than a decoding step."""
    shuffled: list[str] = []
    real = sources._shuffled
    monkeypatch.setattr(sources, "_shuffled", lambda ps, salt: shuffled.append(salt) or real(ps, salt))
    stream, alone = ProblemStream(problems(20), 7), ProblemStream(problems(20), 7)
    apart = [stream.at(at % 2 * 20 + at) for at in range(20)]
    assert shuffled == ["7/0", "7/1"]
    assert apart == [alone.take(0, 20)[at] if at % 2 == 0 else alone.take(20, 20)[at] for at in range(20)]


def test_more_problems_per_step_than_rows() -> None:
    with pytest.raises(
        DataError, match=r"9 problems per step, but only 8 training rows · sampler\.problems_per_step"
    ):
        ProblemStream(problems(8), 0).take(0, 9)
