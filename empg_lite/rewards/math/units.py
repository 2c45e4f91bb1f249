"""What may follow a number without changing it: units, currencies, counted nouns."""

from __future__ import annotations

import re

_SCALES = {"dozen": "12"}
_SCALES |= {
    name: f"10^{{{power}}}"
    for name, power in {"hundred": 2, "thousand": 3, "million": 6, "billion": 9, "trillion": 12}.items()
}
_LETTER_SCALES = {"k": "10^{3}", "m": "10^{6}", "mn": "10^{6}", "bn": "10^{9}"}
_ABBREVIATED = re.compile(r"(\W*\d[\d,.]*)\s?([kKM]|[bm]n)")
_ATTACHED = "cm|mm|km|kg|mg|ml|kl|ft|in|lbs?|oz|yd|mi|mph|kph|hrs?|mins?|secs?|sq|usd|eur|gb|mb|kb|hz|khz"
_ATTACHED += "|nm|ms|ev|kev|mev|pa|kpa|kw|kj|kn|mol|rpm"
_LETTERS = "m|g|s|h|l|L|N|J|W|V|C|F"
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
#: Words that bound the number before them.
_BOUNDS = re.compile(
    r"\bat (?:least|most)\b|\b(?:or|and) (?:more|less|fewer|greater|larger|above|below|over|under|up)\b", re.I
)
#: More words than this are a sentence.
_MAX_WORDS = 8
_BASE = re.compile(r"(?:in )?\(?base\b", re.IGNORECASE)
_CLOCK = re.compile(r"[ap]\.?\s?m\.?", re.IGNORECASE)
_POWER = r"(?:\^\s*(?:\{\s*-?[1-4]\s*\}|[2-4]))"
_TEXT_TAIL = re.compile(
    rf"(?<=[\d}})\]a-zA-Z%!])\s*\\text\{{([^{{}}]*)\}}\s*{_POWER}?(?:/\\text\{{[^{{}}]*\}}{_POWER}?"
    r"|/\s*\((?:\\text\{[^{}]*\}|\\cdot|[\s^\d{}-])*\))?$"
)
#: Left behind by a unit: the dot of a product of units, a Greek prefix.
_UNIT_REST = re.compile(rf"(?<=\}})\s*{_POWER}?\s*(?:\\cdot|/)$|(?<=[\d}})])\s*\\mu$")
_GREEK_UNIT = re.compile(
    r"(?<=[\d})])\s*(?:(?:\\text\{\s*[kMm]\s*\}|[kM]|\\mu)?\s*\\Omega|\\AA|\\mathring\s*\{\s*A\s*\}|\\mu\s*(?:\\text\{\s*)?[mgsLlFACVTHWJM]\s*\}?)$"
)
_PER_TAIL = re.compile(  # 9.6 J/(kg K)
    r"(?<=\d) ?[A-Za-z]{1,3}\s?/\s?\((?:[A-Za-z]{1,3}(?:\^\{?[23]\}?)?(?:\s*(?:\\cdot)?\s*)){2}\)$"
)
_WORDS_TAIL = re.compile(
    r"(?:(?<=[\d})%!])|(?<=\\pi))(\s*)([A-Za-z][A-Za-z./\s-]*)(?:\^\s*(?:\{\s*[23]\s*\}|[23])|[23])?$"
)
_QUOTIENT_TAIL = re.compile(
    r"(?<=[\d})]) +\\frac\{\s*(?:m|km|cm|kg|g|J|N|mol|mi|ft|L)\s*\}"
    r"\{\s*(?:s|h|hr|min|kg|K|mol|L|[cd]?m)(?:\^\{?[23]\}?)?\s*\}$"
    r"|(?<=[\d})])\s*\\frac\{\s*\\text\{[^{}]*\}\s*\}\{\s*\\text\{[^{}]*\}(?:\^\{?[23]\}?)?\s*\}$"
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
    if not words or _CLOCK.fullmatch(words) or _BOUNDS.search(words):
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
    factor = _SCALES.get(first.lower().removesuffix("s"))
    return value if factor is None else _scaled(rf"({value})\cdot {factor}", rest)


def unabbreviated(text: str) -> str:
    r"""``70k`` and ``1.5M`` as products; the caller knows that the letter is no variable."""
    match = _ABBREVIATED.fullmatch(text)
    return rf"({match[1]})\cdot {_LETTER_SCALES[match[2].lower()]}" if match else text


def strip_units(text: str) -> str:
    r"""A normalized answer without trailing unit (``15 cm^2``) or leading remark (``\text{about } 5``)."""
    text = _QUOTIENT_TAIL.sub("", _LEADING.sub("", _NEGATIVE.sub("-", text)))
    text = _PER_TAIL.sub("", _GREEK_UNIT.sub("", text))
    while (tail := _TEXT_TAIL.search(text)) is not None:
        words = tail.group(1).strip()
        kept = _CLOCK.fullmatch(words) or _NOT_UNITS.fullmatch(words) or _CHANGES.fullmatch(words)
        if kept or _BOUNDS.search(words) or _BASE.match(words):
            return text
        text = _scaled(_UNIT_REST.sub("", text[: tail.start()].strip()), words)
    tail = _WORDS_TAIL.search(text)
    if tail is not None and _is_unit(tail.group(2), bool(tail.group(1))):
        return _scaled(text[: tail.start()].strip(), tail.group(2))
    return text
