"""Asking a model and looking at how it reasons."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from empg_lite.estep import sample_rationales
from empg_lite.learner import Learner, build_learner
from empg_lite.rationale import Problem, Rationale, problem_id
from empg_lite.rewards import Grader
from empg_lite.sampler import Decoding
from empg_lite.scoring import score
from empg_lite.target import Target

#: E-step number of chat draws.
CHAT_STEP = -2


@dataclass(frozen=True, slots=True)
class Reply:
    """A rationale with who gave it: ``tuned`` or ``base``; ``reward`` stays None where no gold is known."""

    speaker: str
    rationale: Rationale


class Chat:
    """A loaded model that answers questions, beside its base on request.

    Args:
        temperature: 0 is greedy.
        max_new_tokens: None takes the recipe's.
    """

    def __init__(
        self, target: Target, *, temperature: float = 0.0, max_new_tokens: int | None = None
    ) -> None:
        self.learner: Learner = build_learner(target.recipe)
        self.recipe = self.learner.recipe
        self.decoding = Decoding(
            max_new_tokens or self.recipe.sampler.max_new_tokens, temperature=temperature
        )
        self._sampler = self.learner.sampler()
        self._asked = 0

    def ask(
        self, question: str, grader: Grader, *, gold: str | None = None, compare: bool = False
    ) -> Sequence[Reply]:
        """Answer a question; with ``gold`` the answer is graded, else only read."""
        self._asked += 1
        replies = [Reply("tuned", self._answer(question, gold, grader))]
        if compare:
            with self.learner.policy.reference():
                replies.insert(0, Reply("base", self._answer(question, gold, grader)))
        return replies

    def _answer(self, question: str, gold: str | None, grader: Grader) -> Rationale:
        self.learner.require_room(question, self.decoding.max_new_tokens)
        problem = Problem(problem_id(question), question, gold or "")
        draw = sample_rationales(
            self.learner.policy,
            self._sampler,
            [problem],
            self.decoding,
            samples=1,
            seed=self.recipe.run.seed + self._asked,
            step=CHAT_STEP,
            policy_step=self.learner.state.policy_step,
        )
        graded = score(draw.groups[0].rationales, grader, str(self.recipe.data.reward))[0]
        return graded if gold is not None else replace(graded, reward=None, reason=None)
