"""Whether two answers are the same: yes, no, or undecided without computer algebra.

This module compares structure, following the conventions in docs/grading.md. A leaf function compares single
expressions: the cheap one in this module, or the worker's.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from fractions import Fraction
from typing import NamedTuple

from empg_lite.rewards.math.exact import Exact, read_exact
from empg_lite.rewards.math.normalize import normalize
from empg_lite.rewards.math.real_line import read_conditions
from empg_lite.rewards.math.shapes import Shape, as_intervals, is_quantity, parse_shape, valued
from empg_lite.rewards.math.units import strip_units, unabbreviated
from empg_lite.rewards.math.words import as_words, choice, numeral, plain, spoken

#: Compares two shapes that structure cannot decide: (what, gold, prediction), where ``what`` is
#: ``expression``, ``equation``, ``relation`` or ``other``.
Leaf = Callable[[str, Shape, Shape], bool | None]

_INFINITE = {r"\infty", r"+\infty", r"-\infty"}
_CLOCK = re.compile(r"(\d{1,2}):(\d{2})", re.ASCII)
_RATIO_MARK = re.compile(r":|(?<=\d)\s*(?:\\text\{\s*to\s*\}|\bto\b)\s*(?=\d)")
_MODULUS = re.compile(
    r"(?P<value>.+?)[\s,(]*(?:\\pmod|\\text\{\s*\(?mod\s*\}|\bmod\b)\s*\{?\s*(?P<modulus>\w+)\s*\}?\s*\)?"
)
_SCALE = re.compile(r"(?<=\d)\s*(?:\\text\{\s*)?(dozen|hundred|thousand|million|billion|trillion)s?\b\s*\}?")
_ABBREVIATION = re.compile(r"[kKM]|[bm]n")
_BOUND = re.compile(r"(?:\\text\{\s*)?at (?:the )?(?:very )?(?P<which>least|most)\b\s*\}?\s*", re.IGNORECASE)
_ASKS_LEAST = re.compile(
    r"(?<!at )\bleast\b|\b(?:minim(?:um|al|i[sz]e)|fewest|smallest|lowest|shortest|cheapest|as few)\b"
    r"|\bhow (?:many|much|long|far|high)\b[^?.]*\b(?:must|needs?|ha(?:s|ve) to|required|necessary)\b",
    re.IGNORECASE,
)
_ASKS_MOST = re.compile(
    r"(?<!at )\bmost\b|\b(?:maxim(?:um|al|i[sz]e)|greatest|largest|highest|longest|biggest)\b"
    r"|\bas (?:many|much)\b"
    r"|\bhow (?:many|much|long|far|high)\b[^?.]*\b(?:can|could|at most)\b",
    re.IGNORECASE,
)
_STRUCTURED = re.compile(r"\\(?:begin|mathbb|setminus|backslash|cap|emptyset|cup)")
_ASKING = re.compile(
    r"\b(?:what|which|find|express|calculate|determine|compute|give|write|how)\b[^.?!]*?(?<![\d)}%] )"
    r"\bper ?cent(?:age)?\b|\b(?:as an?|in) per ?cent(?:age)?\b|\$[a-z](?:\$ percent|\\%)"
    r"|(?<![\d)}$])\s\\?%|\(\\?%\)",
    re.IGNORECASE,
)


def asks_percentage(question: str | None) -> bool:
    """True where a problem asks for a percentage, so that 20 and 20% are the same answer."""
    return question is not None and _ASKING.search(question) is not None


def _without_asked_scale(prediction: str, question: str | None) -> str:
    """``2 dozen`` without the scale word, where the problem asks how many dozen."""
    scale = _SCALE.search(prediction) if question else None
    if scale is None or question is None:
        return prediction
    asked = rf"\b(?:how (?:many|much)|in) {scale[1]}s?\b"
    return _SCALE.sub(" ", prediction) if re.search(asked, question, re.IGNORECASE) else prediction


def _without_asked_bound(prediction: str, question: str | None) -> str:
    """``at least 42`` as 42, where the problem asks for the least."""
    bound = _BOUND.match(prediction) if question else None
    if bound is None or question is None:
        return prediction
    asked = _ASKS_LEAST if bound["which"].lower() == "least" else _ASKS_MOST
    return prediction[bound.end() :] if asked.search(question) else prediction


def _squeezed(text: str) -> str:
    """Without insignificant spaces; those between two digits or two letters stay."""
    return re.sub(r"(?<![\dA-Za-z]) | (?![\dA-Za-z])", "", text)


def _ratio(text: str) -> tuple[Fraction, ...] | None:
    """``6:4`` or ``6 to 4`` as shares of the first part; None for anything else."""
    parts = _RATIO_MARK.split(text)
    if len(parts) < 2:
        return None
    exact = [read_exact(part.strip()) for part in parts]
    values = [number.value for number in exact if number is not None]
    if len(values) < len(parts) or min(values) < 0 or not values[0]:
        return None
    return tuple(value / values[0] for value in values)


def _ratios_equal(gold: str, prediction: str) -> bool | None:
    """Ratios of the same shares; two parts are also a quotient.

    A time of day is not a ratio: two of that form, or one not in lowest terms, are compared as written.
    """
    clocks = [_CLOCK.fullmatch(text) for text in (gold, prediction)]
    if all(clocks) or any(clock and math.gcd(*map(int, clock.groups())) > 1 for clock in clocks):
        return gold.lstrip("0") == prediction.lstrip("0")
    one, other = _ratio(gold), _ratio(prediction)
    if one and other:
        return one == other
    shares, rest = (one, read_exact(prediction)) if one else (other, read_exact(gold))
    if shares is None or rest is None:
        return None
    return len(shares) == 2 and rest.value * shares[1] == 1


def _residue(text: str) -> tuple[str, str] | None:
    """``3 \\pmod{7}`` as ("3", "7")."""
    match = _MODULUS.fullmatch(text)
    return (match["value"].strip(), match["modulus"]) if match else None


def _residues_equal(gold: str, prediction: str) -> bool | None:
    one, other = _residue(gold), _residue(prediction)
    if one is None and other is None:
        return None
    values = [read_exact(pair[0] if pair else text) for pair, text in ((one, gold), (other, prediction))]
    if values[0] is None or values[1] is None:
        return None
    if one is None or other is None:
        return values[0].value == values[1].value
    if one[1] != other[1]:
        return False
    difference = values[0].value - values[1].value
    return difference == 0 or (one[1].isdigit() and difference % int(one[1]) == 0)


def _words_equal(gold: str, prediction: str) -> bool | None:
    """Answers in words; None where neither is in words."""
    words = as_words(gold), as_words(prediction)
    if words[0] is None and words[1] is not None and len(words[1]) > 1:
        words = as_words(gold, surely=True), words[1]
    elif words[1] is None and words[0] is not None and len(words[0]) > 1:
        words = words[0], as_words(prediction, surely=True)
    if words[0] is not None and words[1] is not None:
        return words[0] == words[1]
    if (words[0] and len(words[0]) > 1 and read_exact(prediction)) or (words[1] and read_exact(gold)):
        return False
    return None


def _choices_equal(gold: str, prediction: str) -> bool | None:
    """``C`` and ``(C) 12``: letters of a choice; None unless both are."""
    one, other = choice(gold), choice(prediction)
    if one is None or other is None:
        return None
    return one[0] == other[0] and not (one[1] and other[1] and _squeezed(one[1]) != _squeezed(other[1]))


def _exact(text: str) -> Exact | None:
    """The value of a number, in digits or in words."""
    exact = read_exact(text)
    said = spoken(text) if exact is None else None
    return exact if said is None else Exact(Fraction(said))


def decide_plain(gold: str, prediction: str, percent_asked: bool) -> tuple[bool | None, str]:
    """Compare normalized expressions without structure, by text and value: (equal, how it was decided)."""
    if _squeezed(gold) == _squeezed(prediction):
        return True, "the same text"
    if r"\text" in gold + prediction and plain(gold).replace(" ", "") == plain(prediction).replace(" ", ""):
        return True, "the same text"
    chosen = _choices_equal(gold, prediction)
    if chosen is not None:
        return chosen, "letters of a choice"
    gold, prediction = strip_units(gold), strip_units(prediction)
    if _squeezed(gold) == _squeezed(prediction):
        return True, "the same text without units"
    if gold in _INFINITE or prediction in _INFINITE:
        return gold.lstrip("+") == prediction.lstrip("+"), "infinity equals only itself"
    gold_base, prediction_base = numeral(gold), numeral(prediction)
    if gold_base or prediction_base:
        return gold_base == prediction_base, "numerals of a base: digits and base must agree"
    if not _ABBREVIATION.search(gold):
        prediction = unabbreviated(prediction)
    exact_gold, exact_prediction = _exact(gold), _exact(prediction)
    if exact_gold and exact_prediction:
        value = exact_prediction.value
        if percent_asked and exact_prediction.percent and not exact_gold.percent:
            value *= 100
        how = f"exact numbers: {_shown(exact_gold.value)} and {_shown(value)}"
        if exact_gold.percent and not exact_prediction.percent and exact_gold.value * 100 == value:
            return True, how + ", where the gold answer has a percent sign"
        return exact_gold.value == value, how
    for decide, how in ((_ratios_equal, "ratios"), (_residues_equal, "residues"), (_words_equal, "words")):
        equal = decide(gold, prediction)
        if equal is not None:
            return equal, how
    return None, "algebra"


def _shown(value: Fraction) -> str:
    """A fraction for display; Python refuses to print the longest ones."""
    long = max(value.numerator.bit_length(), value.denominator.bit_length()) > 200
    return "a number of over 60 digits" if long else str(value)


def cheap_leaf(percent_asked: bool) -> Leaf:
    """The leaf comparison without algebra; None where that cannot decide."""

    def leaf(what: str, gold: Shape, prediction: Shape) -> bool | None:
        if what == "expression":
            return decide_plain(gold.text, prediction.text, percent_asked)[0]
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
    """Equality is transitive, so pairing each item with its first equal cannot miss a matching."""
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


def _named(shape: Shape) -> dict[str, Shape] | None:
    """Values by name: of ``a = 1, b = 2``, and of ``(a,b) = (1,2)``; None unless all have a name."""
    if shape.kind == "bag":
        labels = [item.label for item in shape.items]
    else:
        label = shape.label
        labels = re.split(r"[,:]", label[1:-1]) if label.startswith("(") and label.endswith(")") else []
    labels = [label.replace(" ", "") for label in labels]
    if len(labels) != len(shape.items) or not all(labels) or len(set(labels)) < len(labels):
        return None
    return dict(zip(labels, shape.items, strict=True))


def _bags(gold: Shape, prediction: Shape, leaf: Leaf) -> bool | None:
    """Labeled items (``x = 1, y = 2``) pair by label, or in order with unlabeled ones."""
    one, other = _named(gold), _named(prediction)
    if one is not None and other is not None and set(one) == set(other):
        return _ordered(list(one.values()), [other[label] for label in one], leaf)
    if gold.kind != prediction.kind:
        point, named = (gold, other) if gold.kind == "tuple" else (prediction, one)
        if named is None or point.label or point.text != "()" or not _coordinates(named):
            return False
        parts = [named[label] for label in sorted(named)]
        left, right = (point.items, parts) if point is gold else (parts, point.items)
        return _ordered(left, right, leaf)
    if gold.kind == "tuple":
        return gold.text == prediction.text and _ordered(gold.items, prediction.items, leaf)
    labeled = [any(item.label for item in shape.items) for shape in (gold, prediction)]
    if (one is not None and not labeled[1]) or (other is not None and not labeled[0]):
        return _ordered(gold.items, prediction.items, leaf)
    return _unordered(gold.items, prediction.items, leaf)


def _coordinates(labels: Iterable[str]) -> bool:
    """True for letters that follow one another, as the names of a point's coordinates do: x, y."""
    names = "".join(sorted(labels))
    return len(names) > 1 and names in "abcdefghijklmnopqrstuvwxyz"


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
        if equal is not None or (one is None and other is None):
            return equal
        if one is not None and other is not None:
            return same(one, other, leaf)
        condition, interval = (gold, other) if one is None else (prediction, one)
        assert interval is not None
        return leaf("other", condition, replace(interval, source=_written(interval)))
    relation, rest = (gold, prediction) if gold.kind == "relation" else (prediction, gold)
    interval = as_intervals(relation)
    if rest.kind not in ("interval", "tuple", "bag"):
        return False
    if interval is None:  # the variable is not isolated: algebra solves it; the condition comes first
        return leaf("other", relation, rest)
    return same(interval, rest, leaf)


