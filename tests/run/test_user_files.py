"""Files as users and other tools have them: read as they are, or refused in one line; nothing is lost."""

from __future__ import annotations

import datetime
import gzip
import json
from collections.abc import Callable
from decimal import Decimal
from pathlib import Path
from typing import Any

import pytest
from broken_inputs import parquet
from local_data import a_recipe

from empg_lite.core.errors import DataError, EmpgError
from empg_lite.data.rows import Loaded, read_problems
from empg_lite.data.sources import load_splits
from empg_lite.policy.templates import load_template
from empg_lite.run.rollouts import read_rollouts
from empg_lite.tools.rescore import score_file

Cli = Callable[..., tuple[int, str, str]]
MARK = b"\xef\xbb\xbf"
ASKED = [{"role": "user", "content": "What is 2 + 3?"}]
TOLD = [{"role": "system", "content": "Be brief."}, *ASKED]
SAID = [{"role": "assistant", "content": "It is \\boxed{5}."}]
CHAT = [*ASKED, *SAID]
PARTS = [
    {"role": "user", "content": [{"type": "text", "text": "What is"}, {"type": "text", "text": " 2 + 3?"}]}
]
PLAIN = {"question": "What is 2 + 3?", "answer": "5"}
PLAIN_MATH = {"problem": "What is 2 + 3?", "answer": 5}
SHARE = [{"from": "human", "value": "What is 2 + 3?"}, {"from": "gpt", "value": "It is \\boxed{5}."}]
NESTED = {"prompt": ASKED, "reward_model": {"style": "rule", "ground_truth": "5"}, "extra_info": {"index": 3}}


def lines(*rows: dict[str, Any]) -> bytes:
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode()


# --- training data --------------------------------------------------------------------------------

#: Name of the file -> its content. Each is the one problem "What is 2 + 3?", gold 5.
READ: dict[str, bytes] = {
    "chat.jsonl": lines({"prompt": ASKED, "answer": "5"}),
    "chat-with-a-system-message.jsonl": lines({"prompt": TOLD, "answer": "5"}),
    "chat-in-parts.jsonl": lines({"prompt": PARTS, "answer": "5"}),
    "chat-with-its-answer.jsonl": lines({"messages": CHAT}),
    "chat-and-answer.jsonl": lines({"messages": ASKED, "answer": 5}),
    "chat.parquet": parquet({"prompt": [ASKED], "answer": ["5"]}),
    "nested.jsonl": lines(NESTED),
    "nested.parquet": parquet({name: [value] for name, value in NESTED.items()}),
    "null-before-a-value.jsonl": lines(
        {"question": None, "problem": "What is 2 + 3?", "gold": None, "answer": 5}
    ),
    "formula.jsonl": lines({"problem": "What is 2 + 3?", "solution": "$5$"}),
    "UPPER.JSONL": lines(PLAIN),
    "packed.jsonl.gz": gzip.compress(lines(PLAIN)),
    "packed.csv.gz": gzip.compress(b"question,answer\nWhat is 2 + 3?,5\n"),
    "lines.json": lines(PLAIN),
    "list.jsonl": b"[" + lines(PLAIN).strip() + b"]",
    "mark.jsonl": MARK + lines(PLAIN),
    "mark.json": MARK + b"[" + lines(PLAIN) + b"]",
    "mark.csv": MARK + b"question;answer\r\nWhat is 2 + 3?;5\r\n",
    "semicolons.csv": b'question;answer;note\n"What is 2 + 3?";5;"a, b"\n',
    "tabs.csv": b"question\tanswer\nWhat is 2 + 3?\t5\n",
    "tabs.tsv": b"question\tanswer\nWhat is 2 + 3?\t5\n",
    "decimals.parquet": parquet({"question": ["What is 2 + 3?"], "answer": [Decimal("5.00")]}),
    "noise.jsonl": lines(PLAIN | {"answer": 5.000000000000000}),
    "from-and-value.jsonl": lines({"conversations": SHARE}),
    "from-and-value.parquet": parquet({"conversations": [SHARE]}),
    "one-chat.json": lines({"messages": CHAT}),
    "ground-truth.jsonl": lines({"prompt": "What is 2 + 3?", "ground_truth": "5", "data_source": "x"}),
    "other-scripts.json": json.dumps([{"messages": CHAT, "其他字段": "é"}], ensure_ascii=False).encode(),
    "shards.parquet": parquet(
        {"images": [[]], "problem": ["What is 2 + 3?"], "answer": ["5"], "choices": [None]}
    ),
    "windows.jsonl": lines(PLAIN).replace(b"\n", b"\r\n"),
}

