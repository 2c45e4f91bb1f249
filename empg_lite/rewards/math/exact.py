"""Exact rational values of plain answers, without sympy and without floats.

Reads integers, decimals, fractions, thousands separators, signs, percent, mixed numbers, powers and
simple LaTeX arithmetic from a normalized answer. A decimal is exact: ``0.33`` is not 1/3. Anything else, or
a value that is too large, gives None.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from fractions import Fraction

#: Longest literal, and the maximum number of digits of any intermediate value: Python neither prints nor
#: parses integers over 4,300 digits, and a tower of powers must cost nothing.
MAX_DIGITS = 4000
_MAX_BITS = 3 * MAX_DIGITS
_MAX_DEPTH = 30
_MAX_FACTORIAL = 200

_PLAIN = re.compile(r"([-+]?)\s*(\d{1,3}(?:,\d{3})+|\d*)(?:\.(\d*))?\s*(%?)", re.ASCII)
_SEPARATED = re.compile(r"(?<![\d.,])\d{1,3}(?:([ ,])\d{3})(?:\1\d{3})*(?!\d)", re.ASCII)
_SCIENTIFIC = re.compile(r"(\d)[eE]([-+]?\d{1,3})(?![\d.])", re.ASCII)
_PERIODIC = re.compile(r"(\d*)\.(\d*)(?:\\overline\{(\d+)\}|(?<=\.)\((\d+)\))", re.ASCII)
_TOKEN = re.compile(r"\s*(\d+\.?\d*|\.\d+|\\frac|\\cdot|[-+/^(){}!%])", re.ASCII)


@dataclass(frozen=True, slots=True)
class Exact:
    """A rational value; ``percent`` when it was written with a percent sign (``20%`` is 1/5)."""

    value: Fraction
    percent: bool = False


class _Unknown(Exception):
    """Not plain arithmetic, or too large."""


def _literal(digits: str) -> Fraction:
    whole, _, decimals = digits.partition(".")
    if len(whole) + len(decimals) > MAX_DIGITS:
        raise _Unknown
    return Fraction(int((whole + decimals) or "0"), 10 ** len(decimals))


def _bounded(value: Fraction) -> Fraction:
    if max(value.numerator.bit_length(), value.denominator.bit_length()) > _MAX_BITS:
        raise _Unknown
    return value


class _Reader:
    """Recursive descent over ``+ - * / ^ ! %``, brackets, ``\\frac`` and juxtaposition."""

    def __init__(self, text: str) -> None:
        self.tokens: list[str] = []
        self.at = 0
        self.depth = 0
        position = 0
        text = text.rstrip()
        while position < len(text):
            match = _TOKEN.match(text, position)
            if match is None:
                raise _Unknown
            self.tokens.append(match.group(1))
            position = match.end()

    def peek(self) -> str:
        return self.tokens[self.at] if self.at < len(self.tokens) else ""

    def take(self, expected: str = "") -> str:
        token = self.peek()
        if not token or (expected and token != expected):
            raise _Unknown
        self.at += 1
        return token

    def sum(self) -> Fraction:
        self.depth += 1
        if self.depth > _MAX_DEPTH:
            raise _Unknown
        total = self.product()
        while self.peek() in ("+", "-"):
            sign = 1 if self.take() == "+" else -1
            total = _bounded(total + sign * self.product())
        self.depth -= 1
        return total

    def product(self) -> Fraction:
        value = self.signed()
        while True:
            token = self.peek()
            if token == r"\cdot":
                self.take()
                value = _bounded(value * self.signed())
            elif token == "/":
                self.take()
                divisor = self.signed()
                if not divisor:
                    raise _Unknown
                value = _bounded(value / divisor)
            elif token in ("(", "{", r"\frac"):
                value = _bounded(value * self.power())
            else:
                return value

    def signed(self) -> Fraction:
        sign = 1
        for _ in range(2):
            if self.peek() in ("+", "-") and self.take() == "-":
                sign = -sign
        return sign * self.power()

    def power(self) -> Fraction:
        base = self.postfix()
        if self.peek() != "^":
            return base
        self.take()
        exponent = self.group() if self.peek() == "{" else self.signed_literal()
        if exponent.denominator != 1 or (not base and exponent <= 0):
            raise _Unknown
        bits = max(base.numerator.bit_length(), base.denominator.bit_length())
        if abs(exponent) * bits > _MAX_BITS:
            raise _Unknown
        return base ** int(exponent)

    def signed_literal(self) -> Fraction:
        sign = -1 if self.peek() == "-" and self.take() else 1
        if not self.peek()[:1].isdigit():
            raise _Unknown
        return sign * _literal(self.take())

    def postfix(self) -> Fraction:
        value = self.atom()
        while self.peek() in ("!", "%"):
            if self.take() == "%":
                value /= 100
            elif value.denominator != 1 or not 0 <= value <= _MAX_FACTORIAL:
                raise _Unknown
            else:
                value = Fraction(math.factorial(int(value)))
        return value

    def atom(self) -> Fraction:
        token = self.peek()
        if token == "{":
            return self.group()
        self.take()
        if token == "(":
            value = self.sum()
            self.take(")")
            return value
        if token == r"\frac":
            top, bottom = self.group(), self.group()
            if not bottom:
                raise _Unknown
            return _bounded(top / bottom)
        if token[0].isdigit() or token[0] == ".":
            return self.mixed(token)
        raise _Unknown

    def mixed(self, token: str) -> Fraction:
        r"""A literal; ``2\frac{1}{3}`` is two and a third, as in MATH's answers."""
        value = _literal(token)
        if self.peek() == r"\frac":
            part = self.tokens[self.at + 1 : self.at + 7]
            if len(part) == 6 and part[0] == part[3] == "{" and part[2] == part[5] == "}":
                top, bottom = part[1], part[4]
                if token.isdigit() and top.isdigit() and bottom.isdigit() and int(top) < int(bottom):
                    self.at += 7
                    return value + Fraction(int(top), int(bottom))
        return value

    def group(self) -> Fraction:
        self.take("{")
        value = self.sum()
        self.take("}")
        return value


