"""A verdict in steps of plain words: what was read, by which rule, and what was compared with what.

Made from the functions that decide; nothing is decided here.
"""

from __future__ import annotations

from empg_lite.rewards.choice import options_of, read_choice
from empg_lite.rewards.functions import MAX_ANSWER, MAX_TEXT, gold_answer
from empg_lite.rewards.math.compare import (
    Leaf,
    asks_percentage,
    cheap_leaf,
    compare,
    decide_plain,
    is_empty,
    read_shape,
)
from empg_lite.rewards.math.extract import Answer, extract, find_boxes, hedged, last_sentence, visible
from empg_lite.rewards.math.normalize import normalize
from empg_lite.rewards.math.shapes import Shape
from empg_lite.rewards.spec import Part, parse_spec
from empg_lite.rewards.verdict import Verdict

_RULES = {
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
_KINDS = {
    "leaf": "a single value",
    "bag": "an unordered list or set",
    "matrix": "a matrix or vector",
    "equation": "an equation",
    "relation": "an inequality",
    "interval": "an interval",
}
_FAILED = {"timeout": "ran out of time", "memory": "ran out of memory", "crash": "died"}
_MAX_SHOWN = 120


def _short(text: str) -> str:
    """As it is written (a backslash is one backslash), on one line, and not too much of it."""
    text = text.replace("\n", "⏎")
    return f"'{text}'" if len(text) <= _MAX_SHOWN else f"'{text[: _MAX_SHOWN - 1]}…'"


def _kind(shape: Shape) -> str:
    """The kind of an answer, with what else must agree."""
    if shape.kind == "tuple":
        name = "ordered pair" if len(shape.items) == 2 else f"ordered tuple of {len(shape.items)}"
        return f"an {name} in {shape.text}"
    if shape.kind == "interval":
        ends = {"(": "open", "[": "closed", ")": "open", "]": "closed"}
        return f"an interval, {ends[shape.text[0]]} below and {ends[shape.text[1]]} above"
    if shape.kind == "bag":
        return f"{_KINDS['bag']} of {len(shape.items)}"
    return f"a matrix of {shape.text}" if shape.kind == "matrix" else _KINDS[shape.kind]


def _looked_at(prediction: str) -> str:
    seen = visible(prediction)
    if seen == prediction:
        return f"looked at the whole text, {len(prediction)} characters"
    return (
        f"looked at {len(seen)} of {len(prediction)} characters: what stands before a closing thinking tag "
        "or outside the answer tag does not count"
    )


def _found(text: str, answer: Answer | None) -> list[str]:
    """How the answer was found, and which boxes were passed over."""
    boxes = find_boxes(text)
    if answer is None:
        if boxes and hedged(text, last_sentence(text, boxes)):
            return ["no answer: the sentence of the last box does not commit itself"]
        if boxes:
            return ["no answer: the last boxes are alternatives, joined by 'or'"]
        return ["no answer: no ####, no box, no 'answer is', no mathematics and no number"]
    steps = [f"read {_short(answer.text)} by the rule {answer.rule}: {_RULES[answer.rule]}"]
    used = last_sentence(text, boxes) if boxes and answer.rule.startswith("boxed") else []
    passed = [box.content.strip() for box in boxes[: len(boxes) - len(used)]]
    if passed:
        boxes_word = "box" if len(passed) == 1 else "boxes"
        shown = ", ".join(map(_short, passed[-3:]))
        steps.append(f"passed over {len(passed)} earlier {boxes_word}: {shown}")
    return steps


def _traced(percent: bool, into: list[str]) -> Leaf:
    """The cheap leaf, writing down what it was asked and how it decided."""
    cheap = cheap_leaf(percent)

    def leaf(what: str, gold: Shape, prediction: Shape) -> bool | None:
        equal = cheap(what, gold, prediction)
        one, other, how = gold.source or gold.text, prediction.source or prediction.text, "as written"
        if what == "expression":
            one, other = gold.text, prediction.text
            how = decide_plain(one, other, percent)[1]
        if equal is None:
            how = "left to algebra in the worker"
        word = {True: "equal", False: "not equal", None: "not decided here"}[equal]
        into.append(f"compared {_short(one)} with {_short(other)}: {word} ({how})")
        return equal

    return leaf


def _compared(gold: str, prediction: str, percent: bool) -> list[str]:
    """The comparison of two normalised answers."""
    if gold == prediction:
        return [f"both, written one way, are {_short(gold)}: the same text"]
    steps = [f"written one way: gold {_short(gold)}, answer {_short(prediction)}"]
    one, other = read_shape(gold), read_shape(prediction)
    steps.append(f"the gold answer is {_kind(one)}; the answer read is {_kind(other)}")
    if percent:
        steps.append("the problem asks for a percentage and the gold has no sign: 20% counts as 20")
    leaves: list[str] = []
    equal = compare(gold, prediction, _traced(percent, leaves))
    steps += leaves[:6]
    if len(leaves) > 6:
        steps.append(f"... and {len(leaves) - 6} more comparisons of parts")
    if equal is False and not leaves:
        steps.append(f"their structure differs: {_kind(one)} against {_kind(other)}")
    return steps


def _mathematical(gold: str, prediction: str, question: str | None, numeric: bool) -> list[str]:
    text = visible(prediction)
    answer = extract(prediction, numeric=numeric)
    steps = [_looked_at(prediction), *_found(text, answer)]
    if answer is None:
        return steps
    known = gold_answer(gold, numeric=numeric)
    if known != gold.strip():
        steps.append(f"read the gold answer {_short(known)} from a worked solution")
    if max(len(known), len(answer.text)) > MAX_ANSWER:
        return [*steps, f"an answer of over {MAX_ANSWER} characters is compared as text only"]
    one, other = normalize(known), normalize(answer.text)
    if is_empty(other):
        return [*steps, "an empty answer, infinity or 'nan' counts only where the gold says the same"]
    return steps + _compared(one, other, "%" in other and asks_percentage(question))


def _literal(gold: str, prediction: str) -> list[str]:
    """The reward ``exact``: to the letter."""
    if prediction.strip() == gold.strip():
        return [_looked_at(prediction), "the whole text is the gold answer to the letter"]
    answer = extract(prediction)
    steps = [_looked_at(prediction), *_found(visible(prediction), answer)]
    if answer is not None:
        steps.append(f"compared {_short(answer.text)} with {_short(gold.strip())} to the letter")
    return steps


def _ending(verdict: Verdict) -> str:
    if verdict.failed:
        return f"the grader {_FAILED[verdict.reason]}: no verdict, the row is left out of training"
    if verdict.reason == "parse":
        return "reward 0: the worker could not read one of the two as mathematics"
    return f"reward {verdict.reward:g}: {verdict.reason.replace('_', ' ')}"


def _chosen(gold: str, prediction: str, question: str | None) -> list[str]:
    """The reward ``choice``."""
    options = options_of(question or "")
    steps = [f"the question lists the options {', '.join(options)}"] if options else []
    answer = read_choice(prediction, options)
    if answer is None:
        return [*steps, "no answer: the text does not settle on one letter, nor on one option's text"]
    return [
        *steps,
        f"read the letter {answer.text} (rule {answer.rule})",
        f"the gold answer is {_short(gold)}",
    ]


def _correctness(part: Part, gold: str, prediction: str, question: str | None) -> list[str]:
    """How the part of a reward that says what is right came to its verdict."""
    if part.name in ("math", "gsm8k"):
        return _mathematical(gold, prediction, question, part.name == "gsm8k")
    if part.name == "exact":
        return _literal(gold, prediction)
    if part.name == "choice":
        return _chosen(gold, prediction, question)
    if part.name == "regex":
        return [
            f"searched the text for the pattern {_short(part.argument)}",
            "the last match's first group, without spaces around, must be the gold answer to the letter; a "
            "pattern without a group only has to match",
        ]
    if part.name == "gym":
        return [*_found(visible(prediction), extract(prediction)), "asked the task's own scorer about it"]
    return [f"asked your function {part.argument}"]


def explain(
    spec: str, gold: str, prediction: str, question: str | None = None, *, verdict: Verdict | None = None
) -> list[str]:
    """The steps of a verdict, in order, in plain words.

    Args:
        spec: the reward, as ``Grader.grade`` takes it.
        gold: the gold answer.
        prediction: the text that was graded.
        question: the problem's text, where it was known to the grader.
        verdict: what the grader said; the last step then states it. Without it the steps end where
            algebra in the worker would begin.

    Raises:
        ValueError: ``spec`` names no reward.
    """
    parsed = parse_spec(spec)
    if len(prediction) > MAX_TEXT:
        steps = [f"a text of over {MAX_TEXT} characters is not read"]
    else:
        steps = _correctness(parsed.correctness, gold, prediction, question)
    if verdict is None:
        return steps
    if verdict.terms:
        sign = " + " if parsed.added else " * "
        terms = sign.join(f"{name} {value:.3g}" for name, value in verdict.terms.items())
        steps.append(f"{'the mean of' if parsed.added else 'multiplied'} its terms: {terms}")
    return [*steps, _ending(verdict)]
