"""Before step 1: sample a few problems, diagnose the settings, and estimate the training time.

Most wasted runs are wasted from the first step: truncated answers, a reward that is never earned, problems
the model always solves. Half a minute of samples shows it.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from math import comb
from statistics import fmean
from typing import TYPE_CHECKING, Any

import torch

from empg_lite.core.errors import GraderUnusable, NoSignal
from empg_lite.core.rationale import Group, Problem, Rationale, flatten
from empg_lite.core.view import View
from empg_lite.data.sources import ProblemStream, load_splits
from empg_lite.loop.estep import draw_and_score, weigh
from empg_lite.loop.health import FAILURES_STOP, Finding, diagnose, graded_failures
from empg_lite.loop.learner import Learner, build_learner
from empg_lite.loop.metrics import estep_metrics
from empg_lite.loop.mstep import m_step

if TYPE_CHECKING:
    from empg_lite.recipe.schema import Recipe
    from empg_lite.rewards import Grader
    from empg_lite.sampler import Sampler

#: Problems sampled, K times each; under ``sampler.tries`` M times, at most so often.
PROBLEMS, TRIED = 16, 8
#: E-step number of its draws; training counts from 1.
PREFLIGHT_STEP = 0


@dataclass(frozen=True, slots=True)
class Preflight:
    """What a few samples of the untrained policy show.

    Attributes:
        problems, rationales: number of problems and samples.
        reward: mean reward of the graded ones.
        truncated: share cut off at ``sampler.max_new_tokens``.
        signal, mixed: share of problems with any reward, and with both right and wrong answers.
        mean_length: tokens, stop included.
        tokens_per_second: sampled, grading included.
        seconds_a_step: sampling and fitting, scaled to the recipe's step; sampling alone if every weight
            is 0.
        minutes: for all of the recipe's steps, without evaluation.
        findings: what to change, worst first; empty if all is well.
        outlook: under ``sampler.tries``: how its slots will fare.
        groups: the rationales themselves, graded and weighed.
    """

    problems: int
    rationales: int
    reward: float
    truncated: float
    signal: float
    mixed: float
    mean_length: float
    tokens_per_second: float
    seconds_a_step: float
    minutes: float
    findings: tuple[Finding, ...]
    outlook: Outlook | None
    groups: tuple[Group, ...] = field(repr=False)

    @property
    def hopeless(self) -> Finding | None:
        """The finding that makes training pointless, if any."""
        return next((f for f in self.findings if f.hopeless), None)

    def facts(self) -> dict[str, Any]:
        """The figures and findings as plain JSON types."""
        figures = {f.name: getattr(self, f.name) for f in fields(self) if f.name not in ("groups", "outlook")}
        outlook = {"outlook": asdict(self.outlook)} if self.outlook else {}
        return {**figures, **outlook, "findings": [asdict(finding) for finding in self.findings]}

    @property
    def seen(self) -> str:
        """The result in one line."""
        duration = f"{self.minutes:.0f} minutes" if self.minutes >= 2 else f"{60 * self.minutes:.0f} seconds"
        found = f"{self.reward:.0%} right, {self.truncated:.0%} cut off, "
        if self.outlook:
            found += self.outlook.seen
        else:
            found += f"{self.mixed:.0%} of the problems with both right and wrong ones"
        return (
            f"preflight: {self.rationales} rationales of {self.problems} problems: {found}; "
            f"{self.mean_length:.0f} tokens each, {self.tokens_per_second:.0f} tokens/s; "
            f"training will take about {duration}"
        )


@dataclass(frozen=True, slots=True)
class Outlook:
    """How slots will fare, by n independent samples of each problem.

    Attributes:
        tries: M, or n where that is less.
        solved: share of the problems that are answered within M tries.
        draws: rationales that a problem takes on average, given up or not.
    """

    tries: int
    solved: float
    draws: float

    @property
    def right(self) -> float:
        """Share of the draws that are right: less than of independent samples, as hard problems take more."""
        return self.solved / self.draws

    @property
    def seen(self) -> str:
        """In a few words."""
        return (
            f"{self.solved:.0%} of the problems solved within {self.tries} tries, {self.draws:.1f} a problem"
        )


def outlook(groups: Sequence[Group], tries: int) -> Outlook:
    """How slots would fare with these samples, from unbiased pass@k (arXiv 2107.03374, eq. 1)."""

    def solved_within(k: int) -> float:
        """Mean over the problems of 1 - C(n - c, k) / C(n, k), c of n samples right."""
        shares = []
        for group in groups:
            valid = [r for r in group.rationales if not r.failed]
            wrong = sum(not r.right for r in valid)
            shares.append(
                1 - comb(wrong, k) / comb(len(valid), k) if len(valid) >= k else float(wrong < len(valid))
            )
        return fmean(shares)

    n = min(tries, *(len(group.rationales) for group in groups))
    return Outlook(n, solved_within(n), sum(1 - solved_within(k) for k in range(n)))


def preflight(
    learner: Learner, sampler: Sampler, grader: Grader, problems: Sequence[Problem], view: View | None = None
) -> Preflight:
    """Sample and grade ``problems`` like a training step, and time it. Nothing is learned.

    Raises:
        GraderUnusable: the grader fails on most answers.
    """
    recipe, view = learner.recipe, view or View()
    k, m = recipe.sampler.samples_per_problem, recipe.sampler.tries
    a_step = k * recipe.sampler.problems_per_step
    k = min(m, TRIED) if m else k
    started = time.perf_counter()
    with view.phase("preflight", len(problems) * k) as on_done:
        drawn = draw_and_score(
            learner,
            sampler,
            grader,
            problems,
            samples=k,
            step=PREFLIGHT_STEP,
            policy_step=learner.state.policy_step,
            on_done=on_done,
        )
    seconds, error = time.perf_counter() - started, drawn.grader_error
    groups = weigh(drawn.groups, weighting=recipe.em.weighting, baseline=recipe.em.baseline)
    record = estep_metrics(groups)
    if graded_failures(record) > FAILURES_STOP:
        raise GraderUnusable(
            f"the grader failed on {graded_failures(record):.0%} of the answers",
            f"reward {recipe.data.reward}",
            error or "test one with `empg-lite grade`",
        )
    rows = flatten(groups)
    learner.make_room(sampler)
    fit = _seconds_to_fit(learner, rows) * recipe.em.passes
    slots = outlook(groups, m) if m else None
    if slots:
        record |= {"em/finished": len(groups), "em/given_up": round((1 - slots.solved) * len(groups))}
        fit *= slots.right / record["reward"] if record["reward"] else 0.0
    step = (seconds + fit) * a_step / len(rows)
    return Preflight(
        problems=len(problems),
        rationales=len(rows),
        reward=record["reward"],
        truncated=record["completions/clipped_ratio"],
        signal=1.0 - record["em/frac_all_wrong"],
        mixed=record["em/frac_mixed"],
        mean_length=record["completions/mean_length"],
        tokens_per_second=sum(len(r.completion_ids) for r in rows) / seconds,
        seconds_a_step=step,
        minutes=step * recipe.run.steps / 60,
        findings=diagnose(record, rows=len(rows), max_new_tokens=recipe.sampler.max_new_tokens, error=error),
        outlook=slots,
        groups=groups,
    )


def preflight_recipe(recipe: Recipe, grader: Grader, view: View | None = None) -> Preflight:
    """Load a recipe's model and run the preflight that ``train`` runs.

    Raises:
        EmpgError: model or data are unusable.
    """
    recipe = recipe.resolved()
    splits = load_splits(recipe)
    learner = build_learner(recipe)
    problems, _ = learner.short_enough(splits.train)
    return preflight(learner, learner.sampler(), grader, first_problems(problems, recipe.run.seed), view)


def first_problems(problems: Sequence[Problem], seed: int) -> list[Problem]:
    """The problems a preflight samples: the first ones training takes."""
    return ProblemStream(problems, seed).take(0, min(PROBLEMS, len(problems)))


def _seconds_to_fit(learner: Learner, rows: Sequence[Rationale]) -> float:
    """Time of one pass over the rows with a learning rate of 0; nothing is moved."""
    frozen = torch.optim.SGD(list(learner.policy.trainable().values()), lr=0.0)
    settings = replace(learner.fit_settings(), learning_rate=0.0, passes=1)
    started = time.perf_counter()
    m_step(learner.policy, frozen, rows, settings, world=learner.world)
    return time.perf_counter() - started


def refuse_hopeless(found: Preflight, where: str) -> None:
    """Stop before the first step.

    Raises:
        NoSignal: nothing can be learned with these settings.
    """
    if found.hopeless is not None:
        finding = found.hopeless
        raise NoSignal(finding.what, where, f"{finding.todo}; --force trains anyway")
