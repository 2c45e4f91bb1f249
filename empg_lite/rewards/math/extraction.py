r"""Finding the final answer in free text, and which rule found it.

The rules, in order of precedence:

* Text before a closing thinking tag and outside the last ``<answer>`` tag is ignored.
* ``hash``: the last ``####`` line (GSM8K's form), when it is a number or, without a box, any bare answer;
  "#### Step 2" and "#### 2. Add" are headings.
* ``final_answer_is``: an explicit "final answer is ..." after the last box.
* ``boxed``: the boxes of the last sentence that has one, read together. Joined by commas or "and" they
  are a list; joined by "or", or under a hedge, they are no answer. ``boxed_unclosed``: a box that is
  never closed is read to the end of its line.
* ``answer_is``: "the answer is ...", ``Answer: ...``, ``A: ...``, or the line below such a heading.
* ``whole``: the text is nothing but an answer.
* ``values_are``: "the solutions are ..." where no value follows: everything listed.
* ``last_math`` and ``last_number``: fallbacks, marked as such.

Every regular expression runs in time linear in the length of the text.
"""

from __future__ import annotations

import itertools
import re
import string

from empg_lite.rewards.math.boxes import PERCENT_AFTER, Answer, find_boxes, read_boxes, visible
from empg_lite.rewards.math.exact import read_exact
from empg_lite.rewards.math.normalize import normalize, restore_escapes, without_domain, without_label
from empg_lite.rewards.math.prose import (
    NUMBER,
    balanced,
    calm,
    denied,
    last_number,
    qualified,
    undecorated,
    unemphasized,
    without_contrast,
)
from empg_lite.rewards.math.units import strip_units

