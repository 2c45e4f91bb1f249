"""One spelling for what means the same: Unicode and LaTeX variants of an answer become plain LaTeX.

Works on an extracted answer, not on a whole text. Nothing is evaluated here, and every expression is
linear in the length of the answer.
"""

from __future__ import annotations

import functools
import re
import unicodedata

_MINUS = "\u2010\u2011\u2012\u2013\u2014\u2015\u2212\ufe58\ufe63\uff0d"
_COMMANDS = {
    "×": r"\cdot ",
    "·": r"\cdot ",
    "⋅": r"\cdot ",
    "∙": r"\cdot ",
    "∗": r"\cdot ",
    "÷": "/",
    "∕": "/",
    "⁄": "/",
    "∞": r"\infty ",
    "≤": r"\le ",
    "≥": r"\ge ",
    "⩽": r"\le ",
    "⩾": r"\ge ",
    "≠": r"\ne ",
    "≈": r"\approx ",
    "±": r"\pm ",
    "∓": r"\mp ",
    "∪": r"\cup ",
    "∩": r"\cap ",
    "∈": r"\in ",
    "∅": r"\emptyset ",
    "√": r"\sqrt ",
    "∛": r"\sqrt[3]",
    "∜": r"\sqrt[4]",
    "⟨": r"\langle ",
    "⟩": r"\rangle ",
    "〈": r"\langle ",
    "〉": r"\rangle ",
    "ℝ": r"\mathbb{R}",
    "°": r"^\circ ",
    "º": r"^\circ ",
    "−": "-",
    "∶": ":",
    "٫": ".",
    "٬": ",",
    "٪": "%",
    "、": ",",
    "。": ".",
    "′": "'",
    "’": "'",
    "‘": "'",
    "“": '"',
    "”": '"',
}
_SUPERSCRIPTS = "⁰¹²³⁴⁵⁶⁷⁸⁹⁺⁻⁼⁽⁾ⁿⁱ"
_SUBSCRIPTS = "₀₁₂₃₄₅₆₇₈₉₊₋₌₍₎"
_RAISED = re.compile(f"[{_SUPERSCRIPTS}]+|[{_SUBSCRIPTS}]+")


def _raised(match: re.Match[str]) -> str:
    run = match.group()
    plain = unicodedata.normalize("NFKC", run).replace("\u2212", "-")
    return ("^{" if run[0] in _SUPERSCRIPTS else "_{") + plain + "}"


@functools.cache
def _fold(char: str) -> str:
    """The ASCII or LaTeX spelling of one character; itself where there is none."""
    if char in _COMMANDS:
        return _COMMANDS[char]
    if char in _MINUS:
        return "-"
    category = unicodedata.category(char)
    if category == "Nd":
        return str(unicodedata.decimal(char))
    if category == "Sc":
        return "$" if char in "$＄﹩" else ""
    if category == "Zs":
        return " "
    if category == "Cf":
        return ""  # zero-width and bidi marks
    if category == "No":
        top, slash, bottom = unicodedata.normalize("NFKC", char).partition("\u2044")
        return rf"\frac{{{top}}}{{{bottom}}}" if slash and bottom else char
    name = unicodedata.name(char, "")
    if name.startswith("GREEK ") and " LETTER " in name and " WITH " not in name:
        letter = name.rpartition(" ")[2].lower()
        return "\\" + (letter if "SMALL" in name else letter.capitalize()) + " "
    folded = unicodedata.normalize("NFKC", char)
    return folded if folded.isascii() else char


def fold_unicode(text: str) -> str:
    """Digits of every script, superscripts, vulgar fractions, operators and signs in ASCII or LaTeX."""
    if text.isascii():
        return text
    return "".join(map(_fold, _RAISED.sub(_raised, text)))


_WHITE = re.compile(r"\s+")  # collapsed early: what follows would be slow on long runs of spaces
_TEXT = re.compile(r"\\(?:text(?:bf|it|rm|sf|tt|normal|up)?|mbox|hbox|mathrm|operatorname\*?)\s*\{")
_STYLE = re.compile(
    r"\\(?:displaystyle|textstyle|scriptstyle|limits|nolimits|math(?:bf|it|sf|tt|normal|cal)|boldsymbol|bm"
    r"|boxed|fbox|bf|rm|it|phantom|hphantom|ensuremath|strut|hfill)(?![a-zA-Z])"
)
_SIZE = re.compile(r"\\(?:left|right|middle|[bB]igg?[lrm]?)(?![a-zA-Z])\s*\.?")
_NEGATIVE_SPACE = re.compile(r"\\!\s*")
_GROUPED = re.compile(
    r"(?<=\d)\s*(?:\{\s*,\s*\}|,\s*\\!|\\!|\\,|\{\\,\}|\\ |~|\\;)\s*(?:\\!)?\s*(?=\d{3}(?!\d))"
)
_SPACE = re.compile(r"(?<!\\)\\(?:[,;:> ]|q?quad(?![a-zA-Z])|enspace|thinspace|hspace\*?\{[^{}]*\})|~")
_FENCE = re.compile(r"(?<!\\)\\[()\[\]]")
_DEGREE = re.compile(r"\^\s*(?:\\circ(?![a-zA-Z])|\{\s*\\circ\s*\})|\\degrees?(?![a-zA-Z])|\\deg(?![a-zA-Z])")
_ORDINAL = re.compile(r"\^?\s*\{?\s*\\text\{\s*(?:st|nd|rd|th)\s*\}\s*\}?|(?<=\d)(?:st|nd|rd|th)(?![a-zA-Z])")
_DOUBLED = re.compile(r"\\\\(?=[a-zA-Z{}%$])")
_PERCENT = re.compile(
    r"\\%|\\text\{\s*(?:percent|percentage|pct|%)\s*\}|(?<![a-zA-Z])(?:percent|pct)(?![a-zA-Z])"
)
_ASCII_ROOT = re.compile(r"(?<![\\a-zA-Z])sqrt\s*\(([^()]*)\)")
_ASCII_NAME = re.compile(r"(?<![\\a-zA-Z])(pi|infty|infinity|inf)(?![a-zA-Z])", re.IGNORECASE)
_POWER = re.compile(r"(?<=[\w)}\]])\s*\*\*\s*(?=[\w({\\-])")
_DECIMAL_COMMA = re.compile(r"[-+]?0,\d{3,}")  # no thousands group begins with a lone zero
_FACTORIAL_EQUALS = re.compile(r"(?<!\d)!=")

