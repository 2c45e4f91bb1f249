"""Accuracy, honestly: greedy pass@1 with its interval, and what sampling adds.

A truncated answer is wrong. The same prompt and decoding serve base and tuned model.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from empg_lite.data import load_problems, subset
from empg_lite.estep import sample_rationales, score
from empg_lite.learner import build_learner
from empg_lite.metrics import View
from empg_lite.policy.policy import Policy
from empg_lite.rationale import Problem, Rationale
from empg_lite.rewards import Grader, UserCode
from empg_lite.sampler import Decoding, Sampler
from empg_lite.target import Target

#: E-step number of evaluation draws: the same random numbers every time, never those of training.
EVAL_STEP = -1
Z_95 = 1.959963984540054  # two-sided 95% quantile of the normal distribution


@dataclass(frozen=True, slots=True)
class Evaluation:
    """Results on n problems. Rates are fractions; lengths are tokens, the stop included.

    Attributes:
        greedy: one rationale for each problem.
        sampled: k at temperature 1 for each problem, problem by problem; may be empty.
    """

    greedy: tuple[Rationale, ...]
    sampled: tuple[tuple[Rationale, ...], ...] = ()

    @property
    def accuracy(self) -> float:
        """Greedy pass@1: mean reward."""
        return sum(r.reward or 0.0 for r in self.greedy) / len(self.greedy)

    def summary(self) -> dict[str, Any]:
        """The figures as ``eval --json`` prints them."""
        n = len(self.greedy)
        low, high = wilson(self.accuracy * n, n)
        result: dict[str, Any] = {
            "n": n,
            "pass@1": self.accuracy,
            "pass@1_ci95": [low, high],
            "mean_length": sum(len(r.completion_ids) for r in self.greedy) / n,
            "truncated": sum(r.finish_reason == "length" for r in self.greedy) / n,
            "grader_failures": sum(r.failed for r in self.greedy),
        }
        if self.sampled:
            k = len(self.sampled[0])
            result["t1_accuracy"] = sum(r.reward or 0.0 for rows in self.sampled for r in rows) / (n * k)
            if k > 1:
                right = [sum((r.reward or 0.0) == 1.0 for r in rows) for rows in self.sampled]
                result[f"pass@{k}"] = sum(pass_at_k(k, c, k) for c in right) / n
                result[f"maj@{k}"] = sum(majority_reward(rows) for rows in self.sampled) / n
        return result


def evaluate(
    policy: Policy,
    sampler: Sampler,
    grader: Grader,
    problems: Sequence[Problem],
    *,
    reward: str,
    max_new_tokens: int,
    samples: int = 0,
    seed: int = 0,
    view: View | None = None,
    label: str = "evaluating",
) -> Evaluation:
    """Answer every problem greedily and, with ``samples`` = k > 0, also k times at temperature 1."""
    assert problems, "nothing to evaluate on"
    view = view or View()

    def answer(decoding: Decoding, k: int) -> list[Rationale]:
        with view.phase(label, len(problems) * k) as on_done:
            draw = sample_rationales(
                policy,
                sampler,
                problems,
                decoding,
                samples=k,
                seed=seed,
                step=EVAL_STEP,
                policy_step=0,
                on_done=on_done,
            )
        return score([r for g in draw.groups for r in g.rationales], grader, reward)

    greedy = answer(Decoding(max_new_tokens, temperature=0.0), 1)
    sampled: list[tuple[Rationale, ...]] = []
    if samples:
        rows = answer(Decoding(max_new_tokens), samples)
        sampled = [tuple(rows[i : i + samples]) for i in range(0, len(rows), samples)]
    return Evaluation(tuple(greedy), tuple(sampled))


def evaluate_target(
    target: Target,
    *,
    split: str | None = None,
    limit: int | None = None,
    k: int = 0,
    base: bool = False,
    view: View | None = None,
    code: UserCode | None = None,
) -> dict[str, Any]:
    """Load a model and evaluate it, with ``base`` also with its adapter off: the same in all else.

    Returns:
        ``split`` and the figures of ``Evaluation.summary``; with ``base`` also an object ``base`` of them.

    Raises:
        EmpgError: model or data are unusable.
    """
    recipe = target.recipe
    problems = subset(
        load_problems(recipe.data, split or recipe.data.eval_split), limit or recipe.run.eval_limit
    )
    learner = build_learner(recipe)
    sampler = learner.sampler()

    def run(label: str) -> Evaluation:
        return evaluate(
            learner.policy,
            sampler,
            grader,
            problems,
            reward=str(recipe.data.reward),
            max_new_tokens=recipe.sampler.max_new_tokens,
            samples=k,
            seed=recipe.run.seed,
            view=view,
            label=label,
        )

    with Grader(code=code) as grader:
        result = {"split": split or recipe.data.eval_split, **run("tuned").summary()}
        if base:
            with learner.policy.reference():
                result["base"] = run("base").summary()
    return result


def wilson(successes: float, n: int, z: float = Z_95) -> tuple[float, float]:
    """Wilson score interval of a proportion (JASA 1927): sound near 0 and 1, where accuracy often is."""
    assert n > 0 and 0 <= successes <= n
    p = successes / n
    centre = (p + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    return max(0.0, centre - half), min(1.0, centre + half)


def pass_at_k(n: int, right: int, k: int) -> float:
    """Chance that k of n samples, drawn without replacement, hold a right one (Chen et al. 2021, eq. 1)."""
    assert 0 <= right <= n and 1 <= k <= n
    return 1.0 - math.comb(n - right, k) / math.comb(n, k)


def majority_reward(rows: Sequence[Rationale]) -> float:
    """Reward of the answer given most often (the first given among equals); 0 where none was read."""
    answers = [r.extracted for r in rows if r.extracted is not None and r.finish_reason == "stop"]
    if not answers:
        return 0.0
    winner = Counter(answers).most_common(1)[0][0]
    return next(r.reward or 0.0 for r in rows if r.extracted == winner)
