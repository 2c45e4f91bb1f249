"""From runs to a page: one HTML file without links to anything, and the figures beside it."""

from __future__ import annotations

import base64
import hashlib
import json
from collections.abc import Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any

from empg_lite.core.behaviors import BEHAVIORS
from empg_lite.core.rationale import Rationale
from empg_lite.core.safe_text import safe
from empg_lite.core.view import View
from empg_lite.loop.eval_summary import paired
from empg_lite.recipe.schema import field_docs
from empg_lite.run import store
from empg_lite.tools.report.charts import Chart, all_charts
from empg_lite.tools.report.drawing import PALETTE, inline_svg, picture
from empg_lite.tools.report.reading import Arm, StoredRun, arms_of, differences, read_run
from empg_lite.tools.report.samples import choose, pieces, rationale_entry, stored

#: Characters of rationales, and of evaluation answers, that a page holds; figures take about 0.3 MB.
ROOM_SAMPLES, ROOM_ANSWERS = 900_000, 500_000


def write_report(paths: Sequence[Path], out: Path, view: View | None = None) -> dict[str, Any]:
    """Write the page of one run, or of several beside each other, and its figures.

    Args:
        paths: run directories.
        out: the page; figures go into the folder ``figures`` beside it, as PNG and SVG.

    Returns:
        ``report`` (the page), ``bytes``, ``figures`` (their files), ``runs``, ``rationales`` (shown),
        ``rationales_stored``.

    Raises:
        RecipeError: a run's recipe cannot be read.
        StorageError: the page cannot be written.
    """
    view = view or View()
    runs = [read_run(path) for path in paths]
    arms = arms_of(runs)
    charts = all_charts(arms)
    with view.phase("drawing", len(charts)) as on_done:
        figures = []
        for chart in charts:
            for kind in ("svg", "png"):
                path = out.parent / "figures" / f"{chart.name}.{kind}"
                store.write_file(path, picture(chart, kind))
                figures.append(str(path))
            on_done(1)
    everything = stored(runs)
    page, shown = _page(runs, arms, charts, everything)
    store.write_file(out, page)
    return {
        "report": str(out),
        "bytes": len(page.encode("utf-8")),
        "figures": figures,
        "runs": len(runs),
        "rationales": shown,
        "rationales_stored": len(everything),
    }