_SAME = {
    r"\dfrac": r"\frac",
    r"\tfrac": r"\frac",
    r"\cfrac": r"\frac",
    r"\leqslant": r"\le",
    r"\leq": r"\le",
    r"\geqslant": r"\ge",
    r"\geq": r"\ge",
    r"\lt": "<",
    r"\gt": ">",
    r"\neq": r"\ne",
    r"\times": r"\cdot",
    r"\ast": r"\cdot",
    r"\div": "/",
    r"\colon": ":",
    r"\lbrace": r"\{",
    r"\rbrace": r"\}",
    r"\lbrack": "[",
    r"\rbrack": "]",
    r"\lparen": "(",
    r"\rparen": ")",
    r"\lvert": "|",
    r"\rvert": "|",
    r"\vert": "|",
    r"\infin": r"\infty",
    r"\varnothing": r"\emptyset",
    r"\R": r"\mathbb{R}",
    r"\Reals": r"\mathbb{R}",
    r"\union": r"\cup",
    r"\lor": r"\text{or}",
    r"\vee": r"\text{or}",
    r"\land": r"\text{and}",
    r"\wedge": r"\text{and}",
    r"\simeq": r"\approx",
    r"\dots": r"\ldots",
    r"\percent": "%",
}
_COMMAND = re.compile(r"\\[a-zA-Z]+")


def matching_brace(text: str, start: int) -> int:
    """Index of the ``}`` that closes the ``{`` at ``start``, or -1. Escaped braces do not count."""
    depth = 0
    for match in re.finditer(r"\\.|[{}]", text[start:], re.DOTALL):
        if match.group() == "{":
            depth += 1
        elif match.group() == "}":
            depth -= 1
            if depth == 0:
                return start + match.start()
    return -1


def _argument(text: str, start: int) -> tuple[str, int]:
    """The TeX argument at ``start``, without its braces, and where it ends."""
    while start < len(text) and text[start] == " ":
        start += 1
    if text[start : start + 1] == "{":
        end = matching_brace(text, start)
        return (text[start + 1 : end], end + 1) if end > 0 else (text[start + 1 :], len(text))
    command = _COMMAND.match(text, start)
    end = command.end() if command else min(start + 1, len(text))
    return text[start:end], end


def _brace_arguments(text: str) -> str:
    r"""``\frac12``, ``\frac 3{4}``, ``\sqrt3`` with all their braces; inner ones first."""
    for match in reversed(list(re.finditer(r"\\(?:frac|sqrt)(?![a-zA-Z])", text))):
        name, end = match.group(), match.end()
        option = re.match(r"\s*(\[[^\]]*\])", text[end:]) if name == r"\sqrt" else None
        if option:
            name, end = name + option.group(1), end + option.end()
        arguments = ""
        for _ in range(2 if name == r"\frac" else 1):
            argument, end = _argument(text, end)
            arguments += "{" + argument + "}"
        text = text[: match.start()] + name + arguments + text[end:]
    return text


def _latex(text: str) -> str:
    if r"\begin" not in text:
        text = _DOUBLED.sub(r"\\", text)
    text = _GROUPED.sub("", text)
    text = _NEGATIVE_SPACE.sub("", text)
    text = text.replace(r"\$", " ")
    text = _SPACE.sub(" ", text)
    text = _TEXT.sub(r"\\text{", text)
    text = _STYLE.sub("", text)
    text = _SIZE.sub("", text)
    text = _WHITE.sub(" ", _FENCE.sub(" ", text))
    text = _COMMAND.sub(lambda match: _SAME.get(match.group(), match.group()), text)
    text = _ORDINAL.sub("", text)
    text = _DEGREE.sub("", text)
    return _brace_arguments(text)


def normalize(answer: str) -> str:
    r"""One spelling of an answer: ``\dfrac12`` and ``½`` become ``\frac{1}{2}``, ``１０`` becomes ``10``.

    Math fences, currency, degree signs, quotes, sizing, spacing and a trailing period go; the text of
    ``\text{}`` stays.
    """
    text = _POWER.sub("^", fold_unicode(answer)).replace("**", "").replace("`", "")
    text = _WHITE.sub(" ", text)
    if "\\" in text:
        text = _latex(text)
    else:
        text = _ORDINAL.sub("", _GROUPED.sub("", text))
    text = re.sub(r'[$"]|\\"', " ", text)
    text = _PERCENT.sub("%", text)
    text = text.replace("<=", r"\le ").replace(">=", r"\ge ")
    text = _FACTORIAL_EQUALS.sub(r"\\ne ", text).replace("*", r"\cdot ")
    text = _ASCII_ROOT.sub(r"\\sqrt{\1}", text)
    text = _ASCII_NAME.sub(lambda m: r"\pi " if m.group().lower() == "pi" else r"\infty ", text)
    text = _WHITE.sub(" ", text).strip().rstrip(".,;: ").lstrip(",;: ")
    return text.replace(",", ".") if _DECIMAL_COMMA.fullmatch(text) else text