_CALCULATOR = re.compile(r"<<[^<>\n]{0,200}>>")
_PHRASE = re.compile(
    r"(?:(?:\b(?P<final>final\s+)?answers?\b|^[ \t]*(?:A|Ans\.?)(?=\s*:))[^\n.:=$\\]{0,60}?"
    r"(?::|=+>?|-+>|→|\b(?:is|are)\b"
    r"|\b(?:would|seems to|appears to) be\b|\b(?:must|should|will|has to) be\b(?=\W{0,4}\d)"
    r"|(?=\s*(?:\$|\\\(|\\\[))|(?<=answer)\W{0,4}\n)"
    r"|^[ \t]*Ans\.(?=\s)|答案\s*(?:是|为|[:：]))",
    re.IGNORECASE | re.MULTILINE,
)
_ABROAD = (*"antwort respuesta réponse risposta resposta ответ jawaban cevap odpowiedź".split(),)
_EAST = (*"答え 回答 正解 정답 답 答".split(),)
_PHRASE_ABROAD = re.compile(
    rf"\b(?:{'|'.join(_ABROAD)})\b(?P<final>(?!))?(?! (?:no|non|não|не)\b)[^\n.:=$\\\d]{{0,30}}?"
    r"(?:\s?[:=]|\b(?:ist|lautet|es|est|è|é|adalah)\b)"
    rf"|(?:{'|'.join(_EAST)})\s*(?:は|은|는|[:：])",
    re.IGNORECASE,
)
#: What may follow "the answer is" without being an answer.
_NO_CONTENT = re.compile(
    r"(?:not|n't|nicht|pas|(?:in)?correct|right|wrong|valid|invalid|reasonable|consistent|verified|confirmed"
    r"|as follows|unknown|unclear)\b",
    re.IGNORECASE,
)
_REMARK = re.compile(
    r",?\s+(?:because|since|rounded|correct to|to the nearest"
    r"|as (?:we|the|there|it|he|she|they)|which|where|given that"
    r"|instead of|rather than|as opposed to|(?:up|down) from|out of|compared (?:to|with))\b"
    r"|,\s+(?:so|but|not)\b"
    r"|\s\((?=or\b|i\.e\.|\$?[\d.]+\s?\\?%)|\s\((?!\s*base\b)(?=[^()\\]{0,200}[A-Za-z]{3})",
    re.IGNORECASE,
)
_ALTERNATIVE = re.compile(r"\s\(or\s+([-$\\\d][^()]*)\)")  # "3 (or 4)" does not commit itself
_GLOSS = re.compile(r"\s\((?!base\b)[A-Za-z][A-Za-z -]{2,60}\)\Z")
#: Words after a number and a comma, unless they change it: "72, in total, so that is all".
_ASIDE = re.compile(
    r"[,;]\s+(?!(?:and|or|minus|plus|less|times|to|but|squared|cubed|per ?cent|dozen|hundred|thousand"
    r"|million)\b)"
    r"[a-z]{2,}"
)
_WORDS = string.ascii_letters + " ,;'’-"
_RESERVED = re.compile(
    r"\b(?:at|more|less|fewer|not|unless|except|if|when|ones?|two|three|four|five|six|seven|eight|nine|ten)\b",
    re.IGNORECASE,
)
_LEAD = re.compile(
    r"(?:(?:[-=]+>|→|⇒|➡|\\(?:Rightarrow|rightarrow|implies|therefore)(?![a-z])"
    r"|(?:(?:it|this|that) is|they are)(?!.*(?<![\\A-Za-z{])[A-Za-z]{3})"
    r"|at(?= \d{1,2}:\d\d)|it['’]s|that['’]s|so|thus|hence|therefore|then|finally|between"
    r"|we (?:get|have|find|obtain)(?: that)?|it follows that|this (?:means|gives)(?: that)?)"
    r"(?:[,:]\s*|\s+)){1,4}",
    re.IGNORECASE,
)
_VALUES = re.compile(
    r"\b(?:solutions?|roots?|zeros|values?|numbers|pairs|points|factors)\b[^\n.:=\\]{0,60}?\b(?:is|are)\b:?\s*",
    re.IGNORECASE,
)
_DENIED = re.compile(
    r"\banswers?\b[^\n.:=$\\]{0,30}?\b(?:is|are)(?:n't| not)\s+[-$\\\d][^\n]{0,80}?(?:[.,;](?=\s|$)|$)",
    re.IGNORECASE | re.MULTILINE,
)
_PHRASE_START = re.compile(r"[\s*:_]*")
_HEADING = re.compile(r"(?:step|part|case|question|problem)\b|\d+[.):]\s|final answer", re.IGNORECASE)
_FENCE = re.compile(r"(?:\$\$?|\\[(\[])\s*")
_PHRASE_END = re.compile(r"。|[.?](?=[\s*\"'”<]|$)|(?<=\w)!(?=\s+[A-Z][a-z])|\n")
# Contents hold no further fence, so that a thousand unclosed ones are read once and not a thousand times.
_MATH = re.compile(
    r"\$\$(?P<a>[^$]+)\$\$|(?<!\\)\$(?P<b>(?:\\\$|[^$])+?)(?<!\\)\$(?!\d)"
    r"|\\\((?P<c>(?:[^\\]|\\[^()\[\]])+)\\\)|(?<!\\)\\\[(?P<d>(?:[^\\]|\\[^()\[\]])+)\\\]"
    r"|(?P<e>\\begin\{(?:align|gather|equation)\*?\}(?:[^\\]|\\(?!begin|end))+"
    r"\\end\{(?:align|gather|equation)\*?\})",
    re.DOTALL,
)
#: Mathematics without fences: commands, digits, signs and single letters, no words.
_UNFENCED = re.compile(
    r"(?:\\(?:text[a-z]*|mathrm|mbox)\s*\{[^{}]*\}|\\[a-zA-Z]+|\\[^a-zA-Z]|[^\sA-Za-z\\$]|sqrt"
    r"|(?<![A-Za-z])[A-Za-z](?![A-Za-z])|[ \t](?=\S))+"
)
_MARKED = re.compile(r"\\[a-zA-Z]|[√π^]|sqrt")
_FOREIGN = re.compile(r"[^\W\d_A-Za-z\u0370-\u03ff\u2100-\u214f]{2,}")


