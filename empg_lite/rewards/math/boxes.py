"""The text of a prediction that counts, the boxes in it, and the answer that they give.

Every regular expression runs in time linear in the length of the text.
"""

from __future__ import annotations

import itertools
import re
from dataclasses import dataclass

from empg_lite.rewards.math.normalize import without_label
from empg_lite.rewards.math.prose import changed_beside

#: The rules by name, in words. ``pattern`` is that of the reward ``regex``.
RULES = {
    "hash": "the last line that begins with ####",
    "final_answer_is": 'an explicit "final answer is", which wins over boxes before it',
    "boxed": "the boxes of the last sentence that has one",
    "boxed_unclosed": "the last box, never closed: read to the end of its line",
    "answer_is": 'the last "answer is", "Answer:" or heading of that name',
    "whole": "the text is nothing but an answer",
    "values_are": 'all that the last "solutions are" lists',
    "last_math": "a fallback: the last mathematics in the text",
    "last_number": "a fallback: the last number in the text",
    "pattern": "the last match of the pattern",
}


@dataclass(frozen=True, slots=True)
class Answer:
    """The text of an answer and the rule that found it.

    Attributes:
        beside: what follows the box and may belong to the answer: a base (``_8``).
    """

    text: str
    rule: str
    beside: str = ""


@dataclass(frozen=True, slots=True)
class Box:
    start: int
    end: int
    content: str
    closed: bool


#: A model that runs on writes the next problem, and its answer, after the answer to this one.
_ANSWERED = re.compile(r"^####\s*[-−$]?\d|boxed\s*\{\s*[^\s}]|\banswer is\b", re.IGNORECASE | re.MULTILINE)
_NEXT_PROBLEM = re.compile(
    r"^[ \t*#]{0,6}(?:Question|Problem|Exercise|Q|User|Human)[ \t]*\d{0,3}\W{0,2}:",
    re.IGNORECASE | re.MULTILINE,
)
_THINKING_ENDS = re.compile(
    r"</\s*(?:think|thinking|thought|thoughts|reason|reasoning|reasoning_end|scratchpad)\s*>|\[/THINK\]|◁/think▷"
    r"|<\|end_of_thought\|>",
    re.IGNORECASE,
)
_ANSWER_TAG = re.compile(r"<answer>\s*([^<\s](?:[^<]|<(?!/?answer>))*)", re.IGNORECASE)
_BRACKETED_TAG = re.compile(r"\[(/?)answer\]", re.IGNORECASE)
_SPECIAL = re.compile(r"<\|\w{2,30}\|>|</s>\s*\Z")  # tokens of a chat template, decoded with the text
_BRACES = re.compile(r"(?<!\\)\\++(?:boxed|fbox)(?![a-zA-Z])|\\[{}]|[{}]")
_OPENED = re.compile(r"\s*\{")
_UNBRACED = re.compile(r"[ \t]?(\\?[^\s$,;\\]{0,100})")
_SENTENCE_END = re.compile(r"[.?](?=[\s$\\)\]*\"'”]|$)|(?<=[A-Za-z])!(?=\s|$)|\n\s*\n")
_OR = re.compile(r"(?<![A-Za-z])or(?![A-Za-z])|\\lor(?![A-Za-z])", re.IGNORECASE)
_JOINED = re.compile(r"[,;]|(?<![A-Za-z])and(?![A-Za-z])", re.IGNORECASE)
_THUS = re.compile(r"\b(?:so|thus|hence|therefore)\b", re.IGNORECASE)
_PROSE = re.compile(r"(?<![\\A-Za-z])[A-Za-z]{2,}")
_MAYBE = re.compile(r"\b(?:maybe|perhaps|possibly)\b", re.IGNORECASE)
_COULD_BE = re.compile(r"\b(?:could|may|might) be\W*(?:either|equal to)?\W*$", re.IGNORECASE)
_BASE_AFTER = re.compile(r"\s?_\s?(?:\{[^{}]{1,12}\}|\w)|[\s$]*(?:in )?\(?base (?:\w+)\)?", re.IGNORECASE)
#: What a prompt says for the answer, echoed.
_PLACEHOLDER = re.compile(
    r"\W*(?:\\text\W*)?(?:(?:(?:your|the|final|my) )*answer(?: here)?)?\W*", re.IGNORECASE
)
PERCENT_AFTER = re.compile(r"[\s$]*(?:\\?%|(?:percent|pct|per cent)\b)", re.IGNORECASE)


