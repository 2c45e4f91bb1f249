"""Which reasoning behaviors a rationale shows: an aid for readers, not a reward.

Four behaviors, detected sentence by sentence with word patterns (English only, in ``behaviors.toml``):

* ``decomposition``: splits the task into named parts, steps, cases or sub-goals;
* ``verification``: checks a result that already exists;
* ``backtracking``: notices an error, or drops an approach for another;
* ``backward_chaining``: reasons from the goal to what it requires.

Definitions, labeled sentences and measured precision and recall are in ``docs/behaviors.md``. The four are
close to those of Gandhi et al., Cognitive Behaviors that Enable Self-Improving Reasoners (arXiv 2503.01307).
"""

from __future__ import annotations

import re
import tomllib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

BEHAVIORS: tuple[str, ...] = ("decomposition", "verification", "backtracking", "backward_chaining")


@dataclass(frozen=True, slots=True)
class Span:
    """A sentence that shows a behavior: ``text[start:end]``. Spans of different behaviors may coincide."""

    start: int
    end: int
    behavior: str


def detect(sentence: str) -> frozenset[str]:
    """The behaviors that one sentence, as cut by ``sentences``, shows.

    >>> sorted(detect("Wait, that is wrong."))
    ['backtracking']
    """
    plain = _plain(sentence)
    return frozenset(name for name, pattern in _COMPILED.items() if pattern.search(plain))


def spans(text: str) -> tuple[Span, ...]:
    """Every sentence of ``text`` that shows a behavior, once per behavior, in reading order."""
    return tuple(
        Span(start, end, name)
        for start, end in _bounds(text)
        if (found := detect(text[start:end]))
        for name in BEHAVIORS
        if name in found
    )


def behavior_counts(text: str) -> dict[str, int]:
    """Number of sentences of one rationale that show each behavior; every behavior has an entry."""
    found = [span.behavior for span in spans(text)]
    return {name: found.count(name) for name in BEHAVIORS}


def behavior_rates(texts: Sequence[str]) -> dict[str, float]:
    """Share of rationales, in [0, 1], that show each behavior at least once; 0 for no rationales."""
    counts = [behavior_counts(text) for text in texts]
    return {name: sum(c[name] > 0 for c in counts) / max(1, len(counts)) for name in BEHAVIORS}


# --- sentences ------------------------------------------------------------------------------------

#: Possible sentence ends, and the openings of blocks that are never split.
_CUT = re.compile(
    r"(?P<open>\\\[|\$\$|\[asy\]|\\begin\{(?P<env>[a-z]{1,20}\*?)\})"
    r"|(?P<newline>[\r\n\v\f\x85\u2028\u2029])"
    r"|(?P<wide>[。！？])"
    r"|(?P<mark>(?<![.!?…])[.!?…]++(?:[\"'”’)*$]|\\\))*+)(?=\s|\\\[|\Z)"
)
_CLOSE = {"\\[": "\\]", "$$": "$$", "[asy]": "[/asy]"}
_LONGEST_BLOCK = 2000
#: The rest of a longer sentence is noise and is ignored.
_LONGEST_SENTENCE = 4000
#: A period after one of these does not end the sentence.
_ABBREVIATION = re.compile(
    r"\b(?:mrs?|ms|dr|st|prof|jr|vs|no|nos|fig|eq|approx|cf|resp|sq|ft|oz|lbs?|hrs?|mins?|secs?|e\.g|i\.e)$",
    re.IGNORECASE,
)
_DOTTED = re.compile(r"(?:\b[a-z](?:\.[a-z])+|\betc)$", re.IGNORECASE)
#: The number of a list item, at the start of a sentence: "2." or "Step 2." or "(b)."
_ITEM = re.compile(
    r"[\s*#_>(-]*(?:(?:step|case|part|method)\s+)?(?:\d{1,3}|[a-z]|[ivx]{1,4})\Z", re.IGNORECASE
)
#: A formula continues after a factorial or an abbreviation.
_RUNS_ON = re.compile(r"\s*(?:[=+/<>,;:)\]}^|-]|\*(?!\*)|\\(?:times|cdot|div|le|ge|ne|equiv)\b)")
_LOWER = re.compile(r"\s*[a-z]")


def sentences(text: str) -> list[str]:
    """Split ``text`` into sentences, stripped; nothing but whitespace is lost.

    A line break ends a sentence. Decimals, abbreviations, list numbers, factorials, display formulas and
    marks such as ``<<1+1=2>>`` do not. Accepts any text, including lone surrogates and NUL, in linear time.
    """
    return [text[start:end] for start, end in _bounds(text)]


def _bounds(text: str) -> Iterator[tuple[int, int]]:
    """Start and end of each sentence, without surrounding whitespace."""
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
    """Whether a period, question or exclamation mark ends the sentence that began at ``start``."""
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


# --- patterns -------------------------------------------------------------------------------------

_FORMULA = re.compile(
    r"\$\$[^$]*\$\$"
    r"|\$(?!\s)[^$]*(?<!\s)\$(?!\d)"  # the dollar sign of an amount has whitespace on the wrong side
    r"|\\\((?:[^\\]|\\(?![()]))*\\\)"
    r"|\\\[(?:[^\\]|\\(?![\[\]]))*\\\]"
    r"|\\begin\{\w+\*?\}(?:[^\\]|\\(?!begin\b|end\b))*\\end\{\w+\*?\}"
)
_MARKUP = re.compile(r"<<[^<>\n]{0,200}>>|[*_#`\s]+")
_QUOTES = str.maketrans("’‘“”", "''\"\"")


def _plain(sentence: str) -> str:
    """The normalized sentence that the patterns match."""
    text = _FORMULA.sub(" @ ", sentence[:_LONGEST_SENTENCE].translate(_QUOTES))
    text = _MARKUP.sub(" ", text).strip().lower()
    return _LOOK_ALIKES.sub("", text)


def _read_patterns() -> tuple[re.Pattern[str], dict[str, re.Pattern[str]]]:
    """The look-alikes and one pattern per behavior, from ``behaviors.toml`` beside this file."""
    source = Path(__file__).with_suffix(".toml").read_text("utf-8")
    data = tomllib.loads(re.sub(r"\n +(?=\|)", "", source))  # join patterns that span lines
    compiled = {}
    for name in BEHAVIORS:
        joined = "|".join(f"(?:{pattern})" for pattern in data["patterns"][name])
        for _ in range(3):  # words may use words
            for word, pattern in data["words"].items():
                joined = joined.replace(f"{{{word}}}", pattern)
        compiled[name] = re.compile(joined)
    return re.compile("|".join(data["look_alikes"])), compiled


_LOOK_ALIKES, _COMPILED = _read_patterns()
