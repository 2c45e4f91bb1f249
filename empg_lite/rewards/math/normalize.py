"""Unicode and LaTeX variants of an answer in one spelling, plain LaTeX.

Works on an extracted answer, not on a whole text. Evaluates nothing, and every regular expression runs in
time linear in the length of the answer.
"""

from __future__ import annotations

import functools
import re
import unicodedata

from empg_lite.rewards.math.prose import undecorated

_MINUS = "\u2010\u2011\u2012\u2013\u2014\u2015\u2212\ufe58\ufe63\uff0d"
#: LaTeX or ASCII spelling -> the characters that it replaces.
_SIGNS = {
    r"\cdot ": "×·⋅∙∗", "/": "÷∕⁄", r"\infty ": "∞", r"\le ": "≤⩽", r"\ge ": "≥⩾", r"\ne ": "≠",
    r"\approx ": "≈", r"\pm ": "±", r"\mp ": "∓", r"\cup ": "∪", r"\cap ": "∩", r"\in ": "∈",
    r"\emptyset ": "∅", r"\surd ": "√", r"\surd[3]": "∛", r"\surd[4]": "∜", r"\langle ": "⟨〈",
    r"\rangle ": "⟩〉", r"\mathbb{R}": "ℝ", r"\mathbb{Z}": "ℤ", r"\equiv ": "≡", r"\setminus ": "∖",
    r"\mu ": "µ", r"\Omega ": "\u2126", "...": "…",
    r"^\circ ": "°º", "-": "−", ":": "∶", ".": "٫。", ",": "٬、", "%": "٪", "'": "′’‘",
    '"': "“”",
}  # fmt: skip
_COMMANDS = {char: spelling for spelling, chars in _SIGNS.items() for char in chars}
_SUPERSCRIPTS = "⁰¹²³⁴⁵⁶⁷⁸⁹⁺⁻⁼⁽⁾ⁿⁱ"
_SUBSCRIPTS = "₀₁₂₃₄₅₆₇₈₉₊₋₌₍₎"
_RAISED = re.compile(f"[{_SUPERSCRIPTS}]+|[{_SUBSCRIPTS}]+")


def _raised(match: re.Match[str]) -> str:
    run = match.group()
    plain = unicodedata.normalize("NFKC", run).replace("\u2212", "-")
    return ("^{" if run[0] in _SUPERSCRIPTS else "_{") + plain + "}"


@functools.cache
def _fold(char: str) -> str:
    """The ASCII or LaTeX spelling of one character, or the character itself."""
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


#: Commands whose backslash and first letter were read as an escape in JSON or Python: form feed + "rac".
_EATEN = re.compile(
    r"\\?(?:(?P<f>\x0c)(?=rac(?![a-z])|box)|(?P<b>\x08)(?=oxed|egin|inom|ar(?![a-z]))"
    r"|(?P<t>\t)(?=ext\s*\{|imes(?![a-z])|frac|heta(?![a-z])))"
)
_BARE_COMMAND = re.compile(r"(?<![\\a-zA-Z])([dt]?frac|boxed)(?=\s?\{)")


def restore_escapes(text: str) -> str:
    r"""``\frac``, ``\boxed``, ``\text`` whose backslash was lost or read as an escape."""
    escaped = sum(text.count("\\" + name) for name in ("frac", "dfrac", "tfrac", "boxed"))
    if text.count("frac") + text.count("boxed") > escaped:
        text = _BARE_COMMAND.sub(r"\\\1", text)
    if not re.search(r"[\x08\x0c\t]", text):
        return text
    return _EATEN.sub(lambda match: "\\" + str(match.lastgroup), text)