def _plain(text: str) -> Exact | None:
    """Fast path for numbers like ``-1,234.50%``."""
    match = _PLAIN.fullmatch(text)
    if match is None:
        return None
    sign, whole, decimals, percent = match.groups()
    digits = whole.replace(",", "")
    if not digits and not decimals:
        return None
    numerator = int(digits + (decimals or ""))
    scale = 10 ** (len(decimals or "") + (2 if percent else 0))
    return Exact(Fraction(-numerator if sign == "-" else numerator, scale), bool(percent))


def _periodic(match: re.Match[str]) -> str:
    r"""``0.1\overline{6}`` as a fraction: (16 - 1) / 90."""
    whole, start, block = match.group(1), match.group(2), match.group(3) or match.group(4)
    value = int(whole + start + block) - int((whole + start) or "0")
    return f"({value}/{10 ** len(start) * (10 ** len(block) - 1)})"


def read_exact(text: str) -> Exact | None:
    r"""The exact value of a normalized answer, or None where it is not plain arithmetic.

    >>> read_exact(r"1\frac{2}{3}").value
    Fraction(5, 3)
    """
    if len(text) > MAX_DIGITS:
        return None
    plain = _plain(text)
    if plain is not None:
        return plain
    joined = _SEPARATED.sub(lambda match: re.sub("[ ,]", "", match.group()), text)
    joined = _SCIENTIFIC.sub(r"\1\\cdot 10^{\2}", joined)
    if "." in joined:
        joined = _PERIODIC.sub(_periodic, joined)
    joined = re.sub(r"^([-+]?\s*)(\d+) (\d+)\s*/\s*(\d+)$", r"\1(\2+\3/\4)", joined)
    try:
        reader = _Reader(joined)
        value = reader.sum()
    except (_Unknown, IndexError):
        return None
    if reader.at != len(reader.tokens):
        return None
    return Exact(value, joined.endswith("%"))
