"""What is drawn: plain numbers, from the records of runs. How they look is ``drawing.py``'s business."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from random import Random
from statistics import fmean
from typing import Any

from empg_lite.core.behaviors import BEHAVIORS, behavior_rates
from empg_lite.core.rationale import Rationale
from empg_lite.core.stats import wilson
from empg_lite.tools.report.reading import Arm, StoredRun

#: Rationales of a step that are searched for behaviours: enough to see a share, quick for long answers.
BEHAVIOR_ROWS = 64


@dataclass(frozen=True, slots=True)
class Line:
    """A series: ``y`` over ``x``, with an interval around it where ``low`` and ``high`` are given.

    Attributes:
        marks: draw points, not a line: single measurements.
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
        caption: how to read it, for a person.
        percent: values are fractions, shown as percentages; the axis goes from 0 to 1.
        stacked: the lines add up, drawn as areas.
    """

    name: str
    title: str
    caption: str
    y_label: str
    lines: tuple[Line, ...] = field(default=())
    percent: bool = False
    stacked: bool = False


def all_charts(arms: Sequence[Arm]) -> list[Chart]:
    """Every chart that there are numbers for: of one run in detail, of several beside each other."""
    made = _of_one(arms[0].runs[0]) if len(arms) == 1 and len(arms[0].runs) == 1 else _of_several(arms)
    return [chart for chart in made if chart.lines]


# --- one run ------------------------------------------------------------------------------------------


def _of_one(run: StoredRun) -> list[Chart]:
    steps, lengths = run.steps, _lengths_and_behaviours(run)
    return [
        Chart(
            "accuracy",
            "Accuracy",
            "Greedy accuracy on held-out training problems, with its 95% Wilson interval; the two points are "
            "the evaluation rows, before and after. The reward is that of the samples, at temperature 1.",
            "right",
            (*_validation(run), *_evaluation(run), *_series(steps, {"reward": "reward of samples"})),
            percent=True,
        ),
        Chart(
            "signal",
            "Where the signal is",
            "Problems of a step by their samples. Those with both right and wrong ones teach most; where all "
            "are wrong there is nothing to fit.",
            "problems",
            _series(
                steps,
                {
                    "em/frac_mixed": "right and wrong",
                    "em/frac_all_wrong": "all wrong",
                    "em/frac_all_right": "all right",
                },
            ),
            percent=True,
            stacked=True,
        ),
        Chart(
            "length",
            "Length",
            "Mean tokens of the samples, stop included. Conciseness is the length of the right ones, at the "
            "accuracy above.",
            "tokens",
            lengths["length"],
        ),
        Chart(
            "behaviors",
            "Ways of reasoning",
            f"Share of the samples (at most {BEHAVIOR_ROWS} a step) with a sentence that sets up a "
            "sub-problem, checks a result, turns back, or works backwards. Patterns find them, no model.",
            "samples",
            lengths["behaviors"],
            percent=True,
        ),
        Chart(
            "time",
            "Where the time goes",
            "Seconds of each step. Grading runs while samples are drawn; what is shown was left of it.",
            "seconds",
            _series(steps, {"time/sample": "sampling", "time/score": "grading", "time/fit": "fitting"}),
            stacked=True,
        ),
        Chart("memory", "Memory", "Peak so far, and what the plan allowed for.", "MB", _memory(steps)),
        Chart(
            "entropy",
            "Entropy",
            "Mean surprise of a sampled token. A fall to zero means that the model always writes the same.",
            "nats a token",
            _series(steps, {"entropy": "entropy"}),
        ),
        Chart(
            "loss",
            "Loss",
            "Weighted surprise at what worked, over all sampled tokens. Each step has its own problems: it "
            "need not fall.",
            "nats a token",
            _series(steps, {"loss": "loss"}),
        ),
    ]


def _series(steps: Sequence[Mapping[str, Any]], names: Mapping[str, str]) -> tuple[Line, ...]:
    lines = []
    for name, label in names.items():
        points = [(r["step"], r[name]) for r in steps if _is_number(r.get(name))]
        if points:
            lines.append(_line(label, points))
    return tuple(lines)


def _line(label: str, points: Sequence[tuple[float, float]], *, marks: bool = False) -> Line:
    return Line(label, tuple(x for x, _ in points), tuple(y for _, y in points), marks=marks)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _validation(run: StoredRun) -> tuple[Line, ...]:
    records = [r for r in run.steps if _is_number(r.get("eval/accuracy"))]
    if not records:
        return ()
    x, y = tuple(r["step"] for r in records), tuple(r["eval/accuracy"] for r in records)
    label = "greedy, held-out rows"
    if not all(_is_number(r.get("eval/n")) for r in records):  # a run of an older version
        return (Line(label, x, y),)
    bounds = [wilson(round(r["eval/accuracy"] * r["eval/n"]), r["eval/n"]) for r in records]
    return (Line(label, x, y, tuple(low for low, _ in bounds), tuple(high for _, high in bounds)),)


def _evaluation(run: StoredRun) -> tuple[Line, ...]:
    found = [f for f in (run.before, run.after) if f]
    if not found:
        return ()
    x, y = tuple(f["step"] for f in found), tuple(f["pass@1"] for f in found)
    low, high = (tuple(f["pass@1_ci95"][i] for f in found) for i in (0, 1))
    return (Line(f"greedy, {found[0]['split']} rows", x, y, low, high, marks=True),)


def _memory(steps: Sequence[Mapping[str, Any]]) -> tuple[Line, ...]:
    labels = {name: "peak" for name in ("memory/peak_rss_mb", "memory/peak_mb")}
    return _series(steps, {**labels, "memory/predicted_mb": "planned"})


def _lengths_and_behaviours(run: StoredRun) -> dict[str, tuple[Line, ...]]:
    """One pass over the rollouts of a run."""
    right: list[tuple[float, float]] = []
    wrong: list[tuple[float, float]] = []
    rates: dict[str, list[tuple[float, float]]] = {name: [] for name in BEHAVIORS}
    for step, rows in run.rollouts():
        for points, chosen in (
            (right, [r for r in rows if r.right]),
            (wrong, [r for r in rows if not r.right]),
        ):
            if chosen:
                points.append((step, fmean(len(r.completion_ids) for r in chosen)))
        for name, share in behavior_rates([r.completion for r in _some(rows, step)]).items():
            rates[name].append((step, share))
    lengths = _series(run.steps, {"completions/mean_length": "all"})
    lengths += tuple(_line(label, p) for label, p in (("right", right), ("wrong", wrong)) if p)
    found = [name for name in BEHAVIORS if any(share for _, share in rates[name])]
    return {"length": lengths, "behaviors": tuple(_line(n.replace("_", " "), rates[n]) for n in found)}


def _some(rows: Sequence[Rationale], step: int) -> Sequence[Rationale]:
    return rows if len(rows) <= BEHAVIOR_ROWS else Random(step).sample(rows, BEHAVIOR_ROWS)


# --- several runs -------------------------------------------------------------------------------------

_COMPARED = (
    (
        "accuracy",
        "Accuracy",
        "eval/accuracy",
        "right",
        True,
        "Greedy accuracy on held-out training problems.",
    ),
    ("reward", "Reward", "reward", "reward", True, "Mean reward of the samples, drawn at temperature 1."),
    (
        "signal",
        "Where the signal is",
        "em/frac_mixed",
        "problems",
        True,
        "Problems of a step with both right and wrong samples.",
    ),
    (
        "length",
        "Length",
        "completions/mean_length",
        "tokens",
        False,
        "Mean tokens of the samples, stop included.",
    ),
    (
        "length-right",
        "Length of right answers",
        "completions/mean_length_right",
        "tokens",
        False,
        "Mean tokens of the right samples: conciseness, at the accuracy above.",
    ),
    ("entropy", "Entropy", "entropy", "nats a token", False, "Mean surprise of a sampled token."),
    ("time", "Time of a step", "step_time", "seconds", False, "Sampling, grading, fitting, and validation."),
    (
        "speed",
        "Sampling speed",
        "time/tokens_per_second",
        "tokens a second",
        False,
        "Sampled tokens for each second of the E-step.",
    ),
)


def _of_several(arms: Sequence[Arm]) -> list[Chart]:
    note = " Lines are means over the seeds; bands reach from the lowest to the highest."
    banded = any(len(arm.runs) > 1 for arm in arms)
    return [
        Chart(
            name,
            title,
            caption + (note if banded else ""),
            y_label,
            tuple(line for arm in arms if (line := _arm_line(arm, key))),
            percent=percent,
        )
        for name, title, key, y_label, percent, caption in _COMPARED
    ]


def _arm_line(arm: Arm, key: str) -> Line | None:
    """Mean, lowest and highest over the runs of an arm, at the steps that all of them have."""
    runs = [{r["step"]: r[key] for r in run.steps if _is_number(r.get(key))} for run in arm.runs]
    shared = sorted(set.intersection(*(set(r) for r in runs)))
    if not shared:
        return None
    over: Callable[[Callable[[list[float]], float]], tuple[float, ...]] = lambda f: tuple(  # noqa: E731
        f([r[step] for r in runs]) for step in shared
    )
    band = (over(min), over(max)) if len(runs) > 1 else ((), ())
    return Line(arm.label, tuple(shared), over(fmean), *band)
