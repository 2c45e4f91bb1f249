"""An evaluation interrupted anywhere finishes with the same rows when repeated."""

from __future__ import annotations

import dataclasses
import json
import random
from pathlib import Path

import pytest
from rationales import HEADER, rationale

from empg_lite.core.errors import DataError, UsageError
from empg_lite.core.rationale import Rationale
from empg_lite.run import store
from empg_lite.run.answers import AnswerFile
from empg_lite.run.rollouts import RolloutHeader, encode_rollouts, read_rollouts

K, PROBLEMS, ROWS = 3, 10, 7
NAMES = [f"p{p}" for p in range(PROBLEMS)]
WHO = dataclasses.replace(HEADER, sampler={"batch_rows": ROWS, "temperature": 1.0})


def answers(problem: int) -> list[Rationale]:
    return [
        rationale(problem_id=f"p{problem}", sample_index=k, completion=f"\u2028{problem}\n{k}" * 20)
        for k in range(K)
    ]


def opened(path: Path | None, header: RolloutHeader = WHO, **options: bool) -> AnswerFile:
    return AnswerFile(path, header, problems=NAMES, k=K, **options)


def complete(file: AnswerFile, seed: int = 0) -> list[Rationale]:
    """Add what is missing, in another order with every seed; returns it."""
    left = [
        r for p in range(PROBLEMS) for r in answers(p) if (r.problem_id, r.sample_index) not in file.answers
    ]
    random.Random(seed).shuffle(left)
    for r in left:
        file.add(r)
    return left


@pytest.fixture
def whole(tmp_path: Path) -> bytes:
    path = tmp_path / "whole.jsonl"
    complete(opened(path))
    return path.read_bytes()


def test_uninterrupted(tmp_path: Path, whole: bytes) -> None:
    """Whatever the order in which answers end; an answer that comes twice is kept once."""
    straight = [r for p in range(PROBLEMS) for r in answers(p)]
    assert whole == encode_rollouts(WHO, straight).encode()
    for seed in (1, 2):
        file = opened(tmp_path / "other.jsonl")
        assert complete(file, seed) != straight
        for r in straight:
            file.add(r)
        assert file.rows == straight and (tmp_path / "other.jsonl").read_bytes() == whole
        (tmp_path / "other.jsonl").unlink()
    in_memory = opened(None)
    complete(in_memory)
    assert in_memory.rows == straight


def test_every_answer_is_in_the_file_at_once(tmp_path: Path) -> None:
    path = tmp_path / "growing.jsonl"
    file, ended = opened(path), random.Random(3).sample([r for p in range(PROBLEMS) for r in answers(p)], 20)
    for n, r in enumerate(ended, 1):
        file.add(r)
        assert list(read_rollouts(path)[0].rationales) == ended[:n]


def test_cut_off_at_every_kind_of_place(
    tmp_path: Path, whole: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Cut around the end of every line and at random bytes: what was whole is kept, only the rest is asked
    again, and the file is completed identically."""
    monkeypatch.setattr(
        store, "_fsync", lambda fd: None
    )  # a cut knows no disk, and a busy one takes its time
    journal = tmp_path / "journal.jsonl"
    complete_but_one = opened(journal)
    for r in random.Random(4).sample([r for p in range(PROBLEMS) for r in answers(p)], K * PROBLEMS - 1):
        complete_but_one.add(r)
    path = tmp_path / "cut.jsonl"
    for content, every in ((whole, 10), (journal.read_bytes(), 4)):
        ends = [i + 1 for i, byte in enumerate(content) if byte == 10][::every]
        cuts = {0, 1, len(content) - 1, len(content), *ends, *(e - 1 for e in ends), *(e + 1 for e in ends)}
        cuts |= set(random.Random(0).sample(range(len(content)), 10))
        for cut in sorted(c for c in cuts if c <= len(content)):
            path.write_bytes(content[:cut])
            asked = complete(opened(path), cut)
            assert path.read_bytes() == whole, cut
            intact = set(content[:cut].split(b"\n")[1:]) & set(content.split(b"\n")[1:-1])
            assert len(asked) == K * PROBLEMS - len(intact), cut
    assert len(asked) == 1


def test_killed_before_the_last_step(tmp_path: Path, whole: bytes) -> None:
    """All answers are there, not yet in order, in as many bytes: opening the file puts them in order."""
    path, rows = tmp_path / "unordered.jsonl", [r for p in range(PROBLEMS) for r in answers(p)]
    path.write_text(encode_rollouts(WHO, rows[::-1]))
    assert path.stat().st_size == len(whole) and path.read_bytes() != whole
    assert complete(opened(path)) == [] and path.read_bytes() == whole


def test_the_original_batch_size_stays_in_the_header(tmp_path: Path, whole: bytes) -> None:
    path = tmp_path / "cut.jsonl"
    path.write_bytes(whole[: len(whole) // 2])
    complete(opened(path, dataclasses.replace(WHO, sampler={**WHO.sampler, "batch_rows": 30})))
    assert path.read_bytes() == whole


def test_another_evaluations_file_is_refused_or_replaced(tmp_path: Path, whole: bytes) -> None:
    path = tmp_path / "whole.jsonl"
    other = dataclasses.replace(WHO, adapter="f" * 64)
    with pytest.raises(UsageError, match="another evaluation"):
        opened(path, other)
    assert path.read_bytes() == whole
    assert opened(path, other, replace_other=True).rows == []
    assert [s.header for s in read_rollouts(path)] == [other]


def test_a_file_of_the_users_is_not_replaced(tmp_path: Path) -> None:
    path = tmp_path / "greedy.jsonl"
    for theirs in (b'{"question": "q", "completion": "5", "id": 1}\n', b'{"question": "q"', b"notes"):
        path.write_bytes(theirs)
        with pytest.raises(UsageError, match="not from an evaluation.*move it away"):
            opened(path)
        assert path.read_bytes() == theirs
    path.write_bytes(b'{"model": "te')  # what a kill leaves of a header
    assert opened(path).rows == []


def test_a_broken_line_in_the_middle_is_named(tmp_path: Path, whole: bytes) -> None:
    path = tmp_path / "broken.jsonl"
    lines = whole.split(b"\n")
    lines[4] = lines[4][:-9]
    path.write_bytes(b"\n".join(lines))
    with pytest.raises(DataError, match="broken.jsonl:5"):
        opened(path)


def test_lines_are_plain_json(whole: bytes) -> None:
    header, *rows = map(json.loads, whole.decode("ascii").splitlines())
    assert header["sampler"]["batch_rows"] == ROWS and len(rows) == K * PROBLEMS
    assert {row["problem_id"] for row in rows} == {f"p{p}" for p in range(PROBLEMS)}
