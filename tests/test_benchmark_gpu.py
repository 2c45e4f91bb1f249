"""The GPU benchmark: what it computes from its figures, and that a failure costs one row."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

FOLDER = Path(__file__).parents[1] / "benchmarks"
sys.path.insert(0, str(FOLDER))

import gpu  # noqa: E402
import gpu_work  # noqa: E402
from shapes import SHAPES, Shape  # noqa: E402

#: 2 layers, 4 hidden units, 2 heads of 2, one of them for keys and values; 10 tokens.
SMALL = Shape(hidden=4, intermediate=6, layers=2, heads=2, kv_heads=1, vocab=10)


def test_the_floor_of_decoding_by_hand() -> None:
    """A layer has 2 x 4 x 4 (q, o) + 2 x 4 x 2 (k, v) + 3 x 4 x 6 = 120 parameters, the head 40: 280."""
    assert SMALL.linear_parameters == 240 and SMALL.head_parameters == 40
    assert SMALL.cache_bytes(2) == 2 * 2 * 1 * 2 * 2 == 16
    lengths, prompt = [3, 1, 2], 5
    # Three positions with 3, 2, 1 living rows at contexts 5, 6, 7; memory is the limit.
    slow_memory = (3 * 560 + 16 * (3 * 5 + 2 * 6 + 1 * 7)) / 100.0
    assert gpu.decode_floor(SMALL, lengths, prompt, 100.0, 1e12) == pytest.approx(slow_memory)
    # Products are the limit: 2 FLOP a parameter and living row.
    assert gpu.decode_floor(SMALL, lengths, prompt, 1e12, 100.0) == pytest.approx(560 * 6 / 100.0)
    # In between, position by position: 560 bytes and more against 1680, 1120, 560 FLOP.
    mixed = max(560 + 240, 1680) + max(560 + 192, 1120) + max(560 + 112, 560)
    assert gpu.decode_floor(SMALL, lengths, prompt, 1.0, 1.0) == pytest.approx(mixed)


def test_the_work_of_an_m_step_by_hand() -> None:
    """Two problems of two rows: prompts of 5 once each, 3 + 1 + 2 + 2 completion tokens."""
    assert gpu.fit_flops(SMALL, [3, 1, 2, 2], 5, 2) == 4 * (240 * (8 + 10) + 40 * 8)


def test_the_floor_of_a_real_shape() -> None:
    """Half a billion parameters, 128 rows, 4.3 TB/s: about 0.14 s, as a spreadsheet had it."""
    lengths = gpu.draw_lengths(128, mean=180, cap=512)
    assert 0.11 < gpu.decode_floor(SHAPES["0.5B"], lengths, 150, 4.3e12, 7.8e14) < 0.18


def test_shares_of_the_floor() -> None:
    """A row as quick as the floor has all of it; one twice as slow a half. Caps and errors have none."""
    floor = {"figure": "floor", "bandwidth": 1e9, "matmul": 1e12, "device": "d", "cap_gb": None}
    row = {"figure": "decode", "rival": "empg", "shape": "tiny", "rows": 8, "cap_gb": None}
    lengths = gpu.draw_lengths(8, mean=180, cap=512)
    least = gpu.decode_floor(SHAPES["tiny"], lengths, 150, 1e9, 1e12)
    failed = {**row, "error": "x"}
    rows = [floor, {**row, "seconds": least}, {**row, "seconds": 2 * least}, failed]
    rows.append({**row, "seconds": least, "cap_gb": 8.0})
    gpu.against_floor(rows, small=False)
    assert [r.get("of_floor") for r in rows[1:]] == [pytest.approx(1.0), pytest.approx(0.5), None, None]


def test_agreement_is_against_the_plain_paths_rows_alone() -> None:
    def row(rival: str, right: float, left: float, alone: float) -> dict[str, object]:
        ways = {"right": [[right], [1.0, 1.0]], "left": [[left], [1.0, 1.0]], "alone": [[alone], [1.0, 1.0]]}
        return {"rival": rival, "figure": "logprobs", **ways}

    found = gpu.agreement([row("empg", 2.0, 2.0, 2.0), row("unsloth", 2.0, 3.5, 2.3)])
    most = {(r["path"], r["padding"]): r["most"] for r in found}
    assert most["unsloth", "left"] == 1.5 and most["unsloth", "alone"] == pytest.approx(0.3)
    assert most["unsloth", "right"] == 0.0 and {r["mean"] for r in found} >= {0.5}
    assert gpu.agreement([row("unsloth", 1.0, 1.0, 1.0)]) == []  # nothing to compare with


def test_a_process_that_dies_costs_its_own_rows(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """What it had told stays; what it had not is a row with the last line it wrote."""
    script = tmp_path / "dies.py"
    line = json.dumps({"figure": "decode", "rival": "hf", "shape": "tiny", "seconds": 1.0})
    script.write_text(
        f"import sys\nprint('noise {{')\nprint('[1]')\nprint('''{line}''')\nsys.exit('broken\\n')"
    )
    monkeypatch.setattr(gpu, "__file__", str(script))
    job = gpu_work.Job("hf", "tiny", "", ("decode", "m-step"))
    told, unheard = gpu.run(job, 60)
    assert told["seconds"] == 1.0 and unheard["figure"] == "m-step"
    assert unheard["error"] == "exit code 1: broken"
    script.write_text("import time\ntime.sleep(60)")
    assert [r["error"] for r in gpu.run(job, 0.5)] == ["stopped after 0 s: "] * 2


def test_a_figure_that_fails_is_a_row(capsys: pytest.CaptureFixture[str]) -> None:
    def breaks() -> dict[str, object]:
        raise ValueError("two\nlines")

    job = gpu_work.Job("hf", "tiny", "", ("decode",))
    gpu_work.tell(job, "decode", breaks, rows=8)
    gpu_work.tell(job, "m-step", lambda: {"seconds": 2.0})
    first, second = map(json.loads, capsys.readouterr().out.splitlines())
    assert first["error"] == "ValueError: two lines" and first["rows"] == 8
    assert second["seconds"] == 2.0 and "error" not in second


def test_jobs_are_in_order_and_out_of_time_is_said(tmp_path: Path) -> None:
    jobs = list(gpu.jobs(gpu.PARTS, ["0.5B", "1.5B"], small=False))
    assert [j.figures for j in jobs[:2]] == [("floor",), ("decode", "m-step", "step", "logprobs")]
    assert {(j.cap_gb, j.shape) for j in jobs if j.cap_gb} >= {(8.0, "3B"), (12.0, "7B"), (24.0, "7B")}
    assert not any("m-step" in j.figures for j in jobs if j.shape == "1.5B")
    rows = gpu.measure(jobs, False, 0.0, tmp_path / "out.json", {})
    assert {r["error"] for r in rows} == {"not begun: out of time"}
    assert len(rows) == sum(len(j.figures) for j in jobs)
    assert [j.figures for j in gpu.jobs(["decode"], ["0.5B"], False)] == [("decode",)] * 3


@pytest.mark.slow
def test_the_rehearsal(tmp_path: Path) -> None:
    """Every figure that needs neither a GPU nor Unsloth is measured, the others say why not."""
    out = tmp_path / "gpu.json"
    command = [sys.executable, str(FOLDER / "gpu.py"), "--rehearse", "--out", str(out)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    rows = json.loads(out.read_text())["rows"]
    measured = {(r["rival"], r["figure"]) for r in rows if "error" not in r}
    wanted = {(rival, f) for rival, able in gpu.RIVALS.items() if "unsloth" not in rival for f in able}
    assert measured >= wanted | {("device", "floor")}
    failed = [r for r in rows if "error" in r]
    assert any("GPU" in r["error"] for r in failed if r["cap_gb"])
    assert all("unsloth" in r["rival"] or r["cap_gb"] for r in failed)
    assert all(r["of_floor"] < 1 for r in rows if "of_floor" in r)
    apart = json.loads(out.read_text())["logprobs"]
    assert {r["padding"] for r in apart if r["path"] == "empg"} == {"right", "left", "alone"}
    assert all(r["most"] < 1e-4 for r in apart if r["path"] == "empg")