_WHITE = re.compile(r"\s+")  # collapsed early: later expressions are slow on long runs of spaces
_TEXT = re.compile(r"\\(?:text(?:bf|it|rm|sf|tt|normal|up)?|emph|mbox|hbox|mathrm|operatorname\*?)\s*\{")
_STYLE = re.compile(
    r"\\(?:displaystyle|textstyle|scriptstyle|limits|nolimits|math(?:bf|it|sf|tt|normal|cal)|boldsymbol|bm"
    r"|underline|uline|boxed|fbox|framebox|bbox|tiny|small|large|Large|LARGE|huge|Huge|bfseries|bf|rm|it|phantom|hphantom|ensuremath|strut|hfill)(?![a-zA-Z])"
)
_COLOR = re.compile(r"\\(?:text)?color\s*(?:\[[^\[\]]*\])?\s*\{[^{}]*\}")
_LABELED_TEXT = re.compile(r"\\text\{\s*[A-Za-z][A-Za-z ]{0,40}:\s*(?=[^{}:,\s][^{}:,]*\})")
_COUNTED_TEXT = re.compile(r"\\text\{\s*(-?\d[\d.,]*%?)(\s+[A-Za-z][A-Za-z ]*)\}")
#: "Result: 460", "His balance is -5"; "The answer is not 5" stays as it is.
_LABEL = re.compile(
    r"[A-Z][A-Za-z]{2}[A-Za-z' ]{0,57}(?:\s(?:is|are|was|equals)|:)\s*"
    r"(?=(?:minus |negative )?(?:\\?\$)?[-+]?[\d.\\({])"
)
#: siunitx: a number, and a number with its unit.
_SI_NUMBER = re.compile(r"\\(?:num|ang)\s*(?:\[[^\[\]]*\])?\s*\{([^{}]*)\}")
_SI_QUANTITY = re.compile(
    r"\\(?:SI|qty)\s*(?:\[[^\[\]]*\])?\s*\{([^{}]*)\}\s*(?:\[[^\[\]]*\])?\s*\{([^{}]*)\}"
)
_SI_UNIT = re.compile(r"\\(?:si|unit)\s*\{[^{}]*\}")
#: Unit vectors: a hat and boldface mean the same.
_UNIT_VECTOR = re.compile(
    r"\\(?:hat|vec)\s*(?:\{\s*)?(?:\\(?:mathbf|bm|boldsymbol)\s*\{(?P<bold>[ijk])\}\s*\}"
    r"|(?:\\(?P<dotless>[ij])math|(?P<plain>[ijk])(?![a-zA-Z]))\s*\}?)"
)
_SIZE = re.compile(r"\\(?:left|right|middle|[bB]igg?[lrm]?)(?![a-zA-Z])\s*\.?")
_NEGATIVE_SPACE = re.compile(r"\\!\s*")
_GROUPED = re.compile(
    r"(?<=\d)\s*(?:\{\s*,\s*\}|,\s*\\!|\\!|\\,|\{\\,\}|\\ |~|\\;)\s*(?:\\!)?\s*(?=\d{3}(?!\d))"
)
_SPACE = re.compile(r"(?<!\\)\\(?:[,;:> ]|q?quad(?![a-zA-Z])|enspace|thinspace|hspace\*?\{[^{}]*\})|~")
_FENCE = re.compile(r"(?<!\\)\\[()\[\]]")
_DEGREE = re.compile(r"\^\s*(?:\\circ(?![a-zA-Z])|\{\s*\\circ\s*\})|\\degrees?(?![a-zA-Z])|\\deg(?![a-zA-Z])")
_TYPED_DEGREE = re.compile(r"(?<=\d)\s*\^\s*(?:o(?![a-zA-Z])|\{\s*o\s*\})")
_MINUTES = re.compile(
    rf"(?<![\d.])(\d+)\s*(?:{_DEGREE.pattern})\s*(\d{{1,2}}(?:\.\d+)?)\s*(?:'(?!')|\^?\{{?\\prime\}}?)"
    r"(?:\s*(\d{1,2}(?:\.\d+)?)\s*(?:''|\"|\^?\{?\\prime\\prime\}?))?"
)
_TEMPERATURE = re.compile(rf"(?:{_DEGREE.pattern})\s*(?:\\text\{{\s*[CF]\s*\}}|[CF](?![A-Za-z]))")
_TRIGONOMETRY = re.compile(r"(?<!arc)\\(?:sin|cos|tan|cot|sec|csc)(?![a-z])")
_ANGLE = re.compile(
    rf"(\d+(?:\.\d+)?|(?<![\\a-zA-Z])[a-zA-Z]|\\(?:alpha|beta|theta))\s*(?:{_DEGREE.pattern})"
)
_ORDINAL = re.compile(r"\^?\s*\{?\s*\\text\{\s*(?:st|nd|rd|th)\s*\}\s*\}?|(?<=\d)(?:st|nd|rd|th)(?![a-zA-Z])")
_DOUBLED = re.compile(r"\\\\(?=[a-zA-Z{}%$])")
_PERCENT = re.compile(
    r"\\%|\\text\{\s*(?:per ?cent|percentage|pct|%)\s*\}|(?<![a-zA-Z])(?:per ?cent|pct)(?![a-zA-Z])"
)
_PERCENT_INSIDE = re.compile(r"\\text\{\s*%\s*")
_ROOT = re.compile(r"(?:(?<![\\a-zA-Z])sqrt|\\sqrt(?=\s*\()|\\surd(?![a-zA-Z]))\s*(?P<degree>\[\d\])?\s*")
_UNDER_ROOT = re.compile(r"\d+(?:\.\d+)?|\\[a-z]+|[A-Za-z]")
_FUNCTION = re.compile(
    r"\\text\{[^{}]*\}|(?<![\\a-zA-Z])(?P<name>(?:arc)?(?:sin|cos|tan)|cot|sec|csc|ln|log|exp)(?![a-zA-Z])"
)
_UPRIGHT = re.compile(r"\\(?:mathrm|text|operatorname)\s*\{\s*([ie])\s*\}(?![a-zA-Z])")
_ROWS = re.compile(
    r"\\begin\{(?P<env>align(?:ed|at)?|gather(?:ed)?|split|cases|eqnarray|equation|multline)(?P<star>\*?)\}"
    r"(?P<body>.*)\\end\{(?P=env)(?P=star)\}",
    re.DOTALL,
)
_RELATED = re.compile(r"=|<|>|\\(?:le|ge|ne|approx|leq|geq|neq|equiv|implies|Rightarrow)(?![a-z])")
_TIMES_TEN = re.compile(r"(?<=[\d.])\s*[xX]\s*(?=10\s*\^)")
_UNION = re.compile(r"(?<=[)\]}])\s*U\s*(?=[(\[{]|\\\{)")
_CHOOSE = re.compile(r"\{([^{}]*)\\choose\s*([^{}]*)\}")
_GOES_ON = re.compile(r"(?P<whole>\d*)\.(?P<digits>\d{2,30})\s*(?:\.\.\.|\\(?:l|c)?dots)")
_REPEATS = re.compile(r"(?<=[\d.])\\(?:bar|overline)\s*(?:\{\s*(\d+)\s*\}|(\d))")
_DOTTED = re.compile(r"(?<=[\d.])\\dot\s*\{?\s*(\d)\s*\}?(?:(\d*)\\dot\s*\{?\s*(\d)\s*\}?)?")
_ASCII_NAME = re.compile(r"(?<![\\a-zA-Z])(pi|infty|infinity|inf|oo)(?![a-zA-Z])", re.IGNORECASE)
_POWER = re.compile(r"(?<=[\w)}\]])\s*\*\*\s*(?=[\w({\\-])")
_DECIMAL_COMMA = re.compile(r"[-+]?0,\d{3,}")  # no thousands group begins with a lone zero
_CONTINENTAL = re.compile(r"([-+]?)(\d{1,3}(?:[. ]\d{3})+),(\d{1,2}|\d{4,})|([-+]?\d{1,3}(?:\.\d{3}){2,})")
_SMALL = r"(\d+|\d{1,3}(?:[. ]\d{3})+),(\d\d)(?!\d)"  # a price with a decimal comma
_PRICE = re.compile(
    rf"(?:[€£¥₹₽]|\\\$|\bEUR)\s?{_SMALL}|(?<![\d,.]){_SMALL}(?=\s?(?:\\text\{{\s*)?(?:[€£¥₹₽]|\\\$|(?:EUR|euros?)\b))"
)
#: Behind a formula, where it names no narrower domain.
_FOR_ALL = re.compile(
    r",?\s*(?:\\text\{)?\s*,?\s*(?:\\forall|(?<![a-z])for\s+(?:all|any|every|each)"
    r"|(?<![a-z])(?:for|where)(?=\s*\}?\s*[a-z]\s*\\in\s*\\mathbb))\s*(?:real(?:\s+numbers?)?|values?\s+of)?\s*\}?"
    r"\s*[a-z](?:\s*,\s*[a-z])*\s*(?:\\in\s*\\mathbb\s*\{?\s*R\s*\}?)?\s*\}?$"
)
_MAX_DOMAIN = 120  # characters: the expression is slow on a whole text
_FACTORIAL_EQUALS = re.compile(r"(?<!\d)!=")

