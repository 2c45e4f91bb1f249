"""Runs in each of several processes; ``test_parallel.py`` starts it as a launcher would."""

from __future__ import annotations

import dataclasses
import json
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from fixture_model import load_fixture_policy
from rationales import rationale
from torch import Tensor

from empg_lite.core.errors import EmpgError, Interrupted, OutOfMemory
from empg_lite.core.rationale import Problem, Rationale
from empg_lite.em import denominator
from empg_lite.loop import mstep
from empg_lite.loop.batching import whole_problems
from empg_lite.loop.estep import sample_rationales
from empg_lite.loop.mstep import FitSettings, FitStats, m_step
from empg_lite.loop.train import train
from empg_lite.policy.packing import Ids
from empg_lite.policy.policy import Policy
from empg_lite.recipe.file import load_recipe
from empg_lite.run.parallel import SINGLE, World, join, leave
from empg_lite.sampler import Decoding, make_sampler

SETTINGS = FitSettings(
    learning_rate=1.0,
    max_grad_norm=1e9,
    passes=1,
    kl_stop=1e9,
    normalization="tokens",
    max_new_tokens=9,
    micro_batch_tokens=40,
)
#: Weights of each problem's rationales: groups of different size and weight, an odd number of problems.
CASES = {
    "unequal": [[2.0, 0.0, 1.0], [0.0, 0.0], [0.3, 1.0, 0.0, 2.5], [4.0], [0.0, -1.0, 1.0]],
    "one problem": [[0.0, 0.0], [1.0, 0.0, 2.0], [0.0]],  # a process has nothing to fit
    "even": [[1.0, 1.0], [1.0, 1.0]],
}


def rows(weights: Sequence[Sequence[float]]) -> list[Rationale]:
    """Rows of different lengths, each ending in the stop token; every other one is correct."""
    return [
        rationale(
            problem_id=f"p{p}",
            prompt_ids=tuple(range(1, 3 + p)),
            completion_ids=(*range(40 + 3 * p + k, 43 + 4 * p + 3 * k), 256),
            sample_index=k,
            reward=float(k % 2),
            weight=w,
        )
        for p, group in enumerate(weights)
        for k, w in enumerate(group)
    ]


class Double:
    """The fixture policy in float64; counts requested rows, and can simulate running out of memory."""

    def __init__(self, model_dir: Path) -> None:
        self.policy: Policy = load_fixture_policy(model_dir)
        self.policy.model.double()
        self.rows, self.room = 0, 10**9
        for name in ("completion_loss", "completion_logprobs"):
            setattr(self.policy, name, self.counted(getattr(self.policy, name)))

    def counted(self, work: Callable[..., Any]) -> Callable[..., Any]:
        def asked(pairs: Sequence[tuple[Ids, Ids]], *rest: Any) -> Any:
            prompts = {prompt for prompt, _ in pairs}
            if sum(map(len, prompts)) + sum(len(completion) for _, completion in pairs) > self.room:
                raise torch.OutOfMemoryError("no room")
            self.rows += len(pairs)
            return work(pairs, *rest)

        return asked

    def parameters(self) -> Tensor:
        return torch.cat([p.detach().flatten() for p in self.policy.trainable().values()])

    def step(
        self, given: Sequence[Rationale], settings: FitSettings, world: World
    ) -> tuple[Tensor, FitStats]:
        """The parameter change of one plain gradient step of rate 1; the parameters are restored."""
        parameters = list(self.policy.trainable().values())
        kept = [p.detach().clone() for p in parameters]
        before = self.parameters()
        stats = m_step(
            self.policy, torch.optim.SGD(parameters, 1.0), given, settings, measure_kl=True, world=world
        )
        moved = self.parameters() - before
        with torch.no_grad():
            for p, old in zip(parameters, kept, strict=True):
                p.copy_(old)
        return moved, stats


class Mean(World):
    """A wrong world that averages gradients, as data-parallel trainers do."""

    __slots__ = ("world",)

    def __init__(self, world: World) -> None:
        object.__setattr__(self, "rank", world.rank)
        object.__setattr__(self, "size", world.size)
        object.__setattr__(self, "world", world)

    def gather(self, value):  # type: ignore[no-untyped-def]
        return self.world.gather(value)

    def sum_gradients(self, parameters: Iterable[Tensor]) -> None:
        parameters = list(parameters)
        self.world.sum_gradients(parameters)
        for p in parameters:
            p.grad /= self.size


def relative(a: Tensor, b: Tensor) -> float:
    return float((a - b).norm() / b.norm())


