"""The jobs of the GPU benchmark: their plan and limits, and what one that hangs or dies costs."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import gpu
import gpu_facts
import gpu_material
import gpu_parts
import gpu_work
import pytest
import setting
from gpu_parts import Job
from processes import alive

from empg_lite.recipe.file import load_recipe

FOLDER = Path(__file__).parents[2] / "benchmarks"


def test_the_parts_are_in_order_of_worth_and_end_within_nine_minutes() -> None:
    assert gpu_parts.PARTS == ("runs", "profile", "tests", "rates", "learn", "rivals", "caps")
    assert sum(job.limit for job in gpu_parts.JOBS) <= 540
    for small in (False, True):  # what a rehearsal prints is what a card gets
        jobs = gpu_parts.chosen(gpu_parts.PARTS, gpu_parts.RIVALS, 9.0, small)
        *parts, whole = gpu.plan_text(jobs).splitlines()
        assert [line.split()[0] for line in parts] == list(gpu_parts.PARTS)
        assert whole.split() == ["all", "540", "s"]
    order = [gpu_parts.PARTS.index(job.part) for job in gpu_parts.JOBS]
    assert order == sorted(order)
    assert {(j.cap_gb, j.shape) for j in gpu_parts.JOBS if j.cap_gb} >= {
        (8.0, "3B"),
        (12.0, "7B"),
        (24.0, "7B"),
    }
    assert all(len(range(0, j.problems[0] * j.samples)) <= 128 for j in gpu_parts.JOBS if j.part == "rivals")
    assert {j.rival for j in gpu_parts.JOBS if j.part == "runs"} == {"empg", "empg-unsloth"}


def test_limits_scale_and_parts_are_picked() -> None:
    jobs = gpu_parts.chosen(["runs", "caps"], gpu_parts.RIVALS, 4.5, False)
    whole = [j for j in gpu_parts.JOBS if j.part in ("runs", "caps")]
    assert [j.limit for j in jobs] == [j.limit / 2 for j in whole]
    assert [j.shape for j in jobs] == [j.shape for j in whole] and not any(j.small for j in jobs)
    (only,) = gpu_parts.chosen(["profile"], ["empg-unsloth"], 9, False)
    assert (only.part, only.rival) == ("profile", "empg-unsloth")
    assert all(j.small and j.cap <= 16 for j in gpu_parts.chosen(gpu_parts.PARTS, gpu_parts.RIVALS, 9, True))


def test_what_earlier_jobs_saved_is_for_later_ones_but_no_limit_is_taken_from() -> None:
    job = Job("caps", "empg", ("step",), 20.0)
    assert gpu.allowed(job, 0.0, 1.0) == 20 and gpu.allowed(job, 15.0, 1.0) == 35
    assert gpu.allowed(job, 500.0, 1.0) == 60 and gpu.allowed(replace(job, limit=50.0), 500.0, 1.0) == 100


def test_a_job_survives_its_command_line() -> None:
    for job in gpu_parts.JOBS:
        assert Job.load(job.dump()) == job


def test_the_parent_imports_no_torch() -> None:
    """It would take memory of the card and seconds of the nine minutes."""
    code = "import sys, gpu; assert 'torch' not in sys.modules and 'empg_lite' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], cwd=FOLDER, check=True)


# --- jobs that hang, die, or tell nothing --------------------------------------------------------------


#: Stands for ``gpu.py --job``. Its job's rival says how it behaves; each leaves its own and its child's id.
FAKE = """
import json, os, subprocess, sys, time
job, folder, rows = json.loads(sys.argv[2]), sys.argv[3], sys.argv[4]
if not sys.stdin.readline():
    sys.exit()
def tell(figure, **facts):
    row = {name: job[name] for name in ("part", "rival", "shape", "cap_gb")} | {"figure": figure}
    with open(rows, "a") as file:
        file.write(json.dumps(row | facts) + "\\n")
print("noise {", flush=True)
if job["rival"] == "hangs":
    sleep = [sys.executable, "-c", "import time; time.sleep(600)"]
    children = [subprocess.Popen(sleep), subprocess.Popen(sleep, start_new_session=True)]
    tell("decode", pids=[os.getpid(), *(child.pid for child in children)])
    time.sleep(600)
