"""The text that a person reads of what ``gpu.py`` found: verdicts first, then figures part by part."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from statistics import fmean
from typing import Any

from machine import headline
from tables import table

Row = Mapping[str, Any]
#: Nats by which kernels may move log-probabilities in the mean; a wrong mask moves them by whole nats.
ROUNDING = {"bfloat16": 0.1, "float16": 0.03}


def report(rows: Sequence[Row], parts: Sequence[Row]) -> str:
    """All of it.

    Args:
        parts: ``part``, ``limit``, ``seconds`` and ``ended`` of each job so far.
    """
    sections = [
        _device(rows),
        _section("Checks", _checks(rows)),
        _section("Times", _times(rows)),
        _section("Training", _training(rows)),
        _section("Log-probabilities", _agreement(rows)),
        _section("Greedy tokens", _greedy(rows)),
        _section("Kernels", _kernels(rows)),
        _section("Smaller cards", _caps(rows)),
        _section("Not measured", _errors(rows)),
        _section("Time spent", _spent(parts)),
    ]
    return "\n\n".join(filter(None, sections)) + "\n"


def _section(title: str, text: str) -> str:
    return f"## {title}\n\n{text}" if text else ""


def _table(head: Sequence[str], lines: Sequence[Sequence[Any]]) -> str:
    return table(head, [[str(cell) for cell in line] for line in lines]) if lines else ""


def _who(row: Row) -> str:
    words = (row["rival"], row["shape"], f"{row['rows']} rows" if row.get("rows") else "")
    return " ".join(filter(None, (*words, f"in {row['cap_gb']:g} GB" if row["cap_gb"] else "")))


def _device(rows: Sequence[Row]) -> str:
    found = next((r for r in rows if r["figure"] == "device" and "bandwidth" in r), None)
    if found is None:
        return ""
    rates = f"{found['bandwidth'] / 1e9:.0f} GB/s copied, {found['matmul'] / 1e12:.2f} TFLOP/s multiplied"
    facts = headline(found["machine"])
    return f"{found['device']}: {rates}\n{facts}"


# --- checks ------------------------------------------------------------------------------------------


def checks(rows: Sequence[Row]) -> list[tuple[str, str, bool]]:
    """(who, what, whether it holds) of everything that has to hold."""
    found = [(_who(row), what, holds) for row in rows for what, holds in row.get("checks", {}).items()]
    for line in agreement(rows):
        if line["holds"] is not None:
            what = f"log-probs {line['way']} agree with the plain ones"
            found.append((line["rival"], what, line["holds"]))
    return found


def _checks(rows: Sequence[Row]) -> str:
    marks = {True: "ok", False: "FAILED"}
    return _table(("", "who", "what"), [(marks[holds], who, what) for who, what, holds in checks(rows)])


def agreement(rows: Sequence[Row]) -> list[dict[str, Any]]:
    """How far each path's log-probabilities lie from the plain path's rows taken one by one, in nats.

    ``holds``: within the rounding of the type, or three times as far as the plain path's own right-padded
    rows, which differ by rounding alone. None for these.
    """
    scored = {r["rival"]: r for r in rows if r["figure"] == "logprobs" and "alone" in r}
    plain = scored.get("empg")
    if plain is None:
        return []
    bar = max(3 * _apart(plain["right"], plain["alone"])[0], ROUNDING.get(plain.get("dtype"), 1e-4))
    found = []
    for rival, row in scored.items():
        for way in ("alone", "right", "left", "packed", "fit"):
            if way not in row or (plain is row and way == "alone"):
                continue
            mean, most = _apart(row[way], plain["alone"])
            holds = None if plain is row and way == "right" else mean <= bar
            found.append({"rival": rival, "way": way, "mean": mean, "most": most, "holds": holds})
    return found


def _apart(rows: Sequence[Sequence[float]], others: Sequence[Sequence[float]]) -> tuple[float, float]:
    pairs = [p for row, other in zip(rows, others, strict=True) for p in zip(row, other, strict=True)]
    off = [abs(a - b) for a, b in pairs]
    return fmean(off), max(off)


def _agreement(rows: Sequence[Row]) -> str:
    lines = [(a["rival"], a["way"], f"{a['mean']:.2e}", f"{a['most']:.2e}") for a in agreement(rows)]
    text = _table(("log-probs of", "path", "mean |difference|", "most"), lines)
    return text and f"Against plain transformers, rows one by one, in nats.\n\n{text}"


def _greedy(rows: Sequence[Row]) -> str:
    lines = []
    for row in rows:
        for model in ("float32", "job"):
            for way, facts in row.get(model, {}).items() if row["figure"] == "greedy" else ():
                of = facts.get("error") or f"{facts['differ']} of {facts['of']} differ"
                gap = "" if "error" in facts else f"{facts['gap']:.1f}"
                name = "tiny, float32" if model == "float32" else row["shape"]
                lines.append((row["rival"], name, way, of, gap))
    return _table(("rival", "model", "graphs beside", "rows", "gap in spacings"), lines)


# --- figures -----------------------------------------------------------------------------------------


def _times(rows: Sequence[Row]) -> str:
    timed = [r for r in rows if "seconds" in r and not r["cap_gb"]]
    ours = {_kind(r): r["seconds"] for r in timed if r["rival"] == "empg"}
    lines = []
    for r in timed:
        if r["figure"] not in ("decode", "decode-eager", "m-step", "step"):
            continue
        faster = r["seconds"] / ours[_kind(r)] if _kind(r) in ours and r["rival"] != "empg" else 0.0
        spread = f" ({r['least']:.3f}-{r['most']:.3f})" if r.get("repeats") else " (first run only)"
        engine = r.get("engine", {})
        graphs = f"{engine['graphs_captured']}/{engine['graphs_replayed']}" if engine else ""
        lines.append(
            (
                r["part"], r["figure"], r["shape"], r.get("rows", ""), r["rival"],
                f"{r['seconds']:.3f}{spread}",
                f"{r['tokens_per_second']:.0f}" if "tokens_per_second" in r else "",
                f"{r['of_floor']:.1%}" if "of_floor" in r else "",
                f"{faster:.2f}x" if faster else "",
                graphs,
                f"{r['peak_gb']:.2f}" if "peak_gb" in r else "",
            )
        )  # fmt: skip
    head = ("part", "figure", "shape", "rows", "rival", "seconds", "tok/s", "of floor", "ours is")
    return _table((*head, "graphs made/run", "peak GB"), lines)


def _kind(row: Row) -> tuple[Any, ...]:
    return row["part"], row["figure"], row["shape"], row.get("rows")


def _training(rows: Sequence[Row]) -> str:
    lines = []
    for r in rows:
        if r["figure"] in ("train", "learn") and r.get("rewards"):
            rewards = r["rewards"]
            accuracy = [r.get(f"accuracy_{when}") for when in ("before", "after")]
            greedy = " -> ".join(f"{a:.1%}" for a in accuracy if a is not None)
            steps = f"{len(rewards)} of {r['of_steps']}"
            name = r.get("recipe") or f"{r['rival']} {r['shape']}"
            seconds = f"{r['seconds']:.1f}" if "seconds" in r else ""
            lines.append((name, steps, f"{rewards[0]:.1%} -> {rewards[-1]:.1%}", greedy, seconds))
    text = _table(("run", "steps", "reward", "greedy accuracy", "seconds of training"), lines)
    engines = [
        f"{r['rival']} {r['shape']}: "
        + ", ".join(f"{k} {v:.4g}" if isinstance(v, float) else f"{k} {v}" for k, v in r["last_step"].items())
        for r in rows
        if r["figure"] == "train" and "last_step" in r
    ]
    return "\n\n".join(filter(None, [text, "\n".join(engines)]))


def _kernels(rows: Sequence[Row]) -> str:
    blocks = []
    for r in rows:
        for half in ("sampling", "fitting") if r["figure"] == "kernels" and "sampling" in r else ():
            found = r[half]
            kinds = ", ".join(found["kinds"]) or "none of those looked for"
            attention = ", ".join(found["attention"]) or "none seen"
            blocks.append(
                f"{r['rival']}, {half}: {found['wall']:.2f} s, kernels ran {found['busy']:.0%} of it; "
                f"found: {kinds}; attention: {attention}\n\n"
                + _table(
                    ("kernel", "calls", "seconds"),
                    [(name[:80], calls, f"{seconds:.4f}") for name, calls, seconds in found["top"]],
                )
            )
        if r["figure"] == "kernels" and r.get("policy"):
            blocks.append(", ".join(f"{k} {v}" for k, v in {**r["policy"], **r["engine"]}.items()))
    return "\n\n".join(blocks)


def _caps(rows: Sequence[Row]) -> str:
    lines = []
    for r in rows:
        if r["cap_gb"] and "seconds" in r:
            rows_now, budget_now = r.get("batch_rows_after"), r.get("budget_after")
            lines.append(
                (
                    f"{r['cap_gb']:g} GB", r["shape"], f"{r['seconds']:.1f}", f"{r['planned_gb']:.2f}",
                    f"{r['peak_gb']:.2f}" if "peak_gb" in r else "not enforced",
                    f"{r['reserved_gb']:.2f}" if "reserved_gb" in r else "",
                    _changed(r["batch_rows"], rows_now), _changed(r["budget"], budget_now),
                    r["merged"], r["keeps_sampler"],
                )
            )  # fmt: skip
    head = ("card", "shape", "seconds", "planned GB", "peak GB", "reserved GB", "rows at once", "micro-batch")
    return _table((*head, "merged copy", "sampler kept"), lines)


def _changed(before: Any, after: Any) -> str:
    return f"{before} -> {after}" if after is not None and int(after) != int(before) else str(before)


def _errors(rows: Sequence[Row]) -> str:
    lines = [
        f"* {r['part']}: {_who(r)}, {r['figure']}: {r.get('error') or r['left_out']}"
        for r in rows
        if "error" in r or "left_out" in r
    ]
    for r in rows:
        lines += [f"* tests: {name} failed" for name in r.get("failures", ())]
        if r["figure"] == "tests" and "passed" in r:
            lines.append(f"* tests: {r['passed']} passed, {r['skipped']} skipped")
    return "\n".join(lines)


def _spent(parts: Sequence[Row]) -> str:
    lines = [
        (p["part"], p["job"], f"{p['limit']:.0f}", f"{p['seconds']:.1f}", p["ended"] or "to the end")
        for p in parts
    ]
    return _table(("part", "job", "limit s", "took s", "ended"), lines)