def _tidy(content: str) -> str:
    return undecorated(content.replace('\\"', '"')).strip().strip('*_`"“”').strip()


def _unfenced(content: str) -> str:
    """Without the math fences around the whole text."""
    for opening, closing in (("$$", "$$"), ("$", "$"), (r"\[", r"\]"), (r"\(", r"\)")):
        inner = content.removeprefix(opening).removesuffix(closing)
        if content.startswith(opening) and opening not in inner and closing not in inner:
            return inner.strip()
    return content


def _phrase_end(text: str, start: int) -> int:
    """Where the sentence that began at ``start`` ends; a period inside braces ends nothing."""
    fence = _FENCE.match(text, start)  # a line break inside display mathematics ends nothing
    for stop in itertools.islice(_PHRASE_END.finditer(text, fence.end() if fence else start), 8):
        content = balanced(text[start : stop.start()])  # a brace that opened before closes nothing here
        if content.count("{") <= content.count("}"):
            return stop.start()
    return len(text)


def _announcements(text: str, start: int) -> list[re.Match[str]]:
    """In the order in which they stand."""
    found = list(_PHRASE.finditer(text, start))
    lower = text.lower()
    if any(word in lower for word in (_ABROAD if text.isascii() else _ABROAD + _EAST)):
        found = sorted([*found, *_PHRASE_ABROAD.finditer(text, start)], key=lambda match: match.start())
    return found


def _last_phrase(text: str, *, start: int = 0, final_only: bool = False) -> tuple[str, str] | None:
    """The rest of the sentence after the last "answer is", and the rule's name."""
    for match in reversed(_announcements(text, start)):
        if (final_only and not match.group("final")) or denied(match.group() + " "):
            continue
        begin = _PHRASE_START.match(text, match.end())
        assert begin is not None
        content = _tidy(balanced(_tidy(text[begin.end() : _phrase_end(text, begin.end())])))
        if content and not _NO_CONTENT.match(content):
            return content, "final_answer_is" if match.group("final") else "answer_is"
    return None


def announced(text: str) -> str | None:
    """The words that the last "answer is" announces, without remarks; None where there is none."""
    phrase = _last_phrase(visible(text))
    return _tidy(_without_remark(phrase[0])) if phrase else None


_WORD = re.compile(
    r"(?<![\\A-Za-z{_^])(?:[A-Za-z]{4,}|(?:is|the|are|was|so|we|of|in|it|to|has|for|but|not|can|as)(?![A-Za-z]))"
)
_TEXT_COMMAND = re.compile(
    r"\\(?:text[a-z]*|mbox|mathrm|operatorname)\s*\{[^{}]*\}|\\(?:begin|end)\s*\{[^{}]*\}"
)
_MATH_WORDS = {"sqrt", "infinity", "percent"}
_LABELLED = re.compile(r"[A-Za-z ]{1,40}=")
_DATE = re.compile(
    r"(?:jan|feb|mar|apr|may|jun|jul|aug|sep|oct|nov|dec)[a-z]*\.? \d{1,2}(?:st|nd|rd|th)?(?:,? \d{4})?"
    r"|\d{1,2}(?:st|nd|rd|th)? (?:of )?[A-Z][a-z]{2,8}(?:,? \d{4})?",
    re.IGNORECASE,
)
_MAX_WORDS = 4
_MAX_NUMBER = 200


