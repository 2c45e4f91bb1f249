"""Rows as problems: formats, columns, gold answers, where files are found. Errors: test_broken_inputs."""

from __future__ import annotations

import csv
import hashlib
import io
import json
from pathlib import Path
from typing import Any

import pytest
from local_data import a_recipe, jsonl, numbered

from empg_lite.core.cells import last_boxed
from empg_lite.core.errors import DataError, MissingInput
from empg_lite.core.rationale import Problem
from empg_lite.data.sources import load_problems, load_splits
from empg_lite.recipe.schema import DataSection


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
def test_gold_extraction(row: dict[str, Any], gold: str, tmp_path: Path) -> None:
    problem = load_one(tmp_path, row)
    assert (problem.question, problem.gold) == ("q", gold)


def test_columns_named_in_the_recipe_win(tmp_path: Path) -> None:
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


# --- where the files are --------------------------------------------------------------------------


@pytest.mark.usefixtures("no_hub")
def test_a_folder_replaces_the_hub(tmp_path: Path) -> None:
    jsonl(tmp_path / "gsm8k_train.jsonl", numbered(20))
    jsonl(tmp_path / "gsm8k_test.jsonl", numbered(3, 100))
    data = DataSection(source="gsm8k", path=str(tmp_path))
    assert len(load_problems(data, "train")) == 20 and len(load_problems(data, "test")) == 3
    jsonl(tmp_path / "train.jsonl", numbered(4))  # the plain name takes precedence
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


@pytest.mark.parametrize("broken", ["path", "eval_path"])
def test_missing_files(broken: str, tmp_path: Path) -> None:
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
def test_hub_datasets_are_requested(
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


def test_a_missing_dataset_error_says_what_to_do() -> None:
    """The real ``datasets``, offline (conftest)."""
    with pytest.raises(
        MissingInput, match=r"empg-lite/no-such-set cannot be loaded.*set data\.path"
    ) as caught:
        load_problems(DataSection(source="empg-lite/no-such-set"), "train")
    assert "\n" not in str(caught.value)


# --- published data -------------------------------------------------------------------------------


@pytest.mark.shared
def test_math_golds_agree_with_those_of_math_500(shared: Path) -> None:
    """MATH-500 comes with independently extracted answers."""
    rows = [json.loads(line) for line in (shared / "math500_test.jsonl").read_text("utf-8").splitlines()]
    golds = {p.question: p.gold for p in load_problems(DataSection(source="math", path=str(shared)), "test")}
    assert [row["answer"] for row in rows] == [golds[row["problem"].strip()] for row in rows]
    assert len(rows) == 500


@pytest.mark.parametrize(
    ("reward", "answer", "said"),
    [
        ("choice", "Z", "is neither a letter A-J nor an option"),
        ("choice * concise:600", "12", "is neither a letter A-J nor an option"),
        ("gsm8k", "?", "the gsm8k reward reads no answer in '?'"),
        ("math", r"\frac{1}{", "its braces do not match"),
        ("math", "We count them and see that 14 are left", "'14' only stands in it; write the answer alone"),
        ("math", "#### Step 1: add\nwe get 5 and 9\n#### Step 2: conclude", "write the answer alone"),
        ("gsm8k", "#### Step 1: add\nwe get 5 and 9\n#### Step 2: conclude", "write the answer alone"),
    ],
)
def test_an_unreadable_gold_is_an_error_naming_its_line(
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
    assert "also unusable: lines 5" in str(raised.value)  # all of them in one error
    kept = load_problems(data.model_copy(update={"skip_bad_rows": True}), "train")
    assert [p.question for p in kept] == ["a?"]


@pytest.mark.parametrize(
    ("reward", "gold"),
    [
        ("gsm8k", "1,234"),
        ("gsm8k", "$5.00"),
        ("gsm8k", "-0.5"),
        ("gsm8k", "1/2"),
        ("gsm8k", "purple"),  # a word after #### is read and compared
        ("math", r"\text{purple}"),
        ("math", "The answer is 14."),
        ("math", "the days between one new moon and the next"),  # words are compared as words
        ("gsm8k", "He has 14 left."),
        ("math", "purple"),
        ("math", r"\begin{pmatrix} 1 \\ 2 \end{pmatrix}"),
        ("math", "x \\in [0, \\infty)"),
        ("exact", "anything at all"),
        ("choice", "(c)"),
        ("regex:colour (.*)", "purple"),
        (None, "purple"),
    ],
)
def test_readable_golds_are_accepted(reward: str | None, gold: str, tmp_path: Path) -> None:
    path = jsonl(tmp_path / "d.jsonl", [{"question": "Which? (A) 1 (B) 2 (C) 3", "answer": gold}])
    data = DataSection(
        source="local", path=path, eval_path=jsonl(tmp_path / "e.jsonl", numbered(1)), reward=reward
    )
    assert [p.gold for p in load_problems(data, "train")] == [gold]


@pytest.mark.shared
@pytest.mark.parametrize(("source", "reward"), [("gsm8k", "gsm8k"), ("math", "math")])
def test_every_published_gold_is_accepted(source: str, reward: str, shared: Path) -> None:
    for split in ("train", "test"):
        plain = DataSection(source=source, path=str(shared))
        assert load_problems(plain.model_copy(update={"reward": reward}), split) == load_problems(
            plain, split
        )
