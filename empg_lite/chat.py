"""Asking a model and looking at how it reasons."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from random import Random

from empg_lite import store
from empg_lite.data import load_problems
from empg_lite.errors import DataError
from empg_lite.estep import sample_rationales
from empg_lite.learner import Learner, build_learner
from empg_lite.rationale import Group, Problem, Rationale, encode_rollouts, problem_id
from empg_lite.rewards import Grader
from empg_lite.rewards.votes import ballot
from empg_lite.sampler import Decoding, TextStream
from empg_lite.scoring import score
from empg_lite.target import Target

#: E-step number of chat draws.
CHAT_STEP = -2

#: Told of (who speaks, the reply's text so far) as it grows.
OnText = Callable[[str, str], None]


@dataclass(frozen=True, slots=True)
class Reply:
    """A rationale with who gave it: ``tuned`` or ``base``; ``reward`` stays None where no gold is known."""

    speaker: str
    rationale: Rationale


@dataclass(frozen=True, slots=True)
class Vote:
    """What several samples of one question say together.

    Attributes:
        answer: the answer that most give, as the first of them wrote it; None where nobody gave one.
        votes: how many gave it.
        right: share of the samples that are right; None where no gold is known.
    """

    answer: str | None
    votes: int
    right: float | None


class Chat:
    """A loaded model that answers questions, beside its base on request.

    Args:
        temperature: 0 is greedy.
        max_new_tokens: None takes the recipe's.

    Attributes:
        decoding: how replies are drawn; may be replaced between questions.
        replies: everything that was said, in order.
    """

    def __init__(
        self, target: Target, *, temperature: float = 0.0, max_new_tokens: int | None = None
    ) -> None:
        self.learner: Learner = build_learner(target.recipe)
        self.recipe = self.learner.recipe
        self.decoding = Decoding(
            max_new_tokens or self.recipe.sampler.max_new_tokens, temperature=temperature
        )
        self.replies: list[Reply] = []
        self._sampler = self.learner.sampler()
        self._asked = 0

    def ask(
        self,
        question: str,
        grader: Grader,
        *,
        gold: str | None = None,
        compare: bool = False,
        on_text: OnText | None = None,
    ) -> Sequence[Reply]:
        """Answer a question, base first where it is asked too; with ``gold`` it is graded, else only read.

        Raises:
            DataError: question and longest answer leave the model's context.
        """
        self._asked += 1
        replies = []
        for speaker in ("base", "tuned") if compare else ("tuned",):
            with self.learner.policy.reference() if speaker == "base" else nullcontext():
                group = self._draw(question, gold, 1, self.decoding, speaker, on_text)
            replies.append(Reply(speaker, self._graded(group, gold, grader)[0]))
        self.replies += replies
        return replies

    def again(
        self, question: str, grader: Grader, samples: int, *, gold: str | None = None
    ) -> tuple[list[Reply], Vote]:
        """Draw K = ``samples`` replies at temperature 1 (or the one set, if not 0), and let them vote."""
        self._asked += 1
        decoding = replace(self.decoding, temperature=self.decoding.temperature or 1.0)
        group = self._draw(question, gold, samples, decoding, "tuned", None)
        replies = [Reply("tuned", r) for r in self._graded(group, gold, grader)]
        self.replies += replies
        return replies, vote([r.rationale for r in replies])

    def draw_problem(self, wanted: str = "") -> Problem:
        """A problem of the evaluation rows: the one whose id begins so, or each time another.

        Raises:
            DataError: no id begins so; the data cannot be read.
        """
        found = [p for p in self._problems if p.id.startswith(wanted)]
        if not found:
            raise DataError("no problem has such an id", wanted, "ids stand in `empg-lite inspect`")
        return found[0] if wanted else Random(f"{self.recipe.run.seed} {self._asked}").choice(found)

    def save(self, path: Path) -> int:
        """Write all that was said as a rollout file: ``inspect`` shows it, ``score`` and ``fit`` take it.

        Returns:
            How many replies it holds.
        """
        header = self.learner.header(str(self.recipe.data.reward))
        text = ""
        for speaker, adapter in (("tuned", header.adapter), ("base", None)):
            rows = [r.rationale for r in self.replies if r.speaker == speaker]
            # Asked twice is sampled twice: within a problem the index tells them apart.
            seen: Counter[str] = Counter()
            numbered = []
            for row in rows:
                numbered.append(replace(row, sample_index=seen[row.problem_id]))
                seen[row.problem_id] += 1
            if numbered:
                text += encode_rollouts(replace(header, adapter=adapter), numbered)
        store.write_file(path, text)
        return len(self.replies)

    @cached_property
    def _problems(self) -> list[Problem]:
        return load_problems(self.recipe.data, self.recipe.data.eval_split)

    def _draw(
        self,
        question: str,
        gold: str | None,
        samples: int,
        decoding: Decoding,
        speaker: str,
        on_text: OnText | None,
    ) -> Group:
        learner = self.learner
        learner.require_room(question, decoding.max_new_tokens)
        problem = Problem(problem_id(question), question, gold or "")
        stream = TextStream(learner.policy.tokenizer, learner.policy.template.stop)

        def grew(i: int, k: int, ids: Sequence[int]) -> None:
            if on_text:
                on_text(speaker, stream.grow(ids))

        draw = sample_rationales(
            learner.policy,
            self._sampler,
            [problem],
            decoding,
            samples=samples,
            seed=self.recipe.run.seed + self._asked,
            step=CHAT_STEP,
            policy_step=learner.state.policy_step,
            on_token=grew if on_text else None,
        )
        return draw.groups[0]

    def _graded(self, group: Group, gold: str | None, grader: Grader) -> list[Rationale]:
        rows = score(group.rationales, grader, str(self.recipe.data.reward))
        return rows if gold is not None else [replace(r, reward=None, reason=None) for r in rows]


def vote(rows: Sequence[Rationale]) -> Vote:
    """The majority's answer: equal numbers are one answer, a truncated rationale does not vote."""
    ballots = [ballot(r.extracted) if r.finish_reason == "stop" else None for r in rows]
    counted = Counter(b for b in ballots if b is not None)
    known = [r for r in rows if r.reward is not None and not r.failed]
    right = sum(r.right for r in known) / len(known) if known else None
    if not counted:
        return Vote(None, 0, right)
    winner, votes = counted.most_common(1)[0]
    return Vote(rows[ballots.index(winner)].extracted, votes, right)