def _bare(text: str) -> bool:
    """True where a text is nothing but an answer: mathematics, a quantity with its unit, or a few words."""
    unset = _TEXT_COMMAND.sub(" ", text)
    said = (
        m.group() for m in _WORD.finditer(unset) if not m.group().isupper() and m.group() not in _MATH_WORDS
    )
    words = len(list(itertools.islice(said, _MAX_WORDS + 1)))
    if words > _MAX_WORDS or (_FOREIGN.search(unset) and re.search(r"[\d$\\]", unset)):
        return False
    if not words:
        return bool(re.search(r"[^\s!-/:-@\[\]^-`{-~]", text))
    if "\n" in text:
        return False
    quantity = NUMBER.match(text.lstrip("*($\\"))
    if quantity is not None or _DATE.fullmatch(text):
        return True
    if _MATH.search(text):
        return False
    label = _LABELLED.match(text)
    return (label is not None and len(_WORD.findall(unset, label.end())) < 2) or not re.search(
        r"[\d$\\]", text
    )


_WORDY = re.compile(r"(?<![\\A-Za-z])[A-Za-z]{3,}")
_PARTS = re.compile(r"(?:\\\{|[(\[{])[^()\[\]{}\n]*,[^()\[\]{}\n]*(?:\\\}|[)\]}])")


def _within_brackets(text: str, start: int, end: int) -> str | None:
    r"""The pair, interval or set around ``start`` to ``end``: ``(2,4)``, ``\{1,2\}``; None for a remark."""
    line = text.rfind("\n", 0, start) + 1
    for match in _PARTS.finditer(text, line):
        if match.start() < start and end < match.end():
            return None if _WORDY.search(match.group()) else match.group()
    return None


def _last_unfenced(text: str) -> tuple[str, int]:
    """The last run of mathematics without fences, and where it ends; ("", -1) if there is none."""
    found, end = "", -1
    for match in _UNFENCED.finditer(text) if _MARKED.search(text) else ():
        if _MARKED.search(match.group()):
            found, end = match.group(), match.end()
    run = re.split(r"[.?!:;]\s", found.rstrip(" .,:;?!"))[-1].strip()
    return re.sub(r"^[aAI]\s", "", run), end


def _math_at(text: str, start: int, math: str, end: int = -1) -> Answer | None:
    """Mathematics that stands at ``start`` with the words that change it; None where they deny it."""
    end = end if end >= 0 else start + len(math)
    whole = qualified(text, start, end)
    if whole.denied:
        return None
    return Answer(math if (whole.start, whole.end) == (start, end) else whole.text, "last_math")


def _last_value(text: str, *, numeric: bool = False) -> Answer | None:
    """The last mathematics or the last number outside it, whichever comes later; None where it is denied."""
    math, start, end = "", -1, -1
    for match in _MATH.finditer(text):
        content = next(group for group in match.groups() if group is not None)
        if re.search(r"\w", content):
            percent = PERCENT_AFTER.match(text, match.end())
            math, start, end = content.strip() + (r"\%" if percent else ""), match.start(), match.end()
    number = last_number(text)
    number_end = number.end if number else -1
    if not numeric and number_end > end:
        unfenced, unfenced_end = _last_unfenced(text[max(0, end) :])
        if unfenced and max(0, end) + unfenced_end >= number_end:
            return _math_at(text, text.rfind(unfenced), unfenced)
    if math and (number is None or number.start < end - 1):  # it may share the closing $
        return _math_at(text, start, math, end)
    if number is None or number.denied:
        return None
    parts = None if numeric else _within_brackets(text, number.start, number.end)
    return Answer(parts, "last_math") if parts else Answer(number.text, "last_number")


def _listed(text: str) -> Answer | None:
    """Everything that "the solutions are" lists, where no value follows that sentence."""
    matches = list(_VALUES.finditer(text))
    if not matches:
        return None
    match = matches[-1]
    end = _phrase_end(text, match.end())
    content = _tidy(_without_remark(text[match.end() : end]))
    if not re.search(r"\d|\$|\\", content) or re.search(r"[\d$\\]", text[end:]) or not _bare(content):
        return None
    return Answer(_unfenced(content), "values_are")


def _without_lead(content: str) -> str:
    return content[lead.end() :] if (lead := _LEAD.match(content)) else content