#: Name of the file -> its content and what the one line about it says.
NOT_READ: dict[str, tuple[bytes, str]] = {
    "broken-line.jsonl": (lines(PLAIN) + b'{"question": "x", answer: 2}\n', r":2 · repair the row"),
    "over-lines.jsonl": (json.dumps(PLAIN, indent=1).encode(), r":1 · repair the row"),
    "python.jsonl": (b"{'question': 'q', 'answer': '1'}\n", r":1 · repair the row"),
    "two-on-a-line.jsonl": (lines(PLAIN).strip() * 2 + b"\n", r":1 · repair the row"),
    "trailing-comma.json": (b"[\n" + lines(PLAIN).strip() + b",\n]", r":3 · repair the list there"),
    "under-a-name.json": (json.dumps({"data": [PLAIN]}).encode(), "write the list under 'data' alone"),
    "cells-under-names.json": (b'{"question": ["q"], "answer": ["1"]}', "write a list of rows"),
    "lists.json": (json.dumps([SHARE]).encode(), "a row is an object of columns"),
    "list-as-answer.jsonl": (lines(PLAIN | {"answer": ["5"]}), "the answer is a list.*write it as text"),
    "truth-as-answer.jsonl": (lines(PLAIN | {"answer": True}), "true or false"),
    "no-answer.jsonl": (lines({"prompt": "q", "chosen": "5"}), "columns here: 'prompt', 'chosen'"),
    "alpaca.json": (b'[{"instruction": "q", "input": "", "output": "5"}]', "set data.question_column"),
    "utf-16.csv": ("question,answer\nq,5\n".encode("utf-16"), ":1 · save the file as UTF-8"),
    "latin-1.csv": ("question,answer\né,5\n".encode("latin-1"), ":2 · save the file as UTF-8"),
    "unmarked-chat.jsonl": (
        lines({"conversations": [*SHARE[:1], {"from": "gpt", "value": "5"}]}),
        "mark the",
    ),
}


def load(path: Path, **columns: str) -> Loaded:
    return read_problems(a_recipe(source="local", path=str(path), **columns).data, "train", str(path))


@pytest.mark.parametrize("name", READ)
def test_files_of_other_tools_are_read(name: str, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(READ[name])
    loaded = read_problems(
        a_recipe(source="local", path=str(tmp_path / name)).data, "train", str(tmp_path / name)
    )
    (problem,) = loaded.problems
    assert (problem.question, problem.gold) == ("What is 2 + 3?", "5")
    said = {"semicolons.csv": "semicolons", "mark.csv": "semicolons", "tabs.csv": "tabs"}
    said["chat-with-a-system-message.jsonl"] = "1 questions of train come with a system message, left out"
    assert len(loaded.notes) == (name in said) and said.get(name, "") in "".join(loaded.notes)


@pytest.mark.parametrize("name", NOT_READ)
def test_what_cannot_be_read_is_said_in_one_line(name: str, tmp_path: Path) -> None:
    content, said = NOT_READ[name]
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=said) as refused:
        load(tmp_path / name)
    assert name in str(refused.value) and "\n" not in str(refused.value)


def test_rows_need_not_have_the_same_columns(tmp_path: Path) -> None:
    rows = [{"question": "a", "answer": "1"}, {"question": "b", "answer": "2", "level": 3, "x": {"k": None}}]
    (tmp_path / "a.jsonl").write_bytes(lines(*rows))
    assert [dict(p.meta) for p in load(tmp_path / "a.jsonl").problems] == [
        {},
        {"level": "Level 3", "x": {"k": None}},
    ]


