"""Charts as pictures: PNG and SVG files, and SVG that takes its colors from the page."""

from __future__ import annotations

import re
from collections.abc import Sequence
from html import escape
from io import BytesIO
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from empg_lite.tools.report.charts import Chart, Line

#: Okabe and Ito's palette, distinguishable with color blindness.
PALETTE = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#8a6d3b", "#666666")
#: Placeholder colors: matplotlib draws with them, and the page's SVG replaces them with CSS variables.
_INK, _GRID = "#010203", "#040506"
_DASHES = ("-", "--", "-.", ":")


def picture(chart: Chart, kind: str) -> bytes:
    """A chart as file content; ``kind`` is ``png`` or ``svg``. White background, readable in print."""
    return _draw(chart, kind, ink="#1a1a1a", grid="#d0d0d0", ground="white")


def inline_svg(chart: Chart) -> str:
    """A chart as an SVG element whose colors are CSS variables: ``--ink``, ``--grid``, ``--c0``, ..."""
    text = _draw(chart, "svg", ink=_INK, grid=_GRID, ground="none").decode("utf-8")
    text = text[text.index("<svg") :]
    for color, variable in ((_INK, "ink"), (_GRID, "grid"), *((c, f"c{i}") for i, c in enumerate(PALETTE))):
        text = text.replace(color, f"var(--{variable})")
    # Ids must be unique: all charts share a page.
    text = re.sub(r'(id="|url\(#|href="#)', rf"\g<1>{chart.name}-", text)
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    text = re.sub(r"\s*\n\s*", " ", text)
    text = re.sub(r' (width|height)="[\d.]+pt"', "", text, count=2)
    label = escape(f"{chart.title}: {', '.join(line.label for line in chart.lines)}")
    return text.replace("<svg ", f'<svg role="img" aria-label="{label}" ', 1)


def _draw(chart: Chart, kind: str, *, ink: str, grid: str, ground: str) -> bytes:
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    style: dict[Any, Any] = {
        "svg.fonttype": "none",
        "svg.hashsalt": chart.name,  # makes the file reproducible
        "font.family": "sans-serif",
        "font.sans-serif": ["DejaVu Sans"],
        "font.size": 10,
        "text.parse_math": False,  # labels are folder names, not formulas
    }
    with rc_context(style):
        figure = Figure(figsize=(6.4, 3.2), layout="constrained", facecolor=ground)
        axes = figure.add_subplot(facecolor=ground)
        if chart.stacked:
            _stack(axes, chart.lines)
        else:
            for i, line in enumerate(chart.lines):
                _plot(axes, line, PALETTE[i % len(PALETTE)], _DASHES[i // len(PALETTE) % len(_DASHES)])
        _style_axes(axes, chart, ink, grid)
        if len(chart.lines) > 1 or chart.lines[0].label != chart.title.lower():
            columns = min(3, len(chart.lines))
            figure.legend(loc="outside upper left", ncols=columns, frameon=False, labelcolor=ink, fontsize=9)
        out = BytesIO()
        figure.savefig(out, format=kind, dpi=150, metadata={"Date": None} if kind == "svg" else None)
    return out.getvalue()


def _style_axes(axes: Any, chart: Chart, ink: str, grid: str) -> None:
    from matplotlib.ticker import MaxNLocator, PercentFormatter

    axes.set_xlabel("step", color=ink)
    axes.set_ylabel(chart.y_label, color=ink)
    axes.set_ylim(0, 1 if chart.percent else None)
    axes.set_xlim(left=0)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    if chart.percent:
        axes.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
    axes.grid(color=grid, linewidth=0.6)
    axes.set_axisbelow(True)
    axes.tick_params(colors=ink, labelcolor=ink, length=3)
    for side, spine in axes.spines.items():
        spine.set_visible(side in ("left", "bottom"))
        spine.set_color(ink)


def _plot(axes: Any, line: Line, color: str, dash: str) -> None:
    if line.marks:
        errors = None
        if line.low:
            below = [y - low for y, low in zip(line.y, line.low, strict=True)]
            errors = [below, [high - y for y, high in zip(line.y, line.high, strict=True)]]
        axes.errorbar(line.x, line.y, errors, fmt="D", markersize=5, capsize=3, color=color, label=line.label)
        return
    point = "o" if len(line.x) <= 12 else None
    axes.plot(
        line.x, line.y, dash, color=color, marker=point, markersize=3.5, linewidth=1.6, label=line.label
    )
    if line.low:
        axes.fill_between(line.x, line.low, line.high, color=color, alpha=0.18, linewidth=0)


def _stack(axes: Any, lines: Sequence[Line]) -> None:
    """Areas that add up; a step that a line lacks counts as 0."""
    steps = sorted({x for line in lines for x in line.x})
    values = [[dict(zip(line.x, line.y, strict=True)).get(x, 0.0) for x in steps] for line in lines]
    colors = PALETTE[: len(lines)]
    axes.stackplot(steps, values, labels=[line.label for line in lines], colors=colors, alpha=0.75)
