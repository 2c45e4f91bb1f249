"""From runs to a page: one self-contained HTML file, with its figures in a folder next to it."""

from __future__ import annotations

import base64
import hashlib
import json
from collections.abc import Sequence
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING, Any

from empg_lite.core.behaviors import BEHAVIORS
from empg_lite.core.safe_text import safe
from empg_lite.core.view import View
from empg_lite.loop.eval_summary import paired
from empg_lite.recipe.schema import field_docs
from empg_lite.run import store
from empg_lite.tools.report.charts import Chart, Line, all_charts
from empg_lite.tools.report.drawing import inline_svg, picture
from empg_lite.tools.report.reading import Arm, StoredRun, arms_of, differences, read_run
from empg_lite.tools.report.samples import Questions, answer_entries, choose, rationale_entry

if TYPE_CHECKING:
    from empg_lite.core.rationale import Rationale

#: Characters of rationales, and of evaluation answers, on a page; the figures take about 0.3 MB.
ROOM_SAMPLES, ROOM_ANSWERS = 900_000, 500_000


def write_report(paths: Sequence[Path], out: Path, view: View | None = None) -> dict[str, Any]:
    """Write the page of one run, or comparing several, and its figures.

    Args:
        paths: run directories.
        out: the page; its figures go to the folder ``figures`` next to it, as PNG and SVG.

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
    figures = []
    with view.phase("drawing", len(charts)) as on_done:
        for chart in charts:
            for kind in ("svg", "png"):
                path = out.parent / "figures" / f"{chart.name}.{kind}"
                store.write_file(path, picture(chart, kind))
                figures.append(str(path))
            on_done(1)
    stored = [(i, r) for i, run in enumerate(runs) for _, rows in run.rollouts() for r in rows]
    data = _embedded(runs, stored)
    page = _page(runs, arms, charts, data, len(stored))
    store.write_file(out, page)
    return {
        "report": str(out),
        "bytes": len(page.encode("utf-8")),
        "figures": figures,
        "runs": len(runs),
        "rationales": len(data["samples"]),
        "rationales_stored": len(stored),
    }


def _embedded(runs: Sequence[StoredRun], stored: Sequence[tuple[int, Rationale]]) -> dict[str, Any]:
    """The JSON that the page's script reads."""
    questions = Questions()
    chosen = choose(stored, ROOM_SAMPLES)
    chosen.sort(key=lambda pair: (pair[0], pair[1].step, pair[1].problem_id, pair[1].sample_index))
    samples = [rationale_entry(r, run, questions) for run, r in chosen]
    room = ROOM_ANSWERS // len(runs)
    answers = [entry for i, run in enumerate(runs) for entry in answer_entries(run, i, questions, room)]
    names = [safe(run.name) for run in runs]
    return {"runs": names, "questions": questions.entries, "samples": samples, "answers": answers}


def _page(
    runs: Sequence[StoredRun], arms: Sequence[Arm], charts: Sequence[Chart], data: dict[str, Any], stored: int
) -> str:
    from jinja2 import Environment, StrictUndefined

    folder = files(__package__)
    style, script, source = (
        (folder / f"page.{kind}").read_text("utf-8") for kind in ("css", "js", "html.j2")
    )
    environment = Environment(
        autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters["percent"] = lambda x: "–" if x is None else f"{x:.1%}"
    environment.filters["safe_text"] = lambda x: safe(str(x))
    single = runs[0] if len(runs) == 1 else None
    return environment.from_string(source).render(
        title=safe(single.name if single else f"{len(runs)} runs"),
        runs=runs,
        arms=[_arm_row(arm) for arm in arms],
        differences=differences(arms) if len(arms) > 1 else [],
        single=single,
        headline=_headline(single) if single else None,
        charts=[{"chart": c, "svg": inline_svg(c), "table": _table(c)} for c in charts],
        events=[_event(i, e) for i, run in enumerate(runs) for e in run.events][:200],
        docs=field_docs(),
        behaviors=BEHAVIORS,
        shown=len(data["samples"]),
        stored=stored,
        answers=len(data["answers"]),
        script=script,
        script_digest=base64.b64encode(hashlib.sha256(script.encode("utf-8")).digest()).decode("ascii"),
        style=style,
        # "<" is always escaped: no text can end the script element.
        data=json.dumps(data, separators=(",", ":")).replace("<", "\\u003c"),
    )


def _headline(run: StoredRun) -> dict[str, Any]:
    """The figures at the top. None where the run is young or was not evaluated."""
    last = run.steps[-1] if run.steps else {}
    return {
        "before": run.before,
        "after": run.after,
        "paired": paired([a for a, _ in run.answers], [b for _, b in run.answers]) if run.answers else None,
        "steps": last.get("step", 0),
        "planned": run.recipe.run.steps,
        "seconds": sum(r.get("step_time", 0.0) for r in run.steps),
        "sampled": last.get("num_tokens", 0),
        "health": last.get("health", []),
        "tries": _tries(run) if run.in_turns else None,
    }


def _tries(run: StoredRun) -> dict[str, Any]:
    """How the problems fared that were asked until right, over the whole run."""
    steps = [r for r in run.steps if "em/finished" in r]
    finished, solved = (sum(r[f"em/{name}"] for r in steps) for name in ("finished", "solved"))
    took = sum(r["em/solved"] * r.get("em/tries_solved", 0.0) for r in steps)
    return {
        "most": run.recipe.sampler.tries,
        "solved": solved,
        "given_up": finished - solved,
        "per_step": finished / len(steps),
        "each": took / solved if solved else None,
    }


def _arm_row(arm: Arm) -> dict[str, Any]:
    """A row of the comparison: (mean, lowest, highest) over the arm's seeds, None where nothing is known."""

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
    """The numbers of a chart, one row per step: for screen readers, and for copying."""

    def number(value: float) -> str:
        return f"{value:.1%}" if chart.percent else f"{value:.4g}"

    def cell(line: Line, x: float) -> str:
        if x not in line.x:
            return ""
        i = line.x.index(x)
        interval = f" [{number(line.low[i])}, {number(line.high[i])}]" if line.low else ""
        return number(line.y[i]) + interval

    steps = sorted({x for line in chart.lines for x in line.x})
    return {
        "head": ["step", *(line.label for line in chart.lines)],
        "rows": [[f"{x:g}", *(cell(line, x) for line in chart.lines)] for x in steps],
    }


def _event(run: int, event: dict[str, Any]) -> dict[str, Any]:
    facts = {k: v for k, v in event.items() if k not in ("event", "step")}
    text = " · ".join(f"{k}: {v if isinstance(v, str) else json.dumps(v)}" for k, v in facts.items())
    return {
        "run": run,
        "step": event.get("step", ""),
        "event": event.get("event", ""),
        "facts": safe(text)[:500],
    }
