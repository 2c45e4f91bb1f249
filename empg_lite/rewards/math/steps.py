"""The steps of reading and comparing answers in plain words, told by the functions that decide."""

from __future__ import annotations

from typing import TYPE_CHECKING

from empg_lite.rewards.math.boxes import RULES, Answer, find_boxes, hedged, last_sentence, visible
from empg_lite.rewards.math.compare import Leaf, Pair, cheap_leaf, decide_plain, read_shape

if TYPE_CHECKING:
    from empg_lite.rewards.math.shapes import Shape

_KINDS = {
    "leaf": "a single value",
    "bag": "an unordered list or set",
    "matrix": "a matrix or vector",
    "equation": "an equation",
    "relation": "an inequality",
    "interval": "an interval",
}
_MAX_SHOWN = 120
_MAX_PARTS = 6


def quoted(text: str) -> str:
    """A text in quotes, on one line, cut off where it is long; a backslash stays one backslash."""
    text = text.replace("\n", "⏎")
    return f"'{text}'" if len(text) <= _MAX_SHOWN else f"'{text[: _MAX_SHOWN - 1]}…'"


def reading_steps(prediction: str, answer: Answer | None) -> list[str]:
    """What was looked at, then how ``answer`` was found in it and which boxes were passed over."""
    return [_looked_at(prediction), *_found(visible(prediction), answer)]


def _looked_at(prediction: str) -> str:
    seen = visible(prediction)
    if seen == prediction:
        return f"looked at the whole text, {len(prediction)} characters"
    return (
        f"looked at {len(seen)} of {len(prediction)} characters: text before a closing thinking tag "
        "or outside the answer tag does not count"
    )


def _found(text: str, answer: Answer | None) -> list[str]:
    boxes = find_boxes(text)
    if answer is None:
        if boxes and hedged(text, last_sentence(text, boxes)):
            return ["no answer: the sentence of the last box does not commit to one"]
        if boxes:
            return ["no answer: the last boxes are alternatives, joined by 'or'"]
        return ["no answer: no ####, no box, no 'answer is', no mathematics and no number"]
    steps = [f"read {quoted(answer.text)} by the rule {answer.rule}: {RULES[answer.rule]}"]
    used = last_sentence(text, boxes) if boxes and answer.rule.startswith("boxed") else []
    passed = [box.content.strip() for box in boxes[: len(boxes) - len(used)]]
    if passed:
        boxes_word = "box" if len(passed) == 1 else "boxes"
        shown = ", ".join(map(quoted, passed[-3:]))
        steps.append(f"passed over {len(passed)} earlier {boxes_word}: {shown}")
    return steps


def comparison_steps(pair: Pair) -> list[str]:
    """How two answers compare; ends where algebra in the worker would begin."""
    if pair.gold == pair.prediction:
        return [f"both, written one way, are {quoted(pair.gold)}: the same text"]
    steps = [f"written one way: gold {quoted(pair.gold)}, answer {quoted(pair.prediction)}"]
    gold, prediction = _described(read_shape(pair.gold)), _described(read_shape(pair.prediction))
    steps.append(f"the gold answer is {gold}; the answer read is {prediction}")
    if pair.percent:
        steps.append("the problem asks for a percentage and the gold has no sign: 20% counts as 20")
    parts: list[str] = []
    equal = pair.equal(_traced(pair.percent, parts))
    steps += parts[:_MAX_PARTS]
    if len(parts) > _MAX_PARTS:
        steps.append(f"... and {len(parts) - _MAX_PARTS} more comparisons of parts")
    if equal is False and not parts:
        steps.append(f"their structure differs: {gold} against {prediction}")
    return steps


def _described(shape: Shape) -> str:
    """The structure of an answer, with everything that must agree."""
    if shape.kind == "tuple":
        name = "ordered pair" if len(shape.items) == 2 else f"ordered tuple of {len(shape.items)}"
        return f"an {name} in {shape.text}"
    if shape.kind == "interval":
        ends = {"(": "open", "[": "closed", ")": "open", "]": "closed"}
        return f"an interval, {ends[shape.text[0]]} below and {ends[shape.text[1]]} above"
    if shape.kind == "bag":
        return f"{_KINDS['bag']} of {len(shape.items)}"
    return f"a matrix of {shape.text}" if shape.kind == "matrix" else _KINDS[shape.kind]


def _traced(percent: bool, into: list[str]) -> Leaf:
    """The cheap leaf, which also writes down what it compared and how it decided."""
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
        into.append(f"compared {quoted(one)} with {quoted(other)}: {word} ({how})")
        return equal

    return leaf