def gradients(double: Double, world: World) -> dict[str, object]:
    """Compare with one process; and two mistakes that must be detected."""
    found: dict[str, object] = {}
    for name, weights in CASES.items():
        given = rows(weights)
        alone, alone_stats = double.step(given, SETTINGS, SINGLE)
        double.rows = 0
        together, stats = double.step(given, SETTINGS, world)
        assert alone_stats.drift is not None and stats.drift is not None
        found[name] = {
            "error": relative(together, alone),
            "loss": [stats.loss, alone_stats.loss],
            "grad_norm": [stats.grad_norm, alone_stats.grad_norm],
            "kl": [stats.drift.k3, alone_stats.drift.k3],
            "fitted": [stats.rows_fitted, alone_stats.rows_fitted],
            "rows_here": double.rows,
            "mean": relative(double.step(given, SETTINGS, Mean(world))[0], alone),
        }
    given = rows(CASES["unequal"])
    alone, _ = double.step(given, SETTINGS, SINGLE)
    kept = [i for i, r in enumerate(given) if r.weight]
    mine = [len(given[i].completion_ids) for i in whole_problems(given, kept, world)]
    z = denominator(mine, normalization="tokens", max_new_tokens=9)
    real, mstep.denominator = mstep.denominator, lambda *_, **__: z
    found["own denominator"] = relative(double.step(given, SETTINGS, world)[0], alone)
    mstep.denominator = real
    return found


def passes(double: Double, world: World) -> dict[str, object]:
    """Sample reuse: all processes decide together to stop."""
    found: dict[str, object] = {}
    given = rows(CASES["unequal"])
    for name, kl_stop in (("all", 1e9), ("stopped", 1e-12)):
        settings = dataclasses.replace(SETTINGS, passes=3, kl_stop=kl_stop)
        alone, _ = double.step(given, settings, SINGLE)
        together, stats = double.step(given, settings, world)
        found[name] = {"updates": stats.updates, "error": relative(together, alone)}
    return found


def trouble(double: Double, world: World) -> dict[str, object]:
    """A failure in one process reaches all."""
    given = rows(CASES["unequal"])
    alone, _ = double.step(given, SETTINGS, SINGLE)
    double.room = 20 if world.rank == 1 else 10**9
    together, stats = double.step(given, SETTINGS, world)
    found: dict[str, object] = {
        "short": {"budget": stats.micro_batch_tokens, "error": relative(together, alone)}
    }
    double.room = 3 if world.rank == 1 else 10**9
    try:
        double.step(given, SETTINGS, world)
    except OutOfMemory as error:
        found["hopeless"] = str(error)
    double.room = 10**9
    infinite = [[float("inf"), 0.0], *CASES["unequal"][1:]]
    moved, stats = double.step(rows(infinite), SETTINGS, world)
    found["infinite"] = [stats.updates, stats.skipped_nonfinite, float(moved.abs().max())]
    return found


def samples(model_dir: Path, world: World) -> dict[str, object]:
    """The rationales of five problems, from all processes and from this one alone."""
    policy = load_fixture_policy(model_dir)
    sampler = make_sampler(policy, "native", 64)
    problems = [Problem(f"p{i}", f"{i} + {'1' * i}7 = ?", "8") for i in range(5)]

    def ask(mine: Sequence[Problem]) -> list[list[Rationale]]:
        draw = sample_rationales(
            policy, sampler, mine, Decoding(12), samples=4, seed=3, step=1, policy_step=0
        )
        return [list(g.rationales) for g in draw.groups]

    shared, alone = world.share(problems, ask), ask(problems)
    return {
        "same": shared == alone,
        "distinct": len({r.completion_ids for rows in shared for r in rows}),
        "none": world.share(problems[:0], ask),
        "one": world.share(problems[:1], ask) == alone[:1],
    }


def main() -> None:
    """``team_probe.py MODEL_DIR RECIPE RUN``; also trains the recipe into RUN."""
    model_dir, recipe, run = Path(sys.argv[1]), load_recipe(sys.argv[2]), Path(sys.argv[3])
    found: dict[str, object] = {}
    try:
        with join() as world:
            double = Double(model_dir)
            found |= gradients(double, world) | {"passes": passes(double, world)}
            found |= {"trouble": trouble(double, world), "samples": samples(model_dir, world)}
            found["once"] = world.once(lambda: f"rank {world.rank}")
            found["first"] = [world.first(None), world.first("last" if world.rank else None)]
            found["any"] = [world.any(False), world.any(world.rank == 1)]
            found["train"] = train(recipe, run, world=world)["steps"]
            if world.rank == 1:
                raise Interrupted(15, "what", "where", "todo")
            world.gather("the others are here, and hear of it")
    except EmpgError as error:
        found["error"] = [type(error).__name__, error.exit_code, error.what, error.where, error.todo]
    print(json.dumps(found))
    leave(0)


if __name__ == "__main__":
    main()
