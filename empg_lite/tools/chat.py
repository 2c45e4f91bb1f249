"""Asking a model and looking at how it reasons."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass, replace
from itertools import groupby
from pathlib import Path
from random import Random

from empg_lite.core.errors import DataError
from empg_lite.core.rationale import Group, Problem, Rationale
from empg_lite.core.safe_text import encodable
from empg_lite.data.sources import load_problems
from empg_lite.loop.estep import sample_rationales
from empg_lite.loop.learner import Learner, build_learner
from empg_lite.rewards import Grader
from empg_lite.rewards.math.votes import ballot
from empg_lite.rewards.scorer import score
from empg_lite.run import store
from empg_lite.run.rollouts import encode_rollouts
from empg_lite.run.target import Target
from empg_lite.sampler import Decoding, TextStream

#: E-step number of chat draws.
CHAT_STEP = -2

#: Told of (who speaks, the reply's text so far) as it grows.
OnText = Callable[[str, str], None]


@dataclass(frozen=True, slots=True)
class Reply:
    """A rationale with who gave it: ``tuned`` or ``base``; ``reward`` stays None where no gold is known.

    ``decoding`` and ``seed`` are how it was drawn; each question has a seed of its own.
    """

    speaker: str
    rationale: Rationale
    decoding: Decoding
    seed: int


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
        """Answer a question, base first where it is asked too; one with a gold is graded, else only read.

        Raises:
            DataError: it is no text, or with its longest answer leaves the model's context.
        """
        self._asked += 1
        replies = []
        for speaker in ("base", "tuned") if compare else ("tuned",):
            with self.learner.policy.reference() if speaker == "base" else nullcontext():
                group = self._draw(problem, 1, self.decoding, speaker, on_text)
            replies += self._replies(speaker, group, grader, self.decoding)
        self.replies += replies
        return replies

    def again(self, problem: Problem, grader: Grader, samples: int) -> tuple[list[Reply], Vote]:
        """Draw K = ``samples`` replies at temperature 1, as training does, and let them vote. See ``ask``."""
        self._asked += 1
        decoding = replace(self.decoding, temperature=1.0)
        group = self._draw(problem, samples, decoding)
        replies = self._replies("tuned", group, grader, decoding)
        self.replies += replies
        return replies, vote([r.rationale for r in replies])

    def draw_problem(self, wanted: str = "") -> Problem:
        """A problem: the one whose id begins so, or each time another one of a split.

        Args:
            wanted: ``data.split``, ``data.eval_split`` (the default), or the beginning of an id in either.

        Raises:
            DataError: no id begins so; the data cannot be read.
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
        raise DataError("no problem has such an id", where, "ids stand in `empg-lite inspect`")

    def save(self, path: Path) -> int:
        """Write all that was said as a rollout file: ``inspect`` shows it, ``score`` and ``fit`` take it.

        Each question is a segment of its own, with its decoding and seed: groups never cross headers, and a
        greedy reply is no sample of the policy. Saving again replaces what this conversation saved.

        Returns:
            How many replies it holds.

        Raises:
            DataError: somebody else's file is there.
        """
        if path.exists() and path.resolve() not in self._saved:
            raise DataError("there is a file already, and it stays as it is", str(path), "name another")
        header = self.learner.header(str(self.recipe.data.reward))
        text = ""
        for (speaker, decoding, seed), said in groupby(
            self.replies, lambda r: (r.speaker, r.decoding, r.seed)
        ):
            rows = [r.rationale for r in said]
            text += encode_rollouts(
                replace(
                    header,
                    adapter=None if speaker == "base" else header.adapter,
                    sampler={**asdict(decoding), "samples_per_problem": len(rows)},
                    seed=seed,
                ),
                rows,
            )
        store.write_file(path, text)
        self._saved.add(path.resolve())
        return len(self.replies)

    def _split(self, name: str) -> list[Problem]:
        if name not in self._rows:
            self._rows[name] = load_problems(self.recipe.data, name)
        return self._rows[name]

    @property
    def _seed(self) -> int:
        """Of the question asked last."""
        return self.recipe.run.seed + self._asked

    def _draw(
        self,
        problem: Problem,
        samples: int,
        decoding: Decoding,
        speaker: str = "tuned",
        on_text: OnText | None = None,
    ) -> Group:
        learner = self.learner
        if not encodable(problem.question):
            raise DataError("it is not UTF-8 text", "the question", "save it as UTF-8")
        learner.require_room(problem.question, decoding.max_new_tokens)
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
            seed=self._seed,
            step=CHAT_STEP,
            policy_step=learner.state.policy_step,
            on_token=grew if on_text else None,
        )
        return draw.groups[0]

    def _replies(self, speaker: str, group: Group, grader: Grader, decoding: Decoding) -> list[Reply]:
        rows = score(group.rationales, grader, str(self.recipe.data.reward))
        if not rows[0].gold:
            rows = [replace(r, reward=None, reason=None) for r in rows]
        return [Reply(speaker, r, decoding, self._seed) for r in rows]


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
