"""Tables of the methods at their best: every one at the shape and rate that a sweep chose for it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from statistics import mean
from typing import Any

from arms import Setting
from empg_vs_grpo import CPU_SEEDS, ON_TINY, REAL, on_a_cpu
from empg_vs_grpo_report import difference, greedy, points, seeds_won, t1, table, there
from study import Results, Study

from empg_lite.core.bundled import BUNDLED

#: Chooses a method's runs; KeyError while what it depends on is missing.
Choice = Callable[[Results, str], list[Setting]]
Run = dict[str, Any]


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
    found = [(method, _runs(results, choose, method)) for method in study.methods]
    return cost_table([(m, r) for m, r in found if r], "CPU s" if study.task in BUNDLED else "s")


def cost_table(rows: Sequence[tuple[str, Sequence[Run]]], seconds: str) -> str:
    """What each row's runs reached, and for how much."""
    cells = []
    for name, runs in rows:
        setting = runs[0]["setting"]
        shape = [name, f"{setting['problems']} × {setting['samples']}", f"{setting['rate']:g}"]
        reached = [points([figure(r) for r in runs]) for figure in (greedy, t1, pass8)]
        spent = [f"{mean(r[what] for r in runs):.0f}" for what in ("samples", "seen", "seconds")]
        cells.append(shape + reached + spent)
    return table(f"method|P × K|rate|greedy|T=1|pass@8|samples|problems|{seconds}".split("|"), cells)


def ahead_table(study: Study, results: Results, choose: Choice) -> str:
    """EMPG with tries minus each method, seed by seed."""
    ours = _runs(results, choose, study.ours)
    found = [(method, _runs(results, choose, method)) for method in list(study.methods)[1:]]
    theirs = [(method, runs) for method, runs in found if runs]
    return gain_table(ours, theirs, "EMPG, tries minus") if ours and theirs else ""


def gain_table(ours: Sequence[Run], theirs: Sequence[tuple[str, Sequence[Run]]], title: str) -> str:
    """Ours minus each row of theirs, paired by seed."""
    cells = []
    for name, runs in theirs:
        gains = [difference(ours, runs, figure) for figure in (greedy, t1, pass8)]
        won = [seeds_won(gain) for gain in gains[:2]]
        text = [points(gain, signed=True) for gain in gains]
        cells.append([name, text[0], won[0], text[1], won[1], text[2]])
    return table(f"{title}|greedy|seeds won|T=1|seeds won|pass@8".split("|"), cells)


def cpu_tables(results: Results) -> dict[str, str]:
    """The real model on a CPU: three tries, and Dr.GRPO after as many samples and after as long."""
    pairs = [[results.get(setting) for setting in on_a_cpu(seed)] for seed in CPU_SEEDS]
    both = [(a, b) for a, b in pairs if a and b]
    if len(both) < len(pairs):
        return {}
    ours, longer = [a for a, _ in both], [b for _, b in both]
    theirs = [
        ("Dr.GRPO, equal samples", [{**run, **run["examined"]} for run in longer]),
        ("Dr.GRPO, equal time", longer),
    ]
    return {
        "real-cpu": cost_table([("EMPG, 3 tries", ours), *theirs], "CPU s"),
        "real-cpu-ahead": gain_table(ours, theirs, "EMPG, 3 tries minus"),
    }


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
    found = {"shapes": shapes_table(ON_TINY, results), **cpu_tables(results)}
    found |= {f"{task}-shapes": shapes_table(study, results) for task, study in REAL.items()}
    found |= {f"{task}-earlier": earlier_table(study, results) for task, study in REAL.items()}
    for name, study, choose in kinds:
        found[name] = methods_table(study, results, choose)
        found[f"{name}-ahead"] = ahead_table(study, results, choose)
    return found