def visible(text: str) -> str:
    """The text that counts: after the last closing thinking tag, inside the last ``<answer>`` tag, and
    before the next problem that a model which runs on puts to itself."""
    ends = [match.end() for match in _THINKING_ENDS.finditer(text)]
    text = text[ends[-1] :] if ends else text
    text = _SPECIAL.sub(" ", text) if "<|" in text or "</s>" in text else text
    text = _BRACKETED_TAG.sub(r"<\1answer>", text) if "[/" in text else text
    if "<answer>" in text.lower():
        tagged = list(_ANSWER_TAG.finditer(text))
        text = tagged[-1].group(1) if tagged else text
    answered = _ANSWERED.search(text) if _NEXT_PROBLEM.search(text) else None
    following = _NEXT_PROBLEM.search(text, answered.end()) if answered else None
    return text[: following.start()] if following else text


def find_boxes(text: str) -> list[Box]:
    """The outermost boxes, in order; a last one that is never closed ends with its line."""
    found: list[Box] = []
    stack: list[int] = []  # positions of open boxes; -1 for other braces
    skip_to = 0
    for match in _BRACES.finditer(text):
        token = match.group()
        if match.start() < skip_to or token in (r"\{", r"\}"):
            continue
        if token == "{":
            stack.append(-1)
        elif token == "}":
            start = stack.pop() if stack else -1
            if start >= 0:
                while found and found[-1].start > start:
                    found.pop()  # nested in this one
                content = text[text.index("{", start) + 1 : match.start()]
                found.append(Box(start, match.end(), content, closed=True))
        else:
            opened = _OPENED.match(text, match.end())
            if opened:
                stack.append(match.start())
                skip_to = opened.end()
            else:
                bare = _UNBRACED.match(text, match.end())
                assert bare is not None
                found.append(Box(match.start(), bare.end(), bare.group(1), closed=True))
    last_open = max(stack, default=-1)
    if last_open >= 0 and (not found or found[-1].start < last_open):
        start = text.index("{", last_open) + 1
        end = text.find("\n", start)
        end = len(text) if end < 0 else end
        found.append(Box(last_open, end, text[start:end], closed=False))
    return found


def last_sentence(text: str, boxes: list[Box]) -> list[Box]:
    """The boxes of the last sentence that has one."""
    first = len(boxes) - 1
    while first > 0 and not _SENTENCE_END.search(text, boxes[first - 1].end, boxes[first].start):
        first -= 1
    return boxes[first:]


def hedged(text: str, boxes: list[Box]) -> bool:
    """True where the sentence around the boxes does not commit to one answer."""
    start = max(0, boxes[0].start - 400)
    for match in _SENTENCE_END.finditer(text, start, boxes[0].start):
        start = match.end()
    before = text[start : boxes[0].start]
    stop = _SENTENCE_END.search(text, boxes[-1].end, boxes[-1].end + 400)
    after = text[boxes[-1].end : stop.end()] if stop else ""
    between = [text[one.end : two.start] for one, two in itertools.pairwise(boxes)]
    if any(_MAYBE.search(part) for part in (before, *between, after)):
        return True
    return any(_COULD_BE.search(part[-80:]) for part in (before, *between)) or after.endswith("?")


def _filled(boxes: list[Box]) -> list[Box]:
    """Without the empty boxes, and those that only repeat the prompt, behind a filled one."""
    last = len(boxes)
    while last > 1 and boxes[last - 1].closed and _PLACEHOLDER.fullmatch(boxes[last - 1].content):
        last -= 1
    return boxes if _PLACEHOLDER.fullmatch(boxes[last - 1].content) else boxes[:last]


def read_boxes(text: str, boxes: list[Box]) -> Answer | None:
    boxes = last_sentence(text, _filled(boxes))
    if hedged(text, boxes):
        return None
    contents: list[str] = []
    for box, following in zip(boxes, [*boxes[1:], None], strict=True):
        percent = PERCENT_AFTER.match(text, box.end)
        contents.append(without_label(box.content.strip()) + (r"\%" if percent else ""))
        if following is None:
            break
        between = text[box.end : following.start]
        if _OR.search(between):
            return None
        if _PROSE.search(between) and (_THUS.search(between) or not _JOINED.search(between)):
            contents.clear()  # not a list: the sentence moved on to another value
    distinct = list(dict.fromkeys(contents))
    rule = "boxed" if boxes[-1].closed else "boxed_unclosed"
    if len(distinct) > 1:
        return Answer(", ".join(distinct), rule)
    whole = changed_beside(text, boxes[0].start, distinct[0], boxes[-1].end)
    if whole is None:
        return None
    base = _BASE_AFTER.match(text, boxes[-1].end)
    return Answer(whole, rule, base.group().lstrip("$") if base else "")
