"""A run's profile as a person reads it."""

from __future__ import annotations

import json
from pathlib import Path

from rich.table import Table

from empg_lite.cli.options import Output
from empg_lite.run.layout import PROFILE


def show_profile(out: Output, run: Path) -> None:
    """``profile.json`` as a table. Nothing under ``--json``, or where no step was taken."""
    path = run / PROFILE
    if out.as_json or not path.is_file():
        return
    found = json.loads(path.read_text("utf-8"))
    table = Table("part")
    for heading in ("seconds", "share", "at least", "of what the device can do"):
        table.add_column(heading, justify="right")
    for part, seconds in found["seconds"].items():
        floor = found["floor"].get(part)
        least = ("", "") if floor is None else (f"{floor:.2f}", f"{found['of_floor'][part]:.1%}")
        table.add_row(part.replace("_", " "), f"{seconds:.2f}", f"{found['shares'][part]:.1%}", *least)
    out.print(table)
    rate, rates = found["tokens_per_second"], found["rates"]
    for line in (
        f"{found['steps']} steps: {rate['sampling']:.0f} tokens a second while sampling, "
        f"{rate['step']:.0f} in whole steps",
        f"sampling computed {found['wasted_row_steps']:.1%} of its rows after their end; "
        f"fitting computed {found['padding']:.1%} padding "
        f"and left out {found['rows_skipped']:.1%} of the rows",
        f"at least: this device copies {rates['bytes_per_second'] / 1e9:.1f} GB/s and multiplies "
        f"{rates['flops_per_second'] / 1e9:.0f} GFLOP/s",
        "everything else: set-up, preflight, evaluation, checkpoints",
    ):
        out.print(line, highlight=False)
