"""The numbers behind each chart, from the records of runs.

``charts.toml`` lists the charts and their texts; ``drawing.py`` draws them.
"""

from __future__ import annotations

import math
import tomllib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from importlib.resources import files
from random import Random
from statistics import fmean
from typing import TYPE_CHECKING, Any

from empg_lite.core.behaviors import BEHAVIORS, behavior_rates
from empg_lite.core.stats import wilson

if TYPE_CHECKING:
    from empg_lite.core.rationale import Rationale
    from empg_lite.tools.report.reading import Arm, StoredRun

#: Rationales per step that are searched for behaviors (as the caption says): enough for a share, and fast.
BEHAVIOR_ROWS = 64


@dataclass(frozen=True, slots=True)
class Line:
    """A series: ``y`` over ``x``, with an interval where ``low`` and ``high`` are given.

    Attributes:
        marks: draw separate points instead of a line.
    """

    label: str
    x: tuple[float, ...]
    y: tuple[float, ...]
    low: tuple[float, ...] = ()
    high: tuple[float, ...] = ()
    marks: bool = False

    def __post_init__(self) -> None:
        assert len(self.x) == len(self.y) and len(self.low) == len(self.high)
        assert not self.low or len(self.low) == len(self.x)


@dataclass(frozen=True, slots=True)
class Chart:
    """One figure.

    Attributes:
        name: of its files.
        caption: how to read it.
        percent: values are fractions, shown as percentages on an axis from 0 to 1.
        stacked: the lines add up and are drawn as areas.
        series: metrics of a run and their labels.
        metric: compared between runs.
        tries: values that replace these for runs with ``sampler.tries``.
    """

    name: str
    title: str
    caption: str
    y_label: str
    percent: bool = False
    stacked: bool = False
    series: Mapping[str, str] = field(default_factory=dict)
    metric: str = ""
    tries: Mapping[str, Any] = field(default_factory=dict)
    lines: tuple[Line, ...] = ()


def all_charts(arms: Sequence[Arm]) -> list[Chart]:
    """Every chart that has data: one run in detail, or several compared."""
    single = len(arms) == 1 and len(arms[0].runs) == 1
    made = _of_one(arms[0].runs[0]) if single else _of_several(arms)
    return [chart for chart in made if chart.lines]


def _described(kind: str) -> list[Chart]:
    """The charts of ``charts.toml``, without lines; ``kind`` is ``run`` or ``comparison``."""
    text = files(__package__).joinpath("charts.toml").read_text("utf-8")
    return [Chart(**values) for values in tomllib.loads(text)[kind]]


# --- one run ------------------------------------------------------------------------------------------


def _of_one(run: StoredRun) -> list[Chart]:
    computed = {
        "accuracy": (*_validation(run), *_evaluation(run), *_at_temperature_1(run)),
        "memory": _memory(run),
        **_lengths_and_behaviors(run),
    }
    charts = [replace(c, **c.tries) if run.in_turns else c for c in _described("run")]
    return [replace(c, lines=computed.get(c.name) or _series(run, c.series)) for c in charts]


def _series(run: StoredRun, names: Mapping[str, str]) -> tuple[Line, ...]:
    """A line for each metric that was recorded; ``names`` maps metrics to labels."""
    points = {
        label: [(r["step"], r[name]) for r in run.steps if _is_number(r.get(name))]
        for name, label in names.items()
    }
    return tuple(_line(label, found) for label, found in points.items() if found)


def _line(label: str, points: Iterable[tuple[float, float]]) -> Line:
    x, y = zip(*points, strict=True)
    return Line(label, x, y)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _validation(run: StoredRun) -> tuple[Line, ...]:
    lines = _series(run, {"eval/accuracy": "greedy, held-out rows"})
    records = [r for r in run.steps if _is_number(r.get("eval/accuracy"))]
    if not lines or not all(_is_number(r.get("eval/n")) for r in records):  # an older version's run
        return lines
    bounds = [wilson(round(r["eval/accuracy"] * r["eval/n"]), r["eval/n"]) for r in records]
    low, high = zip(*bounds, strict=True)
    return (replace(lines[0], low=low, high=high),)