if job["rival"] == "dies":
    tell("decode", rows=8, seconds=2.0)
    tell("decode", rows=8, seconds=1.0)
    sys.exit("broken\\n")
tell("decode", seconds=3.0)
"""


@pytest.fixture
def faked(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    script = tmp_path / "fake.py"
    script.write_text(FAKE)
    monkeypatch.setattr(gpu, "__file__", str(script))
    return tmp_path / "out"


def fake(rival: str, *figures: str, limit: float = 60.0) -> Job:
    return Job("rates", rival, figures, limit, shape="tiny")


def test_a_job_that_hangs_is_cut_off_with_its_children_and_the_next_one_runs(
    faked: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A child in a session of its own is ended too. What the job had told stays, what not is an error."""
    monkeypatch.setattr(gpu, "LEAST", 0.0)
    monkeypatch.setattr(gpu, "MOST", 0.0)
    for limit in (2.0, 10.0, 60.0):  # a busy machine may take long to start two processes
        results = gpu.Results(faked)
        hanging = fake("hangs", "decode", "m-step", limit=limit)
        gpu.measure([hanging, fake("fine", "decode", limit=600.0)], results)
        found = {(r["rival"], r["figure"]): r for r in results.rows}
        if "pids" in found["hangs", "decode"]:
            break
    pids = found["hangs", "decode"]["pids"]
    until = time.monotonic() + 60
    while any(map(alive, pids)) and time.monotonic() < until:  # what was not our child is ended by init
        time.sleep(0.05)
    assert len(pids) == 3 and not any(map(alive, pids))
    assert found["hangs", "m-step"]["error"] == (killed := f"killed after {limit:.0f} s")
    assert found["fine", "decode"]["seconds"] == 3.0
    assert [job["ended"] for job in results.jobs] == [killed, None]


