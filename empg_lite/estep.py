"""E-step: sample rationales from the policy, score them, weigh them. No gradients.

q(z|x) is proportional to pi_old(z|x) R(x, z); on samples of pi_old it is the weight alone. Each of the
three functions is usable without the others: that is what ``sample``, ``score`` and ``fit`` do.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from empg_lite.em import effective_sample_size, em_weights, group_signal
from empg_lite.policy.policy import Policy
from empg_lite.rationale import FAILURES, Group, Problem, Rationale, flatten
from empg_lite.rewards import Case, Grader
from empg_lite.sampler import Completion, Decoding, Prompt, Sampler, sample_key
from empg_lite.sampler.base import StepDone

#: What identifies a completion for the purpose of not grading it twice.
VerdictKey = tuple[str, str]


@dataclass(frozen=True, slots=True)
class Draw:
    """What sampling gives: groups without rewards, and the sampled tokens' mean surprise.

    ``entropy`` (nats a token) is -mean log pi of the tokens drawn: at temperature 1 an unbiased estimate of
    the policy's token entropy.
    """

    groups: tuple[Group, ...]
    entropy: float


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
    on_done: StepDone | None = None,
) -> Draw:
    """Draw K = ``samples`` rationales for each of P problems.

    Args:
        step: the E-step; with ``seed``, the problem and the sample's index it keys the random numbers.
        policy_step: optimiser steps the policy has seen; goes into the record.
    """
    prompts, encoded = [], []
    for problem in problems:
        text, ids = policy.encode_prompt(problem.question)
        keys = tuple(sample_key(seed, step, problem.id, k) for k in range(samples))
        encoded.append((text, ids))
        prompts.append(Prompt(ids, keys))
    drawn = sampler.sample(prompts, decoding, on_done)

    def rationale(problem: Problem, prompt: tuple[str, tuple[int, ...]], k: int, c: Completion) -> Rationale:
        return Rationale(
            problem_id=problem.id,
            question=problem.question,
            gold=problem.gold,
            prompt=prompt[0],
            prompt_ids=prompt[1],
            completion=c.text,
            completion_ids=c.ids,
            finish_reason=c.finish_reason,
            step=step,
            policy_step=policy_step,
            sample_index=k,
            meta=problem.meta,
        )

    groups = tuple(
        Group(problem.id, step, tuple(rationale(problem, prompt, k, c) for k, c in enumerate(completions)))
        for problem, prompt, completions in zip(problems, encoded, drawn, strict=True)
    )
    logprobs = [x for completions in drawn for c in completions for x in c.logprobs]
    return Draw(groups, -sum(logprobs) / max(len(logprobs), 1))


def score(
    rationales: Sequence[Rationale],
    grader: Grader,
    reward: str,
    known: Mapping[VerdictKey, Rationale] | None = None,
) -> list[Rationale]:
    """Grade rationales; a truncated one is wrong without being read.

    Args:
        reward: the reward's name, as in a recipe's ``data.reward``.
        known: verdicts given before, by (problem id, completion): they are not given again.

    Raises:
        GraderUnusable: the grader cannot start.
    """
    known = known or {}
    scored: list[Rationale | None] = [None] * len(rationales)
    asked: list[int] = []
    for i, r in enumerate(rationales):
        before = known.get((r.problem_id, r.completion))
        if r.finish_reason == "length":
            scored[i] = replace(r, reward=0.0, reason="truncated", extracted=None, rule=None, terms={})
        elif before is not None and not before.failed and before.finish_reason == "stop":
            scored[i] = replace(
                r,
                reward=before.reward,
                reason=before.reason,
                extracted=before.extracted,
                rule=before.rule,
                terms=before.terms,
            )
        else:
            asked.append(i)
    items = [Case(r.gold, r.completion, r.question or None, r.meta) for r in (rationales[i] for i in asked)]
    for i, v in zip(asked, grader.grade_many(reward, items), strict=True):
        scored[i] = replace(
            rationales[i],
            reward=v.reward,
            reason=v.reason,
            extracted=v.extracted,
            rule=v.rule,
            terms=v.terms,
        )
    return [r for r in scored if r is not None]


def reward_matrix(groups: Sequence[Group]) -> tuple[Tensor, Tensor]:
    """Rewards ``(P, K)`` float64 and ``valid`` ``(P, K)`` bool.

    K is that of the largest group; places beyond a smaller one and grader failures are not valid.
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
    groups: Sequence[Group], *, weighting: str, baseline: float = 0.0, current_step: int | None = None
) -> tuple[Group, ...]:
    """Give every rationale its weight. Negative ones are dropped in groups whose policy has since moved on.

    Args:
        current_step: optimiser steps the policy about to be fitted has seen; None for fresh samples.
    """
    rewards, valid = reward_matrix(groups)
    weights = em_weights(rewards, valid, weighting=weighting, baseline=baseline)  # (P, K)
    fresh_only = em_weights(rewards, valid, weighting=weighting, baseline=baseline, drop_negative=True)
    weighed = []
    for p, group in enumerate(groups):
        stale = current_step is not None and any(r.policy_step != current_step for r in group.rationales)
        row = (fresh_only if stale else weights)[p].tolist()
        rationales = tuple(replace(r, weight=row[k]) for k, r in enumerate(group.rationales))
        weighed.append(Group(group.problem_id, group.step, rationales))
    return tuple(weighed)


def estep_metrics(groups: Sequence[Group]) -> dict[str, float]:
    """What the samples of a step say: rewards, signal, lengths, grader failures.

    Means of rewards leave grader failures out; lengths are in tokens, stops included.
    """
    rows = flatten(groups)
    rewards, valid = reward_matrix(groups)
    graded = rewards[valid]
    lengths = [len(r.completion_ids) for r in rows]
    right = [n for r, n in zip(rows, lengths, strict=True) if r.reward and not r.failed]
    reasons = Counter(r.reason for r in rows)
    signal = group_signal(rewards, valid)
    return {
        "reward": float(graded.mean()) if len(graded) else 0.0,
        "reward_std": float(graded.std()) if len(graded) > 1 else 0.0,
        "frac_reward_zero_std": signal.pop("frac_reward_zero_std"),
        **{f"em/{name}": value for name, value in signal.items()},
        "em/ess": effective_sample_size(torch.tensor([r.weight for r in rows if not r.failed])),
        "completions/mean_length": sum(lengths) / len(lengths),
        "completions/mean_length_right": sum(right) / len(right) if right else 0.0,
        "completions/clipped_ratio": reasons["truncated"] / len(rows),
        **{f"reasons/{name}": count / len(rows) for name, count in sorted(reasons.items()) if name},
        "reasons/failed": sum(reasons[name] for name in FAILURES) / len(rows),
    }