def _page(
    runs: Sequence[StoredRun],
    arms: Sequence[Arm],
    charts: Sequence[Chart],
    everything: Sequence[tuple[int, Rationale]],
) -> tuple[str, int]:
    """The page's text, and how many rationales it shows."""
    from jinja2 import Environment, StrictUndefined

    questions = _Questions()
    chosen = choose(everything, ROOM_SAMPLES)
    chosen.sort(key=lambda pair: (pair[0], pair[1].step, pair[1].problem_id, pair[1].sample_index))
    samples = [rationale_entry(r, run, questions.number(r)) for run, r in chosen]
    answers = [entry for i, run in enumerate(runs) for entry in _answers(run, i, questions, len(runs))]
    data = {
        "runs": [safe(run.name) for run in runs],
        "questions": questions.entries,
        "samples": samples,
        "answers": answers,
    }
    folder = files("empg_lite.tools.report")
    script = (folder / "page.js").read_text("utf-8")
    digest = base64.b64encode(hashlib.sha256(script.encode("utf-8")).digest()).decode("ascii")
    environment = Environment(
        autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters["percent"] = lambda x: "–" if x is None else f"{x:.1%}"
    environment.filters["safe_text"] = lambda x: safe(str(x))
    template = environment.from_string((folder / "page.html.j2").read_text("utf-8"))
    page = template.render(
        title=safe(runs[0].name if len(runs) == 1 else f"{len(runs)} runs"),
        runs=runs,
        arms=[_arm_row(arm) for arm in arms],
        differences=differences(arms) if len(arms) > 1 else [],
        single=runs[0] if len(runs) == 1 else None,
        headline=_headline(runs[0]) if len(runs) == 1 else None,
        charts=[{"chart": c, "svg": inline_svg(c), "table": _table(c)} for c in charts],
        events=[_event(i, e) for i, run in enumerate(runs) for e in run.events][:200],
        docs=field_docs(),
        behaviors=BEHAVIORS,
        palette=PALETTE,
        shown=len(samples),
        stored=len(everything),
        answers=len(answers),
        script=script,
        script_digest=digest,
        style=(folder / "page.css").read_text("utf-8"),
        # "<" never stands in it as it is: no text can end the element.
        data=json.dumps(data, separators=(",", ":")).replace("<", "\\u003c"),
    )
    return page, len(samples)


class _Questions:
    """Each problem once; the table's rows name it by number."""

    def __init__(self) -> None:
        self.entries: list[dict[str, str]] = []
        self._numbers: dict[tuple[str, str], int] = {}

    def number(self, r: Rationale) -> int:
        key = (r.problem_id, r.gold)
        if key not in self._numbers:
            self._numbers[key] = len(self.entries)
            text = safe(r.question or r.prompt)[:4000]
            self.entries.append({"id": r.problem_id, "text": text, "gold": safe(r.gold)[-400:]})
        return self._numbers[key]


def _answers(run: StoredRun, number: int, questions: _Questions, runs: int) -> list[dict[str, Any]]:
    """Base and tuned answers to the same problems; those that differ first, as many as there is room for."""
    room, entries = ROOM_ANSWERS // runs, []
    for base, tuned in sorted(run.answers, key=lambda pair: pair[0].right == pair[1].right):
        room -= 300 + len(base.completion) + len(tuned.completion)
        if room < 0:
            break
        entries.append(
            {
                "run": number,
                "q": questions.number(tuned),
                "sides": [
                    {"right": r.right, "tokens": len(r.completion_ids), "rule": r.rule, "parts": pieces(r)}
                    for r in (base, tuned)
                ],
            }
        )
    return entries


def _headline(run: StoredRun) -> dict[str, Any]:
    """The figures that come first. Absent ones are None: a run may be young, or without evaluation."""
    compared = None
    if run.answers:
        compared = paired([a for a, _ in run.answers], [b for _, b in run.answers])
    last = run.steps[-1] if run.steps else {}
    return {
        "before": run.before,
        "after": run.after,
        "paired": compared,
        "steps": last.get("step", 0),
        "planned": run.recipe.run.steps,
        "seconds": sum(r.get("step_time", 0.0) for r in run.steps),
        "sampled": last.get("num_tokens", 0),
        "reward": last.get("reward"),
        "health": last.get("health", []),
    }


def _arm_row(arm: Arm) -> dict[str, Any]:
    """One line of the comparison: the range over its seeds."""

    def over(values: Sequence[Any]) -> tuple[float, float, float] | None:
        known = [v for v in values if isinstance(v, int | float)]
        return (sum(known) / len(known), min(known), max(known)) if known else None

    return {
        "label": safe(arm.label),
        "runs": arm.runs,
        "before": over([run.before and run.before["pass@1"] for run in arm.runs]),
        "after": over([run.after and run.after["pass@1"] for run in arm.runs]),
        "t1_before": over([run.before and run.before["t1_accuracy"] for run in arm.runs]),
        "t1_after": over([run.after and run.after["t1_accuracy"] for run in arm.runs]),
        "length": over([run.after and run.after["mean_length_right"] for run in arm.runs]),
        "seconds": over([sum(r.get("step_time", 0.0) for r in run.steps) for run in arm.runs]),
    }


def _table(chart: Chart) -> dict[str, Any]:
    """The numbers of a chart, for those who cannot see it and those who want them: one row a step."""
    steps = sorted({x for line in chart.lines for x in line.x})

    def cell(line: Any, x: float) -> str:
        if x not in line.x:
            return ""
        i = line.x.index(x)
        value = f"{line.y[i]:.1%}" if chart.percent else f"{line.y[i]:.4g}"
        if not line.low:
            return value
        low, high = (f"{v:.1%}" if chart.percent else f"{v:.4g}" for v in (line.low[i], line.high[i]))
        return f"{value} [{low}, {high}]"

    return {
        "head": ["step", *(line.label for line in chart.lines)],
        "rows": [[f"{x:g}", *(cell(line, x) for line in chart.lines)] for x in steps],
    }


def _event(run: int, event: dict[str, Any]) -> dict[str, Any]:
    facts = {k: v for k, v in event.items() if k not in ("event", "step")}
    said = " · ".join(f"{k}: {v if isinstance(v, str) else json.dumps(v)}" for k, v in facts.items())
    return {
        "run": run,
        "step": event.get("step", ""),
        "event": event.get("event", ""),
        "facts": safe(said)[:500],
    }