def test_results_are_on_disk_after_each_job_and_while_one_runs(
    faked: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    states: list[dict[str, Any]] = []
    real = gpu.Results.write

    def write(self: gpu.Results) -> None:
        real(self)
        states.append(json.loads((faked / "results.json").read_text()))

    monkeypatch.setattr(gpu.Results, "write", write)
    jobs = [fake("dies", "decode", "m-step"), fake("fine", "decode")]
    gpu.measure(jobs, gpu.Results(faked))
    assert any(not s["jobs"] and s["rows"] for s in states), "rows come before the job has ended"
    first = next(s for s in states if len(s["jobs"]) == 1)
    told, unheard = first["rows"]
    assert told["seconds"] == 1.0, "the last row of a figure counts"
    assert unheard["figure"] == "m-step" and unheard["error"] == "exit code 1: broken"
    assert len(states[-1]["jobs"]) == 2 and len(states[-1]["rows"]) == 3
    text, log = ((faked / name).read_text() for name in ("results.txt", "log.txt"))
    assert "exit code 1: broken" in text and "noise {" in log and "=== [2/2]" in log
    assert sorted(p.name for p in faked.iterdir()) == ["log.txt", "results.json", "results.txt"]


def test_a_job_without_time_is_not_begun_and_said_so(faked: Path) -> None:
    results = gpu.Results(faked)
    gpu.measure([fake("hangs", "decode", "m-step", limit=0.0), fake("fine", "decode")], results)
    assert [r.get("error") for r in results.rows] == ["not begun: 0 s left"] * 2 + [None]


def test_interrupting_leaves_no_process_behind(faked: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[gpu.Child] = []
    real = gpu.Child.__init__
    monkeypatch.setattr(gpu.Child, "__init__", lambda self, *a: made.append(self) or real(self, *a))

    def interrupted(self: gpu.Results, child: gpu.Child) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(gpu.Results, "look", interrupted)
    with pytest.raises(KeyboardInterrupt):
        gpu.measure([fake("hangs", "decode"), fake("fine", "decode")], gpu.Results(faked))
    assert len(made) == 2 and not any(alive(child.process.pid) for child in made)


def test_a_figure_that_fails_is_a_row(tmp_path: Path) -> None:
    def breaks() -> dict[str, object]:
        raise ValueError("two\nlines")

    work = gpu_work.Work(Job("rates", "hf", ("decode",), 1.0, shape="tiny"), tmp_path, tmp_path / "rows")
    work.tell("decode", breaks, rows=8)
    work.tell("m-step", lambda: {"seconds": 2.0})
    first, second = gpu.told(tmp_path / "rows")
    assert first["error"] == "ValueError: two lines" and first["rows"] == 8
    assert second["seconds"] == 2.0 and "error" not in second


def test_every_run_of_a_timed_figure_is_told(tmp_path: Path) -> None:
    """A process that is killed in its second run has told the first."""
    work = gpu_work.Work(Job("rates", "hf", ("decode",), 1.0, repeats=3), tmp_path, tmp_path / "rows")
    runs = 0

    def run() -> None:
        nonlocal runs
        runs += 1
        if runs == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        work.tell("decode", lambda: work._timed(run, tokens=7))
    (row,) = gpu.told(tmp_path / "rows")
    assert row["repeats"] == 1 and row["tokens"] == 7 and row["least"] == row["most"] == row["seconds"]


def test_results_of_pytest_are_counted() -> None:
    lines = (
        "tests/test_gpu.py::test_a PASSED [ 33%]",
        "tests/test_gpu.py::test_b[x y] FAILED",
        "noise",
        "tests/test_gpu.py::test_c SKIPPED (no NVIDIA GPU here)",
        "FAILED tests/test_gpu.py::test_b - assert 0",
    )
    ended = dict(filter(None, map(gpu_facts.test_result, lines)))
    assert ended == {"test_a": "passed", "test_c": "skipped", "test_b[x y]": "failed"}
    found = gpu_facts.counted(ended)
    assert found["failures"] == ["test_b[x y]"] and found["checks"] == {"tests marked gpu": False}
    assert (found["passed"], found["failed"], found["skipped"]) == (1, 1, 1) and "error" not in found


def test_the_real_model_is_joined_from_its_pieces(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As uploads bring them, one after the other; a damaged one counts as not here."""
    monkeypatch.setattr(gpu_material, "gguf_file", lambda packaged: None)
    monkeypatch.setattr(gpu_material.tempfile, "gettempdir", lambda: str(tmp_path))
    monkeypatch.delenv("EMPG_SMOLLM2_GGUF", raising=False)
    job, whole, pieces = (
        Job("learn", "learn", ("learn",), 35, shape="real"),
        bytes(range(200)),
        tmp_path / "p",
    )
    pieces.mkdir()
    for name, data in {"part-aa": whole[:90], "part-ab": b"damaged", "SHA256": b""}.items():
        assert gpu_material.smollm2_file(pieces) is None
        (pieces / name).write_bytes(data)
    (pieces / "SHA256").write_text(hashlib.sha256(whole).hexdigest() + "\n")
    assert gpu_material.smollm2_file(pieces) is None
    (pieces / "part-ab").write_bytes(whole[90:])
    joined = gpu_material.smollm2_file(pieces)
    assert joined is not None and joined.read_bytes() == whole
    assert os.environ["EMPG_SMOLLM2_GGUF"] == str(joined)
    gym = tmp_path / "gym"
    assert gpu_material.learning_recipe(job, gym) == ("smollm2-135m", [])
    assert gpu_material.learning_recipe(replace(job, small=True), gym)[0] == "tiny-hard"
    gym.mkdir()
    for split, total in {"train": "1 + 2", "test": "3 + 4"}.items():
        row = {"question": f"What is {total}?", "answer": str(eval(total))}
        (gym / f"{split}.jsonl").write_text(json.dumps(row) + "\n", "utf-8")
    recipe = load_recipe(*gpu_material.learning_recipe(job, gym))
    assert (recipe.model.name, recipe.run.steps) == ("smollm2-135m", 100)
    problems = setting.load_splits(recipe)
    assert [p.gold for p in problems.train] == ["3"]
    assert gpu_material.learning_recipe(replace(job, small=True), gym)[0] == "tiny-hard"
