"""Tables of ``empg_vs_grpo.py``: means over seeds, differences by seed, 95% t-intervals."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from arms import Setting
from empg_vs_grpo import (
    ARMS,
    CLOSE,
    HARD,
    SCARCE,
    SEEDS,
    TINY,
    Results,
    best_rate,
    chosen,
    rates,
    remembering,
    sweep,
)
from scipy.stats import t as student

PAGE = Path(__file__).parents[1] / "docs" / "empg-vs-grpo.md"
LABELS = {
    "empg": "EMPG",
    "empg-b.5": "EMPG, baseline .5",
    "centered": "centered",
    "grpo": "GRPO",
    "dr_grpo": "Dr.GRPO",
    "rloo": "RLOO",
    "raft": "RAFT",
}
#: Steps of the running mean over the samples' rewards.
SMOOTH = 5
#: A run collapses when its samples end this far below the base model, or below its own best.
BELOW_BASE, BELOW_PEAK = 0.02, 0.15

Figure = Callable[[Mapping[str, Any]], float]


def greedy(run: Mapping[str, Any]) -> float:
    return float(run["pass@1"])


def t1(run: Mapping[str, Any]) -> float:
    return float(run["t1_accuracy"])


def smooth(values: Sequence[float]) -> list[float]:
    """Running mean over the last ``SMOOTH`` values."""
    return [mean(values[max(0, i + 1 - SMOOTH) : i + 1]) for i in range(len(values))]


def interval(values: Sequence[float]) -> tuple[float, float]:
    """Mean and half-width of its 95% t-interval."""
    n = len(values)
    return mean(values), float(student.ppf(0.975, n - 1)) * stdev(values) / math.sqrt(
        n
    ) if n > 1 else math.nan


def points(values: Sequence[float], signed: bool = False) -> str:
    """Per cent or points with the half-width: ``76.3 ± 1.2``."""
    center, half = interval(values)
    return f"{100 * center:{'+' if signed else ''}.1f} ± {100 * half:.1f}"


def seeds_won(gains: Sequence[float]) -> str:
    """``6 of 8``."""
    return f"{sum(d > 0 for d in gains)} of {len(gains)}"


def table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A Markdown table."""
    lines = ["| " + " | ".join(header) + " |", "|" + "---|" * len(header)]
    return "\n".join([*lines, *("| " + " | ".join(row) + " |" for row in rows)])


def there(results: Results, settings: Sequence[Setting]) -> list[dict[str, Any]] | None:
    """The runs of a row in the order of the seeds, or None while one is missing."""
    return [results[s] for s in settings] if all(s in results for s in settings) else None


def row_of(
    results: Results, task: str, arm: str, passes: int = 1, **changes: Any
) -> list[dict[str, Any]] | None:
    """The eight runs of an arm at its chosen rate."""
    try:
        return there(results, chosen(results, task, (arm,), passes, **changes))
    except KeyError:
        return None


def difference(a: Sequence[Mapping[str, Any]], b: Sequence[Mapping[str, Any]], figure: Figure) -> list[float]:
    """Paired by seed."""
    assert [r["setting"]["seed"] for r in a] == [r["setting"]["seed"] for r in b]
    return [figure(x) - figure(y) for x, y in zip(a, b, strict=True)]


def collapsed(run: Mapping[str, Any], base: float) -> bool:
    rewards = smooth([point["reward"] for point in run["curve"]])[SMOOTH - 1 :]
    return rewards[-1] < base - BELOW_BASE or rewards[-1] < max(rewards) - BELOW_PEAK


# --- tables ---------------------------------------------------------------------------------------


def base_of(results: Results, task: str) -> list[dict[str, Any]]:
    return [results[Setting(task, "empg", 1e-3, seed, steps=0)] for seed in SEEDS]


def rates_table(results: Results, task: str, passes: int = 1, arms: Sequence[str] = ARMS) -> str:
    rows = []
    for arm in arms:
        cells = []
        for rate in rates(task, passes):
            runs = there(results, [s for s in sweep(task, passes, [arm]) if s.rate == rate])
            cells.append("" if runs is None else f"{100 * mean(map(greedy, runs)):.1f}")
        if all(cells):
            best = rates(task, passes).index(best_rate(results, task, arm, passes))
            cells[best] = f"**{cells[best]}**"
            rows.append([LABELS[arm], *cells])
    return table(["arm", *(f"{rate:g}" for rate in rates(task, passes))], rows) if rows else ""


