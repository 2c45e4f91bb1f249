"""The tables of docs/results.md: each row is one file of raw figures, nothing is written by hand.

``docs/results/NAME.json`` is what a finished run left; the tables are made anew from all of these files: a
row without raw figures cannot stay, and one with the name of another replaces it.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from empg_lite.core.errors import DataError, MissingInput
from empg_lite.run.store import write_file

PAGE, FOLDER = "results.md", "results"
Record = Mapping[str, Any]
#: What stands in a table's place while it has no row.
EMPTY = "No row is filled without a run."
#: Table -> does it hold the rehearsals?
TABLES = {"real": False, "rehearsal": True}
GIB = 1024  # in MiB


def check_page(docs: Path) -> str:
    """The text of ``DOCS/results.md``.

    Raises:
        MissingInput: there is no page.
        DataError: a pair of markers is missing, doubled or turned round.
    """
    page = docs / PAGE
    if not page.is_file():
        raise MissingInput("no results page", str(page), "name its folder with --docs")
    text = page.read_text("utf-8")
    for table in TABLES:
        begin, end = _markers(table)
        if text.count(begin) != 1 or text.count(end) != 1 or text.index(begin) > text.index(end):
            raise DataError(
                f"no place for the {table} rows", str(page), f"write {begin} and {end}, once each"
            )
    return text


def read_records(docs: Path) -> list[Record]:
    """The raw figures of every row, from ``DOCS/results/``, oldest first.

    Raises:
        DataError: a file is not one of ours.
    """
    records = []
    for path in sorted((docs / FOLDER).glob("*.json")):
        try:
            record = json.loads(path.read_text("utf-8"))
            _row(record)
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            what = f"not the raw figures of a row ({type(error).__name__}: {error})"
            raise DataError(what, str(path), "remove it, or repeat its command") from error
        if record["name"] != path.stem:
            raise DataError(f"the figures of {record['name']}", str(path), "name the file as they say")
        records.append(record)
    return sorted(records, key=lambda r: (r["finished"], r["name"]))


def add_record(docs: Path, record: Record) -> None:
    """Keep a row's raw figures beside the page, replacing those of its name, and make the tables anew.

    The figures come first: a kill between the two writes leaves a page that the next row completes.

    Raises:
        what ``check_page`` and ``read_records`` raise, StorageError.
    """
    text = check_page(docs)
    write_file(docs / FOLDER / f"{record['name']}.json", json.dumps(record, indent=1) + "\n")
    write_file(docs / PAGE, render(text, read_records(docs)))


def render(text: str, records: Sequence[Record]) -> str:
    """The page with the tables of these records."""
    for table, rehearsal in TABLES.items():
        rows = [_row(record) for record in records if record["rehearsal"] == rehearsal]
        begin, end = _markers(table)
        before, after = text.partition(begin)[0], text.partition(end)[2]
        text = f"{before}{begin}\n{_table(rows)}\n{end}{after}"
    return text


def _markers(table: str) -> tuple[str, str]:
    return f"<!-- rows: {table} -->", f"<!-- end: {table} -->"


def _table(rows: Sequence[Sequence[str]]) -> str:
    if not rows:
        return EMPTY
    lines = [list(COLUMNS), ["---"] * len(COLUMNS), *rows]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in lines)


def _row(record: Record) -> list[str]:
    cells = (cell(record) for cell in COLUMNS.values())
    return [" ".join(cell.split()).replace("|", "\\|") for cell in cells]


# --- cells ----------------------------------------------------------------------------------------


def _share(value: float) -> str:
    return f"{value:.1%}"


def _length(value: float) -> str:
    return f"{value:.1f}"


def _two(name: str, shown: Callable[[float], str] = _share) -> Callable[[Record], str]:
    """Base, then tuned."""
    return lambda r: f"{shown(r['evaluation']['base'][name])} → {shown(r['evaluation'][name])}"


def _greedy(record: Record) -> str:
    def one(figures: Record) -> str:
        low, high = figures["pass@1_ci95"]
        return f"{_share(figures['pass@1'])} [{_share(low)}, {_share(high)}]"

    return f"{one(record['evaluation']['base'])} → {one(record['evaluation'])}"


def _paired(record: Record) -> str:
    paired = record["evaluation"]["paired"]
    p = "p < 0.0001" if paired["p_value"] < 1e-4 else f"p = {paired['p_value']:.4f}"
    return f"{100 * paired['gain']:+.1f} points, {p}"


def _behaviors(record: Record) -> str:
    base, tuned = record["evaluation"]["base"]["behaviors"], record["evaluation"]["behaviors"]
    return ", ".join(f"{n.replace('_', ' ')} {_share(base[n])} → {_share(tuned[n])}" for n in tuned)


def _recipe(record: Record) -> str:
    changed = [*record["changed"], *([f"--limit {record['limit']}"] if record["limit"] else [])]
    return record["recipe"] + (f" ({', '.join(changed)})" if changed else "")


def _model(record: Record) -> str:
    return record["model"] + (f" @ {record['revision'][:12]}" if record["revision"] else "")


def _machine(record: Record) -> str:
    def one(machine: Record) -> str:
        return machine["name"] + (f", {machine['gpu_gib']:.1f} GiB" if machine["gpu_gib"] else " (CPU)")

    return ", then ".join(one(machine) for machine in record["machines"])


def _time(seconds: float) -> str:
    return f"{seconds / 3600:.2f} h" if seconds >= 3600 else f"{seconds / 60:.1f} min"


def _hours(record: Record) -> str:
    spent, steps = record["seconds"], record["training"]["seconds"]
    return f"{_time(spent['train'])} (steps {_time(steps)}) + {_time(spent['eval'])}"


def _memory(record: Record) -> str:
    gpu, rss = record["peak_mib"]["gpu"], record["peak_mib"]["rss"]
    return (f"GPU {gpu / GIB:.2f} GiB, " if gpu is not None else "") + f"process {rss / GIB:.2f} GiB"


COLUMNS: dict[str, Callable[[Record], str]] = {
    "recipe": _recipe,
    "model": _model,
    "seed": lambda r: str(r["seed"]),
    "steps": lambda r: str(r["training"]["steps"]),
    "n": lambda r: str(r["evaluation"]["n"]),
    "greedy, 95% interval": _greedy,
    "gain": _paired,
    "T=1": _two("t1_accuracy"),
    "pass@8": _two("pass@8"),
    "maj@8": _two("maj@8"),
    "length": _two("mean_length", _length),
    "cut off": _two("truncated"),
    "behaviors": _behaviors,
    "machine": _machine,
    "training + evaluation": _hours,
    "peak memory": _memory,
    "versions": lambda r: ", ".join(f"{name} {version}" for name, version in r["versions"].items()),
    "date": lambda r: r["finished"][:10],
    "commit": lambda r: r["commit"],
    "command": lambda r: f"`{r['command']}`",
    "raw": lambda r: f"[json]({FOLDER}/{r['name']}.json)",
}
