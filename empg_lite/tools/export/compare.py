"""Does what was written act like what was trained? Asked on the run's own prompts and answers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from empg_lite.core.errors import MissingInput
from empg_lite.core.rationale import Problem, Rationale, flatten
from empg_lite.loop.estep import sample_rationales
from empg_lite.loop.learner import Learner
from empg_lite.policy.policy import Policy
from empg_lite.rewards import Grader
from empg_lite.rewards.scorer import score
from empg_lite.run.rollouts import read_rollouts
from empg_lite.sampler import Decoding, make_sampler

#: Tokens that are compared at least, where the run has them; prompts that are answered greedily.
TOKENS, PROMPTS = 1000, 16
#: E-step number of the greedy answers; greedy draws nothing.
EXPORT_STEP = -3


@dataclass(frozen=True, slots=True)
class Evidence:
    """What a model does.

    Attributes:
        choices: the most likely next token at each place of the rows, ``(n,)``.
        answers: greedy answers to the problems, graded.
    """

    choices: Tensor
    answers: tuple[Rationale, ...]


@dataclass(frozen=True, slots=True)
class Agreement:
    """Two models on the same rows.

    Attributes:
        tokens: places compared.
        argmax: share of them where both put the same token first.
        greedy: share of the prompts answered with the same tokens.
        reward, reward_adapter: mean reward of the answers: of the export, of the adapter.
    """

    tokens: int
    argmax: float
    prompts: int
    greedy: float
    reward: float
    reward_adapter: float

    def facts(self) -> dict[str, float | int]:
        """For JSON and for model cards."""
        return {
            "compared_tokens": self.tokens,
            "argmax_agreement": self.argmax,
            "compared_prompts": self.prompts,
            "greedy_agreement": self.greedy,
            "reward": self.reward,
            "reward_adapter": self.reward_adapter,
        }


def stored_answers(run: Path) -> list[Rationale]:
    """Rationales of a run to compare on: its last evaluation's answers, then its last steps' samples.

    Raises:
        MissingInput: the run stored none.
    """
    rows: list[Rationale] = []
    after, steps = run / "eval" / "after" / "greedy.jsonl", sorted((run / "rollouts").glob("step-*.jsonl"))
    for path in [after, *reversed(steps)]:
        if path.is_file() and sum(len(r.completion_ids) for r in rows) < TOKENS:
            rows += [r for segment in read_rollouts(path, torn_tail=True) for r in segment.rationales]
    if not rows:
        raise MissingInput("the run has no rationales to compare on", str(run), "let it train a step first")
    return rows


def enough(rows: Sequence[Rationale]) -> list[Rationale]:
    """The first rows that together have ``TOKENS`` completion tokens."""
    chosen: list[Rationale] = []
    while len(chosen) < len(rows) and sum(len(r.completion_ids) for r in chosen) < TOKENS:
        chosen.append(rows[len(chosen)])
    return chosen


def problems_of(rows: Sequence[Rationale]) -> list[Problem]:
    """Up to ``PROMPTS`` different problems of the rows."""
    found = {r.problem_id: Problem(r.problem_id, r.question, r.gold, r.meta) for r in rows if r.question}
    return list(found.values())[:PROMPTS]


def evidence(learner: Learner, policy: Policy, rows: Sequence[Rationale], grader: Grader) -> Evidence:
    """What ``policy`` does on the rows and their problems; ``learner`` says how it is asked."""
    recipe = learner.recipe
    with policy.sampling():
        choices = torch.cat([_choices(policy, r) for r in enough(rows)])
        sampler = make_sampler(policy, "native", PROMPTS, False)
        drawn = sample_rationales(
            policy,
            sampler,
            problems_of(rows),
            Decoding(recipe.sampler.max_new_tokens, temperature=0.0),
            samples=1,
            seed=0,
            step=EXPORT_STEP,
            policy_step=0,
        )
    return Evidence(choices, tuple(score(flatten(drawn.groups), grader, str(recipe.data.reward))))


def _choices(policy: Policy, r: Rationale) -> Tensor:
    """The most likely token at each place of a completion, ``(T_completion,)``, from the whole row."""
    ids = torch.tensor([[*r.prompt_ids, *r.completion_ids]], device=policy.device)
    logits = policy.causal(input_ids=ids, use_cache=False).logits[0]
    start = len(r.prompt_ids) - 1
    return logits[start : start + len(r.completion_ids)].argmax(-1).cpu()


def agreement(adapter: Evidence, export: Evidence) -> Agreement:
    """How far two models agree; both were asked the same."""
    assert adapter.choices.shape == export.choices.shape and len(adapter.answers) == len(export.answers)
    pairs = list(zip(adapter.answers, export.answers, strict=True))
    return Agreement(
        tokens=len(adapter.choices),
        argmax=float((adapter.choices == export.choices).double().mean()),
        prompts=len(pairs),
        greedy=sum(a.completion_ids == b.completion_ids for a, b in pairs) / max(1, len(pairs)),
        reward=_mean_reward(export.answers),
        reward_adapter=_mean_reward(adapter.answers),
    )


def _mean_reward(rows: Sequence[Rationale]) -> float:
    return sum(r.reward or 0.0 for r in rows) / max(1, len(rows))