@pytest.mark.parametrize(
    ("value", "gold"),
    [
        (1.4000000000000001, "1.4"),
        (0.30000000000000004, "0.3"),
        (0.10000000149011612, "0.1"),  # 0.1 in single precision
        (0.000244140625, "0.000244140625"),  # a power of 2 that ends: no noise
        (1 / 3, "0.3333333333333333"),
        (1e-7, "0.0000001"),
        (Decimal("3.50"), "3.5"),
        (Decimal("-0.10"), "-0.1"),
        (10**30, "1" + "0" * 30),
    ],
)
def test_numbers_are_golds_as_people_write_them(value: Any, gold: str) -> None:
    from empg_lite.core.cells import gold_text

    assert gold_text(value, "answer", "f:1") == gold


def test_a_snapshot_of_the_hub_is_a_folder_of_shards(tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    for shard in range(2):
        table = {"question": [f"q{shard}{n}" for n in range(3)], "answer": [f"{n}" for n in range(3)]}
        (tmp_path / "data" / f"train-0000{shard}-of-00002.parquet").write_bytes(parquet(table))
    (tmp_path / "data" / "validation-00000-of-00001-a09b74b3ef9c3b56.parquet").write_bytes(parquet(table))
    (tmp_path / "README.md").write_text("# A card")
    found = load_splits(a_recipe(source="local", path=str(tmp_path), eval_split="validation", validation=0))
    assert [p.question for p in found.train] == ["q00", "q01", "q02"] and len(found.evaluation) == 3
    with pytest.raises(EmpgError, match=r"no file for split 'test'.*data\.eval_split.*: train, validation"):
        load_splits(a_recipe(source="local", path=str(tmp_path)))
    (tmp_path / "data" / "train-00001-of-00002.parquet").unlink()
    with pytest.raises(DataError, match="shard 00001 of 00002 is missing"):
        load_splits(a_recipe(source="local", path=str(tmp_path), eval_split="validation"))


def test_a_note_is_said_once_for_both_splits(tmp_path: Path) -> None:
    """By ``check`` and at the start of a run: both show the notes of the splits."""
    rows = "".join(f"q{n};{n}\n" for n in range(20))
    for name in ("train.csv", "test.csv"):
        (tmp_path / name).write_text("question;answer\n" + rows.replace("q", name[:2]))
    notes = load_splits(a_recipe(source="local", path=str(tmp_path))).notes
    assert notes == tuple(f"{name}: semicolons separate its columns" for name in ("train.csv", "test.csv"))
    (tmp_path / "one.csv").write_text("question;answer\n" + rows)
    assert len(load_splits(a_recipe(source="local", path=str(tmp_path / "one.csv"))).notes) == 1


def test_other_columns_reach_the_users_reward_as_json(tmp_path: Path) -> None:
    when = datetime.date(2026, 1, 31)
    table = {"question": ["q"], "answer": ["1"], "price": [Decimal("1.50")], "day": [when], "image": [b"\0"]}
    (tmp_path / "a.parquet").write_bytes(parquet(table))
    (problem,) = read_problems(
        a_recipe(source="local", path="x").data, "train", str(tmp_path / "a.parquet")
    ).problems
    assert problem.meta == {"price": "1.50", "day": "2026-01-31"}


def test_a_dotted_column_of_that_very_name_comes_first(tmp_path: Path) -> None:
    row = {"task": {"text": "q"}, "label.value": "7", "label": {"value": "8", "other": 1}}
    (tmp_path / "a.jsonl").write_bytes(lines(row))
    found = load(tmp_path / "a.jsonl", question_column="task.text", answer_column="label.value")
    (problem,) = found.problems
    assert (problem.question, problem.gold) == ("q", "7")


def test_a_template_may_begin_with_a_byte_order_mark(tmp_path: Path) -> None:
    for name, text in (("t.txt", "Q: {question}"), ("t.yaml", "text: 'Q: {question}'\n")):
        (tmp_path / name).write_bytes(MARK + text.encode())
        assert load_template(str(tmp_path / name)).text == "Q: {question}"


# --- rollout files --------------------------------------------------------------------------------

ROW = b'{"question": "q", "completion": "5", %s}\n'
RIGHT = {"question": "What is 2 + 3?", "completion": "It is \\boxed{5}."}
ANSWERED = RIGHT | {"answer": "5"}
#: Rows that ``score`` grades as right.
GRADED: dict[str, bytes] = {
    "as-the-field-has-it": lines({"id": 17, "source": "x", **RIGHT, "answer": "5"}),
    "keys-in-any-order": lines({"answer": "5", "z": 1, **RIGHT, "a": {"b": [1, None, 2.5]}}),
    "a-number": lines({**RIGHT, "answer": 5}),
    "gold-as-a-number": lines({**RIGHT, "gold": 5.0, "problem_id": "p1"}),
    "an-empty-gold-and-an-answer": lines({**RIGHT, "gold": "", "answer": "5"}),
    "a-null-gold-and-an-answer": lines({**RIGHT, "gold": None, "answer": "5"}),
    "a-worked-solution": lines({**RIGHT, "solution": "2 + 3 is \\boxed{5}."}),
    "an-answer-behind-hashes": lines({**RIGHT, "answer": "2 + 3 = 5\n#### 5"}),
    "nested": lines({**RIGHT, "reward_model": {"ground_truth": "5"}}),
    "chat": lines({"prompt": TOLD, "completion": SAID, "answer": "5"}),
    "messages": lines({"messages": TOLD, "completion": "\\boxed{5}", "answer": "5"}),
    "problem": lines({"problem": "What is 2 + 3?", "completion": "\\boxed{5}", "answer": "5"}),
    "mark": MARK + lines(ANSWERED),
    "no-last-line-break": lines(ANSWERED).strip(),
    "windows": lines(ANSWERED).replace(b"\n", b"\r\n"),
    "blank-lines": b"\n" + lines(ANSWERED) + b"\n\n",
    "other-scripts": lines({**ANSWERED, "作者": "é ½ \u2028", "emoji": "✅"}),
    "a-format-of-their-own": lines({**ANSWERED, "format": "boxed", "version": 3}),
    "their-weight": lines({**ANSWERED, "weight": 2.5}),
    "long-numbers": lines({**ANSWERED, "n": 2**80, "x": 0.1 + 0.2, "tiny": 5e-324}),
    "nan": lines({**ANSWERED, "x": float("nan")}),
    "ground-truth": lines({**RIGHT, "ground_truth": "5", "data_source": "x", "ability": None}),
    "a-chat-with-its-answer": lines({"conversations": SHARE, "completion": "\\boxed{5}", "source": "x"}),
    "ascii": b'{"\\u4f5c": "\\u00e9", "completion": "\\\\boxed{5}", "question": "q", "answer": "5"}\n',
    "empty-values": lines({**ANSWERED, "a": "", "b": [], "c": {}, "d": None, "e": False}),
    "many-columns": lines({f"column {n}": n for n in range(200)} | ANSWERED),
    "many-rows": lines(*({**ANSWERED, "id": n} for n in range(50))),
    "scored-elsewhere": lines({**ANSWERED, "score": 0.3, "advantage": -1, "logprobs": [-0.1, -2e-9]}),
}


def rows_of(path: Path) -> list[dict[str, Any]]:
    """The rows, keys in order; a NaN as its name, so that it equals itself."""
    text = path.read_bytes().decode("utf-8-sig")
    rows = [json.loads(line, parse_constant=str) for line in text.split("\n") if line.strip()]
    return [row for row in rows if "completion" in row]


@pytest.mark.parametrize("name", GRADED)
def test_score_changes_what_a_verdict_says_and_nothing_else(name: str, tmp_path: Path) -> None:
    file = tmp_path / "my rows.jsonl"
    file.write_bytes(GRADED[name])
    before = rows_of(file)
    assert score_file(file, "math")["reasons"] == {"equal": len(before)}
    verdict = {"reward": 1.0, "reason": "equal", "extracted": "5", "rule": "boxed", "terms": {}}
    assert [list(row.items()) for row in rows_of(file)] == [list((row | verdict).items()) for row in before]
    once = file.read_bytes()
    assert ("作者" in once.decode()) == (name == "other-scripts"), "what was readable stays so"
    score_file(file, None)  # the header names the reward now
    assert file.read_bytes() == once


#: Rows that ``score`` refuses: one line that says what to do, and never to give up a row.
REFUSED: dict[str, tuple[bytes, str]] = {
    "no-gold": (lines(RIGHT), ":1 · write the right answer under `gold`"),
    "some-without": (lines(ANSWERED, RIGHT, {**RIGHT, "answer": ""}), ":2 · .*also unusable: lines 3"),
    "prose": (lines({**RIGHT, "solution": "It is five."}), ":1: solution · mark the answer"),
    "an-empty-box": (lines({**RIGHT, "solution": "\\boxed{}"}), ":1: solution · write the right answer"),
    "a-list": (lines({**RIGHT, "answer": ["5"]}), ":1: answer · write it as text"),
    "no-completion": (lines({"question": "q", "response": "5"}), "columns here: 'question', 'response'"),
    "a-key-twice": (ROW % b'"gold": "5", "gold": "6"', "key 'gold' is there twice"),
    "a-number-out-of-range": (ROW % b'"gold": "5", "x": 1e999', "out of range"),
    "a-list-of-rows": (b"[\n" + lines(ANSWERED) + b"]\n", "one object on one line"),
    "another-meaning": (lines({**ANSWERED, "step": "first"}), ":1: step · .*rename a column"),
    "two-turns": (lines({"prompt": [*CHAT, *ASKED], "completion": "5"}), "a conversation of 3 turns"),
    "packed": (gzip.compress(lines(ANSWERED), mtime=0), "not UTF-8"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_score_refuses_in_one_line_and_leaves_the_file(name: str, cli: Cli, tmp_path: Path) -> None:
    file = tmp_path / "rows.jsonl"
    content, said = REFUSED[name]
    file.write_bytes(content)
    code, _, err = cli("score", file, "--reward", "math")
    (line,) = err.strip().splitlines()
    assert code == 65 and "rows.jsonl" in line
    with pytest.raises(DataError, match=said):
        score_file(file, "math")
    assert "remove" not in line and "delete" not in line
    assert file.read_bytes() == content


def test_a_reward_that_needs_no_gold_answer_grades_without_one(tmp_path: Path) -> None:
    file = tmp_path / "rows.jsonl"
    file.write_bytes(lines(RIGHT))
    assert score_file(file, "regex:boxed")["reward"] == 1.0


def test_unreadable_golds_are_counted_aloud(tmp_path: Path, cli: Cli) -> None:
    file = tmp_path / "rows.jsonl"
    file.write_bytes(lines({**RIGHT, "answer": "zz"}, {**RIGHT, "answer": "C"}))
    code, out, _ = cli("score", file, "--reward", "choice")
    assert code == 0 and "1 gold answers cannot be read, such as 'zz'" in out


def test_their_columns_are_meta_to_everyone_else(tmp_path: Path) -> None:
    """So a function gets them, and the rows that ``fit`` keeps in its RUN have them still."""
    file = tmp_path / "rows.jsonl"
    file.write_bytes(lines({**ANSWERED, "id": 17, "meta": {"level": 3}}))
    (row,) = read_rollouts(file)[0].rationales
    assert (row.gold, dict(row.meta)) == ("5", {"answer": "5", "id": 17, "level": 3})


# --- every command --------------------------------------------------------------------------------


def contents(folder: Path) -> dict[str, bytes]:
    return {str(file.relative_to(folder)): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


def test_there_are_forty_files_of_each_kind() -> None:
    assert len(READ) + len(NOT_READ) >= 40 and len(GRADED) + len(REFUSED) >= 40


def checked(cli: Cli, recipe: Path, folder: Path, files: dict[str, bytes], refused: bool) -> None:
    """``check`` reads each file or refuses it in one line, and leaves the folder as it was."""
    evaluation = folder / "test.jsonl"
    evaluation.write_bytes(lines({"question": "What is 3 + 3?", "answer": "6"}))
    for name, content in files.items():
        (folder / name).write_bytes(content)
    before = contents(folder)
    for name in files:
        data = ("--set", "data.source=local", "--set", f"data.path={folder / name}")
        whole = ("--set", "data.validation=0", "--set", f"data.eval_path={evaluation}")
        code, _, err = cli("check", "--recipe", recipe, *data, *whole, "--set", "data.reward=math", "--json")
        assert (code == 65 and err.count("\n") == 1 and name in err) if refused else code in (0, 1), (
            name,
            err,
        )
    assert contents(folder) == before


def test_check_leaves_files_as_they_are(cli: Cli, recipe_file: Path, tmp_path: Path) -> None:
    """Two of the forty; the slow set takes all."""
    (tmp_path / "theirs").mkdir()
    checked(
        cli,
        recipe_file,
        tmp_path / "theirs",
        {name: READ[name] for name in ("nested.parquet",)},
        False,
    )
    checked(
        cli, recipe_file, tmp_path / "theirs", {"under-a-name.json": NOT_READ["under-a-name.json"][0]}, True
    )


@pytest.mark.slow
def test_check_leaves_all_files_as_they_are(cli: Cli, recipe_file: Path, tmp_path: Path) -> None:
    (tmp_path / "theirs").mkdir()
    checked(cli, recipe_file, tmp_path / "theirs", READ, False)
    checked(
        cli,
        recipe_file,
        tmp_path / "theirs",
        {name: content for name, (content, _) in NOT_READ.items()},
        True,
    )


@pytest.mark.slow
def test_other_commands_leave_files_as_they_are(cli: Cli, recipe_file: Path, tmp_path: Path) -> None:
    """What ``score`` graded is fitted, graded again, listed and evaluated: no key of any row changes."""
    theirs = tmp_path / "theirs"
    theirs.mkdir()
    for name, content in GRADED.items():
        (theirs / f"{name}.jsonl").write_bytes(content)
        assert cli("score", theirs / f"{name}.jsonl", "--reward", "math")[0] == 0
    rows = {file: rows_of(file) for file in theirs.iterdir()}
    before = contents(theirs)
    changes = ("--set", "run.eval_every=0", "--set", "data.reward=math", "--set", "data.prompt=plain")
    run = tmp_path / "run"
    code, _, err = cli("fit", *rows, "--recipe", recipe_file, *changes, "--output-dir", run, "--force")
    assert code == 0, err
    kept = {
        (r.completion, json.dumps(dict(r.meta), sort_keys=True))
        for file in sorted((run / "rollouts").iterdir())
        for part in read_rollouts(file)
        for r in part.rationales
    }
    assert len(kept) > 20 and any('"many"' in meta or '"column 7": 7' in meta for _, meta in kept)
    for row in (row for some in rows.values() for row in some):
        cases = tmp_path / "cases.jsonl"
        cases.write_bytes(lines({**row, "gold": "5", "prediction": "\\boxed{5}"}))
        assert cli("grade", "--cases", cases)[0] == 0
    assert cli("eval", run, "--limit", 1, "--out", theirs)[0] == 0
    (answers,) = theirs.glob("*/greedy.jsonl")
    assert {name: content for name, content in contents(theirs).items() if "/" not in name} == before
    answers.write_bytes(GRADED["windows"])
    code, _, err = cli("eval", run, "--limit", 1, "--out", theirs)
    assert code and err.count("\n") == 1 and answers.read_bytes() == GRADED["windows"], err
    assert {file: rows_of(file) for file in rows} == rows
