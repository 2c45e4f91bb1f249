"""The worker's leaf comparison: expressions parsed by math-verify's LaTeX grammar, compared as functions.

Only the worker imports this, because sympy takes half a second. Text reaches sympy only through the ANTLR
grammar; nothing is evaluated as Python. Two expressions are equal when they agree to 30 digits at several
points: a wrong factor or sign cannot agree, and no simplification has to be found. Whatever has no numeric
value at any point (sets, matrices, unevaluated functions) goes to math-verify's own comparison.
"""

from __future__ import annotations

import functools
import itertools
import logging
import re
from collections.abc import Iterable, Iterator
from fractions import Fraction

import sympy  # type: ignore[import-untyped]
from latex2sympy2_extended.latex2sympy2 import ConversionConfig, _Latex2Sympy
from latex2sympy2_extended.math_normalization import NormalizationConfig, normalize_latex
from math_verify import verify
from sympy.core.function import AppliedUndef  # type: ignore[import-untyped]

from empg_lite.rewards.math.compare import Leaf, Pair, cheap_leaf
from empg_lite.rewards.math.shapes import Shape
from empg_lite.rewards.math.units import strip_units

logging.disable(logging.CRITICAL)

_MAX_LENGTH = 1000
_MAX_NESTING = 40
_DIGITS = 40
_TOLERANCE = sympy.Float(10) ** -30
_SPELLING = NormalizationConfig(
    basic_latex=True, units=False, malformed_operators=True, nits=False, boxed="none"
)
_CONVERSION = ConversionConfig(lowercase_symbols=False)
_UNEVALUATED = (sympy.Sum, sympy.Product, sympy.Integral, sympy.Limit, sympy.Derivative)
#: Where functions are compared: on either side of 0 and 1, and beyond the numbers in ``|x - 2|``.
#: Nothing one would write has a zero, pole or period there.
_SAMPLES = tuple(
    sympy.Rational(*pair) for pair in ((23, 17), (281, 29), (5, 13), (-37, 53), (-409, 31), (97, 41))
)


class Unparsable(ValueError):
    """Not mathematics that the grammar can parse."""


class _Grammar(_Latex2Sympy):
    """math-verify's grammar with exact numbers: 0.5 is 1/2, and no literal reaches ``eval``."""

    def parse_number(self, text: str) -> sympy.Rational:
        value = Fraction(text.replace(",", "").replace(" ", ""))
        return sympy.Rational(value.numerator, value.denominator)


def _nesting(text: str) -> int:
    """The deepest level of brackets: the grammar's time grows steeply with it."""
    steps = (1 if char in "([{" else -1 if char in ")]}" else 0 for char in text)
    return max(itertools.accumulate(steps, initial=0))


@functools.lru_cache(maxsize=512)  # the K rationales of a problem share its gold answer
def parse(text: str) -> sympy.Basic:
    """A normalized answer as a sympy object, ``i`` as the imaginary unit, ``f(x)`` as a symbol of its own.

    Raises:
        Unparsable: the grammar cannot parse it.
    """
    if len(text) > _MAX_LENGTH or _nesting(text) > _MAX_NESTING:
        raise Unparsable("too long or nested too deeply")
    text = re.sub(r"_\s*(\w)", r"_{\1}", strip_units(text))
    if re.search(r"\d\s+\d", text):
        raise Unparsable("two numbers side by side")
    try:
        parsed = _Grammar(is_real=None, config=_CONVERSION).parse(normalize_latex(text, _SPELLING))
    except (RecursionError, MemoryError):
        raise
    except Exception as error:  # the grammar raises plain Exception for every syntax error
        raise Unparsable(str(error)[:200]) from error
    if not isinstance(parsed, sympy.Basic | sympy.MatrixBase):
        raise Unparsable("no expression")
    if parsed.has(sympy.zoo, sympy.nan):
        raise Unparsable("no value")
    if not isinstance(parsed, sympy.Expr):
        return parsed
    bound = {s for node in parsed.atoms(*_UNEVALUATED) for s in getattr(node, "variables", node.args[1:2])}
    names: dict[sympy.Basic, sympy.Basic] = {
        call: sympy.Symbol(str(call.doit())) for call in parsed.atoms(AppliedUndef)
    }
    names.update({s: sympy.I for s in parsed.free_symbols if s.name == "i" and s not in bound})
    closed = parsed.xreplace(names)
    return closed.doit() if bound else closed


def _points(names: Iterable[str]) -> Iterator[dict[str, sympy.Rational]]:
    """Assignments of the variables, no two on one ray; the signs alternate in the last one."""
    ordered = sorted(names)
    for row, sample in enumerate(_SAMPLES if ordered else _SAMPLES[:1]):
        mixed = row == len(_SAMPLES) - 1
        yield {
            name: sample * (1 + sympy.Rational((3 + row) * column, 11)) * (-1 if mixed and column % 2 else 1)
            for column, name in enumerate(ordered)
        }


