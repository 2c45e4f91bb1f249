"""The memory plan of every shipped recipe on the cards that README names, as one Markdown table.

    python benchmarks/plan_table.py [--json]

Torch-free and offline. To compare two versions of the plan, run the script of one with the package of the
other: ``PYTHONPATH=/tmp/other python benchmarks/plan_table.py``.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from typing import Any

from empg_lite.loop.plan import plan_recipe
from empg_lite.policy.memory.machine import Machine, card
from empg_lite.policy.memory.shape import read_shape
from empg_lite.recipe.file import load_recipe

#: Recipe -> the cards to plan for: those of README, and larger ones to show what `auto` does with them.
CARDS = {
    "gsm8k-0.5b": ("8GB", "12GB", "16GB", "24GB"),
    "gsm8k-1.5b": ("8GB", "12GB", "16GB", "24GB"),
    "gsm8k-3b": ("12GB", "16GB", "24GB", "80GB"),
    "gsm8k-7b": ("24GB", "80GB"),
    "math-hard-1.5b": ("12GB", "24GB"),
    "math-hard-3b": ("16GB", "24GB", "80GB"),
    "gsm8k-0.5b-t4": ("15GB",),
    "custom-jsonl": ("8GB", "24GB"),
    "tiny": ("cpu",),
    "tiny-hard": ("cpu",),
    "smollm2-135m": ("cpu", "8GB"),
}
#: Free memory that the recipes for a CPU are planned with.
RAM = 8 * 10**9
HEAD = (
    "recipe",
    "card",
    "peak, GB",
    "phase of the peak",
    "rows",
    "micro-batch tokens",
    "checkpointing",
    "merged copy",
    "sampler stays",
)


def rows() -> Iterator[dict[str, Any]]:
    """One plan for each recipe and card."""
    for name, cards in CARDS.items():
        recipe = load_recipe(name)
        for size in cards:
            machine = Machine("cpu", RAM) if size == "cpu" else card(size)
            plan = plan_recipe(recipe, read_shape(recipe.model.name), machine)
            s = plan.settings
            yield {
                "recipe": name,
                "card": size,
                "fits": plan.fits,
                "peak": plan.peak,
                "phase": plan.largest[0],
                "term": plan.largest[1],
                "rows": s.batch_rows,
                "tokens": s.micro_batch_tokens,
                "checkpointing": s.checkpointing,
                "merged": s.merged,
                "keeps_sampler": plan.keeps_sampler,
            }


def line(row: dict[str, Any]) -> str:
    """A row of the table."""

    def word(value: bool) -> str:
        return "yes" if value else "no"

    size = row["card"].replace("GB", " GB")
    peak = f"{row['peak'] / 1e9:.1f}" + ("" if row["fits"] else " (does not fit)")
    cells = (row["recipe"], size, peak, row["phase"], row["rows"], f"{row['tokens']:,}")
    flags = (word(row[key]) for key in ("checkpointing", "merged", "keeps_sampler"))
    return f"| {' | '.join(map(str, (*cells, *flags)))} |"


def main() -> None:
    """Print the table, or the same as JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", action="store_true", help="one JSON object a line instead of a table")
    if parser.parse_args().json:
        for row in rows():
            print(json.dumps(row))
        return
    print(f"| {' | '.join(HEAD)} |", f"|{'---|' * len(HEAD)}", *map(line, rows()), sep="\n")


if __name__ == "__main__":
    main()
