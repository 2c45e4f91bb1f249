r"""What stands around an answer in running text, and what of it belongs to the answer.

Decoration (emphasis, emoji, the mark of an exclamation) is taken off. A sign in words, a scale word, a bound
or a denial changes the number beside it, and stays with it. Every regular expression runs in time linear in
the length of the text.
"""

from __future__ import annotations

import re
from typing import NamedTuple

#: Pictures that only cheer; crosses and question marks, which retract, are not among them.
_CHEER = (
    "[\u2600-\u265f\u2668-\u26d3\u26d5-\u2715\u2719-\u274b\u274d\u274f-\u2752\u2757-\u27bf\u2b50\u2b55"
    "\U0001f300-\U0001f44d\U0001f44f-\U0001f6aa\U0001f6ac-\U0001faff]"
)
_CHEERS = re.compile(rf"(?:{_CHEER}|[\s\ufe0f\u200d])*")
#: The same at the end, read backwards, with full stops and commas among them.
_CHEERS_BACK = re.compile(rf"(?:[\s.,;:]*+(?:{_CHEER}|[\ufe0f\u200d]))*+")
_TAG = re.compile(
    r"<(?P<tag>b|i|u|em|strong|mark|big|ins|code|center|span|font|p|div)(?:\s[^<>\n]{0,100})?>(?P<inside>(?:[^<]|<(?![a-z/]))*)"
    r"</(?P=tag)\s*>",
    re.IGNORECASE,
)
_RAISED_TAG = re.compile(r"<(?P<tag>su[pb])>(?P<inside>[^<>{}\n]{1,40})</(?P=tag)>", re.IGNORECASE)
_STRUCK = re.compile(r"~~[^~\n]+~~|<(s|del|strike)>[^<]*</\1>", re.IGNORECASE)  # taken back
_HIGHLIGHT = re.compile(r"(?<![=\w])==(?=[^\s=])([^=\n]+)(?<=[^\s=])==(?![=\w])")
_UNDERSCORES = re.compile(
    r"(?<!\w)__(?=\S)([^_\n]+)(?<=\S)__(?!\w)|(?<![\w}\\)])_([-$]{0,2}\d[\d.,]*)_(?!\w)"
)
#: A mark after a number or a number with words: "42!", "-$42!", "x = 42!", "42 marbles!"; no other factorial.
_EXCLAIMED = re.compile(
    r"[^!\\^*/+()]*(?<![\w.,])\d[\d.,]*(?:/\d+)?%?\$?(?: [A-Za-z][A-Za-z ]*)?(?P<marks>!+)"
)
_CLOSED = re.compile(r"(?:(?<=[$*%％\]])|(?<=\\[)\]}])|(?P<parts>\([^()]*,[^()]*\)))!+\Z")

