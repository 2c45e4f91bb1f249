"""Ask a model questions and inspect how it reasons."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass, replace
from itertools import groupby
from pathlib import Path
from random import Random
from typing import TYPE_CHECKING

from empg_lite.core.errors import DataError
from empg_lite.core.safe_text import encodable
from empg_lite.data.sources import load_problems
from empg_lite.loop.estep import sample_rationales
from empg_lite.loop.learner import Learner, build_learner
from empg_lite.rewards.math import ballot
from empg_lite.rewards.scorer import score
from empg_lite.run import store
from empg_lite.run.rollouts import encode_rollouts
from empg_lite.sampler import Decoding, TextStream

if TYPE_CHECKING:
    from empg_lite.core.rationale import Problem, Rationale
    from empg_lite.rewards import Grader
    from empg_lite.run.target import Target

#: E-step number of chat samples.
CHAT_STEP = -2

#: Called with (speaker, the reply's text so far) as it grows.
OnText = Callable[[str, str], None]


@dataclass(frozen=True, slots=True)
class Reply:
    """A rationale and its ``speaker``, ``tuned`` or ``base``. Its reward is None if there is no gold answer.

    ``decoding`` and ``seed`` reproduce it; each question has its own seed.
    """

    speaker: str
    rationale: Rationale
    decoding: Decoding
    seed: int


@dataclass(frozen=True, slots=True)
class Vote:
    """The majority among several samples of one question.

    Attributes:
        answer: the most frequent answer, as its first sample wrote it; None if no sample has an answer.
        votes: how many gave it.
        right: share of the samples that are right; None if there is no gold answer.
    """

    answer: str | None
    votes: int
    right: float | None


class Chat:
    """A loaded model that answers questions, optionally next to its base model.

    Args:
        temperature: 0 is greedy.
        max_new_tokens: None: the recipe's.

    Attributes:
        decoding: how ``ask`` decodes; may be replaced between questions.
        replies: the conversation so far.
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
        self._rows: dict[str, list[Problem]] = {}  # by split
        self._saved: set[Path] = set()

    def ask(
        self,
        problem: Problem,
        grader: Grader,
        *,
        compare: bool = False,
        on_text: OnText | None = None,
    ) -> Sequence[Reply]:
        """Answer a question, with ``compare`` first by the base model; graded if it has a gold answer.

        Raises:
            DataError: it is not valid text, or with its longest answer exceeds the model's context.
        """
        self._asked += 1
        replies: list[Reply] = []
        for speaker in ("base", "tuned") if compare else ("tuned",):
            with self.learner.policy.reference() if speaker == "base" else nullcontext():
                replies += self._reply(speaker, problem, 1, self.decoding, grader, on_text)
        self.replies += replies
        return replies

    def again(self, problem: Problem, grader: Grader, samples: int) -> tuple[list[Reply], Vote]:
        """K = ``samples`` replies at temperature 1, as in training, and their vote. Raises like ``ask``."""
        self._asked += 1
        replies = self._reply("tuned", problem, samples, replace(self.decoding, temperature=1.0), grader)
        self.replies += replies
        return replies, vote([r.rationale for r in replies])

    def draw_problem(self, wanted: str = "") -> Problem:
        """A problem by id prefix, or another random problem of a split on each call.

        Args:
            wanted: ``data.split``, ``data.eval_split`` (the default), or the start of an id in either.

        Raises:
            DataError: no id starts like this, or the data cannot be read.
        """
        data = self.recipe.data
        splits = list(dict.fromkeys((data.eval_split, data.split)))
        if not wanted or wanted in splits:
            return Random(f"{self.recipe.run.seed} {self._asked}").choice(self._split(wanted or splits[0]))
        for split in splits:
            for problem in self._split(split):
                if problem.id.startswith(wanted):
                    return problem
        where = f"{wanted!r}, splits {' and '.join(splits)}"
        raise DataError("no problem id starts like this", where, "`empg-lite inspect` shows ids")

    def save(self, path: Path) -> int:
        """Write the conversation as a rollout file, which ``inspect``, ``score`` and ``fit`` read.

        Each question is a segment with its own decoding and seed: groups never cross segments, and a greedy
        reply is not a sample of the policy. Saving again replaces what this conversation saved.

        Returns:
            The number of replies.

        Raises:
            DataError: the file exists and is not from this conversation.
        """
        if path.exists() and path.resolve() not in self._saved:
            raise DataError("the file already exists", str(path), "choose another name")
        header = self.learner.header(str(self.recipe.data.reward))
        text = ""
        for (speaker, decoding, seed), replies in groupby(
            self.replies, lambda r: (r.speaker, r.decoding, r.seed)
        ):
            rows = [r.rationale for r in replies]
            segment = replace(
                header,
                adapter=None if speaker == "base" else header.adapter,
                sampler={**asdict(decoding), "samples_per_problem": len(rows)},
                seed=seed,
            )
            text += encode_rollouts(segment, rows)
        store.write_file(path, text)
        self._saved.add(path.resolve())
        return len(self.replies)

    def _split(self, name: str) -> list[Problem]:
        if name not in self._rows:
            self._rows[name] = load_problems(self.recipe.data, name)
        return self._rows[name]

    def _reply(
        self,
        speaker: str,
        problem: Problem,
        samples: int,
        decoding: Decoding,
        grader: Grader,
        on_text: OnText | None = None,
    ) -> list[Reply]:
        """Sample and grade replies to the current question, under its own seed."""
        learner, seed = self.learner, self.recipe.run.seed + self._asked
        if not encodable(problem.question):
            raise DataError("not UTF-8 text", "the question", "save it as UTF-8")
        learner.require_room(problem.question, decoding.max_new_tokens)
        stream = TextStream(learner.policy.tokenizer, learner.policy.template.stop)

        def on_token(i: int, k: int, ids: Sequence[int]) -> None:
            if on_text:
                on_text(speaker, stream.grow(ids))

        draw = sample_rationales(
            learner.policy,
            self._sampler,
            [problem],
            decoding,
            samples=samples,
            seed=seed,
            step=CHAT_STEP,
            policy_step=learner.state.policy_step,
            on_token=on_token if on_text else None,
        )
        rows = score(draw.groups[0].rationales, grader, str(self.recipe.data.reward))
        if not problem.gold:
            rows = [replace(r, reward=None, reason=None) for r in rows]
        return [Reply(speaker, r, decoding, seed) for r in rows]


def vote(rows: Sequence[Rationale]) -> Vote:
    """The majority answer: equal numbers are one answer, and truncated rationales do not vote."""
    ballots = [ballot(r.extracted) if r.finish_reason == "stop" else None for r in rows]
    counted = Counter(b for b in ballots if b is not None)
    known = [r for r in rows if r.reward is not None and not r.failed]
    right = sum(r.right for r in known) / len(known) if known else None
    if not counted:
        return Vote(None, 0, right)
    winner, votes = counted.most_common(1)[0]
    return Vote(rows[ballots.index(winner)].extracted, votes, right)
