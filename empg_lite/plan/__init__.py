"""What fits in memory: terms, the sizes that a recipe leaves to ``auto``, and what to change. No torch."""

from __future__ import annotations

from empg_lite.plan.choose import (
    Plan,
    advice_text,
    advise,
    as_overrides,
    plan_recipe,
    predict,
    refuse_unfit,
    with_sizes,
)
from empg_lite.plan.machine import (
    Machine,
    card,
    free_memory,
    resident_memory,
    return_freed_blocks,
    this_machine,
)
from empg_lite.plan.shape import Shape, read_shape, shape_of
from empg_lite.plan.terms import Settings

__all__ = [
    "Machine",
    "Plan",
    "Settings",
    "Shape",
    "advice_text",
    "advise",
    "as_overrides",
    "card",
    "free_memory",
    "plan_recipe",
    "predict",
    "read_shape",
    "refuse_unfit",
    "resident_memory",
    "return_freed_blocks",
    "shape_of",
    "this_machine",
    "with_sizes",
]