_CURRENCY = r"\\?[$€£¥₹]\s?"
NUMBER = re.compile(
    r"(?<![\w.\\^])(?:(?<![\w)\]}$] )(?<![)\]}$])[-+−–]\s?|(?<=[A-Za-z:=,] )[-−–](?=\\?[$€£¥₹]\s?\d))?"
    rf"(?:{_CURRENCY})?[-−–]?"
    r"(?:\\[dt]?frac\s*\{[^{}]*\}\s*\{[^{}]*\}|\d{1,4} \d{1,2}/\d{1,3}(?![\d/])"
    r"|\d+_(?:\{\d\d?\}|\d\d?)(?!\d)"
    r"|\d+(?:(?:\s:\s|:)\d+)+(?:\s?[AaPp]\.?[Mm]\b)?"
    r"|(?:(?<=[€£¥₹])|(?<=[€£¥₹] )|(?<=\\\$))\d+,\d\d(?!\d)|\d{1,3}(?:\.\d{3})*,\d\d\s?[€£¥₹]"
    r"|(?:\d{1,3}(?:(?:,|\{,\}|,\\!)\d{3})+(?!\d)|\d+)(?:\.\d+)?(?:\s?/\s?\d+(?!\.?\d))?|\.\d+)"
    r"(?:\s?(?:\\times|\\cdot|[×·*x])\s?10\s?\^\s?(?:\{\s?[-−]?\d+\s?\}|[-−]?\d+)|[eE][-−+]?\d+(?!\w))?"
    r"(?:\s?\\?%|\s(?:percent|pct|per cent)\b)?|[½⅓⅔¼¾⅕⅖⅗⅘⅙⅚⅛⅜⅝⅞]"
)
_NUMERAL = re.compile(r"[\d½⅓⅔¼¾⅕⅖⅗⅘⅙⅚⅛⅜⅝⅞]")
_OPEN = r"[\s*]*(?:\$|\\\(|\\\$)?\s*\Z"
_SIGN_BEFORE = re.compile(rf"(?<![\d)\]}}$] )(?<!\w)(?:minus|negative){_OPEN}", re.IGNORECASE)
_NUMBER_BEFORE = r"(?<![\w.,])\$?\d[\d.,]*"
_BOUND_BEFORE = re.compile(
    r"\b(?:(?:at (?:the )?(?:very )?(?:least|most)"
    r"|(?:more|less|fewer|greater|larger|smaller|higher|lower) than(?: or equal to)?"
    r"|(?:is|are|was|were|be|of|costs?|takes?|weighs?|spends?|earns?|pays?|needs?|ha[sd]|have) "
    r"(?:well |just )?(?:over|under|above|below|beyond|up to)"
    rf"|exceed(?:s|ed)?|between {_NUMBER_BEFORE} and){_OPEN}"
    rf"|ratio\b[^.\n]{{0,60}}(?P<first> {_NUMBER_BEFORE} to\s+\Z))"
    rf"|(?:\A|\n)\W*(?:over|under|above|below|beyond|up to){_OPEN}|(?<![\w.])\d[\d.,]*[–—-]\Z"
    r"|(?:(?<!\S)[<>]=?|[≤≥]|\\(?:le|ge|lt|gt|leq|geq|leqslant|geqslant)(?![a-z]))\s*\$?\Z",
    re.IGNORECASE,
)
_DENIAL_BEFORE = re.compile(
    r"(?:\b(?:not|cannot|never|nicht|pas|no es|non è|não é)|n['’]t)"
    rf"(?: be)?(?: equal(?: to)?| exactly)?{_OPEN}"
    rf"|\b(?:other than|anything but|far from|almost|nearly){_OPEN}|(?<=\d) (?:or|and) \$?\Z",
    re.IGNORECASE,
)
SCALES_AFTER = re.compile(
    r"(?:[\s$]*-?(?:hundred|thousand|million|billion|trillion|dozen)s?\b)+", re.IGNORECASE
)
_AFTER = re.compile(
    rf"{SCALES_AFTER.pattern}|\s?(?-i:[kKM]|bn|mn)(?=[\s.,;!?)$]|\Z)"
    r"|\s(?:squared|cubed|factorial|halves|thirds|(?:fif|six|eigh|nin|ten|hundred|thousand)ths)\b",
    re.IGNORECASE,
)
_OR_MORE = (
    r"(?:(?:or|and) (?:more|less|fewer|greater|larger|smaller|higher|lower|above|below|over|under|up"
    r"|beyond)\b(?! (?:than|\d|\$))"
    r"|at (?:the )?(?:very )?(?:least|most)(?=[^\w\s]|\s*\Z))"
)
#: Up to three words between: "42 apples or more", but not "42 homes with two or more pets".
_BOUND_AFTER = re.compile(
    rf"\$?(?:(?: (?!(?:one|two|three|four|five|six|seven|eight|nine|ten) )[A-Za-z]+){{0,3}}?,? {_OR_MORE}"
    r"|\+(?=\s+[A-Za-z]|[.!?]?\s*\Z))",
    re.IGNORECASE,
)
#: Around a box: a bound, a denial, a sign, a scale word.
_BOUNDED_BOX = re.compile(
    r"\b(?P<bound>at (?:the )?(?:very )?(?:least|most)"
    r"|(?:more|less|fewer|greater|larger|smaller|higher|lower) than(?: or equal to)?)"
    rf"(?: exactly)?{_OPEN}",
    re.IGNORECASE,
)
_DENIED_BOX = re.compile(
    rf"(?:\b(?:not|cannot|never)|n['’]t)(?: be)?(?: equal(?: to)?| exactly)?{_OPEN}", re.IGNORECASE
)
_SIGNED_BOX = re.compile(  # a unary minus: no space behind it, where it might be a bullet or a dash
    r"(?:=\s*[-−–]\s*|(?:\A|[:>\n,.(\[{$]|[A-Za-z]{2}\s)\s*\$?[-−–])\Z"
)
#: How the words end that change what stands behind them; most numbers follow others.
_CHANGING = (
    *"least most than to over under above below beyond exceed exceeds exceeded and or minus negative".split(),
    *"not never be equal exactly almost nearly from but nicht pas es è é 't ’t".split(),
    *"- – — − < > = ≤ ≥ le ge lt gt leq geq leqslant geqslant".split(),
)
_FENCES = " $*(\\\n\t"
_OR_MORE_BOX = re.compile(rf"[ $]*,? *{_OR_MORE}", re.IGNORECASE)
_NEAR_END = 300  # characters in which what is denied could be taken for the answer
_CONTRAST = re.compile(
    r"\s\((?:or\s+)?(?:approximately|approx\.?|about|roughly|≈|~|\\approx)[^()]{0,60}\)|(?:,\s+(?:and\s+)?not"
    r"|(?<=\w) (?:instead of|rather than|as opposed to|(?:up|down) from|out of|compared (?:to|with)))"
    r"\s+[-−$\\]{0,3}\d[\d.,]*"
)


class Quantity(NamedTuple):
    """A number in a text, with the words that change it."""

    text: str
    start: int
    end: int
    denied: bool = False


