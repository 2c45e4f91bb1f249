"""The registry of export formats: adding one touches its own file and one line."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from stored_runs import make_run

from empg_lite.core.errors import UsageError
from empg_lite.run.target import resolve_target
from empg_lite.tools.export import FORMATS, export

PACKAGE = Path(__file__).parents[2] / "empg_lite"
TOY = """
from empg_lite.run import store
from empg_lite.run.rollouts import read_rollouts


def export(target, out, grader, view=None, *, case="lower"):
    rows = [r for s in read_rollouts(target.run / "rollouts" / "step-000001.jsonl") for r in s.rationales]
    text = "".join(r.question + "\\n" for r in rows)
    store.write_file(out, text.upper() if case == "upper" else text)
    return {"export": str(out), "lines": len(rows)}
"""
LINE = """    "toy": Format(
        "toy", "questions", {"case": Option("of the letters", "lower", ("lower", "upper"))}, "q.txt", False
    ),
"""


@pytest.fixture
def run(tmp_path: Path) -> Path:
    folder = make_run(tmp_path / "run", steps=1)
    (folder / "adapter").mkdir()
    return folder


def test_a_new_format_is_one_file_and_one_line(tmp_path: Path, run: Path) -> None:
    shutil.copytree(PACKAGE, tmp_path / "empg_lite", ignore=shutil.ignore_patterns("__pycache__", "tiny"))
    folder = tmp_path / "empg_lite" / "tools" / "export"
    (folder / "toy.py").write_text(TOY, "utf-8")
    registry = (folder / "__init__.py").read_text("utf-8")
    head = "FORMATS: dict[str, Format] = {\n"
    assert head in registry
    (folder / "__init__.py").write_text(registry.replace(head, head + LINE), "utf-8")

    def python(*words: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run([sys.executable, *words], cwd=tmp_path, capture_output=True, text=True)

    done = python("-m", "empg_lite", "export", str(run), "--to", "toy", "--case", "upper", "--json")
    assert done.returncode == 0, done.stderr
    out = run / "export" / "q.txt"
    assert json.loads(done.stdout) == {"export": str(out), "lines": 16}
    assert out.read_text("utf-8").startswith("PROBLEM 0 OF STEP 1?\n")
    code = "from empg_lite import api; print(api.export_run('run', 'toy', 'a.txt')['lines'])"
    done = python("-c", code)
    assert done.stdout == "16\n", done.stderr
    assert (tmp_path / "a.txt").read_text("utf-8").startswith("Problem 0")
    done = python("-m", "empg_lite", "export", str(run), "--to", "toy", "--case", "odd")
    assert done.returncode == 2 and "lower" in done.stderr


@pytest.mark.parametrize(
    ("to", "options", "message"),
    [
        ("onnx", {}, "unknown export format 'onnx' · --to · one of adapter, merged, gguf, hub, sft-dataset"),
        ("merged", {"dtype": "int3"}, "unknown value 'int3' · --dtype · one of auto, float32"),
        ("gguf", {"kind": "q4"}, "unknown value 'q4' · --gguf-type · one of f16"),
        (
            "gguf",
            {"dtype": "float32"},
            "--dtype is not an option of this format · --to gguf · it has --gguf-type",
        ),
        ("adapter", {"kind": "f16"}, "--gguf-type is not .* it has no options"),
        ("hub", {}, "a required option is missing · --to hub · add --repo OWNER/NAME"),
    ],
)
def test_options_are_checked_before_anything_is_loaded(
    run: Path, to: str, options: dict[str, str], message: str
) -> None:
    with pytest.raises(UsageError, match=message):
        export(resolve_target(str(run)), to, **options)
    assert not (run / "export").exists()


def test_every_format_has_its_file() -> None:
    for form in FORMATS.values():
        assert "def export(" in (PACKAGE / "tools" / "export" / f"{form.module}.py").read_text("utf-8")
