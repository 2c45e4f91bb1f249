"""Over a long time nothing is held: memory, files, threads, children."""

from __future__ import annotations

import gc
import os
import re
from pathlib import Path
from statistics import linear_regression
from typing import Any

import pytest
from crash_harness import Plant, side_by_side
from fixture_recipe import quick_recipe

from empg_lite.core.view import View
from empg_lite.loop.train import TrainOptions, train
from empg_lite.rewards import Grader
from empg_lite.run.checkpoint import list_checkpoints

slow = pytest.mark.slow


# --- over a long time --------------------------------------------------------------------------------------


def held() -> dict[str, int]:
    """Resident bytes, open files, threads and children of this process."""
    status = Path("/proc/self/status").read_text("utf-8")
    found = {n: int(re.search(rf"^{n}:\s+(\d+)", status, re.M)[1]) for n in ("VmRSS", "Threads")}  # type: ignore[index]
    children = Path(f"/proc/self/task/{os.getpid()}/children").read_text("utf-8").split()
    files = len(os.listdir("/proc/self/fd"))
    return {
        "rss": found["VmRSS"] * 1024,
        "threads": found["Threads"],
        "files": files,
        "children": len(children),
    }


@slow
def test_three_hundred_steps_hold_no_more_than_fifty(plant: Plant, model_dir: Path, tmp_path: Path) -> None:
    """In a child of its own: what other tests left behind must not hide what this one adds."""

    def soak() -> list[Any]:
        recipe = quick_recipe(tmp_path, model_dir, "run.steps=300", "run.save_every=10", "run.keep=3")
        run, seen = tmp_path / "run", []

        class Watch(View):
            def step(self, record: Any, total: int) -> None:
                if record["step"] % 50 == 0:
                    gc.collect()
                    seen.append(held())

        train(recipe, run, TrainOptions(force=True), view=Watch())
        size = sum(f.stat().st_size for f in (run / "checkpoints").rglob("*") if f.is_file())
        one = sum(f.stat().st_size for f in list_checkpoints(run)[-1].iterdir())
        return [seen, size / one]

    ((seen, kept),) = side_by_side([soak])
    steps = [50 * (n + 1) for n in range(len(seen))]
    slope = linear_regression(steps, [s["rss"] for s in seen]).slope * 100 / 2**20  # least squares
    print(
        f"\nR1: {slope:.2f} MB per 100 steps after step 50; {seen[0]} -> {seen[-1]}; {kept:.2f} checkpoints"
    )
    assert len(seen) == 6 and slope < 1.0
    assert len({(s["threads"], s["files"], s["children"]) for s in seen}) == 1
    assert kept == pytest.approx(3, rel=0.1)


@slow
def test_a_hundred_thousand_gradings_hold_no_more(plant: Plant) -> None:
    def soak() -> list[Any]:
        with Grader() as grader:
            seen = []
            for n in range(100_000):
                # One in a hundred asks a worker.
                hard = n % 100 == 0
                gold, said = (
                    ("2*x + 2", f"\\boxed{{2(x+1) + {n % 7} - {n % 7}}}") if hard else ("42", f"#### {n}")
                )
                grader.grade("math" if hard else "gsm8k", gold, said)
                if (n + 1) % 20_000 == 0:
                    gc.collect()
                    seen.append(held())
            return seen

    (seen,) = side_by_side([soak])
    grown = (seen[-1]["rss"] - seen[0]["rss"]) / 2**20
    print(f"\nR1: 100,000 gradings, {grown:.2f} MB more than after 20,000; {seen[-1]}")
    assert grown < 1.0
    assert len({(s["threads"], s["files"], s["children"]) for s in seen}) == 1