#: LaTeX command or sign -> the commands that mean the same.
_SYNONYMS = {
    r"\frac": r"\dfrac \tfrac \cfrac", r"\le": r"\leqslant \leq", r"\ge": r"\geqslant \geq",
    "<": r"\lt", ">": r"\gt", r"\ne": r"\neq", r"\cdot": r"\times \ast", "/": r"\div",
    ":": r"\colon", r"\{": r"\lbrace", r"\}": r"\rbrace", "[": r"\lbrack", "]": r"\rbrack",
    "(": r"\lparen", ")": r"\rparen", "|": r"\lvert \rvert \vert", r"\infty": r"\infin",
    r"\emptyset": r"\varnothing", r"\mathbb{R}": r"\R \Reals", r"\cup": r"\union",
    r"\text{or}": r"\lor \vee", r"\text{and}": r"\land \wedge", r"\approx": r"\simeq",
    r"\ldots": r"\dots \cdots", "%": r"\percent", r"\log_{10}": r"\lg", r"\binom": r"\dbinom \tbinom",
    r"\pmod": r"\mod \bmod",
}  # fmt: skip
_SAME = {command: spelling for spelling, commands in _SYNONYMS.items() for command in commands.split()}
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
    r"""``\frac12``, ``\frac 3{4}``, ``\sqrt3`` with all braces; innermost first."""
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


