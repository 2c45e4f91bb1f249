"""skeleton"""

from __future__ import annotations

import re
from collections.abc import Iterator

#: Where text may end a sentence, and the openings of blocks whose inside is never cut.
_CUT = re.compile(
    r"(?P<open>\\\[|\$\$|\[asy\]|\\begin\{(?P<env>[a-z]{1,20}\*?)\})"
    r"|(?P<newline>[\r\n\v\f\x85\u2028\u2029])"
    r"|(?P<wide>[。！？])"
    r"|(?P<mark>(?<![.!?…])[.!?…]++(?:[\"'”’)*$]|\\\))*+)(?=\s|\\\[|\Z)"
)
_CLOSE = {"\\[": "\\]", "$$": "$$", "[asy]": "[/asy]"}
_LONGEST_BLOCK = 2000
#: What a full stop belongs to without ending the sentence. Read backwards from the stop.
_ABBREVIATION = re.compile(
    r"\b(?:mrs?|ms|dr|st|prof|jr|vs|no|nos|fig|eq|approx|cf|resp|sq|ft|oz|lbs?|hrs?|mins?|secs?|e\.g|i\.e)$",
    re.IGNORECASE,
)
_DOTTED = re.compile(r"(?:\b[a-z](?:\.[a-z])+|\betc)$", re.IGNORECASE)
#: The number of a list item: "2." or "Step 2." or "(b)." and nothing before it.
_ITEM = re.compile(r"[\s*#_>(-]*(?:(?:step|case|part|method)\s+)?(?:\d{1,3}|[a-z]|[ivx]{1,4})\Z", re.IGNORECASE)
#: A formula runs on after a factorial or an abbreviation.
_RUNS_ON = re.compile(r"\s*(?:[=+/<>,;:)\]}^|-]|\*(?!\*)|\\(?:times|cdot|div|le|ge|ne|equiv)\b)")
_LOWER = re.compile(r"\s*[a-z]")


def sentences(text: str) -> list[str]:
    return [text[start:end] for start, end in _bounds(text)]


def _bounds(text: str) -> Iterator[tuple[int, int]]:
    """Start and end of each sentence, blanks around it left out."""
    start = 0
    for end in _ends(text):
        piece = text[start:end]
        if stripped := piece.strip():
            first = start + piece.index(stripped[0])
            yield first, first + len(stripped)
        start = end


def _ends(text: str) -> Iterator[int]:
    start = position = 0
    while match := _CUT.search(text, position):
        position = match.end()
        if match["open"]:
            close = _CLOSE.get(match["open"]) or f"\\end{{{match['env']}}}"
            found = text.find(close, position, position + _LONGEST_BLOCK)
            if found < 0:
                continue
            stop, position = text[position:found].rstrip()[-1:], found + len(close)
            ends = stop in (".", "!", "?") and not _LOWER.match(text, position)
        else:
            ends = not match["mark"] or _ends_sentence(text, start, match)
        if ends:
            yield position
            start = position
    yield len(text)


def _ends_sentence(text: str, start: int, match: re.Match[str]) -> bool:
    """Whether a full stop, question or exclamation mark ends the sentence that began at ``start``."""
    mark, stop = match["mark"], match.start()
    before = text[max(start, stop - 24) : stop]
    if _RUNS_ON.match(text, match.end()):
        return False
    if mark[0] in "!?":
        return True
    if mark.startswith(("..", "…")) or _DOTTED.search(before):
        return not _LOWER.match(text, match.end())
    if _ABBREVIATION.search(before):
        return False
    return stop - start > 24 or not _ITEM.match(before)
