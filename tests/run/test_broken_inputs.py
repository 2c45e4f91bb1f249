"""Broken recipes and data files: one line with file, line and field, code 65, fast and without torch."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from random import Random
from typing import Any

import pytest
from broken_inputs import BROKEN, DATA, HEAD, RECIPES, ROWS, Files, data, parquet, run_case, write_case

from empg_lite.core.errors import EmpgError
from empg_lite.data.sources import load_splits
from empg_lite.recipe.file import load_recipe

BY_NAME: dict[str, Any] = {"argvalues": [case[1:] for case in BROKEN], "ids": [case[0] for case in BROKEN]}


@pytest.mark.parametrize(("files", "overrides", "fragments"), **BY_NAME)
def test_one_line_names_file_line_and_field(
    files: Files,
    overrides: Sequence[str],
    fragments: Sequence[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    message = run_case(tmp_path, files, overrides)
    assert message.isprintable(), "one line, no control characters"
    assert len(message) < 600
    assert not [fragment for fragment in fragments if fragment not in message], message


def test_enough_cases_and_valid_files_pass(tmp_path: Path) -> None:
    assert len(RECIPES) >= 30 and len(DATA) >= 30
    assert len({case[0] for case in BROKEN}) == len(BROKEN)
    splits = load_splits(load_recipe(str(write_case(tmp_path, {}))))
    assert (len(splits.train), len(splits.validation), len(splits.evaluation)) == (17, 1, 2)


TOKENS = (*b"{}[]:,-&*!#|>?%@`~'\"\n\r\t\0\x07\xff", b"1e999", b"- ", b"\xe2\x80\xa8", b"---\n", b"\\ud800")


def damage(content: bytes, rng: Random) -> bytes:
    """A few insertions, deletions and repetitions."""
    damaged = bytearray(content)
    for _ in range(rng.randint(1, 4)):
        at, other = rng.randrange(len(damaged) + 1), rng.randrange(len(damaged) + 1)
        token = rng.choice(TOKENS)
        change = (token if isinstance(token, bytes) else bytes([token]), b"", damaged[other : other + 20])
        damaged[at : at + rng.choice((0, 0, 1, 8))] = rng.choice(change)
    return bytes(damaged)


@pytest.mark.parametrize("name", ["recipe.yaml", "rows.jsonl", "rows.json", "rows.csv", "rows.parquet"])
def test_damaged_files_pass_or_end_in_one_line(name: str, tmp_path: Path) -> None:
    table = [{"question": f"é {i}?", "answer": f"{i}"} for i in range(20)]
    whole = {
        "recipe.yaml": HEAD.encode() + b"run:\n  steps: 3  # few\n",
        "rows.jsonl": ROWS.encode(),
        "rows.json": json.dumps(table, indent=1).encode(),
        "rows.csv": (
            "question,answer\n" + "".join(f'"{row["question"]}",{row["answer"]}\n' for row in table)
        ).encode(),
        "rows.parquet": parquet({key: [row[key] for row in table] for key in table[0]}),
    }[name]
    rng, ends = Random(0), {"passed": 0, "refused": 0}
    for _ in range(150):
        path = write_case(
            tmp_path, data(name, damage(whole, rng)) if "rows" in name else {name: damage(whole, rng)}
        )
        try:
            load_splits(load_recipe(str(path)))
            ends["passed"] += 1
        except EmpgError as error:
            assert error.exit_code in (65, 66) and not set(str(error)) & set("\n\r\x07\0\u2028"), error
            ends["refused"] += 1
    assert ends["refused"] > 30, ends


def test_no_case_needs_torch(tmp_path: Path) -> None:
    """All cases in one fresh interpreter."""
    code = """if True:
        import json, os, pathlib, sys
        from broken_inputs import BROKEN, run_case
        for name, files, overrides, _ in BROKEN:
            folder = pathlib.Path(sys.argv[1], name)
            folder.mkdir()
            os.chdir(folder)
            run_case(folder, files, overrides)
        print(json.dumps(sorted({"torch", "transformers", "datasets", "peft"} & sys.modules.keys())))
    """
    root = Path(__file__).parents[2]
    result = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path)],
        capture_output=True,
        text=True,
        env={"PYTHONPATH": f"{root}:{root / 'tests' / 'support'}", "PATH": ""},
        timeout=120,
    )
    assert result.returncode == 0, result.stderr
    assert json.loads(result.stdout) == []
