"""E-step: sample rationales from the policy, score them, weigh them. No gradients.

q(z|x) is proportional to pi_old(z|x) R(x, z); on samples of pi_old only the weight is left. Each of the three
works without the others: that is what the commands ``sample``, ``score`` and ``fit`` do.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Container, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from empg_lite.core.errors import DataError
from empg_lite.core.rationale import Group, Problem, Rationale, flatten, group_rationales
from empg_lite.em import em_weights
from empg_lite.rewards.scorer import Scorer, VerdictKey
from empg_lite.run.rollouts import read_rollouts
from empg_lite.sampler import Completion, Decoding, OnToken, Prompt, Sampler, sample_key

if TYPE_CHECKING:
    from empg_lite.loop.learner import Learner
    from empg_lite.policy.policy import Policy
    from empg_lite.rewards import Grader
    from empg_lite.run.parallel import World
    from empg_lite.sampler import SampleWork


@dataclass(frozen=True, slots=True)
class Draw:
    """Sampled groups without rewards, and their surprise.

    ``nats`` is -sum log pi of the sampled tokens; per token, at temperature 1, an unbiased estimate of the
    policy's token entropy.
    """

    groups: tuple[Group, ...]
    nats: float


def sample_rationales(
    policy: Policy,
    sampler: Sampler,
    problems: Sequence[Problem],
    decoding: Decoding,
    *,
    samples: int,
    seed: int,
    step: int,
    policy_step: int,
    have: Container[tuple[str, int]] = (),
    on_rationale: Callable[[Rationale], None] | None = None,
    on_token: OnToken | None = None,
) -> Draw:
    """Draw K = ``samples`` rationales for each of P problems.

    Args:
        have: (problem ID, sample index) of what is not drawn again; at least one is drawn for each problem.
        step: the E-step; keys the random numbers with ``seed``, problem id and sample index.
        policy_step: optimizer steps the policy has taken; stored in each rationale.
        on_rationale: called with each rationale as soon as it ends.
        on_token: called with each rationale's tokens as they are sampled.
    """
    prompts, texts = [], []
    wanted = [[k for k in range(samples) if (problem.id, k) not in have] for problem in problems]
    for problem, numbers in zip(problems, wanted, strict=True):
        text, ids = policy.encode_prompt(problem.question)
        keys = tuple(sample_key(seed, step, problem.id, k) for k in numbers)
        texts.append(text)
        prompts.append(Prompt(ids, keys))
    rationales: dict[tuple[int, int], Rationale] = {}

    def on_completion(i: int, at: int, c: Completion) -> None:
        k = wanted[i][at]
        r = rationale_of(problems[i], texts[i], prompts[i].ids, c, step, policy_step, k)
        rationales[i, k] = r
        if on_rationale:
            on_rationale(r)

    drawn = sampler.sample(prompts, decoding, on_completion, on_token)
    groups = tuple(
        Group(problem.id, step, tuple(rationales[i, k] for k in wanted[i]))
        for i, problem in enumerate(problems)
    )
    return Draw(groups, -sum(x for completions in drawn for c in completions for x in c.logprobs))


def rationale_of(
    problem: Problem,
    prompt: str,
    prompt_ids: tuple[int, ...],
    completion: Completion,
    step: int,
    policy_step: int,
    sample_index: int,
) -> Rationale:
    """A completion with where it comes from."""
    return Rationale(
        problem_id=problem.id,
        question=problem.question,
        gold=problem.gold,
        prompt=prompt,
        prompt_ids=prompt_ids,
        completion=completion.text,
        completion_ids=completion.ids,
        finish_reason=completion.finish_reason,
        step=step,
        policy_step=policy_step,
        sample_index=sample_index,
        meta=problem.meta,
    )


@dataclass(frozen=True, slots=True)
class Drawn:
    """Scored groups and what they took.

    Attributes:
        groups: one per problem, with rewards, and weights after ``weigh``.
        nats: -sum log pi over all sampled tokens.
        sample_seconds: wall time of sampling.
        score_seconds: wall time still spent scoring afterwards; the rest overlaps sampling.
        grader_error: message of the last grader failure.
        own_work, work: what this process's sampler and those of all computed; set by ``with_work``.
    """

    groups: tuple[Group, ...]
    nats: float
    sample_seconds: float
    score_seconds: float
    grader_error: str | None = None
    own_work: SampleWork | None = None
    work: SampleWork | None = None

    def with_groups(self, groups: tuple[Group, ...]) -> Drawn:
        """The same draw, its groups weighed."""
        return replace(self, groups=groups)

    def with_work(self, own: SampleWork, world: World) -> Drawn:
        """The same draw, with what the samplers of all processes computed for it."""
        first, *others = world.gather(own)
        return replace(self, own_work=own, work=sum(others, first))


class _AsScored:
    """Has rationales graded and, where there is someone to tell, passes them on with their verdicts."""

    def __init__(self, scorer: Scorer, tell: Callable[[Rationale], None] | None) -> None:
        self._scorer, self._tell = scorer, tell
        self._waiting: list[Rationale] = []

    def ended(self, r: Rationale) -> None:
        """A verdict that takes longer is passed on when a later rationale ends."""
        self._scorer.submit(r)
        if self._tell is None:
            return
        self._waiting.append(r)
        ready = [self._scorer.ready(w) for w in self._waiting]
        there = [w for w, yes in zip(self._waiting, ready, strict=True) if yes]
        self._waiting = [w for w, yes in zip(self._waiting, ready, strict=True) if not yes]
        self._pass_on(there)

    def finish(self) -> None:
        """Pass on the rest, waiting for each verdict."""
        self._pass_on(self._waiting)

    def _pass_on(self, rows: Sequence[Rationale]) -> None:
        for r in self._scorer.scored(rows):
            assert self._tell is not None  # or no row waits
            self._tell(r)


def draw_and_score(
    learner: Learner,
    sampler: Sampler,
    grader: Grader,
    problems: Sequence[Problem],
    decoding: Decoding | None = None,
    *,
    samples: int,
    step: int,
    policy_step: int,
    known: Mapping[VerdictKey, Rationale] | None = None,
    have: Container[tuple[str, int]] = (),
    on_scored: Callable[[Rationale], None] | None = None,
    on_done: Callable[[int], None],
) -> Drawn:
    """Draw K = ``samples`` rationales for each problem; each is graded as soon as it ends.

    Training, preflight and evaluation all sample here. The processes of a launch divide the problems.

    Args:
        decoding: None samples as training does.
        known: earlier verdicts, which are reused.
        have: see ``sample_rationales``.
        on_scored: called with each rationale of this process once its verdict is in.
        on_done: called with the number of rationales that just ended (progress).
    """
    started, sampled, nats, world = time.perf_counter(), 0.0, 0.0, learner.world
    reward = str(learner.recipe.data.reward)
    scorer = Scorer(grader, reward, known, lambda n: on_done(n * world.size))
    grading = _AsScored(scorer, on_scored)

    def ask(mine: Sequence[Problem]) -> list[list[Rationale]]:
        nonlocal sampled, nats
        draw = sample_rationales(
            learner.policy,
            sampler,
            mine,
            decoding or learner.decoding,
            samples=samples,
            seed=learner.recipe.run.seed,
            step=step,
            policy_step=policy_step,
            have=have,
            on_rationale=grading.ended,
        )
        sampled = time.perf_counter()
        nats = draw.nats
        grading.finish()
        rows = iter(scorer.scored(flatten(draw.groups)))
        return [[next(rows) for _ in group.rationales] for group in draw.groups]

    found = [r for rows in world.share(problems, ask) for r in rows]
    return Drawn(
        tuple(group_rationales(found)),
        sum(world.gather(nats)),
        sampled - started,
        time.perf_counter() - sampled,
        world.first(scorer.error),
    )


def known_verdicts(path: Path, reward: str) -> dict[VerdictKey, Rationale]:
    """Verdicts of a step that was graded before the run was interrupted."""
    if not path.is_file():
        return {}
    try:
        (segment,) = read_rollouts(path)
    except (DataError, ValueError):
        return {}
    if segment.header.reward_name != reward:
        return {}
    return {(r.problem_id, r.completion): r for r in segment.rationales if r.reward is not None}


def reward_matrix(groups: Sequence[Group]) -> tuple[Tensor, Tensor]:
    """Rewards ``(P, K)`` float64 and ``valid`` ``(P, K)`` bool.

    K is that of the largest group; padding and grader failures are not valid.
    """
    width = max(len(g.rationales) for g in groups)
    rewards = torch.zeros((len(groups), width), dtype=torch.float64)
    valid = torch.zeros((len(groups), width), dtype=torch.bool)
    for p, group in enumerate(groups):
        for k, r in enumerate(group.rationales):
            assert r.reward is not None, "score before weighing"
            rewards[p, k] = r.reward
            valid[p, k] = not r.failed
    return rewards, valid


def weigh(
    groups: Sequence[Group],
    *,
    weighting: str,
    baseline: float = 0.0,
    current_step: int | None = None,
    max_age: int | None = None,
) -> tuple[Group, ...]:
    """Compute every rationale's weight. Negative weights are dropped in stale groups.

    Rationales drawn in turns weigh their reward: a problem's add up to 1 by the time it is answered.

    Args:
        current_step: optimizer steps of the policy about to be fitted; None for fresh samples.
        max_age: groups with a rationale older than this many optimizer steps get weight 0; None: no limit.
            External text is never too old.
    """
    if not groups:
        return ()
    rewards, valid = reward_matrix(groups)
    weights = em_weights(rewards, valid, weighting=weighting, baseline=baseline)  # (P, K)
    clamped = em_weights(rewards, valid, weighting=weighting, baseline=baseline, drop_negative=True)
    weighed = []
    for p, group in enumerate(groups):
        age = 0 if current_step is None else max(abs(current_step - r.policy_step) for r in group.rationales)
        row = (clamped if age else weights)[p].tolist()
        if group.rationales[0].position is not None:
            row = [0.0 if r.failed else r.reward for r in group.rationales]
        if max_age is not None and age > max_age and group.rationales[0].policy_step >= 0:
            row = [0.0] * len(row)
        rationales = tuple(replace(r, weight=row[k]) for k, r in enumerate(group.rationales))
        weighed.append(Group(group.problem_id, group.step, rationales))
    return tuple(weighed)