def _written(interval: Shape) -> str:
    """An interval, or a union of intervals, in LaTeX."""
    if interval.kind == "bag":
        return r" \cup ".join(map(_written, interval.items))
    low, high = interval.items
    return f"{interval.text[0]}{low.text},{high.text}{interval.text[1]}"


def _plain_label(label: str) -> bool:
    return re.fullmatch(r"[A-Za-z]|\\[a-zA-Z]+", label.strip()) is not None


def _function(label: str) -> str:
    """The name of the function in a label such as ``f(x)``; empty for another label."""
    match = re.fullmatch(r"([A-Za-z]\w*|\\[a-zA-Z]+)\s*\(.*\)", label.strip())
    return match.group(1) if match else ""


def same(gold: Shape, prediction: Shape, leaf: Leaf) -> bool | None:
    """True or False where the conventions decide, None where ``leaf`` could not decide a needed part."""
    kinds = {gold.kind, prediction.kind}
    if "equation" not in kinds and "relation" in kinds:
        return _relations(gold, prediction, leaf)
    variables = _plain_label(gold.label) and _plain_label(prediction.label)
    if "equation" in kinds or (variables and gold.label != prediction.label):  # the lines x = 5 and y = 5
        one, other = _as_equation(gold), _as_equation(prediction)
        return leaf("equation", one, other) if one and other else False
    functions = _function(gold.label), _function(prediction.label)
    if all(functions) and functions[0] != functions[1]:
        return False  # f(x) = ... and g(x) = ...
    if kinds == {"leaf"}:
        return leaf("expression", gold, prediction)
    if kinds <= {"bag", "tuple"}:
        return _bags(gold, prediction, leaf)
    if kinds <= {"tuple", "interval"} or kinds == {"matrix"}:  # (1,2) may be a point or an interval
        return gold.text == prediction.text and _ordered(gold.items, prediction.items, leaf)
    if "leaf" in kinds:
        text = (gold if gold.kind == "leaf" else prediction).text
        return leaf("other", gold, prediction) if _STRUCTURED.search(text) else False
    return False


