"""The step that the speed benchmarks take: problems, lengths, rewards, and our own way through it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from forced import draw_lengths, forced_draws

from empg_lite.core.rationale import Problem, Rationale, flatten, group_rationales
from empg_lite.data.sources import load_splits
from empg_lite.loop.estep import sample_rationales, weigh
from empg_lite.loop.learner import Learner, build_learner
from empg_lite.policy.policy import Policy
from empg_lite.recipe.file import load_recipe
from empg_lite.rewards import Grader
from empg_lite.rewards.scorer import Scorer
from empg_lite.sampler import Prompt, Sampler, sample_key


@dataclass(frozen=True)
class Setting:
    """One step's work, the same for all rivals.

    Attributes:
        lengths: completion length of each row, problem by problem, K rows each.
        plain_id: a token that stops nothing, for the place of an end token drawn too early.
    """

    problems: tuple[Problem, ...]
    samples: int
    max_new_tokens: int
    lengths: tuple[int, ...]
    plain_id: int

    @property
    def rows(self) -> int:
        """P x K."""
        return len(self.problems) * self.samples

    @property
    def tokens(self) -> int:
        """Completion tokens of a step."""
        return sum(self.lengths)

    def rewards(self, silent: bool) -> list[float]:
        """One a row: 1 and 1/2 in turn; with ``silent`` every other problem has 0 in all of its rows."""
        k = self.samples
        return [0.0 if silent and i // k % 2 else (1.0, 0.5)[i % 2] for i in range(self.rows)]


def tiny_recipe(*overrides: str):  # type: ignore[no-untyped-def]
    """The demo's recipe with everything filled in."""
    return load_recipe("tiny", overrides, seed=0).resolved()


def tiny_learner(*overrides: str, disturb: float = 0.02) -> Learner:
    """The bundled model with a LoRA that is not zero: an adapter left out would be seen."""
    learner = build_learner(tiny_recipe(*overrides))
    disturb_adapter(learner.policy, disturb)
    return learner


def disturb_adapter(policy: Policy, scale: float) -> None:
    """Move every LoRA weight by ``scale`` times a normal number, from a fixed seed."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in policy.trainable().values():
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.add_(scale * noise.to(parameter))


def tiny_setting(learner: Learner, *, problems: int = 16, samples: int = 8, mean: float = 36.0) -> Setting:
    """The demo's first problems; lengths of mean ``mean`` and at most the recipe's ``max_new_tokens``."""
    cap = learner.recipe.sampler.max_new_tokens
    rows = load_splits(learner.recipe).train[:problems]
    return Setting(
        tuple(rows),
        samples,
        cap,
        tuple(draw_lengths(problems * samples, mean=mean, cap=cap)),
        plain_id=learner.policy.tokenizer.encode(" is", add_special_tokens=False)[0],
    )


def prompts_of(policy: Policy, setting: Setting, step: int = 1) -> list[Prompt]:
    """The prompts with the random keys that ``sample_rationales`` gives them at ``step``."""
    return [
        Prompt(
            policy.encode_prompt(p.question)[1],
            tuple(sample_key(0, step, p.id, k) for k in range(setting.samples)),
        )
        for p in setting.problems
    ]


def ends_of(prompts: Sequence[Prompt], setting: Setting) -> dict[int, int]:
    """Length of each row by its random key."""
    return dict(zip((key for p in prompts for key in p.keys), setting.lengths, strict=True))


def sample(learner: Learner, sampler: Sampler, setting: Setting, step: int = 1) -> tuple[Rationale, ...]:
    """One E-step's rationales, their lengths forced; in the order of ``setting.lengths``."""
    policy = learner.policy
    ends = ends_of(prompts_of(policy, setting, step), setting)
    stop, others = policy.tokenizer.eos_token_id, policy.stop_ids
    with forced_draws(ends, stop, setting.plain_id, policy.device, others):
        drawn = sample_rationales(
            policy, sampler, setting.problems, learner.decoding,
            samples=setting.samples, seed=0, step=step, policy_step=0,
        )  # fmt: skip
    return flatten(drawn.groups)


def weighed(rationales: Sequence[Rationale], rewards: Sequence[float]) -> tuple[Rationale, ...]:
    """The rationales with these rewards, and the default weighting's weights."""
    rewarded = [
        replace(r, reward=reward, reason="equal" if reward else "different")
        for r, reward in zip(rationales, rewards, strict=True)
    ]
    return flatten(weigh(group_rationales(rewarded), weighting="posterior"))


class OurStep:
    """Sample, score, weigh, fit, with the engine and the memory settings that ``train`` would take.

    Answers are graded as in training, then the table's rewards are put in.
    """

    def __init__(self, learner: Learner, setting: Setting, grader: Grader, *, silent: bool) -> None:
        self.learner, self.setting, self.grader = learner, setting, grader
        self.rewards = setting.rewards(silent)
        self.sampler = learner.sampler()
        self.tokens = 0  # completion tokens of the last step

    def step(self) -> None:
        """One whole step."""
        self.fit(self.sample())

    def sample(self) -> tuple[Rationale, ...]:
        """The E-step: weighed rationales, and the sampler's memory given back where the plan says so."""
        learner = self.learner
        rationales = sample(learner, self.sampler, self.setting, learner.state.policy_step + 1)
        rationales = tuple(Scorer(self.grader, str(learner.recipe.data.reward)).scored(rationales))
        self.tokens = sum(len(r.completion_ids) for r in rationales)
        if not learner.planned.keeps_sampler:
            self.sampler.release()
        return weighed(rationales, self.rewards)

    def fit(self, rationales: Sequence[Rationale]) -> None:
        """The M-step."""
        self.learner.fit(rationales)
