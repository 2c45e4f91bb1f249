"""The E-step that stops asking a problem once it is answered: ``sampler.tries``, see ``core.slots``."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from empg_lite.core.rationale import group_rationales
from empg_lite.core.slots import Slot, Tries
from empg_lite.loop.estep import Drawn, rationale_of
from empg_lite.rewards.scorer import Scorer, VerdictKey
from empg_lite.sampler import Ask, Sampler, sample_key

if TYPE_CHECKING:
    from empg_lite.core.rationale import Problem, Rationale
    from empg_lite.data.sources import ProblemStream
    from empg_lite.loop.learner import Learner
    from empg_lite.rewards import Grader
    from empg_lite.sampler import Completion


class Asking:
    """The turns of some slots in one step: what each draws next, given the verdicts so far.

    Args:
        numbers: of these slots, among all P.
        slots: what they hold, in the same order.
        step: the E-step; keys the random numbers with the seed, the problem and slot x K + draw.

    Attributes:
        rows: for each slot the rationales drawn; all but the last one graded.
        nats: -sum log pi of the sampled tokens.
    """

    def __init__(
        self,
        learner: Learner,
        stream: ProblemStream,
        scorer: Scorer,
        numbers: Sequence[int],
        slots: Sequence[Slot],
        step: int,
    ) -> None:
        assert learner.recipe.tries is not None
        self._rule: Tries = learner.recipe.tries
        self._learner, self._stream, self._scorer = learner, stream, scorer
        self._numbers, self._slots, self._step = numbers, list(slots), step
        self._graded = [0] * len(slots)
        self._prompts: dict[int, tuple[Problem, str, tuple[int, ...]]] = {}  # by position
        self.rows: list[list[Rationale]] = [[] for _ in slots]
        self.nats = 0.0

    def __len__(self) -> int:
        """Number of slots."""
        return len(self._slots)

    @property
    def prompts(self) -> list[tuple[int, ...]]:
        """Those that may come up: if every draw is right, a slot sees K problems."""
        rule = self._rule
        ahead = (slot.position + k * rule.slots for slot in self._slots for k in range(rule.draws))
        return [self._prompt(position)[2] for position in ahead]

    def ask(self, slot: int) -> Ask | None:
        """See ``sampler.Turns``."""
        self._grade_last(slot)
        if len(self.rows[slot]) == self._rule.draws:
            return None
        problem, _, ids = self._prompt(self._slots[slot].position)
        return Ask(ids, sample_key(self._learner.recipe.run.seed, self._step, problem.id, self._index(slot)))

    def ready(self, slot: int) -> bool:
        """See ``sampler.Turns``.

        A CPU waits for every verdict: a layout that depends on the graders' speed would change last digits.
        """
        rows = self.rows[slot]
        on_cpu = self._learner.policy.device.type == "cpu"
        return on_cpu or self._graded[slot] == len(rows) or self._scorer.ready(rows[-1])

    def ended(self, slot: int, completion: Completion) -> None:
        """See ``sampler.Turns``."""
        here = self._slots[slot]
        problem, text, ids = self._prompt(here.position)
        policy_step = self._learner.state.policy_step
        row = rationale_of(problem, text, ids, completion, self._step, policy_step, self._index(slot))
        row = replace(row, position=here.position, tries=here.tries + 1)
        self.nats -= sum(completion.logprobs)
        self.rows[slot].append(row)
        self._scorer.submit(row)

    def graded(self) -> list[list[Rationale]]:
        """All rows of all slots with their verdicts; waits for those that are missing."""
        for slot in range(len(self)):
            self._grade_last(slot)
        return self.rows

    def _index(self, slot: int) -> int:
        """Sample index of the slot's next draw: no other one of this step has it."""
        return self._numbers[slot] * self._rule.draws + len(self.rows[slot])

    def _grade_last(self, slot: int) -> None:
        rows = self.rows[slot]
        if self._graded[slot] < len(rows):
            rows[-1:] = self._scorer.scored(rows[-1:])
            self._graded[slot] = len(rows)
            self._slots[slot], _ = self._rule.after(self._slots[slot], rows[-1])

    def _prompt(self, position: int) -> tuple[Problem, str, tuple[int, ...]]:
        if position not in self._prompts:
            problem = self._stream.at(position)
            self._prompts[position] = problem, *self._learner.policy.encode_prompt(problem.question)
        return self._prompts[position]


def draw_in_turns(
    learner: Learner,
    sampler: Sampler,
    grader: Grader,
    stream: ProblemStream,
    slots: Sequence[Slot],
    *,
    step: int,
    known: Mapping[VerdictKey, Rationale] | None = None,
    on_done: Callable[[int], None],
) -> Drawn:
    """Draw and grade K rationales in each of P slots, one after another. Processes divide the slots.

    Args:
        slots: what each holds at the beginning of the step.
        known: earlier verdicts, which are reused.
        on_done: called with the number of rationales that just ended (progress).
    """
    started, nats, world = time.perf_counter(), 0.0, learner.world
    scorer = Scorer(grader, str(learner.recipe.data.reward), known, lambda n: on_done(n * world.size))

    def ask(mine: Sequence[int]) -> list[list[Rationale]]:
        nonlocal nats
        asking = Asking(learner, stream, scorer, mine, [slots[i] for i in mine], step)
        if mine:
            sampler.take_turns(asking, learner.decoding)
        nats = asking.nats
        return asking.graded()

    rows = [r for drawn in world.share(range(len(slots)), ask) for r in drawn]
    return Drawn(
        tuple(group_rationales(rows)),
        sum(world.gather(nats)),
        time.perf_counter() - started,
        0.0,
        world.first(scorer.error),
    )


def slots_now(learner: Learner, stream: ProblemStream) -> tuple[Slot, ...]:
    """What the slots hold before the next step: the state's, or P problems from the data position on.

    Raises:
        DataError: there are fewer than P problems.
    """
    rule, state = learner.recipe.tries, learner.state
    assert rule is not None
    stream.take(0, rule.slots)
    return state.slots if len(state.slots) == rule.slots else rule.opened(state.position)
