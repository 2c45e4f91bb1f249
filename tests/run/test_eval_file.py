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
from empg_lite.run.answers import AnswerFile
from empg_lite.run.rollouts import RolloutHeader, read_rollouts

K, PROBLEMS, ROWS = 3, 10, 7  # seven rows at once: two problems a batch
WHO = dataclasses.replace(HEADER, sampler={"batch_rows": ROWS, "temperature": 1.0})


def answers(problem: int) -> list[Rationale]:
    return [
        rationale(problem_id=f"p{problem}", sample_index=k, completion=f"\u2028{problem}\n{k}" * 20)
        for k in range(K)
    ]


def opened(path: Path | None, header: RolloutHeader = WHO, **options: bool) -> AnswerFile:
    return AnswerFile(path, header, total=K * PROBLEMS, k=K, **options)


def complete(file: AnswerFile, batches: list[tuple[int, int]] | None = None) -> None:
    for start in range(len(file.rows) // K, PROBLEMS, file.batch):
        end = min(PROBLEMS, start + file.batch)
        if batches is not None:
            batches.append((start, end))
        file.add([r for p in range(start, end) for r in answers(p)])


@pytest.fixture
def whole(tmp_path: Path) -> bytes:
    path = tmp_path / "whole.jsonl"
    complete(opened(path))
    return path.read_bytes()


def test_uninterrupted(tmp_path: Path, whole: bytes) -> None:
    file = opened(tmp_path / "whole.jsonl")
    assert file.rows == [r for p in range(PROBLEMS) for r in answers(p)] and file.batch == 2
    assert (tmp_path / "whole.jsonl").read_bytes() == whole
    in_memory = opened(None)
    complete(in_memory)
    assert in_memory.rows == file.rows


def test_cut_off_at_every_kind_of_place(tmp_path: Path, whole: bytes) -> None:
    """Cut around the end of every line and at 200 random bytes: the file is completed identically."""
    ends = [i + 1 for i, byte in enumerate(whole) if byte == 10]
    cuts = {0, 1, len(whole) - 1, len(whole), *ends, *(e - 1 for e in ends), *(e + 1 for e in ends)}
    cuts |= set(random.Random(0).sample(range(len(whole)), 200))
    path, straight = tmp_path / "cut.jsonl", {(i, i + 2) for i in range(0, PROBLEMS, 2)}
    for cut in sorted(c for c in cuts if c <= len(whole)):
        path.write_bytes(whole[:cut])
        asked: list[tuple[int, int]] = []
        complete(opened(path), asked)
        assert path.read_bytes() == whole, cut
        assert set(asked) <= straight, "in the batches of the straight evaluation"
    assert asked == [], "nothing is asked of a whole file"


def test_the_original_batch_size_is_kept(tmp_path: Path, whole: bytes) -> None:
    path = tmp_path / "cut.jsonl"
    path.write_bytes(whole[: len(whole) // 2])
    other = dataclasses.replace(WHO, sampler={**WHO.sampler, "batch_rows": 30})
    file = opened(path, other)
    assert file.batch == 2
    complete(file)
    assert path.read_bytes() == whole


def test_another_evaluations_file_is_refused_or_replaced(tmp_path: Path, whole: bytes) -> None:
    path = tmp_path / "whole.jsonl"
    other = dataclasses.replace(WHO, adapter="f" * 64)
    with pytest.raises(UsageError, match="another evaluation"):
        opened(path, other)
    assert path.read_bytes() == whole
    assert opened(path, other, replace_other=True).rows == []
    assert [s.header for s in read_rollouts(path)] == [other]


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
