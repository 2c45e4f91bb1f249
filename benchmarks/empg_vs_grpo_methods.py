"""Tables of the methods at their best: every one at the shape and rate that a sweep chose for it."""

from __future__ import annotations

from collections.abc import Callable
from statistics import mean
from typing import Any

from arms import Setting
from empg_vs_grpo import ON_TINY, REAL
from empg_vs_grpo_report import difference, greedy, points, seeds_won, t1, table, there
from study import Results, Study

from empg_lite.core.bundled import BUNDLED

#: Chooses a method's runs; KeyError while what it depends on is missing.
Choice = Callable[[Results, str], list[Setting]]


def shapes_table(study: Study, results: Results) -> str:
    """Greedy accuracy on validation rows by shape and rate; in brackets, a rate that was dropped early."""
    rows = []
    for method, ways in study.methods.items():
        for label, shape in ways.items():
            cells = []
            try:
                left = study.rates_left(results, label)
                best = study.best(results, method)
            except KeyError:
                continue
            for rate in study.rates:
                seeds = study.first + study.rest if rate in left else study.first
                runs = there(results, study.tried(label, rate, seeds))
                text = "" if runs is None else f"{100 * mean(map(greedy, runs)):.1f}"
                text = f"**{text}**" if (label, rate) == best else text if rate in left else f"({text})"
                cells.append(text)
            tries = str(shape.get("tries") or "")
            rows.append([method, f"{shape['problems']} × {shape['samples']}", tries, *cells])
    return table(["method", "P × K", "tries", *(f"{r:g}" for r in study.rates)], rows) if rows else ""


def _runs(results: Results, choose: Choice, method: str) -> list[dict[str, Any]] | None:
    try:
        return there(results, choose(results, method))
    except KeyError:
        return None


def methods_table(study: Study, results: Results, choose: Choice) -> str:
    """Every method at its best; '' until the runs of the first are there."""
    if _runs(results, choose, study.ours) is None:
        return ""
    rows = []
    for method in study.methods:
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
    seconds = "CPU s" if study.task in BUNDLED else "s"
    return table(f"method|P × K|rate|greedy|T=1|pass@8|samples|problems|{seconds}".split("|"), rows)


def ahead_table(study: Study, results: Results, choose: Choice) -> str:
    """EMPG with tries minus each method, seed by seed."""
    ours, rows = _runs(results, choose, study.ours), []
    for method in list(study.methods)[1:]:
        theirs = _runs(results, choose, method)
        if ours is None or theirs is None:
            continue
        gains = [difference(ours, theirs, figure) for figure in (greedy, t1, pass8)]
        won = [seeds_won(gain) for gain in gains[:2]]
        cells = [points(gain, signed=True) for gain in gains]
        rows.append([method, cells[0], won[0], cells[1], won[1], cells[2]])
    return table("EMPG, tries minus|greedy|seeds won|T=1|seeds won|pass@8".split("|"), rows) if rows else ""


def earlier_table(study: Study, results: Results) -> str:
    """EMPG with tries after fewer steps minus each method at its end: greedy, on the curve's problems."""
    ours, rows = _runs(results, changed(study), study.ours), []
    for method in list(study.methods)[1:]:
        theirs = _runs(results, changed(study), method)
        if ours is None or theirs is None:
            continue
        last = study.steps - 1
        spent = f"{mean(r['curve'][last]['seconds'] for r in theirs):.0f}"
        for at in range(9, study.steps, 10):
            gain = [
                a["curve"][at]["greedy"] - b["curve"][last]["greedy"]
                for a, b in zip(ours, theirs, strict=True)
            ]
            seconds = f"{mean(r['curve'][at]['seconds'] for r in ours):.0f}"
            rows.append([method, spent, f"{at + 1}", seconds, points(gain, signed=True), seeds_won(gain)])
    return table("EMPG, tries minus|its s|after steps|s|greedy|seeds won".split("|"), rows) if rows else ""


def pass8(run: dict[str, Any]) -> float:
    return float(run["pass@8"])


def changed(study: Study, **changes: Any) -> Choice:
    """The methods' runs with these changes."""
    return lambda results, method: study.runs(results, method, **changes)


def method_tables(results: Results) -> dict[str, str]:
    """All of them by name."""
    kinds: list[tuple[str, Study, Choice]] = [
        ("methods", ON_TINY, changed(ON_TINY)),
        ("methods-time", ON_TINY, ON_TINY.equal_time),
        ("methods-noise-2", ON_TINY, changed(ON_TINY, noise=0.02)),
        ("methods-noise-5", ON_TINY, changed(ON_TINY, noise=0.05)),
        ("methods-stale", ON_TINY, changed(ON_TINY, stale=4)),
        *((task, study, changed(study)) for task, study in REAL.items()),
    ]
    found = {"shapes": shapes_table(ON_TINY, results)}
    found |= {f"{task}-shapes": shapes_table(study, results) for task, study in REAL.items()}
    found |= {f"{task}-earlier": earlier_table(study, results) for task, study in REAL.items()}
    for name, study, choose in kinds:
        found[name] = methods_table(study, results, choose)
        found[f"{name}-ahead"] = ahead_table(study, results, choose)
    return found