def _roots(text: str) -> str:
    r"""``sqrt(2)``, ``√2`` and ``√(1+√2)`` as ``\sqrt{}``; outermost first."""
    out, at = "", 0
    while (match := _ROOT.search(text, at)) is not None:
        out += text[at : match.start()] + r"\sqrt" + (match["degree"] or "")
        at = match.end()
        if text[at : at + 1] == "(":
            end = _partner(text, at)
            inside = text[at + 1 : end]
            if end == len(text):  # nothing closes it: a full stop does not belong under it
                inside = _unstopped(inside)
            text = text[:at] + "{" + inside + "}" + text[end + 1 :]
        elif (token := _UNDER_ROOT.match(text, at)) is not None:
            text = text[:at] + "{" + token.group() + "}" + text[token.end() :]
        elif text[at : at + 1] != "{":
            out += "{}"
    return out + text[at:]


def _partner(text: str, start: int) -> int:
    """Index of the ``)`` that closes the ``(`` at ``start``; the end of the text where none does."""
    depth = 0
    for index in range(start, len(text)):
        depth += (text[index] == "(") - (text[index] == ")")
        if depth == 0:
            return index
    return len(text)


def _rows(text: str) -> str:
    r"""An aligned display on one line: rows that begin with a relation form a chain, others a list."""
    match = _ROWS.search(text)
    if match is None or r"\begin" in match["body"] or (match["env"] == "cases" and "&" in match["body"]):
        return text
    line = ""
    for row in re.split(r"\\\\(?:\s*\[[^\]]*\])?", match["body"]):
        row = row.replace("&", " ").strip().strip(",;")
        joint = " " if not line or _RELATED.match(row) else ", "
        line += joint + row if row else ""
    return text[: match.start()] + line + text[match.end() :]


def _going_on(match: re.Match[str]) -> str:
    r"""``0.333...`` as ``0.\overline{3}``: a digit three times, or a longer block twice, repeats."""
    digits = match["digits"]
    for size in range(1, 7):
        block = digits[-size:]
        times = 3 if size == 1 else 2
        if digits.endswith(block * times):
            while digits.endswith(block * 2):
                digits = digits[:-size]
            return f"{match['whole']}.{digits[:-size]}\\overline{{{block}}}"
    return match.group()


def _price(match: re.Match[str]) -> str:
    r"""``29,50 €`` and ``€1.234,50``: beside a currency sign a comma before two digits is a decimal comma."""
    whole, cents = match[1] or match[3], match[2] or match[4]
    return " " + re.sub("[. ]", "", whole) + "." + cents


def _quantity(match: re.Match[str]) -> str:
    return match[1] + (r"\%" if "percent" in match[2] or "%" in match[2] else "")


def _minutes(match: re.Match[str]) -> str:
    r"""``30^\circ 15'`` in degrees."""
    return rf"({match[1]}+{match[2]}/60" + (f"+{match[3]}/3600)" if match[3] else ")")


def _packages(text: str) -> str:
    """Commands of packages: siunitx, colors, unit vectors, angles with minutes."""
    text = _SI_UNIT.sub("", _SI_QUANTITY.sub(_quantity, _SI_NUMBER.sub(r"\1", text)))
    text = _UNIT_VECTOR.sub(lambda m: f"{{{m['bold'] or m['dotless'] or m['plain']}}}", text)
    return _MINUTES.sub(_minutes, _COLOR.sub("", text))


