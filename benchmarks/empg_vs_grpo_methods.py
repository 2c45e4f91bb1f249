"""Tables of the methods at their best: every one at the shape and rate that a sweep chose for it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from statistics import mean
from typing import Any

from arms import Setting
from empg_vs_grpo import (
    HARD,
    METHODS,
    RATES,
    SHAPES,
    SWEEP_SEEDS,
    Results,
    best_of,
    best_shape,
    equal_time,
    rates_left,
    shape_sweep,
)
from empg_vs_grpo_report import difference, greedy, points, t1, table, there

#: The method that the others are compared with.
OURS = next(iter(METHODS))
#: Chooses a method's runs; KeyError while what it depends on is missing.
Choice = Callable[[Results, str], list[Setting]]


def shapes_table(results: Results) -> str:
    """Greedy accuracy on validation rows by shape and rate; a rate dropped after two seeds in brackets."""
    rows = []
    for method, labels in METHODS.items():
        for label in labels:
            shape, cells = SHAPES[label], []
            try:
                left = rates_left(results, label)
                best = best_shape(results, method)
            except KeyError:
                continue
            for rate in RATES[HARD]:
                seeds = SWEEP_SEEDS if rate in left else SWEEP_SEEDS[:2]
                runs = there(results, shape_sweep([label], seeds, [rate]))
                text = "" if runs is None else f"{100 * mean(map(greedy, runs)):.1f}"
                text = f"**{text}**" if (label, rate) == best else text if rate in left else f"({text})"
                cells.append(text)
            tries = str(shape.get("tries") or "")
            rows.append([method, f"{shape['problems']} × {shape['samples']}", tries, *cells])
    return table(["method", "P × K", "tries", *(f"{r:g}" for r in RATES[HARD])], rows) if rows else ""


def _runs(results: Results, choose: Choice, method: str) -> list[dict[str, Any]] | None:
    try:
        return there(results, choose(results, method))
    except KeyError:
        return None


def methods_table(results: Results, choose: Choice) -> str:
    """Every method, and EMPG with tries minus it, paired by seed; '' until all of its runs are there."""
    ours, rows = _runs(results, choose, OURS), []
    if ours is None:
        return ""
    for method in METHODS:
        runs = _runs(results, choose, method)
        if runs is None:
            continue
        setting = runs[0]["setting"]
        cells = [
            method,
            f"{setting['problems']} × {setting['samples']}",
            f"{setting['rate']:g}",
            *(points([figure(r) for r in runs]) for figure in (greedy, t1, pass8)),
            f"{mean(r['samples'] for r in runs):.0f}",
            f"{mean(r['seen'] for r in runs):.0f}",
            f"{mean(r['seconds'] for r in runs):.0f}",
        ]
        rows.append(cells)
    return table("method|P × K|rate|greedy|T=1|pass@8|samples|problems|CPU s".split("|"), rows)


def ahead_table(results: Results, choose: Choice) -> str:
    """EMPG with tries minus each method, seed by seed."""
    ours, rows = _runs(results, choose, OURS), []
    for method in list(METHODS)[1:]:
        theirs = _runs(results, choose, method)
        if ours is None or theirs is None:
            continue
        gains = [difference(ours, theirs, figure) for figure in (greedy, t1, pass8)]
        won = [f"{sum(d > 0 for d in gain)} of {len(gain)}" for gain in gains[:2]]
        cells = [points(gain, signed=True) for gain in gains]
        rows.append([method, cells[0], won[0], cells[1], won[1], cells[2]])
    return table("EMPG, tries minus|greedy|seeds won|T=1|seeds won|pass@8".split("|"), rows) if rows else ""


def pass8(run: dict[str, Any]) -> float:
    return float(run["pass@8"])


def changed(**changes: Any) -> Choice:
    """The methods' runs with these changes."""
    return lambda results, method: best_of(results, method, **changes)


def method_tables(results: Results) -> dict[str, str]:
    """All of them by name."""
    kinds: Sequence[tuple[str, Choice]] = (
        ("methods", changed()),
        ("methods-time", equal_time),
        ("methods-noise-2", changed(noise=0.02)),
        ("methods-noise-5", changed(noise=0.05)),
        ("methods-stale", changed(stale=4)),
    )
    found = {"shapes": shapes_table(results)}
    for name, choose in kinds:
        found |= {name: methods_table(results, choose), f"{name}-ahead": ahead_table(results, choose)}
    return found
