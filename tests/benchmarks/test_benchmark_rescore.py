"""The scoring benchmark makes what it says, and scores it as it was made."""

from __future__ import annotations

import importlib
import json
import subprocess
import sys
from pathlib import Path

import pytest

FOLDER = Path(__file__).parents[2] / "benchmarks"


def test_made_rationales_are_what_is_promised(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(FOLDER))
    rescore = importlib.import_module("rescore")
    rows, right = rescore.rationales(800)
    assert len(rows) == 800 and len({r.problem_id for r in rows}) == 100
    boxed = [r for r in rows if "boxed" in r.completion]
    assert 0.4 < right / 800 < 0.6 and right < len(boxed) < 720
    assert 0.05 < sum(r.finish_reason == "length" for r in rows) / 800 < 0.15
    words = [len(r.completion.partition(" The answer is")[0].split()) for r in rows]
    assert min(words) >= 99 and max(words) <= 200
    assert sum("x^2" in r.gold for r in rows) == 40  # one in twenty
    assert rescore.rationales(800) == (rows, right) != rescore.rationales(800, seed=1)


def test_the_benchmark_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    command = [sys.executable, str(FOLDER / "rescore.py"), "--rationales", "320", "--json"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    assert result["rationales"] == 320 and result["reasons"]["equal"] == result["right"] > 100
    assert result["peak_rss_mb_workers"] > 10  # algebra was needed