def read_shape(normalized: str) -> Shape:
    """The structure of an answer: conditions read together, and ``3/4, or 0.75`` as the one value it is."""
    shape = read_conditions(parse_shape(normalized))
    if shape.kind != "bag" or not re.search(r"\bor\b", shape.source):
        return shape
    exact = [read_exact(item.text) if item.kind == "leaf" else None for item in shape.items]
    values = {number.value if number else None for number in exact}
    return shape.items[0] if len(values) == 1 and None not in values else shape


def is_empty(normalized: str) -> bool:
    """True where there is no answer: no letter, digit or symbol, "nan", a bare infinity."""
    if not re.search(r"\w|\\", normalized):
        return True
    return normalized.strip("()").lower() in {"nan", *_INFINITE, "n/a"}


def compare(gold: str, prediction: str, leaf: Leaf) -> bool | None:
    """Compare two normalized answers; None where ``leaf`` could not decide a needed part."""
    if _squeezed(gold) == _squeezed(prediction):
        return True
    one, other = read_shape(gold), read_shape(prediction)
    if one.kind == "equation" and is_quantity(one.items[0].text):
        one = valued(other, one)
    return same(one, valued(one, other), leaf)


class Pair(NamedTuple):
    """Two answers, each in its normalized spelling.

    Attributes:
        percent: the problem asks for a percentage, so that 20% answers 20.
    """

    gold: str
    prediction: str
    percent: bool = False

    @classmethod
    def of(cls, gold: str, prediction: str, question: str | None = None) -> Pair:
        """Normalize both; ``question`` is the problem's text."""
        normalized = _without_asked_scale(_without_asked_bound(normalize(prediction), question), question)
        return cls(normalize(gold), normalized, "%" in normalized and asks_percentage(question))

    @property
    def blank(self) -> bool:
        """True where the prediction gives no answer; see ``is_empty``."""
        return is_empty(self.prediction)

    def equal(self, leaf: Leaf | None = None) -> bool | None:
        """Whether they mean the same; None where ``leaf``, by default without algebra, cannot decide."""
        return compare(self.gold, self.prediction, leaf or cheap_leaf(self.percent))
