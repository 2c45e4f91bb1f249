"""How the figures of an evaluation look on a terminal."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rich.table import Table

from empg_lite.cli.options import Output
from empg_lite.loop.eval_summary import BREAKDOWNS

_LABELS = {
    "pass@1": "greedy accuracy",
    "pass@1_ci95": "  95% interval",
    "t1_accuracy": "T=1 accuracy",
    "mean_length": "tokens an answer",
    "mean_length_right": "tokens a right answer",
    "truncated": "cut off",
    "grader_failures": "grader failed on",
    "mean_reward": "mean reward (shaped)",
}


def show_evaluation(out: Output, label: str, result: Mapping[str, Any]) -> None:
    """Figures, breakdowns by level and subject, and base against tuned where both were asked."""
    base = result.get("base")
    out.print(_figures(label, result, base))
    for name in BREAKDOWNS.values():
        if name in result:
            out.print(_breakdown(name, result[name], base[name] if base else None))
    if base:
        out.print(_verdict(result["paired"], result["n"]), markup=False, highlight=False)
    out.print(f"every answer: {result['answers']}", style="dim", markup=False, highlight=False)


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
        table.add_row(_LABELS.get(name, name), *(_cell(name, side[name]) for side in sides))
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
    return f"{figures['pass@1']:.1%} {_cell('pass@1_ci95', figures['pass@1_ci95'])}"


def _cell(name: str, value: object) -> str:
    if value is None:
        return "-"
    if isinstance(value, list):
        return "[" + ", ".join(f"{v:.1%}" for v in value) + "]"
    if name.startswith("mean_length"):
        return f"{value:.1f}"
    return f"{value:.1%}" if isinstance(value, float) else str(value)


def _verdict(paired: Mapping[str, Any], n: int) -> str:
    """Base against tuned in one sentence."""
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
