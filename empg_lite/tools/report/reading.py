"""Run directories as the report reads them. Interrupted runs are read as far as they go."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from empg_lite.core.errors import DataError
from empg_lite.recipe.file import load_recipe
from empg_lite.run.journal import read_metrics
from empg_lite.run.layout import ENVIRONMENT, EVENTS, METRICS, RECIPE
from empg_lite.run.rollouts import read_rollouts

if TYPE_CHECKING:
    from empg_lite.core.rationale import Rationale
    from empg_lite.recipe.schema import Recipe

#: Recipe keys that are not part of the method: the seed, and settings for the machine and the disk.
_NOT_METHOD = {
    "sampler.batch_rows",
    "sampler.merged",
    "optim.micro_batch_tokens",
    "optim.gradient_checkpointing",
    "run.seed",
    "run.keep",
    "run.save_every",
}


@dataclass(frozen=True, slots=True)
class StoredRun:
    """One run.

    Attributes:
        steps: records of the training steps, in order.
        before, after: figures of the evaluations before and after training; None if missing.
        answers: (base, tuned) greedy answers to the same problems; () unless both evaluations exist.
    """

    path: Path
    recipe: Recipe
    steps: tuple[dict[str, Any], ...]
    events: tuple[dict[str, Any], ...]
    environment: dict[str, Any]
    before: dict[str, Any] | None
    after: dict[str, Any] | None
    answers: tuple[tuple[Rationale, Rationale], ...]

    @property
    def name(self) -> str:
        """For titles; a seed's folder is shown with its parent."""
        path = self.path.absolute()
        return f"{path.parent.name}/{path.name}" if path.name.startswith("seed-") else path.name

    @property
    def in_turns(self) -> bool:
        """Whether it asked each problem until it was right (``sampler.tries``)."""
        return any("em/finished" in record for record in self.steps)

    @property
    def command(self) -> str:
        """The command that started it, from the first line of its recipe; may be empty."""
        first = (self.path / RECIPE).read_text("utf-8").partition("\n")[0]
        return first.removeprefix("# made by: ") if first.startswith("# made by: ") else ""

    def rollouts(self) -> Iterator[tuple[int, list[Rationale]]]:
        """(step, its rationales) of every stored training step; unreadable files are skipped."""
        for path in sorted((self.path / "rollouts").glob("step-*.jsonl")):
            step = int(path.stem[5:])
            if step and (rows := _rationales(path)):
                yield step, rows

    def method(self) -> dict[str, str]:
        """The recipe as {key: JSON value}, without ``_NOT_METHOD``: equal for all runs of a sweep."""
        sections = self.recipe.model_dump(mode="json")
        values = {f"{name}.{key}": v for name, section in sections.items() for key, v in section.items()}
        return {key: json.dumps(value) for key, value in values.items() if key not in _NOT_METHOD}


def read_run(path: Path) -> StoredRun:
    """Read a run directory; its rollouts are read on demand.

    Raises:
        RecipeError: its recipe cannot be read.
    """
    before, after = (_json(path / "eval" / name / "figures.json") for name in ("before", "after"))
    return StoredRun(
        path,
        load_recipe(str(path / RECIPE)),
        tuple(r for r in read_metrics(path / METRICS) if r.get("reward") is not None),
        tuple(read_metrics(path / EVENTS)),
        _json(path / ENVIRONMENT) or {},
        before,
        after,
        tuple(_pairs(path)) if before and after else (),
    )


def _pairs(path: Path) -> list[tuple[Rationale, Rationale]]:
    base, tuned = (_rationales(path / "eval" / name / "greedy.jsonl") for name in ("before", "after"))
    by_problem = {r.problem_id: r for r in base}
    return [(by_problem[r.problem_id], r) for r in tuned if r.problem_id in by_problem]


def _rationales(path: Path) -> list[Rationale]:
    try:
        return [r for segment in read_rollouts(path, torn_tail=True) for r in segment.rationales]
    except (DataError, OSError):
        return []


def _json(path: Path) -> dict[str, Any] | None:
    try:
        found = json.loads(path.read_text("utf-8"))
    except (OSError, ValueError):
        return None
    return found if isinstance(found, dict) else None


@dataclass(frozen=True, slots=True)
class Arm:
    """Runs that differ only in their seed."""

    label: str
    runs: tuple[StoredRun, ...]


def arms_of(runs: Sequence[StoredRun]) -> list[Arm]:
    """Group the runs by recipe, in order of first appearance; the seeds of one recipe are one arm."""
    by_method: dict[tuple[tuple[str, str], ...], list[StoredRun]] = {}
    for run in runs:
        by_method.setdefault(tuple(run.method().items()), []).append(run)
    return [Arm(_label(members), tuple(members)) for members in by_method.values()]


def _label(members: Sequence[StoredRun]) -> str:
    if len(members) == 1:
        return members[0].name
    first, parents = members[0].path.absolute(), {m.path.absolute().parent for m in members}
    shared = first.parent.name if len(parents) == 1 and first.name.startswith("seed-") else first.name
    return f"{shared} ({len(members)} seeds)"


def differences(arms: Sequence[Arm]) -> list[tuple[str, list[str]]]:
    """(key, its value in each arm) for every recipe key in which the arms differ."""
    methods = [arm.runs[0].method() for arm in arms]
    found = [(key, [method[key] for method in methods]) for key in methods[0]]
    return [(key, values) for key, values in found if len(set(values)) > 1]
