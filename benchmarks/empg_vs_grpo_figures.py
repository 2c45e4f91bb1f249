"""Figures of ``empg_vs_grpo.py``, as SVG beside its page."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import mean
from typing import Any

from empg_vs_grpo import ARMS, HARD, TINY
from empg_vs_grpo_report import LABELS, PAGE, base_of, greedy, interval, row_of, smooth
from study import Results

FIGURES = PAGE.parent / "figures"
COLORS = {
    "empg": "#0b6e4f",
    "empg-b.5": "#6aa84f",
    "centered": "#b8860b",
    "grpo": "#a4262c",
    "dr_grpo": "#5b6abf",
}


def draw(results: Results) -> list[Path]:
    """Curves and bars for which the runs are there, as SVG."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    plt.rcParams.update(
        {"font.size": 9, "axes.spines.top": False, "axes.spines.right": False, "svg.hashsalt": "0"}
    )
    FIGURES.mkdir(parents=True, exist_ok=True)
    drawn = []
    for task in (HARD, TINY):
        runs_of = {arm: runs for arm in ARMS if (runs := row_of(results, task, arm)) is not None}
        if runs_of:
            figure, axes = plt.subplots(1, 3, figsize=(10.5, 3.2))
            _curves(axes, runs_of, greedy(base_of(results, task)[0]))
            drawn.append(_save(figure, f"empg-vs-grpo-{task}"))
    ages = {age: [row_of(results, HARD, arm, stale=age) for arm in ARMS] for age in (0, 1, 4)}
    whole = {age: row for age, row in ages.items() if all(row)}
    if len(whole) > 1:
        figure, axis = plt.subplots(figsize=(5.6, 3.2))
        _stale(axis, whole)
        drawn.append(_save(figure, "empg-vs-grpo-stale"))
    return drawn


def _save(figure: Any, name: str) -> Path:
    figure.tight_layout()
    path = FIGURES / f"{name}.svg"
    figure.savefig(path, metadata={"Date": None})
    return path


def _curves(axes: Any, runs_of: Mapping[str, list[dict[str, Any]]], base: float) -> None:
    for arm, runs in runs_of.items():
        rewards = [smooth([p["reward"] for p in r["curve"]]) for r in runs]
        steps = range(1, len(rewards[0]) + 1)
        center = [100 * mean(values) for values in zip(*rewards, strict=True)]
        axes[0].plot(steps, center, color=COLORS[arm], label=LABELS[arm])
        known = [(0.0, base)] + [
            (mean(r["curve"][i]["seconds"] for r in runs), mean(r["curve"][i]["greedy"] for r in runs))
            for i, p in enumerate(runs[0]["curve"])
            if "greedy" in p
        ]
        axes[1].plot([s for s, _ in known], [100 * a for _, a in known], ".-", color=COLORS[arm])
        lengths = [mean(r["curve"][i]["length"] for r in runs) for i in range(len(steps))]
        axes[2].plot(steps, smooth(lengths), color=COLORS[arm])
    axes[0].set(xlabel="step (64 samples each)", ylabel="right samples, T=1 (%)")
    axes[1].set(xlabel="CPU seconds of training", ylabel="greedy accuracy, validation (%)")
    axes[2].set(xlabel="step", ylabel="mean length of samples (tokens)")
    axes[0].legend(frameon=False, fontsize=8)


def _stale(axis: Any, ages: Mapping[int, Sequence[Any]]) -> None:
    for n, arm in enumerate(ARMS):
        spans = [interval([100 * greedy(r) for r in row[n]]) for row in ages.values()]
        at = [age + 0.06 * (n - 2) for age in ages]
        middle, half = zip(*spans, strict=True)
        axis.errorbar(at, middle, half, color=COLORS[arm], label=LABELS[arm], fmt=".-", capsize=2)
    axis.set(xlabel="E-steps between sampling and fitting", ylabel="greedy accuracy, test (%)")
    axis.set_xticks(list(ages))
    axis.legend(frameon=False, fontsize=8, loc="center left", bbox_to_anchor=(1.0, 0.5))
