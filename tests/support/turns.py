"""Slots that ask without a learner: a quiz whose answers are right by a rule on their tokens."""

from __future__ import annotations

import random
from collections import Counter
from dataclasses import dataclass, field
from typing import Any

from empg_lite.sampler import Ask, Completion, sample_key


@dataclass
class Quiz:
    """P slots of K draws; slot i asks question i until an answer is right or the third one wrong, then i + P.

    About a third of all answers are right. Fits ``sampler.Turns``.

    Attributes:
        late: verdicts are in after up to so many questions whether they are.
        drawn: (slot, draw) -> question, number of the try, tokens, whether they are right.
    """

    policy: Any
    slots: int
    draws: int
    late: int = 0
    drawn: dict[tuple[int, int], tuple[int, int, tuple[int, ...], bool]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self._at = [(i, 1) for i in range(self.slots)]  # question, try
        self._done = Counter[int]()
        self._pending: dict[int, int] = {}  # slot -> times that its verdict is not in yet
        self._random = random.Random(self.late)
        self.waits = 0

    def __len__(self) -> int:
        return self.slots

    def prompt(self, question: int) -> tuple[int, ...]:
        """Of 1 to 22 letters."""
        return tuple(self.policy.encode_prompt(chr(97 + question % 26) * (1 + 7 * question % 22))[1])

    @property
    def prompts(self) -> list[tuple[int, ...]]:
        return [self.prompt(question) for question in range(self.slots * (self.draws + 1))]

    def ask(self, slot: int) -> Ask | None:
        self._pending.pop(slot, None)
        if self._done[slot] == self.draws:
            return None
        question, _ = self._at[slot]
        return Ask(
            self.prompt(question), sample_key(0, 1, str(question), slot * self.draws + self._done[slot])
        )

    def ready(self, slot: int) -> bool:
        left = self._pending.get(slot, 0)
        self._pending[slot] = left - 1
        self.waits += left > 0
        return left <= 0

    def ended(self, slot: int, completion: Completion) -> None:
        question, tries = self._at[slot]
        right = sum(completion.ids) % 3 == 0
        self.drawn[slot, self._done[slot]] = question, tries, completion.ids, right
        self._at[slot] = self.following(slot) if right or tries == 3 else (question, tries + 1)
        self._done[slot] += 1
        self._pending[slot] = self._random.randint(0, self.late)

    def following(self, slot: int) -> tuple[int, int]:
        """The slot's next question."""
        return self._at[slot][0] + self.slots, 1


@dataclass
class Shared(Quiz):
    """The rule that must not be: whoever is done first takes the next question of a common stream."""

    _next: int = 0

    def following(self, slot: int) -> tuple[int, int]:
        self._next += 1
        return self.slots + self._next - 1, 1
