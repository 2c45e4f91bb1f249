"""The mathematics of grading: finding an answer in a text, and deciding whether two answers are the same.

The rest of the package uses only what this file exports; the algebra worker also uses ``symbolic``, which
needs sympy. Names are imported on first use.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from empg_lite.rewards.math.boxes import Answer, visible
    from empg_lite.rewards.math.compare import Pair
    from empg_lite.rewards.math.extraction import announced, extract
    from empg_lite.rewards.math.steps import comparison_steps, quoted, reading_steps
    from empg_lite.rewards.math.votes import ballot

__all__ = [
    "Answer",
    "Pair",
    "announced",
    "ballot",
    "comparison_steps",
    "extract",
    "quoted",
    "reading_steps",
    "visible",
]
_HOMES = {
    "compare": ("Pair",),
    "boxes": ("Answer", "visible"),
    "extraction": ("announced", "extract"),
    "steps": ("comparison_steps", "quoted", "reading_steps"),
    "votes": ("ballot",),
}


def __getattr__(name: str) -> Any:
    for home, names in _HOMES.items():
        if name in names:
            return getattr(import_module(f"{__name__}.{home}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
