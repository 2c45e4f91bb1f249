"""A memory plan as a person reads it."""

from __future__ import annotations

from typing import Any

from rich.table import Table

from empg_lite.cli.options import Output
from empg_lite.loop.plan import KEYS, SHARE, Plan, advice_text
from empg_lite.recipe.schema import Recipe


def show_plan(out: Output, recipe: Recipe, plan: Plan, change: dict[str, Any] | None) -> None:
    """Terms, totals, what ``auto`` became, the verdict, and what to change. Nothing under ``--json``."""
    if out.as_json:
        return
    s, free = plan.settings, plan.machine.free
    kind = "NF4" if s.four_bit else f"{8 * s.itemsize} bit"
    where = "a GPU" if plan.machine.device == "cuda" else "this CPU"
    title = f"{recipe.model.name} in {kind}, LoRA r={s.lora_r}, computing in {8 * s.itemsize} bit, on {where}"
    out.print(title, markup=False, highlight=False)
    out.print(_terms(plan), highlight=False)
    sizes = ", ".join(f"{KEYS[n]} {str(getattr(s, n)).lower()}" for n in KEYS if n != "merged" or s.merged)
    out.print(f"for {sizes}", markup=False, highlight=False)
    phase, term = plan.largest
    out.print(f"peak: {_gb(plan.peak)} GB in the {phase}; the largest term is {term}", highlight=False)
    room = f"{_gb(SHARE * free)} GB (nine tenths of the {_gb(free)} GB free beside the libraries)"
    if plan.fits:
        out.print(f"fits in {room}", style="bold green", highlight=False)
        return
    out.print(f"does not fit in {room}", style="bold red", highlight=False)
    out.print(f"to make it fit: {advice_text(change)}", markup=False, highlight=False)


def _terms(plan: Plan) -> Table:
    table = Table("phase", "term")
    table.add_column("GB", justify="right")
    for phase, terms in [("both", plan.stays), *plan.phases.items()]:
        for i, (term, size) in enumerate((t, n) for t, n in terms.items() if n):
            table.add_row(phase if i == 0 else "", term, _gb(size))
        if phase in plan.totals:
            table.add_row("", "with what stays", _gb(plan.totals[phase]), style="bold")
        table.add_section()
    return table


def _gb(size: float) -> str:
    """10^9 bytes; three digits below one."""
    return f"{size / 1e9:.3f}" if size < 1e9 else f"{size / 1e9:.1f}"
