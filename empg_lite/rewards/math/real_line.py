r"""Conditions on one real variable as intervals: ``x \ge 0 and x < 1``, ``\mathbb{R}\setminus\{2\}``.

Endpoints are compared as exact numbers; conditions with other endpoints stay as written.
"""

from __future__ import annotations

import math
import re
from dataclasses import replace
from fractions import Fraction

from empg_lite.rewards.math.exact import read_exact
from empg_lite.rewards.math.shapes import Shape, as_intervals, parse_shape

_OR = re.compile(r"(?<![A-Za-z])or(?![A-Za-z])|\\cup", re.IGNORECASE)
_PUNCTURED = re.compile(
    r"(?:(?:(?P<label>[A-Za-z])\s*\\in\s*)?(?:\\mathbb\s*\{?\s*R\s*\}?|\(-\\infty\s*,\s*\\infty\s*\))"
    r"\s*(?:\\setminus|\\backslash|-)"
    r"\s*(?P<set>\\\{[^{}]*\\\})"
    r"|(?:\\text\{)?\s*all real (?:numbers?|values)(?: (?P<name>[a-z]))?(?:,? )?"
    r"(?:except|but|other than)(?: for)?\s*\}?"
    r"\s*(?P<points>.+))",
    re.IGNORECASE,
)
_INFINITE = {r"\infty": math.inf, r"+\infty": math.inf, r"-\infty": -math.inf}


def _value(end: str) -> Fraction | float | None:
    end = end.replace(" ", "")
    if end in _INFINITE:
        return _INFINITE[end]
    exact = read_exact(end)
    return exact.value if exact else None


def _interval(low: str, high: str, brackets: str, label: str, source: str) -> Shape:
    return Shape("interval", brackets, (Shape("leaf", low), Shape("leaf", high)), label, source)


def _punctured(shape: Shape) -> Shape | None:
    """All real numbers except some: the open intervals between those points."""
    match = _PUNCTURED.fullmatch(shape.source)
    if match is None:
        return None
    listed = parse_shape(match["set"] or match["points"])
    points = listed.items if listed.kind == "bag" else (listed,)
    values = [_value(point.text) for point in points]
    if any(value is None for value in values) and len(points) > 1:
        return None
    order = sorted(range(len(points)), key=lambda at: values[at] or 0)
    ends = [r"-\infty", *(points[at].text for at in order), r"\infty"]
    label = shape.label or match["label"] or match["name"] or ""
    parts = [_interval(a, b, "()", label, shape.source) for a, b in zip(ends, ends[1:], strict=False)]
    return Shape("bag", "", tuple(parts), label, shape.source)


def _meet(one: Shape, other: Shape) -> Shape | None:
    """The intersection of two intervals; None where it is empty or an endpoint is not an exact number."""
    lows = [(_value(s.items[0].text), s.text[0] == "(", s.items[0].text) for s in (one, other)]
    highs = [(_value(s.items[1].text), s.text[1] != ")", s.items[1].text) for s in (one, other)]
    if any(value is None for value, _, _ in (*lows, *highs)):
        return None
    low, high = max(lows, key=_place), min(highs, key=_place)
    if not _place(low)[0] < _place(high)[0]:
        return None
    brackets = ("(" if low[1] else "[") + ("]" if high[1] else ")")
    return _interval(low[2], high[2], brackets, one.label, one.source)


def _place(end: tuple[Fraction | float | None, bool, str]) -> tuple[Fraction | float, bool]:
    assert end[0] is not None
    return end[0], end[1]


def _met(shape: Shape) -> Shape | None:
    """Conditions joined by "and" or a comma, as the interval or intervals where all of them hold."""
    first, *rest = shape.items
    if (
        first.kind == "relation"
        and first.text == r"\ne"
        and all(i.kind == "leaf" and not i.label for i in rest)
    ):
        others = [replace(first, items=(first.items[0], item)) for item in rest]  # x is neither 2 nor 3
        shape = replace(shape, items=(first, *others))
    sets = [as_intervals(item) if item.kind == "relation" else None for item in shape.items]
    if None in sets or len({item.label for item in sets if item}) != 1:
        return None
    pieces: list[Shape] | None = None
    for item in sets:
        assert item is not None
        parts = list(item.items) if item.kind == "bag" else [item]
        if pieces is None:
            pieces = parts
        else:
            pieces = [shared for a in pieces for b in parts if (shared := _meet(a, b)) is not None]
    if not pieces:
        return None  # x < 1 and x > 2: loose wording for "or"
    whole = pieces[0] if len(pieces) == 1 else Shape("bag", "", tuple(pieces), pieces[0].label)
    return replace(whole, source=shape.source)


def read_conditions(shape: Shape) -> Shape:
    """``shape`` with its conditions on one variable combined; unchanged where it has none."""
    if shape.kind == "bag" and not _OR.search(shape.source):
        return _met(shape) or shape
    if shape.kind in ("leaf", "bag"):
        return _punctured(shape) or shape
    return shape
