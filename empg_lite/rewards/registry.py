"""The kinds of reward. To add one, write a file in ``kinds/`` and add a line here."""

from __future__ import annotations

from functools import cache
from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from empg_lite.rewards.kind import Kind

#: Rewards as written in a recipe; capitals mark the user's part. The text before the colon is the name of the
#: reward and of its file in ``kinds/``.
REWARDS = (
    "gsm8k",
    "math",
    "exact",
    "choice",
    "gym",
    "python:FILE.py",
    "regex:PATTERN",
)
NAMES = tuple(usage.partition(":")[0] for usage in REWARDS)


@cache
def kind_of(name: str) -> Kind:
    """The kind of reward with this name, one of ``NAMES``; imports its file."""
    kind: Kind = import_module(f"empg_lite.rewards.kinds.{name}").KIND
    assert kind.name == name, (kind.name, name)
    return kind