def main_table(
    results: Results, task: str, passes: int = 1, arms: Sequence[str] = ARMS, **changes: Any
) -> str:
    base = base_of(results, task)
    rows = [
        [
            "base model",
            f"{100 * greedy(base[0]):.1f}",
            points([t1(r) for r in base]),
            points([r["pass@8"] for r in base]),
            f"{base[0]['mean_length']:.1f}",
            f"{mean(r['t1_length'] for r in base):.1f}",
            *[""] * 2,
        ]
    ]
    for arm in arms:
        runs = row_of(results, task, arm, passes, **changes)
        if runs is None:
            continue
        rows.append(
            [
                LABELS[arm],
                points([greedy(r) for r in runs]),
                points([t1(r) for r in runs]),
                points([r["pass@8"] for r in runs]),
                f"{mean(r['mean_length'] for r in runs):.1f}",
                f"{mean(r['t1_length'] for r in runs):.1f}",
                f"{mean(r['seconds'] for r in runs):.0f}",
                f"{sum(collapsed(r, mean(map(t1, base))) for r in runs)} of {len(runs)}",
            ]
        )
    header = "arm|greedy|T=1|pass@8|length|length, T=1|CPU s|collapsed".split("|")
    return table(header, rows) if len(rows) > 1 else ""


def paired_table(
    results: Results, task: str, passes: int = 1, arms: Sequence[str] = ARMS, **changes: Any
) -> str:
    """EMPG minus each other arm, seed by seed."""
    ours = row_of(results, task, "empg", passes, **changes)
    rows = []
    for arm in arms:
        theirs = row_of(results, task, arm, passes, **changes)
        if arm == "empg" or ours is None or theirs is None:
            continue
        gain = difference(ours, theirs, greedy)
        others = [difference(ours, theirs, figure) for figure in (t1, lambda r: float(r["pass@8"]))]
        won = seeds_won(gain)
        rows.append([LABELS[arm], points(gain, signed=True), won, *(points(d, signed=True) for d in others)])
    return table(["EMPG minus", "greedy", "seeds won", "T=1", "pass@8"], rows) if rows else ""


def changes_table(
    results: Results, arms: Sequence[str], name: str, values: Sequence[Any], labels: Sequence[str]
) -> str:
    """Greedy and T=1 under changed settings, each beside the same arm unchanged; only what every arm has."""
    kinds = [({}, "unchanged"), *(({name: v}, label) for v, label in zip(values, labels, strict=True))]
    rows_of = {label: [row_of(results, HARD, arm, **changes) for arm in arms] for changes, label in kinds}
    whole = {label: [r for r in rows if r] for label, rows in rows_of.items() if all(rows)}
    if len(whole) < 2 or "unchanged" not in whole:
        return ""
    header, plain = ["arm", "unchanged"], whole.pop("unchanged")
    rows = [[LABELS[arm], points([greedy(r) for r in runs])] for arm, runs in zip(arms, plain, strict=True)]
    for label, changed in whole.items():
        header += [f"{label}: greedy", "Δ greedy", "Δ T=1"]
        for row, before, after in zip(rows, plain, changed, strict=True):
            row.append(points([greedy(r) for r in after]))
            row += [points(difference(after, before, figure), signed=True) for figure in (greedy, t1)]
    return table(header, rows)


def memory_table(results: Results, **changes: Any) -> str:
    try:
        plain = there(results, remembering(results, 0, **changes))
        kinds = [
            (size, weight, there(results, remembering(results, size, (weight,), **changes)))
            for size in (1,)
            for weight in ("one", "group")
        ]
    except KeyError:
        return ""
    if plain is None:
        return ""
    figures = {name: lambda r, n=name: r["hardest"][n] for name in ("t1", "greedy")}
    base = mean(r["hardest"]["base_t1"] for r in plain)
    rows = [["base model", "", f"{100 * base:.1f}", "", "", "", ""]]
    for size, weight, runs in [(0, "", plain), *kinds]:
        if runs is None:
            continue
        cells = [str(size), {"": "", "one": "1 a row", "group": "K a problem"}[weight]]
        for figure in figures.values():
            cells.append(points([figure(r) for r in runs]))
            cells.append(points(difference(runs, plain, figure), signed=True) if size else "")
        cells.append(points(difference(runs, plain, greedy), signed=True) if size else "")
        rows.append(cells)
    header = [
        "memory",
        "weight",
        "hardest quarter, T=1",
        "Δ",
        "hardest quarter, greedy",
        "Δ",
        "test, greedy Δ",
    ]
    return table(header, rows)


def at_seconds(run: Mapping[str, Any], base: float, seconds: float) -> float:
    """Greedy accuracy on the curve's validation rows after so many CPU seconds, interpolated."""
    known = [(0.0, base)] + [(p["seconds"], p["greedy"]) for p in run["curve"] if "greedy" in p]
    for (s0, a0), (s1, a1) in zip(known, known[1:], strict=False):
        if seconds <= s1:
            return a0 + (a1 - a0) * (seconds - s0) / (s1 - s0)
    return known[-1][1]


def clock_table(results: Results, task: str) -> str:
    rows_of = {arm: row_of(results, task, arm) for arm in ARMS}
    runs_of = {arm: runs for arm, runs in rows_of.items() if runs is not None}
    if "grpo" not in runs_of:
        return ""
    base = greedy(base_of(results, task)[0])
    limit = min(run["seconds"] for runs in runs_of.values() for run in runs)
    budgets = [limit / 2, limit]
    rows = []
    for arm, runs in runs_of.items():
        cells = [LABELS[arm]]
        for budget in budgets:
            ours = [at_seconds(r, base, budget) for r in runs]
            theirs = [at_seconds(r, base, budget) for r in runs_of["grpo"]]
            gain = [a - b for a, b in zip(ours, theirs, strict=True)]
            cells += [points(ours), points(gain, signed=True) if arm != "grpo" else ""]
        rows.append(cells)
    header = ["arm"]
    for budget in budgets:
        header += [f"after {budget:.0f} CPU s", "− GRPO"]
    return table(header, rows)