def _evaluation(run: StoredRun) -> tuple[Line, ...]:
    found = [f for f in (run.before, run.after) if f]
    if not found:
        return ()
    x, y = tuple(f["step"] for f in found), tuple(f["pass@1"] for f in found)
    low, high = (tuple(f["pass@1_ci95"][i] for f in found) for i in (0, 1))
    return (Line(f"greedy, {found[0]['split']} rows", x, y, low, high, marks=True),)


def _at_temperature_1(run: StoredRun) -> tuple[Line, ...]:
    """The reward; under ``sampler.tries`` the outcome of first tries, and of all.

    Until a problem can have had M tries, only quick ones have ended: all of them solved.
    """
    if not run.in_turns:
        return _series(run, {"reward": "reward of samples"})
    m, k = run.recipe.sampler.tries or 1, run.recipe.sampler.samples_per_problem
    ended = [r for r in run.steps if r.get("em/finished") and r["step"] >= m / k]
    points = [(r["step"], r["em/solved"] / r["em/finished"]) for r in ended]
    solved = (_line(f"solved within {m} tries", points),) if points else ()
    return (*_series(run, {"em/right_first": "right at first try"}), *solved)


def _memory(run: StoredRun) -> tuple[Line, ...]:
    """The peak that the plan predicts: of the card's memory on a GPU, else of the process's."""
    on_gpu = any("memory/peak_gpu_mb" in r for r in run.steps)
    peak = "memory/peak_gpu_mb" if on_gpu else "memory/peak_rss_mb"
    return _series(run, {peak: "peak", "memory/predicted_mb": "planned"})


def _lengths_and_behaviors(run: StoredRun) -> dict[str, tuple[Line, ...]]:
    """Both read the rollouts, so they share one pass."""
    points: dict[str, list[tuple[float, float]]] = {name: [] for name in ("right", "wrong", *BEHAVIORS)}
    for step, rows in run.rollouts():
        for label, right in (("right", True), ("wrong", False)):
            lengths = [len(r.completion_ids) for r in rows if r.right is right]
            if lengths:
                points[label].append((step, fmean(lengths)))
        for name, share in behavior_rates([r.completion for r in _some(rows, step)]).items():
            points[name].append((step, share))
    every = _series(run, {"completions/mean_length": "all"})
    shown = [name for name in BEHAVIORS if any(share for _, share in points[name])]
    return {
        "length": every + tuple(_line(name, points[name]) for name in ("right", "wrong") if points[name]),
        "behaviors": tuple(_line(name.replace("_", " "), points[name]) for name in shown),
    }


def _some(rows: Sequence[Rationale], step: int) -> Sequence[Rationale]:
    return rows if len(rows) <= BEHAVIOR_ROWS else Random(step).sample(rows, BEHAVIOR_ROWS)


# --- several runs -------------------------------------------------------------------------------------


def _of_several(arms: Sequence[Arm]) -> list[Chart]:
    banded = any(len(arm.runs) > 1 for arm in arms)
    note = " Lines are means over seeds; bands span the lowest to the highest." if banded else ""
    tries = any(map(_in_turns, arms))
    charts = []
    for chart in _described("comparison"):
        other = replace(
            chart, **chart.tries
        )  # its metric is that of runs with tries, its texts fit both kinds
        shown = other if tries else chart
        found = (_arm_line(arm, (other if _in_turns(arm) else chart).metric) for arm in arms)
        charts.append(replace(shown, caption=shown.caption + note, lines=tuple(filter(None, found))))
    return charts


def _in_turns(arm: Arm) -> bool:
    return any(run.in_turns for run in arm.runs)


def _arm_line(arm: Arm, key: str) -> Line | None:
    """Mean, lowest and highest over the runs of an arm, at the steps that all of them have."""
    runs = [{r["step"]: r[key] for r in run.steps if _is_number(r.get(key))} for run in arm.runs]
    shared = sorted(set.intersection(*(set(r) for r in runs)))
    if not shared:
        return None

    def over(f: Callable[[list[float]], float]) -> tuple[float, ...]:
        return tuple(f([r[step] for r in runs]) for step in shared)

    band = (over(min), over(max)) if len(runs) > 1 else ((), ())
    return Line(arm.label, tuple(shared), over(fmean), *band)
