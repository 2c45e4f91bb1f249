"""Seconds of training until the tiny model answers 95% of its test problems, by shape of a step.

    python benchmarks/seconds_to_learn.py [--seeds 0 1 2] [--goal 0.95] [--shape P K M R W ...]

One thread, one process; seconds are processor seconds of sampling, grading and fitting. After each step all
test problems are answered greedily, which is not counted. A shape is P x K samples a step with M tries (0:
fixed groups) at learning rate R after W steps of warm-up.
"""

from __future__ import annotations

import argparse
import os
import time
from statistics import mean
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch

import torch  # noqa: E402
from arms import EStep, Setting, _fit, _learner  # noqa: E402
from memory import SuccessMemory  # noqa: E402

from empg_lite.core.view import View  # noqa: E402
from empg_lite.data.sources import ProblemStream, load_splits  # noqa: E402
from empg_lite.loop.evaluate import Evaluator  # noqa: E402
from empg_lite.recipe.file import load_recipe  # noqa: E402
from empg_lite.rewards import Grader  # noqa: E402

#: (P, K, tries, rate, warm-up): ``tiny`` before tries, and now.
SHAPES = ((16, 8, 0, 2e-3, 5), (64, 1, 8, 3e-3, 3))


def learn(setting: Setting, goal: float, most: int) -> dict[str, Any]:
    """Train until the goal is reached, or for ``most`` steps."""
    torch.set_num_threads(1)
    learner = _learner(setting)
    splits = load_splits(load_recipe(setting.task).resolved())
    seconds, found = 0.0, 0.0
    with Grader() as grader:
        sampler = learner.sampler()
        evaluator = Evaluator(learner, sampler, grader, View())
        e_step = EStep(setting, learner, sampler, grader, ProblemStream(splits.train, setting.seed))
        for step in range(1, most + 1):
            started = time.process_time()
            groups = e_step.draw(step, learner.state.policy_step)
            assert groups is not None
            _fit(learner, setting, groups, None, SuccessMemory(0), step)
            seconds += time.process_time() - started
            found = evaluator.evaluate(splits.evaluation).summary()["pass@1"]
            if found >= goal:
                break
    return {"steps": step, "samples": e_step.samples, "seconds": seconds, "greedy": found}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--recipe", default="tiny")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--goal", type=float, default=0.95)
    parser.add_argument("--most", type=int, default=40, help="steps")
    parser.add_argument("--shape", nargs="+", type=float, help="P K M R W, any number of times")
    args = parser.parse_args()
    numbers = args.shape or [n for shape in SHAPES for n in shape]
    print("| P x K | tries | rate | seed | steps | samples | seconds | greedy |\n" + "|---" * 8 + "|")
    for p, k, m, rate, warmup in zip(*[iter(numbers)] * 5, strict=True):
        found = []
        for seed in args.seeds:
            setting = Setting(
                args.recipe,
                "empg",
                rate,
                seed,
                problems=int(p),
                samples=int(k),
                tries=int(m) or None,
                warmup=int(warmup),
            )
            found.append(learn(setting, args.goal, args.most))
            r, shape = found[-1], f"{p:.0f} x {k:.0f} | {m:.0f} | {rate:g}"
            figures = f"{r['steps']} | {r['samples']} | {r['seconds']:.1f} | {r['greedy']:.1%}"
            print(f"| {shape} | {seed} | {figures} |", flush=True)
        print(f"| {shape} | mean | | | {mean(r['seconds'] for r in found):.1f} | |", flush=True)


if __name__ == "__main__":
    main()
