"""E-step: sample rationales from the policy and weigh them; ``scoring`` grades them between. No gradients.

q(z|x) is proportional to pi_old(z|x) R(x, z); on samples of pi_old it is the weight alone. Each of the
three is usable without the others: that is what ``sample``, ``score`` and ``fit`` do.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from empg_lite.core.rationale import FAILURES, Group, Problem, Rationale, flatten
from empg_lite.em import effective_sample_size, em_weights, group_signal
from empg_lite.policy.policy import Policy
from empg_lite.sampler import Completion, Decoding, OnToken, Prompt, Sampler, sample_key


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
    on_rationale: Callable[[Rationale], None] | None = None,
    on_token: OnToken | None = None,
) -> Draw:
    """Draw K = ``samples`` rationales for each of P problems.

    Args:
        step: the E-step; with ``seed``, the problem and the sample's index it keys the random numbers.
        policy_step: optimiser steps the policy has seen; goes into the record.
        on_rationale: told of each rationale as soon as it has ended, in that order.
        on_token: told of each rationale's tokens as they are drawn.
    """
    prompts, texts = [], []
    for problem in problems:
        text, ids = policy.encode_prompt(problem.question)
        keys = tuple(sample_key(seed, step, problem.id, k) for k in range(samples))
        texts.append(text)
        prompts.append(Prompt(ids, keys))
    rationales: dict[tuple[int, int], Rationale] = {}

    def on_completion(i: int, k: int, c: Completion) -> None:
        problem = problems[i]
        rationales[i, k] = r = Rationale(
            problem_id=problem.id,
            question=problem.question,
            gold=problem.gold,
            prompt=texts[i],
            prompt_ids=prompts[i].ids,
            completion=c.text,
            completion_ids=c.ids,
            finish_reason=c.finish_reason,
            step=step,
            policy_step=policy_step,
            sample_index=k,
            meta=problem.meta,
        )
        if on_rationale:
            on_rationale(r)

    drawn = sampler.sample(prompts, decoding, on_completion, on_token)
    groups = tuple(
        Group(problem.id, step, tuple(rationales[i, k] for k in range(samples)))
        for i, problem in enumerate(problems)
    )
    logprobs = [x for completions in drawn for c in completions for x in c.logprobs]
    return Draw(groups, -sum(logprobs) / max(len(logprobs), 1))


def by_group(groups: Sequence[Group], rows: Sequence[Rationale]) -> list[list[Rationale]]:
    """The rows of flattened groups, graded since, cut into the groups again."""
    left = iter(rows)
    return [[next(left) for _ in group.rationales] for group in groups]


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
    groups: Sequence[Group],
    *,
    weighting: str,
    baseline: float = 0.0,
    current_step: int | None = None,
    max_age: int | None = None,
) -> tuple[Group, ...]:
    """Give every rationale its weight. Negative ones are dropped in groups whose policy has since moved on.

    Args:
        current_step: optimiser steps the policy about to be fitted has seen; None for fresh samples.
        max_age: groups with a rationale older than so many optimiser steps weigh 0; None is no limit. Text
            from elsewhere has no age.
    """
    if not groups:
        return ()
    rewards, valid = reward_matrix(groups)
    weights = em_weights(rewards, valid, weighting=weighting, baseline=baseline)  # (P, K)
    fresh_only = em_weights(rewards, valid, weighting=weighting, baseline=baseline, drop_negative=True)
    weighed = []
    for p, group in enumerate(groups):
        age = 0 if current_step is None else max(abs(current_step - r.policy_step) for r in group.rationales)
        row = (fresh_only if age else weights)[p].tolist()
        if max_age is not None and age > max_age and group.rationales[0].policy_step >= 0:
            row = [0.0] * len(row)
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
    texts = {(r.problem_id, r.completion) for r in rows if r.reward and not r.failed}
    reasons = Counter(r.reason for r in rows)
    signal = group_signal(rewards, valid)
    return {
        "reward": float(graded.mean()) if len(graded) else 0.0,
        "reward_std": float(graded.std()) if len(graded) > 1 else 0.0,
        "frac_reward_zero_std": signal.pop("frac_reward_zero_std"),
        **{f"em/{name}": value for name, value in signal.items()},
        "em/frac_wrong_paid": _wrong_paid(groups),
        "completions/mean_length": sum(lengths) / len(lengths),
        "completions/mean_length_right": sum(right) / len(right) if right else 0.0,
        "completions/distinct_right": len(texts) / len(right) if right else 0.0,
        "completions/clipped_ratio": reasons["truncated"] / len(rows),
        **{f"reasons/{name}": reasons[name] / len(rows) for name in sorted(filter(None, reasons))},
        "reasons/failed": sum(reasons[name] for name in FAILURES) / len(rows),
    }


def _wrong_paid(groups: Sequence[Group]) -> float:
    """Share of the problems where no answer is right and rewards differ all the same: shaping gone wrong."""
    wrong = [[r for r in g.rationales if not r.failed] for g in groups]
    paid = [rows for rows in wrong if not any(r.correct for r in rows) and len({r.reward for r in rows}) > 1]
    return len(paid) / len(groups)


def mixture_metrics(rows: Sequence[Rationale], policy_step: int) -> dict[str, float]:
    """What a step fits: where its rows come from, how old they are, how few of them carry it.

    An age is the number of optimiser steps between the policy that drew a row and the one about to be fitted,
    which has seen ``policy_step`` of them. It is known where the row's own ``policy_step`` is 0 or more.

    Args:
        rows: at least one, weighed.
    """
    ages = [abs(policy_step - r.policy_step) for r in rows if r.policy_step >= 0]
    origins = Counter(r.origin for r in rows)
    return {
        "em/weight_max": max(abs(r.weight or 0.0) for r in rows),
        "em/ess": effective_sample_size(torch.tensor([r.weight for r in rows if not r.failed])),
        "em/frac_text": origins["text"] / len(rows),
        "em/frac_stale": sum(age > 0 for age in ages) / len(rows),
        "em/staleness": sum(ages) / len(ages) if ages else 0.0,
        "em/staleness_max": float(max(ages, default=0)),
    }
