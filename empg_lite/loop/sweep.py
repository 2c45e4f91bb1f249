"""Train one recipe under several seeds, to tell the method from luck."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING, Any

from empg_lite.core.control import Clock
from empg_lite.core.errors import UsageError
from empg_lite.core.view import View
from empg_lite.loop.train import TrainOptions, train
from empg_lite.run.layout import is_run, seed_dir
from empg_lite.run.parallel import SINGLE, World

if TYPE_CHECKING:
    from empg_lite.recipe.schema import Recipe

NO_OPTIONS = TrainOptions()
#: Figures summarized over the seeds.
FIGURES = ("accuracy_before", "accuracy_after", "t1_accuracy_before", "t1_accuracy_after", "seconds")


def sweep(
    recipe: Recipe,
    folder: Path,
    seeds: Sequence[int],
    options: TrainOptions = NO_OPTIONS,
    view: View | None = None,
    world: World = SINGLE,
) -> dict[str, Any]:
    """Train once per seed, one after the other, into ``folder/seed-N``; each is a normal run.

    Args:
        options: ``max_minutes`` is for all seeds together; with ``resume``, finished seeds are kept and the
            first unfinished one continues.

    Returns:
        ``sweep`` (the folder), ``seeds`` (those begun), ``runs`` (what ``train`` returned for each),
        ``seconds_total``, and for each of ``FIGURES`` an object ``mean``, ``min``, ``max`` over the seeds,
        None while one of them lacks it.

    Raises:
        UsageError: a folder contains a run and ``resume`` is off; nothing was started.
        EmpgError: as ``train``; earlier seeds are finished.
    """
    clock, view = Clock(options.max_minutes), view or View()
    held = [run for run in (seed_dir(folder, seed) for seed in seeds) if is_run(run)]
    if held and not options.resume:
        raise UsageError(
            "the folder already contains a run",
            str(held[0]),
            "add --resume to continue, or name another folder",
        )
    results: list[dict[str, Any]] = []
    for n, seed in enumerate(seeds, 1):
        view.note(f"seed {seed} ({n} of {len(seeds)})")
        left = None if options.max_minutes is None else max(0.0, options.max_minutes - clock.seconds() / 60)
        own = recipe.model_copy(update={"run": recipe.run.model_copy(update={"seed": seed})})
        result = train(own, seed_dir(folder, seed), replace(options, max_minutes=left), view, world)
        results.append(result)
        if result["steps"] < recipe.run.steps:  # out of time
            break
    return {
        "sweep": str(folder),
        "seeds": list(seeds[: len(results)]),
        "runs": results,
        "seconds_total": round(clock.seconds(), 3),
        **{name: _spread([r[name] for r in results]) for name in FIGURES},
    }


def _spread(values: Sequence[float | None]) -> dict[str, float] | None:
    known = [v for v in values if v is not None]
    if len(known) < len(values):
        return None
    return {"mean": fmean(known), "min": min(known), "max": max(known)}
