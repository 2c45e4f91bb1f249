"""What a step costs against rationales per problem, problems, completion length and model size, on a CPU.

    python benchmarks/scaling.py [--repeats N] [--json]

One thread; P = 16, K = 8, lengths from a table of mean 36 and the bundled model's shape, one of the four
changed at a time. The E-step is the package's own engine; in the M-step no row has weight 0. Random weights
where the shape is not the bundled one's. Seconds are of processor time: those of an idle core.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path

os.environ["OMP_NUM_THREADS"] = "1"

import torch
from machine import headline
from setting import sample, tiny_learner, tiny_setting, weighed
from shapes import SHAPES, wider, write_model
from timing import Spread, circumstances, in_turn, table

from empg_lite.loop.mstep import m_step
from empg_lite.sampler import make_sampler


@dataclass(frozen=True, slots=True)
class Point:
    """One setting: P, K, mean completion length (the cap is twice that), times the bundled model's width."""

    problems: int = 16
    samples: int = 8
    mean: float = 36.0
    width: int = 1


@dataclass(frozen=True, slots=True)
class Cost:
    """Seconds of processor time, and completion tokens of the step."""

    point: Point
    tokens: int
    sampling: Spread
    fitting: Spread


#: What is changed, and its values.
SWEEPS: dict[str, tuple[str, tuple[int, ...]]] = {
    "rationales per problem": ("samples", (2, 4, 8, 16)),
    "problems per step": ("problems", (4, 8, 16, 32)),
    "mean completion length": ("mean", (18, 36, 72)),
    "width of the model": ("width", (1, 2, 4)),
}


def points() -> Iterator[tuple[str, Point]]:
    """Every sweep's settings."""
    for name, (field, values) in SWEEPS.items():
        for value in values:
            yield name, replace(Point(), **{field: value})


def cost(point: Point, repeats: int) -> Cost:
    """Time the two halves of a step."""
    with tempfile.TemporaryDirectory() as folder:
        overrides = [f"sampler.max_new_tokens={2 * round(point.mean)}"]
        if point.width > 1:
            model = write_model(Path(folder), wider(SHAPES["tiny"], point.width))
            overrides.append(f"model.name={model}")
        learner = tiny_learner(*overrides)
    setting = tiny_setting(learner, problems=point.problems, samples=point.samples, mean=point.mean)
    sampler = make_sampler(learner.policy, "native", learner.recipe.sampler.batch_rows)
    rows = weighed(sample(learner, sampler, setting), setting.rewards(False))
    settings = replace(learner.fit_settings(), learning_rate=1e-6)
    spent = in_turn(
        {
            "E": lambda: sample(learner, sampler, setting),
            "M": lambda: m_step(learner.policy, learner.optimizer, rows, settings),
        },
        repeats=repeats,
        warmups=1,
    )
    seconds = {half: Spread.of([s.cpu for s in times]) for half, times in spent.items()}
    return Cost(point, setting.tokens, seconds["E"], seconds["M"])


def show(name: str, costs: list[Cost]) -> str:
    """One sweep's table; rates from the medians."""
    field = SWEEPS[name][0]
    head = (name, "tokens", "E-step, s", "tok/s", "M-step, s", "tok/s")
    cells = [
        (
            f"{getattr(c.point, field):g}",
            str(c.tokens),
            str(c.sampling),
            f"{c.tokens / c.sampling.median:.0f}",
            str(c.fitting),
            f"{c.tokens / c.fitting.median:.0f}",
        )
        for c in costs
    ]
    return table(head, cells)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--repeats", type=int, default=1, metavar="N", help="timed rounds (one more warms up)"
    )
    parser.add_argument("--json", action="store_true", help="one JSON object instead of tables")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    where = circumstances("transformers", "peft")
    known: dict[Point, Cost] = {}  # the middle of all sweeps is measured once
    sweeps: dict[str, list[Cost]] = {}
    for name, point in points():
        known[point] = known.get(point) or cost(point, arguments.repeats)
        sweeps.setdefault(name, []).append(known[point])
    if arguments.json:
        costs = {name: [asdict(c) for c in found] for name, found in sweeps.items()}
        print(json.dumps({"machine": where, "sweeps": costs}))
        return
    print(headline(where))
    for name, found in sweeps.items():
        print(f"\n{show(name, found)}")


if __name__ == "__main__":
    main()
