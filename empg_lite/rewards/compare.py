"""Are two answers the same? Three values: yes, no, and "a computer algebra system has to look".

Structure is compared here, with the conventions of the documentation's table; single expressions are
compared by the leaf function handed in: the cheap one of this module, or the worker's.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence

from empg_lite.rewards.exact import read_exact
from empg_lite.rewards.shapes import Shape, as_intervals, parse_shape
from empg_lite.rewards.units import strip_units

#: Compares two shapes that structure cannot decide: (what, gold, prediction), ``what`` one of
#: ``expression``, ``equation``, ``relation``, ``other``.
Leaf = Callable[[str, Shape, Shape], bool | None]

_INFINITE = {r"\infty", r"+\infty", r"-\infty"}
_PROSE = re.compile(r"[A-Za-z\d\s.,:'()&;!?/-]+")
_CLOCK = re.compile(r"\d{1,2}:\d{2}")
_STRUCTURED = re.compile(r"\\(?:begin|mathbb|setminus|backslash|cap|emptyset|cup)")
_ASKING = re.compile(
    r"\b(?:what|which|find|express|calculate|determine|compute|give|write|how)\b[^.?!]*?(?<![\d)}%] )"
    r"\bpercent(?:age)?\b|\bas an? percent(?:age)?\b|\$[a-z](?:\$ percent|\\%)",
    re.IGNORECASE,
)


def asks_percentage(question: str | None) -> bool:
    """True where a problem asks for a percentage, so that 20 and 20% answer it alike."""
    return question is not None and _ASKING.search(question) is not None


def _squeezed(text: str) -> str:
    """Without the spaces that mean nothing; those between two digits or two letters stay."""
    return re.sub(r"(?<![\dA-Za-z]) | (?![\dA-Za-z])", "", text)


def as_words(text: str) -> str | None:
    r"""The letters and digits of a text answer, lower case; None where it is not one.

    A text answer is set in ``\text{}``, or has a word that no product of variables would spell, or is a
    single letter.
    """
    plain = re.sub(r"\\text\{([^{}]*)\}", r"\1", text)
    if not _PROSE.fullmatch(plain):
        return None
    marked = plain != text
    words = re.findall(r"[A-Za-z]+", plain)
    clock = re.search(r"\d\s*[ap]\.?\s?m\b", plain, re.IGNORECASE)
    if not words or not (
        marked or clock or max(map(len, words)) > 3 or re.fullmatch(r"\(?[A-Za-z]\)?", plain)
    ):
        return None
    return re.sub(r"[^A-Za-z\d]", "", plain).lower()


def _numeral_base(text: str) -> tuple[str, str] | None:
    """``2215_6`` as (digits, base): a numeral, not a product, and not 2215."""
    match = re.fullmatch(r"([\dA-Za-z.]*\d[\dA-Za-z.]*)_\{?\s*(?:\\text\{)?\s*(\w+)\s*\}*", text)
    return (match.group(1).lstrip("0").upper(), match.group(2).lower()) if match else None


def _compare_plain(gold: str, prediction: str, percent_asked: bool) -> bool | None:
    """Two normalised expressions without structure, by text and exact value."""
    if _squeezed(gold) == _squeezed(prediction):
        return True
    gold, prediction = strip_units(gold), strip_units(prediction)
    if _squeezed(gold) == _squeezed(prediction):
        return True
    if gold in _INFINITE or prediction in _INFINITE:
        return gold.lstrip("+") == prediction.lstrip("+")
    gold_base, prediction_base = _numeral_base(gold), _numeral_base(prediction)
    if gold_base or prediction_base:
        return gold_base == prediction_base
    exact_gold, exact_prediction = read_exact(gold), read_exact(prediction)
    if exact_gold and exact_prediction:
        value = exact_prediction.value
        if percent_asked and exact_prediction.percent and not exact_gold.percent:
            value *= 100
        return exact_gold.value == value
    if _CLOCK.fullmatch(gold) and _CLOCK.fullmatch(prediction) and gold.lstrip("0") == prediction.lstrip("0"):
        return True
    gold_words, prediction_words = as_words(gold), as_words(prediction)
    if gold_words is not None and prediction_words is not None:
        return gold_words == prediction_words
    if (gold_words and len(gold_words) > 1 and exact_prediction) or (prediction_words and exact_gold):
        return False
    return None


def cheap_leaf(percent_asked: bool) -> Leaf:
    """The leaf comparison that needs no algebra; leaves what it cannot decide undecided."""

    def leaf(what: str, gold: Shape, prediction: Shape) -> bool | None:
        if what == "expression":
            return _compare_plain(gold.text, prediction.text, percent_asked)
        return True if _squeezed(gold.source) == _squeezed(prediction.source) else None

    return leaf


def _ordered(gold: Sequence[Shape], prediction: Sequence[Shape], leaf: Leaf) -> bool | None:
    if len(gold) != len(prediction):
        return False
    undecided = False
    for one, other in zip(gold, prediction, strict=True):
        equal = same(one, other, leaf)
        if equal is False:
            return False
        undecided |= equal is None
    return None if undecided else True


def _unordered(gold: Sequence[Shape], prediction: Sequence[Shape], leaf: Leaf) -> bool | None:
    """Equality is transitive, so taking the first partner that fits cannot miss a matching."""
    if len(gold) != len(prediction):
        return False
    left = list(prediction)
    for one in gold:
        verdicts = []
        for other in left:
            verdicts.append(same(one, other, leaf))
            if verdicts[-1]:
                break
        if verdicts[-1]:
            left.pop(len(verdicts) - 1)
        else:
            return None if None in verdicts else False
    return True


def _bags(gold: Sequence[Shape], prediction: Sequence[Shape], leaf: Leaf) -> bool | None:
    """Labelled items (``x = 1, y = 2``) pair by label, or in order with unlabelled ones."""
    gold_labels, labels = [g.label for g in gold], [p.label for p in prediction]
    gold_named = all(gold_labels) and len(set(gold_labels)) == len(gold)
    named = all(labels) and len(set(labels)) == len(prediction)
    if gold_named and named:
        by_label = {item.label: item for item in prediction}
        if set(by_label) == set(gold_labels):
            return _ordered(gold, [by_label[label] for label in gold_labels], leaf)
    if (gold_named and not any(labels)) or (named and not any(gold_labels)):
        return _ordered(gold, prediction, leaf)
    return _unordered(gold, prediction, leaf)


def _as_equation(shape: Shape) -> Shape | None:
    if shape.kind == "equation":
        return shape
    if shape.label and shape.kind == "leaf":
        sides = (Shape("leaf", shape.label), Shape("leaf", shape.text))
        return Shape("equation", f"{shape.label}={shape.text}", sides, source=f"{shape.label}={shape.text}")
    return None


def _relations(gold: Shape, prediction: Shape, leaf: Leaf) -> bool | None:
    if gold.kind == prediction.kind == "relation":
        equal = leaf("relation", gold, prediction)
        one, other = as_intervals(gold), as_intervals(prediction)
        if equal is not None or one is None or other is None:
            return equal
        return same(one, other, leaf)
    relation, rest = (gold, prediction) if gold.kind == "relation" else (prediction, gold)
    interval = as_intervals(relation)
    if interval is None or rest.kind not in ("interval", "tuple", "bag"):
        return False
    return same(interval, rest, leaf)


def _plain_label(label: str) -> bool:
    return re.fullmatch(r"[A-Za-z]|\\[a-zA-Z]+", label.strip()) is not None


def same(gold: Shape, prediction: Shape, leaf: Leaf) -> bool | None:
    """True or False where the conventions decide, None where ``leaf`` left a needed part undecided."""
    kinds = {gold.kind, prediction.kind}
    if "equation" in kinds:
        one, other = _as_equation(gold), _as_equation(prediction)
        return leaf("equation", one, other) if one and other else False
    if "relation" in kinds:
        return _relations(gold, prediction, leaf)
    if _plain_label(gold.label) and _plain_label(prediction.label) and gold.label != prediction.label:
        one, other = _as_equation(gold), _as_equation(prediction)
        return leaf("equation", one, other) if one and other else False  # the lines x = 5 and y = 5
    if kinds == {"leaf"}:
        return leaf("expression", gold, prediction)
    if kinds == {"bag"}:
        return _bags(gold.items, prediction.items, leaf)
    if kinds <= {"tuple", "interval"} or kinds == {"matrix"}:  # (1,2) may be a point or an interval
        return gold.text == prediction.text and _ordered(gold.items, prediction.items, leaf)
    if "leaf" in kinds:
        text = (gold if gold.kind == "leaf" else prediction).text
        return leaf("other", gold, prediction) if _STRUCTURED.search(text) else False
    return False


def is_empty(normalized: str) -> bool:
    """True where nothing was said: no letter, digit or symbol, "not a number", a bare infinity."""
    if not re.search(r"\w|\\", normalized):
        return True
    return normalized.strip("()").lower() in {"nan", *_INFINITE, "n/a"}


def compare(gold: str, prediction: str, leaf: Leaf) -> bool | None:
    """Compare two normalised answers; None where ``leaf`` left a needed part undecided."""
    if _squeezed(gold) == _squeezed(prediction):
        return True
    return same(parse_shape(gold), parse_shape(prediction), leaf)
