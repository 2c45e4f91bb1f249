"""Answers in words: names, yes and no, letters of a choice, "no solution", "all real numbers"."""

from __future__ import annotations

import re

_PROSE = re.compile(r"[A-Za-z\d\s.,:'()&;!?/-]+")
_TEXT = re.compile(r"\\text\{([^{}]*)\}")
#: Words so short that they would otherwise be a product of variables.
_SHORT = {"yes", "no", "odd", "red", "dne", "one", "two", "six", "ten", "all", "any", "her", "him"}
_ARTICLE = re.compile(r"^(?:an?|the)\s+(?=[A-Za-z\d])", re.IGNORECASE)
_CHOICE_WORD = re.compile(r"^(?:option|choice|answer)\s+(?=\(?[A-Z]\)?$)", re.IGNORECASE)
_CHOICE = re.compile(r"\(?(?P<letter>[A-J])(?:[).:]+\s*(?P<rest>\S.*)|\)?)", re.DOTALL)
#: Everything but letters, digits, a leading minus sign and the marks within a number or a time of day.
_UNSPOKEN = re.compile(r"(?!(?<![^\s(])-(?=[\d.])|(?<=\d)[.:/](?=\d))[^A-Za-z\d]")
_NOTHING = re.compile(
    r"(?:there (?:is|are|exists?) )?no (?:real |integer |such |possible |valid )*"
    r"(?:solutions?|values?|roots?|numbers?|integers?|pairs?|triples?|functions?|polynomials?|arrangements?)"
    r"(?: exists?)?|(?:the )?empty set|none|dne|(?:it |they )?(?:do|does)(?: not|n['’]t) exist",
    re.IGNORECASE,
)
_EVERYTHING = re.compile(
    r"(?:[a-z] is |[a-z] can be )?(?:the set of )?(?:(?:all|any|every) (?:real numbers?|reals)"
    r"|real numbers|reals)(?: [a-z])?",
    re.IGNORECASE,
)
_NAMES = {"two": 2, "three": 3, "four": 4, "five": 5, "six": 6, "seven": 7, "eight": 8, "nine": 9, "ten": 10}
_NAMES |= {"eleven": 11, "twelve": 12, "sixteen": 16}
_ONES = "one two three four five six seven eight nine"
_TEENS = "ten eleven twelve thirteen fourteen fifteen sixteen seventeen eighteen nineteen"
_TENS = "twenty thirty forty fifty sixty seventy eighty ninety"
_COUNTS = {word: value for value, word in enumerate(f"zero {_ONES} {_TEENS}".split())}
_COUNTS |= {word: 10 * value for value, word in enumerate(_TENS.split(), 2)}
_TIMES = {"dozen": 12, "hundred": 100, "thousand": 1000, "million": 10**6}
_ONE, _TEEN, _TEN = (f"(?:{words.replace(' ', '|')})" for words in (_ONES, _TEENS, _TENS))
_HUNDREDS = (
    rf"(?:(?:a|{_ONE}) hundred(?: (?:{_TEN}(?: {_ONE})?|{_TEEN}|{_ONE}))?|{_TEN}(?: {_ONE})?|{_TEEN}|{_ONE})"
)
_SPOKEN = re.compile(
    rf"(?:(?:minus|negative) )?(?:zero|(?:a|{_TEEN}|{_ONE}) dozen|(?:a|{_HUNDREDS}) million"
    rf"|(?:(?:{_HUNDREDS}) million )?(?:(?:a|{_HUNDREDS}) thousand(?: {_HUNDREDS})?|{_HUNDREDS}))"
)
_MAX_SPOKEN = 100
_BASE = re.compile(
    r"(?P<digits>[\dA-Za-z.]*\d[\dA-Za-z.]*)\s*(?:\\text\{)?\s*(?:,?\s*in\s+)?\(?base[\s~-]*\$?(?P<base>\w+)\$?\)?\s*\}?"
)
_NUMERAL = re.compile(r"([\dA-Za-z.]*[\dA-Z][\dA-Za-z.]*)_\{?\s*\(?(?:\\text\{)?\s*(\w+)\s*\)?\}*")


def plain(text: str) -> str:
    r"""Without the ``\text{}`` around words."""
    return _TEXT.sub(r"\1", text)


def spoken(text: str) -> int | None:
    """A whole number in words: ``twenty-five``, ``minus two thousand``, ``a dozen``; None for anything else.

    >>> spoken("two hundred and five"), spoken("five two")
    (205, None)
    """
    said = plain(text).lower().replace("-", " ").replace(" and ", " ").strip()
    if len(said) > _MAX_SPOKEN or not _SPOKEN.fullmatch(said):
        return None
    total = part = 0
    for word in said.split():
        if word in ("thousand", "million"):
            total, part = total + max(part, 1) * _TIMES[word], 0
        else:
            part = max(part, 1) * _TIMES[word] if word in _TIMES else part + _COUNTS.get(word, 0)
    return -(total + part) if said.startswith(("minus", "negative")) else total + part


def means_nothing(text: str) -> bool:
    """True for "no solution" and the like: the empty set."""
    return _NOTHING.fullmatch(plain(text).strip(" .")) is not None


def means_everything(text: str) -> bool:
    """True for "all real numbers" and the like."""
    return len(text) > 4 and _EVERYTHING.fullmatch(plain(text).strip(" .")) is not None


def as_words(text: str, *, surely: bool = False) -> str | None:
    r"""The letters and digits of a text answer, lower case, without articles; None for other answers.

    A text answer is set in ``\text{}``, or contains a word that cannot be a product of variables, or is
    a single letter. With ``surely`` (the other answer is one) any letters count.
    """
    bare = plain(text).strip()
    if not _PROSE.fullmatch(bare):
        return None
    marked = bare != text
    words = re.findall(r"[A-Za-z]+", bare)
    clock = re.search(r"\d\s*[ap]\.?\s?m\b", bare, re.IGNORECASE)
    if not words or not (
        (surely and not re.search(r"\d", bare))
        or marked
        or clock
        or max(map(len, words)) > 3
        or any(word.lower() in _SHORT for word in words)
        or re.fullmatch(r"\(?[A-Za-z]\)?", bare)
    ):
        return None
    bare = _ARTICLE.sub("", _CHOICE_WORD.sub("", bare))
    return _UNSPOKEN.sub("", bare).lower()


def choice(text: str) -> tuple[str, str] | None:
    """``(C) 12`` as ("C", "12"), ``C`` as ("C", ""): the letter of a choice and the text after it."""
    match = _CHOICE.fullmatch(plain(text).strip())
    return (match["letter"], match["rest"] or "") if match else None


def numeral(text: str) -> tuple[str, str] | None:
    """``2215_6`` as (digits, base): a numeral of that base, not a product, and not 2215."""
    if "base" in text:
        text = re.sub(r"_\s*\{\s*(.*?)\s*\}$", r" \1", text) if "_" in text else text
        match = _BASE.fullmatch(text) or _BASE.fullmatch(plain(text))
    else:
        text = re.sub(r"^\{(\w+)\}|^\((\w+)\)", r"\1\2", text)
        match = _NUMERAL.fullmatch(
            plain(text) if "_{" not in text else re.sub(r"^\\text\{(\w+)\}", r"\1", text)
        )
    if match is None:
        return None
    base = match.group(2).lower()
    return match.group(1).lstrip("0").upper(), str(_NAMES.get(base, base))
