"""Algebra inside a worker.

``{"op": "equal", "gold", "prediction", "percent"}`` -> ``{"equal": bool}`` or ``{"unparsable": why}``.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from empg_lite.rewards.math import Pair
from empg_lite.rewards.math.symbolic import decide
from empg_lite.rewards.worker.main import Answer


def load(setup: Mapping[str, Any]) -> Answer:
    """Run what the first request would otherwise wait for."""
    for gold, prediction in (
        (r"3\sqrt{5}", r"\sqrt{45}"),
        (r"\frac{x^2}{2}+1", r"(x^2+2)/2"),
        ("2x+y=1", "y=1-2x"),
        (r"\mathbb{R}\setminus\{1\}", r"(-\infty,1)\cup(1,\infty)"),
    ):
        assert _equal({"gold": gold, "prediction": prediction, "percent": False}) == {"equal": True}, gold
    return _equal


def _equal(request: Mapping[str, Any]) -> dict[str, Any]:
    try:
        return {"equal": decide(Pair(request["gold"], request["prediction"], request["percent"]))}
    # The grader works, as loading has shown, so the answer is at fault: a verdict that no policy can dodge.
    except (ValueError, TypeError, NotImplementedError, RecursionError, ArithmeticError) as error:
        return {"unparsable": f"{type(error).__name__}: {error}"[:300]}
