"""A comparison of methods on one task: every one at its best shape and rate, chosen on seeds of their own."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from statistics import mean
from typing import Any

from arms import Setting

Results = dict[Setting, dict[str, Any]]

#: A rate this far behind another on the first seeds of a sweep is not tried on the others.
FAR_BEHIND = 0.04


def shapes(arm: str, *problems_samples: tuple[int, int], **settings: Any) -> dict[str, dict[str, Any]]:
    """Ways to spend a step's samples, by label: ``dr_grpo 8x8``, ``empg tries 8 32x2``."""
    named = " ".join(f"{name} {value} " for name, value in settings.items())
    return {
        f"{arm} {named}{p}x{k}": {"arm": arm, "problems": p, "samples": k, **settings}
        for p, k in problems_samples
    }


@dataclass(frozen=True)
class Study:
    """What is compared.

    Attributes:
        task: a recipe.
        steps: of a run.
        rates: the grid of the sweep, the same for every method.
        methods: method -> its shapes by label; the first is the one that the others are compared with.
        first: seeds of the sweep on which every rate is tried; ``rest``: those on which only rates are that
            are not far behind.
        seeds: of the results; none is in the sweep.
    """

    task: str
    steps: int
    rates: tuple[float, ...]
    methods: Mapping[str, Mapping[str, Mapping[str, Any]]]
    first: tuple[int, ...] = (100, 101)
    rest: tuple[int, ...] = (102, 103)
    seeds: tuple[int, ...] = tuple(range(8))

    @property
    def ours(self) -> str:
        """The method that the others are compared with."""
        return next(iter(self.methods))

    @property
    def shapes(self) -> dict[str, Mapping[str, Any]]:
        """All shapes by label."""
        return {label: shape for group in self.methods.values() for label, shape in group.items()}

    # --- the sweep --------------------------------------------------------------------------------

    def tried(self, label: str, rate: float, seeds: Iterable[int]) -> list[Setting]:
        """A shape at a rate, on validation rows."""
        plain = Setting(self.task, rate=rate, seed=0, steps=self.steps, test=False, **self.shapes[label])
        return [replace(plain, seed=seed) for seed in seeds]

    def sweep_first(self) -> list[Setting]:
        """Every rate for every shape, seed by seed."""
        return [
            run
            for seed in self.first
            for rate in self.rates
            for label in self.shapes
            for run in self.tried(label, rate, [seed])
        ]

    def sweep_rest(self, results: Results) -> list[Setting]:
        """What is left to try on the other seeds; KeyError before the first."""
        return [
            run
            for label in self.shapes
            for rate in self.rates_left(results, label)
            for run in self.tried(label, rate, self.rest)
        ]

    def rates_left(self, results: Results, label: str) -> list[float]:
        """The rates of a shape that are not far behind its best one on the first seeds."""
        score = {
            rate: mean(results[s]["pass@1"] for s in self.tried(label, rate, self.first))
            for rate in self.rates
        }
        return [rate for rate in score if score[rate] >= max(score.values()) - FAR_BEHIND]

    def best(self, results: Results, method: str) -> tuple[str, float]:
        """Shape and rate with the best mean greedy accuracy on validation rows; KeyError before the sweep."""
        score = {
            (label, rate): mean(results[s]["pass@1"] for s in self.tried(label, rate, self.first + self.rest))
            for label in self.methods[method]
            for rate in self.rates_left(results, label)
        }
        return max(score, key=lambda key: score[key])

    # --- the results ------------------------------------------------------------------------------

    def runs(self, results: Results, method: str, **changes: Any) -> list[Setting]:
        """A method at its best shape and rate, on the seeds of the results."""
        label, rate = self.best(results, method)
        plain = Setting(self.task, rate=rate, seed=0, steps=self.steps, **self.shapes[label])
        return [replace(plain, seed=seed, **changes) for seed in self.seeds]

    def every(self, results: Results, **changes: Any) -> list[Setting]:
        """All methods at their best, seed by seed, so that a busy machine is busy for all of them."""
        runs = [self.runs(results, method, **changes) for method in self.methods]
        return [run[i] for i in range(len(self.seeds)) for run in runs]

    def equal_time(self, results: Results, method: str) -> list[Setting]:
        """A method with as many steps as take the seconds of the first one."""
        both = (self.runs(results, m) for m in (self.ours, method))
        ours, theirs = (mean(results[s]["seconds"] for s in runs) for runs in both)
        return self.runs(results, method, steps=round(self.steps * ours / theirs))