def _without_remark(content: str) -> str:
    """``18, because ...`` without the reason; ``so 18`` without the conjunction."""
    content = _without_lead(re.sub(r"\s{2,}", " ", content))
    content = _ALTERNATIVE.sub(r" or \1", content) if "(or" in content else content
    remark = _REMARK.search(content)
    if remark and re.search(r"\w", content[: remark.start()]):
        content = content[: remark.start()]
    aside = _ASIDE.search(content, len(content.rstrip(_WORDS)))
    if aside and not _RESERVED.search(content, aside.start()) and re.search(r"\d", content[: aside.start()]):
        content = content[: aside.start()]
    return content


def _is_number(text: str) -> bool:
    return len(text) <= _MAX_NUMBER and read_exact(normalize(text)) is not None


def _unglossed(text: str) -> str:
    """``72 (seventy-two)`` without what the brackets say again in words."""
    gloss = _GLOSS.search(text) if text.endswith(")") else None
    return text[: gloss.start()] if gloss and _is_number(text[: gloss.start()]) else text


def _fragment(content: str, rule: str, numeric: bool) -> Answer | None:
    """The answer in an announced phrase: all of it, or the last value in it; None where that is denied."""
    content = _tidy(calm(_tidy(_without_remark(content))))
    if numeric:
        if _is_number(content):
            return Answer(_unfenced(content), rule)
        number = last_number(content)
        if number:
            return None if number.denied else Answer(number.text, rule)
    if _bare(content):
        return Answer(_unfenced(content), rule)
    value = _last_value(content)
    return Answer(value.text if value else content, rule)


def _hash(text: str) -> tuple[str, bool]:
    """The line of the last ``####``, and whether it is a number; empty if it is only a heading."""
    start = text.rfind("####")
    if start < 0:
        return "", False
    line, _, rest = text[start:].lstrip("#").strip().partition("\n")
    line = without_label(without_domain(calm(_tidy(line))))
    if _is_number(line):
        return _unfenced(line), True
    if "boxed" in rest or _HEADING.match(line):
        return "", False
    number = NUMBER.match(line)
    if number is None or len(line) > _MAX_NUMBER or not _bare(line):
        return line, False
    shown = number.group().strip()
    same = strip_units(normalize(line)) == normalize(shown)  # "12 eggs" is 12, "12 dozen" is not
    return (shown if same else line), True


def extract(text: str, *, numeric: bool = False) -> Answer | None:
    """The final answer in a free text, or None.

    Args:
        text: a prediction, or a worked solution.
        numeric: the answer is known to be a number (GSM8K), so "the answer is ..." is read for its number.
    """
    text = restore_escapes(unemphasized(visible(text)))
    text = _CALCULATOR.sub("", text) if "<<" in text else text
    line, line_is_number = _hash(text)
    if line_is_number:
        return Answer(line, "hash")
    boxes = find_boxes(text) if "boxed" in text or "fbox" in text else []
    if boxes:
        phrase = _last_phrase(text, start=boxes[-1].end, final_only=True)
        if phrase and re.search(r"[\d$\\]", phrase[0]):
            return _fragment(*phrase, numeric)
        return read_boxes(text, boxes)
    if line and _bare(line):
        return Answer(_unfenced(line), "hash")
    phrase = _last_phrase(text)
    if phrase:
        return _fragment(*phrase, numeric)
    stripped = balanced(_tidy(text))
    bare = without_domain(_tidy(_without_lead(stripped)))
    if numeric or not re.fullmatch(r"\d+!", text.strip()):  # 5! alone is mathematics
        bare = _unglossed(calm(bare))
    if not stripped:
        return None
    if _bare(bare) and not (numeric and not _is_number(bare) and NUMBER.search(bare)):
        return Answer(_unfenced(bare), "whole")
    stripped = without_contrast(_DENIED.sub("", stripped) if "answer" in stripped.lower() else stripped)
    return (None if numeric else _listed(stripped)) or _last_value(stripped, numeric=numeric)
