"""Written solutions of the bundled word problems, in the four styles that ``make_tiny.py`` pre-trains on.

``careful`` (every step correct), ``careless`` (occasional errors that carry over), ``habitual`` (some facts
are known wrongly, each in its own way) and ``blurted`` (no steps, mostly wrong).
"""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from random import Random

from empg_lite.data.tiny.problems import Story, compute


def careful(story: Story) -> str:
    """Every step written out and correct: `` 3 + 4 = 7. 7 * 2 = 14. #### 14``."""
    return "".join(f" {step}" for step in story.steps) + f" #### {story.answer}"


def careless(story: Story, rng: Random, slip: float = 0.4) -> str:
    """Steps written out; each result is slightly off with probability ``slip``, and errors carry over."""
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
    """How well a fact is known: (probability of a wrong result, by how much); most are known well.

    A fact is an operator with the last digits of its operands, so that a habit shows in many problems and can
    be unlearned from their answers alone.
    """
    rng = Random(f"{operator}{left_digit}{right_digit}")
    slip = rng.uniform(0.2, 0.8) if rng.random() < 0.45 else 0.0
    return slip, rng.choice((-10, -2, -1, 1, 2, 10))


def habitual(story: Story, rng: Random) -> str:
    """Steps written out; badly known facts go wrong with their own probability, always the same way."""
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
    """An answer without steps, correct with probability ``right``; else a step is skipped or guessed."""
    if rng.random() < right:
        return f" #### {story.answer}"
    last = story.steps[-1]
    near = sorted({last.right, *(last.left + d for d in (-2, -1, 1, 2))} - {story.answer})
    return f" #### {last.left if rng.random() < 0.25 else rng.choice(near)}"