def _latex(text: str) -> str:
    text = _packages(_rows(text))
    if r"\begin" not in text:
        text = _DOUBLED.sub(r"\\", text).replace("&=", "=")
    text = _GROUPED.sub("", text)
    text = _NEGATIVE_SPACE.sub("", text)
    text = text.replace(r"\$", " ")
    text = _SPACE.sub(" ", text)
    text = _UPRIGHT.sub(r"\1", text)
    text = _TEXT.sub(r"\\text{", text)
    text = _COUNTED_TEXT.sub(r"\1\\text{\2}", _LABELED_TEXT.sub(r"\\text{", text))
    text = _STYLE.sub("", text)
    text = _SIZE.sub("", text)
    text = _WHITE.sub(" ", _FENCE.sub(" ", text))
    text = _COMMAND.sub(lambda match: _SAME.get(match.group(), match.group()), text)
    text = _ORDINAL.sub("", text)
    text = _TEMPERATURE.sub("", text)
    if _TRIGONOMETRY.search(text):
        text = _ANGLE.sub(r"(\1\\cdot\\frac{\\pi}{180})", text)
    text = _DEGREE.sub("", text)
    text = _REPEATS.sub(r"\\overline{\1\2}", text)
    text = _DOTTED.sub(r"\\overline{\1\2\3}", text)
    text = _CHOOSE.sub(r"\\binom{\1}{\2}", text)
    return _brace_arguments(text)


def _ascii(text: str) -> str:
    """Typed mathematics as LaTeX: ``sqrt(2)``, ``ln 2``, ``1.5 x 10^3``, ``0.333...``."""
    if "sqrt" in text or r"\surd" in text:
        text = _roots(text)
    if "..." in text or "dots" in text:
        text = _GOES_ON.sub(_going_on, text)
    text = _FUNCTION.sub(lambda match: "\\" + match["name"] if match["name"] else match.group(), text)
    return _UNION.sub(r"\\cup ", _TIMES_TEN.sub(r"\\cdot ", text))


def _decimal_point(text: str) -> str:
    """``0,125``, ``1.234,56`` and ``1.234.567`` in English notation, where unambiguous."""
    if _DECIMAL_COMMA.fullmatch(text):
        return text.replace(",", ".")
    match = _CONTINENTAL.fullmatch(text)
    if match is None:
        return text
    sign, whole, decimals, grouped = match.groups()
    if grouped:
        return grouped.replace(".", "")
    return f"{sign}{re.sub('[. ]', '', whole)}.{decimals}"


def _unstopped(text: str) -> str:
    r"""Without trailing punctuation, which ``\sqrt`` would take as an argument; keeps ``\,``, a space."""
    bare = text.rstrip(".,;: ")
    after = text[len(bare) : len(bare) + 1]
    return bare + after if bare.endswith("\\") and after != "." else bare


def without_label(text: str) -> str:
    """``Result: 460`` and ``The cost is $27`` without the words."""
    label = _LABEL.match(text)
    return text[label.end() :] if label and re.search(r"[^\s.,;:]", text[label.end() :]) else text


def without_domain(text: str) -> str:
    r"""Without "for all real x" at the end; ``for all x > 0`` stays."""
    head, tail = text[:-_MAX_DOMAIN], text[-_MAX_DOMAIN:]
    return head + _FOR_ALL.sub("", tail) if "for" in tail or "where" in tail else text


def normalize(answer: str) -> str:
    r"""One spelling of an answer: ``\dfrac12`` and ``½`` become ``\frac{1}{2}``, ``１０`` becomes ``10``.

    Removes math fences, currency, degree signs, quotes, sizing, spacing and a trailing period; keeps the text
    of ``\text{}``.
    """
    if answer.isascii() and answer.isdigit():
        return answer
    text = _PRICE.sub(_price, without_label(undecorated(restore_escapes(answer))))
    text = _POWER.sub("^", fold_unicode(text)).replace("**", "").replace("`", "")
    text = _TYPED_DEGREE.sub("", _unstopped(_ascii(_WHITE.sub(" ", text)))).replace("...", r"\ldots ")
    if "\\" in text:
        text = _latex(text)
    else:
        text = _ORDINAL.sub("", _GROUPED.sub("", text))
    text = re.sub(r'[$"]|\\"', " ", text)
    text = _PERCENT.sub("%", text)
    text = _PERCENT_INSIDE.sub(r"%\\text{", text)
    text = text.replace("<=", r"\le ").replace(">=", r"\ge ")
    text = _FACTORIAL_EQUALS.sub(r"\\ne ", text).replace("*", r"\cdot ")
    text = _ASCII_NAME.sub(lambda m: r"\pi " if m.group().lower() == "pi" else r"\infty ", text)
    text = _WHITE.sub(" ", text).strip().rstrip(".,;: ").lstrip(",;:= ")
    return _decimal_point(without_domain(text).removeprefix("+").lstrip())
