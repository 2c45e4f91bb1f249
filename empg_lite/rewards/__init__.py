"""Rewards: reading an answer, comparing it with the gold one, and the worker processes that help.

Names are imported on first use, so that importing this package costs nothing.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from empg_lite.rewards.grader import Grader
    from empg_lite.rewards.kind import Case, Verdict
    from empg_lite.rewards.kinds.python import UserCode, pin, refuse_code, with_absolute_file
    from empg_lite.rewards.spec import check_reward, parse_spec

__all__ = [
    "Case",
    "Grader",
    "UserCode",
    "Verdict",
    "check_reward",
    "parse_spec",
    "pin",
    "refuse_code",
    "with_absolute_file",
]
_HOMES = {
    "grader": ("Grader",),
    "kind": ("Case", "Verdict"),
    "kinds.python": ("UserCode", "pin", "refuse_code", "with_absolute_file"),
    "spec": ("check_reward", "parse_spec"),
}


def __getattr__(name: str) -> Any:
    for home, names in _HOMES.items():
        if name in names:
            return getattr(import_module(f"{__name__}.{home}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