def length_table(results: Results, task: str, levels: Sequence[float] = (0.3, 0.4, 0.5)) -> str:
    """Tokens of right samples at the step where the running reward first reaches a level."""
    rows = []
    for arm in ARMS:
        runs = row_of(results, task, arm)
        if runs is None:
            continue
        cells = [LABELS[arm]]
        for level in levels:
            found = [x for r in runs if (x := _length_at(r, level)) is not None]
            cells.append(f"{mean(found):.1f} ({len(found)})" if found else "never")
        rows.append([*cells, f"{mean(r['mean_length_right'] for r in runs):.1f}"])
    header = ["arm", *(f"reward {level:.0%}" for level in levels), "greedy, at the end"]
    return table(header, rows) if rows else ""


def _length_at(run: Mapping[str, Any], level: float) -> float | None:
    curve = run["curve"]
    for i, value in enumerate(smooth([p["reward"] for p in curve])):
        if i + 1 >= SMOOTH and value >= level:
            near = [p for p in curve[i + 1 - SMOOTH : i + 1] if p["length_right"]]
            total = sum(p["reward"] for p in near)
            return float(sum(p["length_right"] * p["reward"] for p in near) / total)
    return None


def kl_stop_table(results: Results) -> str:
    kinds = {
        "0.005 (default)": {},
        "0.001": {"kl_stop": 0.001},
    }
    rows = []
    for label, changes in kinds.items():
        runs = row_of(results, HARD, "empg", 4, **changes)
        if runs is not None:
            updates = mean(mean(p["updates"] for p in r["curve"]) for r in runs)
            rows.append(
                [label, points(list(map(greedy, runs))), points(list(map(t1, runs))), f"{updates:.1f}"]
            )
    return table(["kl_stop", "greedy", "T=1", "passes done"], rows) if rows else ""


def k_table(results: Results) -> str:
    """EMPG with as many samples a step, split otherwise into problems and samples of each."""
    rows = []
    for p, k in ((16, 4), (8, 8), (4, 16)):
        runs = row_of(results, HARD, "empg", problems=p, samples=k)
        if runs is not None:
            cells = [points([figure(r) for r in runs]) for figure in (greedy, t1)]
            rows.append([f"{p} × {k}", *cells, points([r["pass@8"] for r in runs])])
    return table(["P × K", "greedy", "T=1", "pass@8"], rows) if len(rows) > 1 else ""


def tables(results: Results) -> dict[str, str]:
    """Every table for which the runs are there, by name."""
    from empg_vs_grpo_methods import method_tables  # builds on this module

    found = method_tables(results) | {
        "rates": rates_table(results, HARD),
        "main": main_table(results, HARD),
        "paired": paired_table(results, HARD),
        "clock": clock_table(results, HARD),
        "stale": changes_table(results, ARMS, "stale", (4,), ("4 steps stale",)),
        "stale-1": changes_table(results, CLOSE, "stale", (1,), ("1 step stale",)),
        "noise": changes_table(results, ("empg",), "noise", (0.02, 0.05), ("2% let pass", "5% let pass")),
        "memory": memory_table(results),
        "memory-hard": memory_table(results, **SCARCE),
        "length": length_table(results, HARD),
        "rates-tiny": rates_table(results, TINY),
        "main-tiny": main_table(results, TINY),
        "paired-tiny": paired_table(results, TINY),
        "k": k_table(results),
        "kl-stop": kl_stop_table(results),
        "relatives": main_table(results, HARD, arms=("empg", "grpo", "rloo", "raft"))
        if row_of(results, HARD, "raft")
        else "",
    }
    for passes in (2, 4):
        found[f"rates-{passes}"] = rates_table(results, HARD, passes)
        found[f"passes-{passes}"] = main_table(results, HARD, passes)
        found[f"paired-{passes}"] = paired_table(results, HARD, passes)
    return {name: text for name, text in found.items() if text}


# --- the page ---------------------------------------------------------------------------------------


def fill(page: str, made: Mapping[str, str]) -> str:
    """The page with each table between its markers, ``<!-- NAME -->`` and ``<!-- /NAME -->``, made anew."""
    for name, text in made.items():
        inside = re.compile(rf"(<!-- {name} -->\n).*?(<!-- /{name} -->)", re.DOTALL)
        page = inside.sub(lambda found, text=text: f"{found[1]}{text}\n{found[2]}", page)
    return page


def report(results: Results) -> None:
    """Print every table and put it into the page."""
    made = tables(results)
    for name, text in made.items():
        print(f"## {name}\n\n{text}\n")
    PAGE.write_text(fill(PAGE.read_text("utf-8"), made), "utf-8")
    print(PAGE)