def _value(expression: sympy.Expr, point: dict[str, sympy.Rational]) -> sympy.Expr | None:
    """The value, a finite complex number to 40 digits, or None."""
    values = {symbol: point[symbol.name] for symbol in expression.free_symbols}
    try:
        if expression.has(*_UNEVALUATED):
            number = expression.subs(values).doit().evalf(_DIGITS)
        else:
            number = expression.evalf(_DIGITS, subs=values)
        finite = number.is_number and number.is_finite
        return number if finite and all(part.is_Number for part in number.as_real_imag()) else None
    except (RecursionError, MemoryError):
        raise
    except Exception:  # a pole or a divergent sum: sympy and mpmath raise all kinds of exceptions
        return None


def _nothing(number: sympy.Expr) -> bool:
    """True for zero, and for the rounding noise of an exact zero: evalf found no correct digit in it."""
    return all(part == 0 or getattr(part, "_prec", 99) < 16 for part in number.as_real_imag())


def _close(a: sympy.Expr, b: sympy.Expr) -> bool:
    if _nothing(a) or _nothing(b):
        return _nothing(a) and _nothing(b)
    return bool(abs(a - b) <= _TOLERANCE * max(abs(a), abs(b)))


def _names(*expressions: sympy.Basic) -> set[str]:
    return {symbol.name for expression in expressions for symbol in expression.free_symbols}


def _identical(a: sympy.Expr, b: sympy.Expr) -> bool | None:
    """Equal as functions; None where no point gave a value to both.

    A point where only one side is real (``\\sqrt{x}^2`` against ``x``) does not count.
    """
    compared = 0
    for point in _points(_names(a, b)):
        one, other = _value(a, point), _value(b, point)
        if one is None or other is None:
            continue
        if not _close(one, other):
            if bool(one.is_real) != bool(other.is_real) and point:
                continue
            return False
        compared += 1
    return True if compared else None


def expressions_equal(gold: str, prediction: str) -> bool:
    """Equal as functions or, to math-verify, as sets, matrices and the like.

    Raises:
        Unparsable: either side is not mathematics.
    """
    a, b = parse(gold), parse(prediction)
    if isinstance(a, sympy.Expr) and isinstance(b, sympy.Expr):
        if a == b:
            return True
        verdict = _identical(a, b)
        if verdict is not None:
            return verdict
    return bool(verify(a, b, timeout_seconds=None))


def _ratio(gold: Shape, prediction: Shape) -> sympy.Expr | None:
    """f/g where gold says f = 0 and the prediction g = 0 (or f < 0, g < 0); None where not constant."""
    sides = [parse(item.text) for shape in (gold, prediction) for item in shape.items]
    if not all(isinstance(side, sympy.Expr) for side in sides):
        return None
    f, g = sides[0] - sides[1], sides[2] - sides[3]
    if not _names(f) or _names(f) != _names(g):
        return None
    ratio = None
    for point in _points(_names(f)):
        one, other = _value(f, point), _value(g, point)
        if one is None or other is None or _nothing(one) or _nothing(other):
            continue
        if ratio is not None and not _close(one / other, ratio):
            return None
        ratio = one / other
    return ratio


def _relations_equal(gold: Shape, prediction: Shape) -> bool | None:
    """Inequalities with proportional sides; None where as_intervals may still decide."""
    signs, others = gold.text.split(), prediction.text.split()
    if len(signs) == len(others) == 1:
        ratio = _ratio(gold, prediction)
        if ratio is None or not ratio.is_real:
            return None
        if signs == others == [r"\ne"]:
            return True
        flipped = {"<": ">", ">": "<", r"\le": r"\ge", r"\ge": r"\le"}
        return (signs[0] if ratio > 0 else flipped.get(signs[0])) == others[0]
    return None


def symbolic_leaf(percent_asked: bool) -> Leaf:
    """The worker's leaf comparison: always decides, except for some inequalities."""
    cheap = cheap_leaf(percent_asked)

    def leaf(what: str, gold: Shape, prediction: Shape) -> bool | None:
        decided = cheap(what, gold, prediction)
        if decided is not None:
            return decided
        if what == "expression":
            return expressions_equal(gold.text, prediction.text)
        if what == "equation":
            return _ratio(gold, prediction) is not None
        if what == "relation":
            return _relations_equal(gold, prediction)
        return bool(verify(parse(gold.source), parse(prediction.source), timeout_seconds=None))

    return leaf


def decide(pair: Pair) -> bool:
    """Whether two answers mean the same, by algebra.

    Raises:
        ValueError, TypeError, NotImplementedError, RecursionError, ArithmeticError: sympy's errors for an
            answer that is not mathematics, has no value, or whose value is too large.
    """
    return bool(pair.equal(symbolic_leaf(pair.percent)))
