r"""The outer structure of an answer: lists, tuples, intervals, matrices, relations, and what they hold.

``(1,2)``, ``\{1,2\}``, ``[1,2]`` and a vector are different things; "2 or 3", ``2, 3`` and ``\{2,3\}``
are the same. This module reads only brackets and separators; leaves remain text.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, replace

from empg_lite.rewards.math.units import strip_units
from empg_lite.rewards.math.words import means_everything, means_nothing

_MAX_DEPTH = 12


@dataclass(frozen=True, slots=True)
class Shape:
    """One node.

    Attributes:
        kind: ``leaf``, ``bag`` (unordered), ``tuple`` (ordered), ``interval``, ``matrix``, ``equation``,
            ``relation`` (inequality).
        text: the source of a leaf, the brackets of a tuple or interval, the operators of a relation, the size
            of a matrix as ``RxC``.
        items: parts in the order written (a matrix row by row).
        label: what precedes "=", as ``x`` in ``x = 5``.
        source: the text it was parsed from.
    """

    kind: str
    text: str
    items: tuple[Shape, ...] = ()
    label: str = ""
    source: str = ""


_TOKEN = re.compile(
    r"\\begin\{\w+\*?\}|\\end\{\w+\*?\}|\\text\{|\\[a-zA-Z]+|\\.|[()\[\]{}]|[A-Za-z]+|.", re.DOTALL
)
_OPENERS = {"(", "[", "{", r"\{", r"\langle", r"\text{"}
_CLOSERS = {")", "]", "}", r"\}", r"\rangle"}
_JOINERS = {"and", "or", ","}
_TEXT_JOINER = re.compile(r"\\text\{[\s,;]*(?:and|or)?[\s,;]*\}")
_RELATIONS = {"=", "<", ">", r"\le", r"\ge", r"\ne", r"\approx", r"\in", r"\equiv"}
_MIRRORED = {"<": ">", ">": "<", r"\le": r"\ge", r"\ge": r"\le"}
_SINGLE = re.compile(
    r"(?:[A-Za-z]|\\(?!frac|sqrt|pi|sin|cos|tan|log|ln|text)[a-zA-Z]+)"
    r"(?:_(?:\{[^{}]*\}|\w))?(?:\s*'+|\^\{-1\})?(?:\s*\((?:[A-Za-z\\,\s]|\d+)+\))?"
)
_BUILDER = re.compile(
    r"\s*[A-Za-z]\s*(?:\\in\s*\\mathbb\s*\{?\s*R\s*\}?|\\in\s*R)?"
    r"\s*(?:\\mid(?![a-z])|\||:|\\text\{\s*such that\s*\})"
)
_NUMBER = re.compile(r"[-+]?\d+(?:\.\d*)?%?", re.ASCII)  # most answers
_MATRIX = re.compile(
    r"[(\[]?\s*\\begin\{(?P<env>[pb]?matrix|smallmatrix|array)\}(?:\{[^{}]*\})?(?P<body>.*)\\end\{(?P=env)\}\s*[)\]]?",
    re.DOTALL,
)


def _depths(text: str) -> Iterator[tuple[int, str, int]]:
    """(position, token, bracket depth before it); openers of any kind count the same, as in ``[0,1)``."""
    depth = 0
    for match in _TOKEN.finditer(text):
        token = match.group()
        if token in _CLOSERS or token.startswith(r"\end"):
            depth -= 1
            yield match.start(), token, depth
        else:
            yield match.start(), token, depth
            depth += token in _OPENERS or token.startswith(r"\begin")


def _split(text: str, separators: set[str]) -> list[tuple[str, str]]:
    """Cut at top-level separators: (piece, separator that ended it)."""
    pieces, start = [], 0
    for position, token, depth in _depths(text):
        if depth == 0 and token in separators:
            pieces.append((text[start:position], token))
            start = position + len(token)
    return [*pieces, (text[start:], "")]


def _thousands(text: str, *, enclosed: bool) -> str:
    """Join ``1,234`` where its comma cannot separate: alone, or next to commas followed by a space.

    In brackets that may hold parts a lone comma separates: ``(4,112)`` is a pair.
    """
    marked = bool(re.search(r",\s|[^A-Za-z](?:and|or)[^A-Za-z]|;", text))
    if enclosed and not marked:
        return text
    if not marked and not re.fullmatch(r"[^,]*?(?<![\d.])\d{1,3}(?:,\d{3})+(?![\d,])[^,]*", text):
        return text
    out, last = "", 0
    groups = {m.start(): m.end() for m in re.finditer(r"(?<![\d.,])\d{1,3}(?:,\d{3})+(?![\d,]*\d)", text)}
    for position, _, depth in _depths(text):
        if depth == 0 and position in groups and position >= last:
            out += text[last:position] + text[position : groups[position]].replace(",", "")
            last = groups[position]
    return out + text[last:]


def _elements(text: str, *, enclosed: bool = False) -> list[str]:
    """The items of a comma list, inside brackets or bare; "and" and "or" separate too."""
    text = _TEXT_JOINER.sub(" , ", _thousands(text, enclosed=enclosed))
    return [piece.strip() for piece, _ in _split(text, _JOINERS) if piece.strip()]


def _enclosed(text: str) -> tuple[str, str, str] | None:
    """(opener, inner, closer) where one pair of brackets encloses the whole text."""
    tokens = list(_depths(text))
    if len(tokens) < 2 or tokens[0][1] not in _OPENERS or tokens[-1][1] not in _CLOSERS:
        return None
    if any(depth == 0 for _, _, depth in tokens[1:-1]) or tokens[-1][2] != 0:
        return None
    opener, closer = tokens[0][1], tokens[-1][1]
    return opener, text[len(opener) : tokens[-1][0]].strip(), closer


def _label(text: str) -> bool:
    """True for a text that may precede "=" without being part of the answer."""
    text = text.strip()
    if text.startswith("{") and text.endswith("}"):
        text = text[1:-1].strip()
    if _SINGLE.fullmatch(text) or re.fullmatch(r"\|?\s*[A-Z]{1,4}\s*\|?|[A-Za-z]{3,}(?:\s+[A-Za-z]+)*", text):
        return True
    if re.fullmatch(
        r"m?\s*\\(?:angle|overline|overrightarrow|triangle|vec|hat|bar|tilde)\s*\{?\s*[A-Za-z]{1,4}\s*\}?",
        text,
    ):
        return True
    if re.fullmatch(r"\\text\{[^{}]*\}(?:_\{?\w+\}?)?", text):
        return True
    parts = re.split(r"[,:]", text[1:-1] if text.startswith("(") and text.endswith(")") else text)
    return len(parts) > 1 and all(
        _SINGLE.fullmatch(p.strip()) or re.fullmatch(r"[A-Z]{1,4}", p.strip()) for p in parts
    )


_CONSTANT_WORDS = re.compile(r"\\(?:frac|sqrt|cdot|pi|text\{[^{}]*\})|\^|[\d\s+\-*/(){}.,!%]")


_QUANTITY = re.compile(
    r"\\(?:sin|cos|tan|cot|sec|csc)(?![a-zA-Z])\s*(?:\^\{?\d\}?)?\s*\(?\s*(?:\\[a-z]+|\\?angle|[A-Z]+)\s*\)?"
    r"|(?:\\Pr|[A-Za-z])\s*\((?:[^()a-z]|\\[a-z]+)*\)|(?:\\Pr|P|E)\s*\[[^\[\]]*\]"
    r"|\|[A-Z\\a-z ]+\||\[[A-Z]{3,}\]"
    r"|\\(?:angle|overline|triangle|text)(?![a-zA-Z])\s*\{?[^{}+*/=-]*\}?|(?<![A-Za-z\\])[A-Z]{2,4}(?![a-z])"
)


def _constant(text: str) -> bool:
    """True where no variable occurs."""
    return not _CONSTANT_WORDS.sub("", text)


def is_value(shape: Shape) -> bool:
    """True for a value without variables, or a structure of such values."""
    if shape.label:
        return False
    if shape.kind == "leaf":
        return _constant(re.sub(r"(?<![A-Za-z\\])[ei](?![A-Za-z])|\\infty|:", "", shape.text))
    return shape.kind in ("bag", "tuple", "interval", "matrix") and all(map(is_value, shape.items))


def is_quantity(text: str) -> bool:
    r"""True for lengths, angles, values of functions and what is made of them: ``\frac{NO}{BO}``, ``P(A)``.

    Not for an expression in variables, which an equation binds.
    """
    if re.fullmatch(r"\s*[a-w](?:\s*\+\s*[a-w])+\s*", text):  # m + n, the sum that was asked for
        return True
    rest, count = _QUANTITY.subn("", text)
    return count > 0 and _constant(rest)


def valued(one: Shape, other: Shape) -> Shape:
    r"""``other``, or its last side where it is an equation that ends in a value and ``one`` is a value.

    ``m+n = 256+37 = 293`` says 293. An equation that ends in 0 is one to be solved.
    """
    if other.kind != "equation" or not is_value(one):
        return other
    side = parse_shape(other.items[-1].text)
    return (
        side if is_value(side) and (side.text.strip() != "0" or is_quantity(other.items[0].text)) else other
    )


def _leaf(text: str) -> Shape:
    return Shape("leaf", text, source=text)


def _related(text: str, depth: int) -> Shape | None:
    """Equations, inequalities, labels and memberships; None where there is no relation at the top level."""
    pieces = _split(text, _RELATIONS)
    if len(pieces) == 1:
        return None
    parts, signs = [piece.strip() for piece, _ in pieces], [sign for _, sign in pieces[:-1]]
    if r"\approx" in signs:
        cut = signs.index(r"\approx")
        if cut == 0 and _label(parts[0]):
            return replace(_single(parts[1], depth + 1), label=parts[0])
        if cut > 0:
            return parse_shape(text[: text.index(r"\approx")], depth + 1)
        return _single(parts[0] or parts[1], depth + 1)
    if signs == [r"\in"] and _label(parts[0]):
        return replace(_single(parts[1], depth + 1), label=parts[0])
    if all(sign in ("=", r"\equiv") for sign in signs) and all(parts):
        return _equated(text, parts, depth)
    if not all(parts) or any(sign in ("=", r"\in", r"\equiv") for sign in signs):
        return _leaf(text)
    return Shape("relation", " ".join(signs), tuple(map(_leaf, parts)), source=text)


def _equated(text: str, parts: list[str], depth: int) -> Shape:
    if _label(parts[0]):
        return replace(_single(parts[-1], depth + 1), label=parts[0].strip())
    if all(map(_constant, parts)):
        return _single(parts[-1], depth + 1)
    if len(parts) == 2 and _constant(parts[0]) and _label(parts[1]):  # 5 = x
        return replace(_single(parts[0], depth + 1), label=parts[1])
    return Shape("equation", text, (_leaf(parts[0]), _leaf(parts[-1])), source=text)


def _matrix(text: str) -> Shape | None:
    match = _MATRIX.fullmatch(text)
    if match is None or r"\begin" in match["body"]:
        return None
    rows = [row for row in re.split(r"\\\\(?:\s*\[[^\]]*\])?|\\cr(?![a-z])", match["body"]) if row.strip()]
    cells = [[cell.strip() for cell in row.split("&")] for row in rows]
    if not cells or len({len(row) for row in cells}) != 1:
        return None
    items = tuple(_leaf(cell) for row in cells for cell in row)
    return Shape("matrix", f"{len(cells)}x{len(cells[0])}", items, source=text)


def _bracketed(text: str, depth: int) -> Shape | None:
    """Sets, tuples, intervals, vectors and plain groups."""
    name = re.match(r"[A-Z]\s*(?=\([^()]*,)", text)  # a named point, as in A(1,2)
    enclosed = _enclosed(text[name.end() :] if name else text)
    if enclosed is None:
        return None
    opener, inner, closer = enclosed
    if opener in ("{", r"\text{") and closer == "}":
        return (
            parse_shape(inner, depth + 1)
            if opener == "{" or re.search(r"[,;]|\b(?:and|or)\b", inner)
            else None
        )
    if opener == r"\{":
        built = _BUILDER.match(inner)
        if built is not None:
            return parse_shape(inner[built.end() :], depth + 1)
        if not inner:
            return _leaf(r"\emptyset")
    elements = _elements(inner, enclosed=True)
    if len(elements) < 2 and opener in ("(", "["):
        return None  # a group, not a tuple
    items = tuple(parse_shape(element, depth + 1) for element in elements)
    if opener == r"\{":
        return _bag(items, text)
    if opener == r"\langle":
        return Shape("matrix", f"{len(items)}x1", items, source=text)
    if opener == "[" and all(item.text == "[]" and len(item.items) == len(items[0].items) for item in items):
        cells = tuple(cell for row in items for cell in row.items)
        return Shape("matrix", f"{len(items)}x{len(items[0].items)}", cells, source=text)
    brackets = opener + closer
    kind = "interval" if len(items) == 2 and brackets != "()" else "tuple"
    return Shape(kind, brackets, items, source=text)


def _bag(items: tuple[Shape, ...], text: str) -> Shape:
    flat: list[Shape] = []
    for item in items:
        flat.extend(item.items if item.kind == "bag" and not item.label else [item])
    return flat[0] if len(flat) == 1 else Shape("bag", "", tuple(flat), source=text)


def _single(text: str, depth: int) -> Shape:
    """One item: no comma, "and" or "or" at its top level."""
    text = text.strip()
    if depth > _MAX_DEPTH:
        return _leaf(text)
    if re.fullmatch(r"\\mathbb\s*\{?\s*R\s*\}?", text) or means_everything(text):
        text = r"(-\infty,\infty)"
    elif means_nothing(text):
        text = r"\emptyset"
    if text.startswith("]") or text.endswith("["):  # French notation for open ends
        text = re.sub(r"\[$", ")", re.sub(r"^\]", "(", text))
    shape = _related(text, depth)
    if shape is not None:
        return shape
    parts = [piece for piece, _ in _split(text, {r"\cup"})]
    if len(parts) > 1:
        return _bag(tuple(parse_shape(part, depth + 1) for part in parts), text)
    for candidate in dict.fromkeys((text, strip_units(text))):
        shape = _matrix(candidate) or _bracketed(candidate, depth)
        if shape is not None:
            return shape
    if re.search(r"\\(?:pm|mp)(?![a-zA-Z])", text):
        upper = re.sub(r"\\pm(?![a-zA-Z])", "+", re.sub(r"\\mp(?![a-zA-Z])", "-", text))
        lower = re.sub(r"\\pm(?![a-zA-Z])", "-", re.sub(r"\\mp(?![a-zA-Z])", "+", text))
        return Shape("bag", "", (_leaf(upper.removeprefix("+").strip()), _leaf(lower)), source=text)
    return _leaf(text)


def _group(text: str, depth: int) -> Shape:
    """One item of a semicolon list: ``p=5,q=2`` is one solution, an ordered pair."""
    items = tuple(_single(item, depth + 1) for item in _elements(text))
    return items[0] if len(items) == 1 else Shape("tuple", "()", items, source=text)


def parse_shape(text: str, depth: int = 0) -> Shape:
    """Parse the outer structure of a normalized answer."""
    text = text.strip().strip(",;").strip()
    if depth > _MAX_DEPTH or _NUMBER.fullmatch(text):
        return _leaf(text)
    groups = [piece for piece, _ in _split(text, {";"}) if piece.strip()]
    if len(groups) > 1:
        return _bag(tuple(_group(piece, depth) for piece in groups), text)
    items = _elements(text)
    if len(items) > 1:
        return _bag(tuple(_single(item, depth + 1) for item in items), text)
    return _single(items[0] if items else text, depth)


def as_intervals(relation: Shape) -> Shape | None:
    r"""An inequality in one isolated variable as its interval, ``x \ne a`` as two; None for any other."""
    parts, signs = [item.text for item in relation.items], relation.text.split()
    if signs == [r"\ne"] and _label(parts[0]):
        below = Shape("interval", "()", (_leaf(r"-\infty"), _leaf(parts[1])), parts[0], relation.source)
        above = Shape("interval", "()", (_leaf(parts[1]), _leaf(r"\infty")), parts[0], relation.source)
        return Shape("bag", "", (below, above), parts[0], relation.source)
    if signs and all(sign in (">", r"\ge") for sign in signs):
        parts, signs = parts[::-1], [_MIRRORED[sign] for sign in reversed(signs)]
    if not all(sign in ("<", r"\le") for sign in signs):
        return None
    if len(signs) == 1 and _label(parts[0]):
        parts, signs = [r"-\infty", *parts], ["<", *signs]
    elif len(signs) == 1 and _label(parts[1]):
        parts, signs = [*parts, r"\infty"], [*signs, "<"]
    if len(signs) != 2 or not _label(parts[1]):
        return None
    brackets = ("(" if signs[0] == "<" else "[") + (")" if signs[1] == "<" else "]")
    return Shape("interval", brackets, (_leaf(parts[0]), _leaf(parts[2])), parts[1], relation.source)