def undecorated(text: str) -> str:
    """Without emoji and check marks at either end, unless there is nothing else."""
    if text.isascii():
        return text
    start, end = _CHEERS.match(text), _CHEERS_BACK.match(text[::-1])
    assert start is not None and end is not None  # both match the empty text
    bare = text[start.end() : len(text) - end.end()]
    return bare if re.search(r"[\w\\]", bare) else text


def unemphasized(text: str) -> str:
    """Without HTML tags, Markdown emphasis and what is struck through; ``<sup>`` becomes a power."""
    text = _STRUCK.sub(" ", text) if "~~" in text or "</" in text else text
    if "</" in text:
        text = _RAISED_TAG.sub(
            lambda m: ("^" if m["tag"].lower() == "sup" else "_") + f"{{{m['inside']}}}", text
        )
        for _ in range(3):
            text = _TAG.sub(r"\g<inside>", text)
    text = _HIGHLIGHT.sub(r"\1", text) if "==" in text else text
    return _UNDERSCORES.sub(r"\1\2", text) if "_" in text else text


def calm(text: str) -> str:
    r"""Without the mark of an exclamation: ``42 marbles!``, ``$42$!``; ``n!`` and ``$5!$`` keep theirs."""
    if not text.endswith("!"):
        return text
    match = _EXCLAIMED.fullmatch(text)
    return text[: match.start("marks")] if match else _CLOSED.sub(r"\g<parts>", text)


def balanced(text: str) -> str:
    r"""Without closing braces and fences that open outside: ``} 460 \]`` of ``\[ \text{Sum: } 460 \]``."""
    depth, out = 0, []
    closes = text.count("}") > text.count("{") or text.find("}") < text.find("{")
    for part in re.split(r"(?<!\\)([{}])", text) if closes else [text]:
        depth += (part == "{") - (part == "}")
        if depth >= 0:
            out.append(part)
        depth = max(depth, 0)
    text = "".join(out).strip()
    for opening, closing in ((r"\[", r"\]"), (r"\(", r"\)"), ("$$", "$$"), ("$", "$")):
        if text.endswith(closing) and text.count(closing) == 1 + (opening != closing and text.count(opening)):
            bare = text.removesuffix(closing)
            text = text if opening != closing and opening in bare else bare.rstrip()
    return text


def denied(text: str) -> bool:
    """True for words that deny what follows them."""
    return _DENIAL_BEFORE.search(text) is not None


def without_contrast(text: str) -> str:
    """``40, not 42`` without what it denies."""
    return text[:-_NEAR_END] + _CONTRAST.sub("", text[-_NEAR_END:])


def qualified(text: str, start: int, end: int) -> Quantity:
    """What stands at ``start`` to ``end`` with sign, scale and bound in words beside it."""
    near = max(0, start - 80)
    told = text[near:start].rstrip(_FENCES).lower().endswith(_CHANGING)
    if told and _DENIAL_BEFORE.search(text, near, start):
        return Quantity(text[start:end].strip(), start, end, denied=True)
    after = _AFTER.match(text, end)
    end = after.end() if after else end
    bound = _BOUND_AFTER.match(text, end)
    end = bound.end() if bound else end
    for before in (_BOUND_BEFORE, _SIGN_BEFORE) if told else ():
        match = before.search(text, near, start)
        if match and not (match.group() == "<" and text[end : end + 1] == ">"):  # <42> is in brackets
            start = match.start("first" if match.groupdict().get("first") else 0)
    return Quantity(text[start:end].strip(), start, end)


def changed_beside(text: str, start: int, content: str, end: int) -> str | None:
    """The content of a box from ``start`` to ``end`` with the sign, scale and bound beside it.

    None where the words before it deny it.
    """
    near = max(0, start - 80)
    told = text[near:start].rstrip(_FENCES).lower().endswith(_CHANGING)
    if told and _DENIED_BOX.search(text, near, start):
        return None
    if scale := SCALES_AFTER.match(text, end):
        content, end = f"{content} {scale.group().strip(' $-')}", scale.end()
    if told and (_SIGNED_BOX.search(text, near, start) or _SIGN_BEFORE.search(text, near, start)):
        content = f"-({content})" if re.search(r"[-+,=<>]", content) else f"-{content}"
    bound = _BOUNDED_BOX.search(text, near, start) if told else None
    after = _OR_MORE_BOX.match(text, end)
    return (
        (f"{bound['bound']} " if bound else "") + content + (f" {after.group().strip(' $')}" if after else "")
    )


def _last_sentence_with_a_digit(text: str) -> int:
    """Where it starts. No number reaches across a full stop and a space, or an empty line."""
    digit = _NUMERAL.search(text[::-1])
    end = len(text) - digit.start() if digit else 0
    return max(0, *(text.rfind(stop, 0, end) for stop in (". ", ".\n", "\n\n")))


def last_number(text: str) -> Quantity | None:
    """The last number of a text, qualified; None where there is none."""
    for start in dict.fromkeys((_last_sentence_with_a_digit(text), 0)):  # few sentences are read twice
        spans = [match.span() for match in NUMBER.finditer(text, start)]
        if spans:
            return qualified(text, *spans[-1])
    return None
