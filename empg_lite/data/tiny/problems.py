"""Word problems of the bundled demo: short stories about a changing count, one arithmetic step per sentence.

A *story* is a question with the chain of steps that answers it. ``scripts/tiny_solutions.py`` turns the same
chain into the solutions that the bundled models were pre-trained on.

Problems are generated on the fly with ``random.Random`` and integer seeds, identically on every machine.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from random import Random

from empg_lite.core.errors import MissingInput
from empg_lite.core.rationale import Problem, problem_id


@dataclass(frozen=True, slots=True)
class Difficulty:
    """Length of the chains and size of the numbers.

    Attributes:
        steps: minimum and maximum number of arithmetic steps.
        max_value: largest number in a story or its solution.
        max_operand: largest number added or subtracted in one step.
        max_factor: largest factor or divisor, at most 6.
    """

    steps: tuple[int, int]
    max_value: int
    max_operand: int
    max_factor: int


#: The difficulty of the demo.
TINY = Difficulty(steps=(2, 3), max_value=50, max_operand=12, max_factor=4)
#: Longer chains and larger numbers: headroom for comparing methods.
HARD = Difficulty(steps=(3, 5), max_value=100, max_operand=30, max_factor=5)
#: One step: for a small pre-trained model, which knows the words but little arithmetic.
EASY = Difficulty(steps=(1, 1), max_value=50, max_operand=20, max_factor=5)


@dataclass(frozen=True, slots=True)
class Step:
    """One line of arithmetic, printed as ``left operator right = result.``; the result may be wrong."""

    left: int
    operator: str
    right: int
    result: int

    def __str__(self) -> str:
        return f"{self.left} {self.operator} {self.right} = {self.result}."


def compute(left: int, operator: str, right: int) -> Step:
    """The step with its correct result; ``/`` drops the remainder."""
    results = {"+": left + right, "-": left - right, "*": left * right, "/": left // right}
    return Step(left, operator, right, results[operator])


@dataclass(frozen=True, slots=True)
class Story:
    """A question and the chain of steps that answers it; each step starts from the previous result."""

    question: str
    steps: tuple[Step, ...]

    @property
    def answer(self) -> int:
        return self.steps[-1].result

    def problem(self) -> Problem:
        """The story without its solution, as training sees it."""
        meta = {"steps": str(len(self.steps))}
        return Problem(problem_id(self.question), self.question, str(self.answer), meta)


# ---- words -----------------------------------------------------------------------------------------------

_SHE, _HE = ("she", "her"), ("he", "him")
_PEOPLE = {
    **dict.fromkeys(("Mia", "Ana", "Eva", "Ivy", "Zoe", "Nora"), _SHE),
    **dict.fromkeys(("Tom", "Ben", "Leo", "Max", "Sam", "Finn"), _HE),
}
_THINGS = (
    "shells",
    "beads",
    "coins",
    "stamps",
    "cards",
    "marbles",
    "stickers",
    "pencils",
    "apples",
    "buttons",
)
_BOXES = ("boxes", "bags", "jars", "trays")
_PARTS = ("half", "a third", "a quarter", "a fifth", "a sixth")

# An opening states the count (no step), or two numbers that combine into it (one step).
_OPENINGS = {
    "": (
        "{name} has {n} {things}.",
        "{name} starts with {n} {things}.",
        "There are {n} {things} on {name}'s desk.",
    ),
    "+": (
        "{name} has {n} red {things} and {k} blue {things}.",
        "{name} finds {n} {things} at home and {k} at school.",
    ),
    "*": (
        "{name} has {n} {boxes} with {k} {things} in each.",
        "{name} fills {n} {boxes} with {k} {things} each.",
    ),
}
# What happens to the count, by operator.
_EVENTS = {
    "+": (
        "{He} buys {k} more.",
        "{friend} gives {him} {k} {things}.",
        "Then {he} finds {k} more {things}.",
        "{He} wins {k} in a game.",
    ),
    "-": (
        "{He} loses {k} of them.",
        "{He} gives {k} {things} to {friend}.",
        "Then {he} sells {k} of them.",
        "{k} of the {things} break.",
    ),
    "*": ("Soon {he} has {times} as many.", "After the fair {he} has {times} as many {things}."),
    "/": (
        "{He} splits them into {k} equal piles and keeps one pile.",
        "{He} keeps only {part} of the {things}.",
    ),
}
# The last step may end the story with a question of its own.
_ENDINGS = {
    "+": "{friend} has {k} more {things} than {name}. How many {things} does {friend} have?",
    "-": "{friend} has {k} fewer {things} than {name}. How many {things} does {friend} have?",
    "*": "{friend} has {times} as many {things} as {name}. How many {things} does {friend} have?",
    "/": "{He} shares them equally among {k} friends. How many {things} does each friend get?",
}
_QUESTION = "How many {things} does {name} have now?"


def _draw_words(rng: Random) -> dict[str, str]:
    name, friend = rng.sample(tuple(_PEOPLE), 2)
    he, him = _PEOPLE[name]
    things, boxes = rng.choice(_THINGS), rng.choice(_BOXES)
    words = {"name": name, "friend": friend, "he": he, "He": he.capitalize(), "him": him}
    return words | {"things": things, "boxes": boxes}


def _operand_words(operator: str, k: int) -> dict[str, str]:
    """The operand in words: ``7``, ``twice`` or ``3 times``, ``half`` or ``a third``."""
    words = {"k": str(k)}
    if operator in "*/":
        words |= {"times": "twice" if k == 2 else f"{k} times", "part": _PARTS[k - 2]}
    return words


# ---- stories ---------------------------------------------------------------------------------------------


def _operands(value: int, difficulty: Difficulty) -> dict[str, list[int]]:
    """Valid operands per operator at ``value``: every number stays in 2..max_value, so plurals agree."""
    added = range(2, min(difficulty.max_operand, difficulty.max_value - value) + 1)
    taken = range(2, min(difficulty.max_operand, value - 2) + 1)
    factors = range(2, difficulty.max_factor + 1)
    return {
        "+": list(added),
        "-": list(taken),
        "*": [k for k in factors if value * k <= difficulty.max_value],
        "/": [k for k in factors if value % k == 0 and value // k >= 2],
    }


def _draw_step(rng: Random, difficulty: Difficulty, value: int, operator: str = "") -> Step:
    """A step from ``value`` with the given operator, or with any valid one."""
    operands = _operands(value, difficulty)
    operator = operator or rng.choice([op for op, ks in operands.items() if ks])
    return compute(value, operator, rng.choice(operands[operator]))


def make_story(rng: Random, difficulty: Difficulty = TINY) -> Story:
    """Draw one story."""
    words = _draw_words(rng)
    length = rng.randint(*difficulty.steps)
    opening = rng.choice(tuple(_OPENINGS))
    value = rng.randint(2, 10) if opening == "*" else rng.randint(3, difficulty.max_value // 2)
    steps = [_draw_step(rng, difficulty, value, opening)] if opening else []
    sentence = rng.choice(_OPENINGS[opening])
    sentences = [sentence.format(**words, n=value, k=steps[0].right if steps else "")]

    own_ending = rng.random() < 0.4 and len(steps) < length
    while len(steps) < length:
        step = _draw_step(rng, difficulty, steps[-1].result if steps else value)
        steps.append(step)
        ends = own_ending and len(steps) == length
        sentence = _ENDINGS[step.operator] if ends else rng.choice(_EVENTS[step.operator])
        sentences.append(sentence.format(**words, **_operand_words(step.operator, step.right)))
    if not own_ending:
        sentences.append(_QUESTION.format(**words))
    return Story(" ".join(sentences), tuple(steps))


def stories(seed: int, difficulty: Difficulty = TINY) -> Iterator[Story]:
    """An endless stream of stories without repeated texts."""
    rng = Random(seed)
    seen: set[str] = set()
    while True:
        story = make_story(rng, difficulty)
        if story.question not in seen:
            seen.add(story.question)
            yield story


# ---- splits ----------------------------------------------------------------------------------------------

_SEED = 20_250_418
_ROWS = {"test": 500, "train": 4000}


def tiny_problems(split: str, difficulty: Difficulty = TINY) -> list[Problem]:
    """The fixed problems of a split: ``train`` (4000) or ``test`` (500), disjoint by text.

    Both come from one stream without repeats, ``test`` first.

    Raises:
        MissingInput: an unknown split.
    """
    if split not in _ROWS:
        raise MissingInput(f"unknown split {split!r}", "data.split", f"use {' or '.join(_ROWS)}")
    start = 0 if split == "test" else _ROWS["test"]
    cut = islice(stories(_SEED, difficulty), start, start + _ROWS[split])
    return [story.problem() for story in cut]
