"""Word problems of the bundled demo: short stories about a count that changes, one step a sentence.

A *story* is a question with the chain of arithmetic steps that answers it. The same chain writes the
solutions the bundled models were pre-trained on, in four manners: ``careful`` (every step right),
``careless`` (results slip now and then, and the slip is carried on), ``habitual`` (some facts are known
wrongly, each in its own way) and ``blurted`` (no steps, mostly wrong).

Everything is drawn with ``random.Random`` from integer seeds and generated on the fly: nothing is stored, and
the same problems come on every machine.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cache
from itertools import islice
from random import Random

from empg_lite.core.rationale import Problem, problem_id


@dataclass(frozen=True, slots=True)
class Difficulty:
    """How long the chains and how large the numbers are.

    Attributes:
        steps: fewest and most arithmetic steps of a story, both included.
        max_value: no number of a story or of its careful solution is larger.
        max_operand: largest number that is added or taken away at once.
        max_factor: largest number that multiplies or divides, at most 6.
    """

    steps: tuple[int, int]
    max_value: int
    max_operand: int
    max_factor: int


#: The demo.
TINY = Difficulty(steps=(2, 3), max_value=50, max_operand=12, max_factor=4)
#: Longer chains and larger numbers: headroom for comparing methods.
HARD = Difficulty(steps=(3, 5), max_value=100, max_operand=30, max_factor=5)


@dataclass(frozen=True, slots=True)
class Step:
    """One line of arithmetic, printed as ``left operator right = result.``; the result may have slipped."""

    left: int
    operator: str
    right: int
    result: int

    def __str__(self) -> str:
        return f"{self.left} {self.operator} {self.right} = {self.result}."


def compute(left: int, operator: str, right: int) -> Step:
    """The step with its true result; ``/`` drops the remainder."""
    results = {"+": left + right, "-": left - right, "*": left * right, "/": left // right}
    return Step(left, operator, right, results[operator])


@dataclass(frozen=True, slots=True)
class Story:
    """A question and the chain of steps that answers it; each step starts from the result before."""

    question: str
    steps: tuple[Step, ...]

    @property
    def answer(self) -> int:
        return self.steps[-1].result

    def problem(self) -> Problem:
        """The story without its solution: what training sees."""
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

# An opening gives the count itself (no step), or two numbers that make it (one step).
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
# What happens to the count, by the operator it stands for.
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
# The last step may end the story in its own way, with its own question.
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
    """The operand as the sentences say it: ``7``, ``twice`` or ``3 times``, ``half`` or ``a third``."""
    words = {"k": str(k)}
    if operator in "*/":
        words |= {"times": "twice" if k == 2 else f"{k} times", "part": _PARTS[k - 2]}
    return words


# ---- stories ---------------------------------------------------------------------------------------------


def _operands(value: int, difficulty: Difficulty) -> dict[str, list[int]]:
    """Operands each operator may take at ``value``: every number stays in 2..max_value, so plurals agree."""
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
    """A step from ``value`` with the given operator, or with any that is possible there."""
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

    own_ending = rng.random() < 0.4
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
    """An endless stream of stories, no text twice."""
    rng = Random(seed)
    seen: set[str] = set()
    while True:
        story = make_story(rng, difficulty)
        if story.question not in seen:
            seen.add(story.question)
            yield story


# ---- written solutions -----------------------------------------------------------------------------------


def careful(story: Story) -> str:
    """Every step written out and right: `` 3 + 4 = 7. 7 * 2 = 14. #### 14``."""
    return "".join(f" {step}" for step in story.steps) + f" #### {story.answer}"


def careless(story: Story, rng: Random, slip: float = 0.4) -> str:
    """Steps written out; each result is off by a little with probability ``slip``, and carried on so."""
    text, left = "", story.steps[0].left
    for story_step in story.steps:
        step = compute(left, story_step.operator, story_step.right)
        if rng.random() < slip:
            step = replace(step, result=max(step.result + rng.choice((-3, -2, -1, 1, 2, 3)), 1))
        text += f" {step}"
        left = step.result
    return f"{text} #### {left}"


@cache
def habit(operator: str, left_digit: int, right_digit: int) -> tuple[float, int]:
    """How a fact is known: (probability that its result slips, by how much); most are known well.

    A fact is an operator with the last digits of its numbers, so that a habit shows in many problems and can
    be unlearned from their answers alone.
    """
    rng = Random(f"{operator}{left_digit}{right_digit}")
    slip = rng.uniform(0.2, 0.8) if rng.random() < 0.45 else 0.0
    return slip, rng.choice((-10, -2, -1, 1, 2, 10))


def habitual(story: Story, rng: Random) -> str:
    """Steps written out; a fact that is known wrongly slips as its habit says, always the same way."""
    text, left = "", story.steps[0].left
    for story_step in story.steps:
        step = compute(left, story_step.operator, story_step.right)
        slip, by = habit(step.operator, step.left % 10, step.right % 10)
        if rng.random() < slip:
            step = replace(step, result=max(step.result + by, 1))
        text += f" {step}"
        left = step.result
    return f"{text} #### {left}"


def blurted(story: Story, rng: Random, right: float = 0.4) -> str:
    """An answer without steps, right with probability ``right``; else a step is forgotten or guessed."""
    if rng.random() < right:
        return f" #### {story.answer}"
    last = story.steps[-1]
    near = sorted({last.right, *(last.left + d for d in (-2, -1, 1, 2))} - {story.answer})
    return f" #### {last.left if rng.random() < 0.25 else rng.choice(near)}"


# ---- splits ----------------------------------------------------------------------------------------------

_SEED = 20_250_418
_ROWS = {"test": 500, "train": 4000}


def tiny_problems(split: str, difficulty: Difficulty = TINY) -> list[Problem]:
    """The problems of a split, always the same: ``train`` (4000) and ``test`` (500), disjoint by text.

    Both are cut from one stream without repeats, ``test`` first. An unknown split is a ``ValueError``.
    """
    if split not in _ROWS:
        raise ValueError(f"unknown split {split!r} of the tiny problems; known: {', '.join(sorted(_ROWS))}")
    start = 0 if split == "test" else _ROWS["test"]
    cut = islice(stories(_SEED, difficulty), start, start + _ROWS[split])
    return [story.problem() for story in cut]
