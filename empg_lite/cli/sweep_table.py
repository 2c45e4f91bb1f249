"""How the runs of a sweep look beside each other on a terminal."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rich.table import Table

from empg_lite.cli.options import Output

_COLUMNS = {
    "accuracy_before": "greedy before",
    "accuracy_after": "greedy after",
    "t1_accuracy_before": "T=1 before",
    "t1_accuracy_after": "T=1 after",
    "seconds": "training",
}


def show_sweep(out: Output, result: Mapping[str, Any]) -> None:
    """One line a seed, and the mean with the range; columns that no run has are left out."""
    if out.as_json:
        return
    runs, seeds = result["runs"], result["seeds"]
    shown = {name: title for name, title in _COLUMNS.items() if any(r[name] is not None for r in runs)}
    table = Table("seed", *shown.values(), title=f"{len(seeds)} seeds in {result['sweep']}")
    for column in table.columns[1:]:
        column.justify = "right"
    for seed, run in zip(seeds, runs, strict=True):
        table.add_row(str(seed), *(_cell(name, run[name]) for name in shown), end_section=run is runs[-1])
    spreads = [(name, result[name]) for name in shown]
    table.add_row("mean", *(_cell(name, s and s["mean"]) for name, s in spreads), style="bold")
    for end, title in (("min", "lowest"), ("max", "highest")):
        table.add_row(title, *(_cell(name, s and s[end]) for name, s in spreads), style="dim")
    out.print(table)
    out.print(f"beside each other: {result['report']}", markup=False, highlight=False)


def _cell(name: str, value: float | None) -> str:
    if value is None:
        return ""
    return f"{value:.0f} s" if name == "seconds" else f"{value:.1%}"
