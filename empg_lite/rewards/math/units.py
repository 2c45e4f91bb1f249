"""What may follow a number without changing it: units, currencies, counted nouns."""

from __future__ import annotations

import re

_SCALES = {"hundred": 2, "thousand": 3, "million": 6, "billion": 9, "trillion": 12}
_ATTACHED = "cm|mm|km|kg|mg|ml|kl|ft|in|lbs?|oz|yd|mi|mph|kph|hrs?|mins?|secs?|sq|usd|eur|gb|mb|kb|hz|khz"
_LETTERS = "m|g|s|h|l|L"
_NOT_UNITS = re.compile(
    r"(?:and|or|mod|sin|cos|tan|cot|sec|csc|log|ln|exp|sqrt|pi|if|when|for|not|to|base|am|pm|noon|midnight"
    r"|percent|pct|percentage)",
    re.IGNORECASE,
)
#: Words that change or retract the number before them: "5 times ten", but not "5 times a day".
_CHANGES = re.compile(
    r"(?:squared|cubed|factorial|negative|(?:ten|hundred|thousand|third|fourth|fifth|sixth|eighth)ths?|halves|thirds)"
    r"|(?:times|plus|minus|over|modulo|remainder|point|into)(?:\s+(?:zero|one|two|three|four|five|six|seven|eight"
    r"|nine|ten|eleven|twelve|(?:twen|thir|for|fif)ty|hundred|thousand|million|[b-z])(?![a-z]).*)"
    r"|(?:plus|minus)"
    r"|(?:less|more|fewer|greater|larger|smaller)\s+than(?![a-z]).*"
    r"|(?:but|unless|is)(?![a-z]).*",
    re.IGNORECASE | re.DOTALL,
)
#: More words than this are a sentence.
_MAX_WORDS = 8
_CLOCK = re.compile(r"[ap]\.?\s?m\.?", re.IGNORECASE)
_TEXT_TAIL = re.compile(
    r"(?<=[\d})\]a-zA-Z%!])\s*\\text\{([^{}]*)\}\s*(?:\^\s*(?:\{\s*[23]\s*\}|[23]))?(?:/\\text\{[^{}]*\})?$"
)
_WORDS_TAIL = re.compile(
    r"(?:(?<=[\d})%!])|(?<=\\pi))(\s*)([A-Za-z][A-Za-z./\s-]*)(?:\^\s*(?:\{\s*[23]\s*\}|[23])|[23])?$"
)
_QUOTIENT_TAIL = re.compile(
    r"(?<=[\d})])\s*\\frac\{\s*\\text\{[^{}]*\}\s*\}\{\s*\\text\{[^{}]*\}(?:\^\{?[23]\}?)?\s*\}$"
)
#: Remarks before a number, except those that are part of it.
_LEADING = re.compile(
    r"^(?:\\text\{(?![^{}]*(?<![a-z])(?:not?|minus|negative|less|more|fewer|greater|least|most|under|over|below|above"
    r"|except|without)(?![a-z]))[^{}]*\}\s*(?=[-+\d.\\(])|(?:USD|EUR|GBP|US|Rs\.?)\s*(?=[\d.]))",
    re.IGNORECASE,
)
_NEGATIVE = re.compile(r"^(?:\\text\{\s*)?(?:minus|negative)(?![a-z])\s*\}?\s*(?=[\d.\\])", re.IGNORECASE)


def _is_unit(words: str, spaced: bool) -> bool:
    words = words.strip(" .")
    if not words or _CLOCK.fullmatch(words):
        return False
    first = re.split(r"[\s./-]+", words)[0]
    if _NOT_UNITS.fullmatch(first) or _CHANGES.fullmatch(words) or len(words.split()) > _MAX_WORDS:
        return False
    if re.fullmatch(_ATTACHED, first, re.IGNORECASE):
        return True
    if spaced and re.fullmatch(_LETTERS, first):
        return True
    return spaced and (len(first) >= 3 or first == "of")


def _scaled(value: str, words: str) -> str:
    """``3 million`` is a value, not a unit."""
    first, _, rest = words.strip().partition(" ")
    power = _SCALES.get(first.lower().removesuffix("s"))
    return value if power is None else rf"({value})\cdot 10^{{{power}}}"


def strip_units(text: str) -> str:
    r"""A normalized answer without trailing unit (``15 cm^2``) or leading remark (``\text{about } 5``)."""
    text = _QUOTIENT_TAIL.sub("", _LEADING.sub("", _NEGATIVE.sub("-", text)))
    while (tail := _TEXT_TAIL.search(text)) is not None:
        words = tail.group(1).strip()
        if _CLOCK.fullmatch(words) or _NOT_UNITS.fullmatch(words) or _CHANGES.fullmatch(words):
            return text
        text = _scaled(text[: tail.start()].strip(), words)
    tail = _WORDS_TAIL.search(text)
    if tail is not None and _is_unit(tail.group(2), bool(tail.group(1))):
        return _scaled(text[: tail.start()].strip(), tail.group(2))
    return text
