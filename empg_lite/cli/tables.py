"""Results as tables on a terminal: evaluation, memory plan, profile, sweep, installation."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.table import Table

from empg_lite.cli.output import Output
from empg_lite.loop.eval_summary import BREAKDOWNS
from empg_lite.loop.plan import KEYS, SHARE, Plan
from empg_lite.run.layout import PROFILE

# --- evaluation ---------------------------------------------------------------------------------------

_LABELS = {
    "pass@1": "greedy accuracy",
    "pass@1_ci95": "  95% interval",
    "t1_accuracy": "T=1 accuracy",
    "mean_length": "tokens per answer",
    "mean_length_right": "tokens per right answer",
    "truncated": "cut off",
    "grader_failures": "grader failed on",
    "mean_reward": "mean reward (shaped)",
}


def show_evaluation(out: Output, label: str, result: Mapping[str, Any]) -> None:
    """Figures, breakdowns by level and subject, and with ``--base`` the comparison."""
    base = result.get("base")
    out.show(_figures(label, result, base))
    for name in BREAKDOWNS.values():
        if name in result:
            out.show(_breakdown(name, result[name], base[name] if base else None))
    if base:
        out.say(_comparison(result["paired"], result["n"]))
    out.say(f"every answer: {result['answers']}", style="dim")


def _columns(title: str, first: str, compared: bool) -> Table:
    table = Table(title=title)
    table.add_column(first)
    if compared:
        table.add_column("base", justify="right")
    table.add_column("tuned", justify="right")
    return table


def _figures(label: str, result: Mapping[str, Any], base: Mapping[str, Any] | None) -> Table:
    table = _columns(f"{label} on {result['split']} ({result['n']} problems)", "", base is not None)
    sides = [side for side in (base, result) if side is not None]
    for name in result:
        if name in ("n", "split", "answers", "base", "paired", "behaviors", *BREAKDOWNS.values()):
            continue
        table.add_row(_LABELS.get(name, name), *(_figure(name, side[name]) for side in sides))
    for behavior in result["behaviors"]:
        table.add_row(
            f"answers with {behavior.replace('_', ' ')}",
            *(f"{side['behaviors'][behavior]:.1%}" for side in sides),
        )
    return table


def _breakdown(name: str, tuned: Mapping[str, Any], base: Mapping[str, Any] | None) -> Table:
    table = _columns("", name.replace("_", " "), base is not None)
    for value, figures in tuned.items():
        cells = [_accuracy(side[value]) for side in (base, tuned) if side is not None]
        table.add_row(f"{value} ({figures['n']})", *cells)
    return table


def _accuracy(figures: Mapping[str, Any]) -> str:
    return f"{figures['pass@1']:.1%} {_figure('pass@1_ci95', figures['pass@1_ci95'])}"


def _figure(name: str, value: object) -> str:
    if value is None:
        return "-"
    if isinstance(value, list):
        return "[" + ", ".join(f"{v:.1%}" for v in value) + "]"
    if name.startswith("mean_length"):
        return f"{value:.1f}"
    return f"{value:.1%}" if isinstance(value, float) else str(value)


def _comparison(paired: Mapping[str, Any], n: int) -> str:
    """Base and tuned in one sentence."""
    p = paired["p_value"]
    luck = "p < 0.0001" if p < 1e-4 else f"p = {p:.4f}"
    text = (
        f"tuned against base on the same {n} problems: {100 * paired['gain']:+.1f} points; only tuned is "
        f"right on {paired['only_second']}, only base on {paired['only_first']} (McNemar, exact: {luck})"
    )
    if paired["both_right"]:
        base, tuned = paired["mean_length_first"], paired["mean_length_second"]
        text += f"; where both are right: {base:.1f} -> {tuned:.1f} tokens"
    return text


# --- memory plan --------------------------------------------------------------------------------------


def show_plan(out: Output, model: str, plan: Plan, change: Sequence[str] | None) -> None:
    """Terms, totals, what each ``auto`` became, the verdict, and what to change."""
    s, free = plan.settings, plan.machine.free
    kind = "NF4" if s.four_bit else f"{8 * s.itemsize} bit"
    where = "a GPU" if plan.machine.device == "cuda" else "this CPU"
    out.say(f"{model} in {kind}, LoRA r={s.lora_r}, computing in {8 * s.itemsize} bit, on {where}")
    out.show(_terms(plan))
    sizes = ", ".join(f"{KEYS[n]} {str(getattr(s, n)).lower()}" for n in KEYS if n != "merged" or s.merged)
    out.say(f"for {sizes}")
    phase, term = plan.largest
    out.say(f"peak: {_gb(plan.peak)} GB in the {phase}; the largest term is {term}")
    room = f"{_gb(SHARE * free)} GB ({SHARE:.0%} of the {_gb(free)} GB left once the libraries are loaded)"
    if plan.fits:
        out.say(f"fits in {room}", style="bold green")
        return
    out.say(f"does not fit in {room}", style="bold red")
    advice = "use a larger card or a smaller model"
    if change is not None:
        advice = " ".join(f"--set {override}" for override in change)
    out.say(f"to make it fit: {advice}")


def _terms(plan: Plan) -> Table:
    table = Table("phase", "term")
    table.add_column("GB", justify="right")
    for phase, terms in [("all", plan.stays), *plan.phases.items()]:
        for i, (term, size) in enumerate((t, n) for t, n in terms.items() if n):
            table.add_row(phase if i == 0 else "", term, _gb(size))
        if phase in plan.totals:
            table.add_row("", "in all", _gb(plan.totals[phase]), style="bold")
        table.add_section()
    return table


def _gb(size: float) -> str:
    """In 10^9 bytes, with three decimals below one."""
    return f"{size / 1e9:.3f}" if size < 1e9 else f"{size / 1e9:.1f}"


# --- profile ------------------------------------------------------------------------------------------


def show_profile(out: Output, run: Path) -> None:
    """``profile.json`` as a table; nothing if no step was taken."""
    path = run / PROFILE
    if not path.is_file():
        return
    found = json.loads(path.read_text("utf-8"))
    table = Table("part")
    for heading in ("seconds", "share", "at least", "of the device's limit"):
        table.add_column(heading, justify="right")
    for part, seconds in found["seconds"].items():
        floor = found["floor"].get(part)
        least = ("", "") if floor is None else (f"{floor:.2f}", f"{found['of_floor'][part]:.1%}")
        table.add_row(part.replace("_", " "), f"{seconds:.2f}", f"{found['shares'][part]:.1%}", *least)
    out.show(table)
    rate, rates = found["tokens_per_second"], found["rates"]
    for line in (
        f"{found['steps']} steps: {rate['sampling']:.0f} tokens/s while sampling, "
        f"{rate['step']:.0f} over whole steps",
        f"sampling computed {found['wasted_row_steps']:.1%} of its rows after their stop; "
        f"fitting computed {found['padding']:.1%} padding "
        f"and skipped {found['rows_skipped']:.1%} of the rows",
        f"at least: this device copies {rates['bytes_per_second'] / 1e9:.1f} GB/s and multiplies "
        f"{rates['flops_per_second'] / 1e9:.0f} GFLOP/s",
        "everything else: setup, preflight, evaluation, checkpoints",
    ):
        out.say(line)


# --- sweep --------------------------------------------------------------------------------------------

_COLUMNS = {
    "accuracy_before": "greedy before",
    "accuracy_after": "greedy after",
    "t1_accuracy_before": "T=1 before",
    "t1_accuracy_after": "T=1 after",
    "seconds": "training",
}


def show_sweep(out: Output, result: Mapping[str, Any]) -> None:
    """One line per seed, then mean and range; columns that no run has are left out."""
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
    out.show(table)
    out.say(f"compared in {result['report']}")


def _cell(name: str, value: float | None) -> str:
    if value is None:
        return ""
    return f"{value:.0f} s" if name == "seconds" else f"{value:.1%}"


# --- installation -------------------------------------------------------------------------------------


def show_install(out: Output, found: Mapping[str, Any]) -> None:
    """Packages against the tested versions, the machine, and the command that fixes what is wrong."""
    table = Table("package", "installed", "tested with", "", box=None, pad_edge=False)
    for name, f in found["packages"].items():
        state = "NOT TESTED" if not f["ok"] else "ok" if f["installed"] else "optional, not installed"
        style = "bold red" if not f["ok"] else None if f["installed"] else "dim"
        table.add_row(name, f["installed"] or "-", f["wanted"] or "any", state, style=style)
    out.show(table)
    out.say("")
    for name, value in found.items():
        if name not in ("ok", "packages"):
            out.say(f"{name}: {value}")
    fix = " ".join(f"'{name}{f['wanted']}'" for name, f in found["packages"].items() if not f["ok"])
    out.say(
        f"to fix: pip install {fix}" if fix else "all good; first try: empg-lite train --recipe tiny",
        style="bold",
    )
