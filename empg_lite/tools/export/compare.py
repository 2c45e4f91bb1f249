"""Does an export behave like the adapter it was made from? Tested on the run's own prompts and answers."""

from __future__ import annotations

import gc
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from empg_lite.core.errors import CheckFailed, MissingInput, UsageError
from empg_lite.core.rationale import Problem, Rationale, flatten
from empg_lite.core.view import View
from empg_lite.loop.estep import sample_rationales
from empg_lite.loop.learner import Learner, build_learner
from empg_lite.loop.recorder import read_figures
from empg_lite.policy import load_policy
from empg_lite.policy.card import Provenance
from empg_lite.rewards.scorer import score
from empg_lite.run import store
from empg_lite.run.rollouts import read_rollouts
from empg_lite.sampler import Decoding, make_sampler

if TYPE_CHECKING:
    from empg_lite.policy.policy import Policy
    from empg_lite.rewards import Grader
    from empg_lite.run.target import Target

#: Share of the positions at which an export must choose the adapter's token.
THRESHOLD = 0.99
#: Completion tokens to compare, if the run has that many; prompts to answer greedily.
TOKENS, PROMPTS = 1000, 16
#: E-step number of the greedy answers; greedy decoding uses no random numbers.
EXPORT_STEP = -3


@dataclass(frozen=True, slots=True)
class Evidence:
    """How a model behaves.

    Attributes:
        choices: the most likely next token at each completion position, ``(n,)``.
        answers: graded greedy answers to the problems.
    """

    choices: Tensor
    answers: tuple[Rationale, ...]


@dataclass(frozen=True, slots=True)
class Agreement:
    """Two models on the same rows; the names are those of the JSON result and of the model card.

    Attributes:
        argmax_agreement: share of the positions at which both rank the same token first.
        greedy_agreement: share of the prompts that both answer with the same tokens.
        reward, reward_adapter: mean reward of the greedy answers.
    """

    compared_tokens: int
    argmax_agreement: float
    compared_prompts: int
    greedy_agreement: float
    reward: float
    reward_adapter: float


@dataclass(slots=True)
class Export:
    """A loaded run and where its export goes; ``evidence`` is the behavior of its own adapter."""

    target: Target
    out: Path
    grader: Grader
    view: View
    learner: Learner
    rows: list[Rationale]
    problems: list[Problem]
    evidence: Evidence
    provenance: Provenance

    def reload(self, section: Any) -> Policy:
        """Load what was written; the trained policy is released first, as two models may not fit."""
        self.release()
        prompt = str(self.learner.recipe.data.prompt)
        return load_policy(section, prompt, seed=0, gradient_checkpointing=False)

    def release(self) -> None:
        """Free the trained policy."""
        self.learner.policy = self.learner.optimizer = None  # type: ignore[assignment]
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()

    def compare(self, policy: Policy) -> Agreement:
        """How far ``policy`` agrees with the run's adapter."""
        adapter, export = self.evidence, collect(self.learner, policy, self.rows, self.problems, self.grader)
        assert adapter.choices.shape == export.choices.shape
        pairs = list(zip(adapter.answers, export.answers, strict=True))
        return Agreement(
            compared_tokens=len(adapter.choices),
            argmax_agreement=float((adapter.choices == export.choices).double().mean()),
            compared_prompts=len(pairs),
            greedy_agreement=sum(a.completion_ids == b.completion_ids for a, b in pairs) / max(1, len(pairs)),
            reward=_mean_reward(export.answers),
            reward_adapter=_mean_reward(adapter.answers),
        )

    def require(self, share: float, tokens: int, threshold: float, what: str, todo: str) -> None:
        """Raise CheckFailed, so that nothing is published, if too few positions agree."""
        if share < threshold:
            raise CheckFailed(
                f"the {what} chooses the adapter's top token at {share:.2%} of {tokens} positions, "
                f"{threshold:.0%} required; nothing was written",
                str(self.out),
                todo,
            )

    def result(self, facts: Mapping[str, Any]) -> dict[str, Any]:
        """What ``export`` returns once the folder is published: its path, its size and ``facts``."""
        size = sum(p.stat().st_size for p in self.out.iterdir())
        return {"export": str(self.out), "bytes": size, **facts}


def begin(target: Target, out: Path, grader: Grader, view: View | None) -> Export:
    """Load the run and record how it behaves, before anything is written.

    Raises:
        UsageError: ``out`` exists.
        MissingInput: the run stored no rationales.
    """
    view = view or View()
    if out.exists():
        raise UsageError("it already exists", str(out), "choose another --out, or move it away")
    assert target.run is not None
    stored = stored_answers(target.run)
    rows, problems = enough(stored), problems_of(stored)
    learner = build_learner(target.recipe)
    view.note(f"sampling from {target.label}: {sum(len(r.completion_ids) for r in rows)} tokens to compare")
    evidence = collect(learner, learner.policy, rows, problems, grader)
    before = read_figures(target.run, "before")
    after = read_figures(target.run, "after") if target.label.endswith("/adapter") else None
    provenance = Provenance(learner.recipe, learner.policy.revision, after, before)
    return Export(target, out, grader, view, learner, rows, problems, evidence, provenance)


def write_files(folder: Path, files: Mapping[str, bytes]) -> None:
    """Write files by name."""
    for name, data in files.items():
        store.write_file(folder / name, data)


# --- evidence -----------------------------------------------------------------------------------------


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
        raise MissingInput(
            "the run has no rationales to compare on", str(run), "train at least one step first"
        )
    return rows


def enough(rows: Sequence[Rationale]) -> list[Rationale]:
    """The first rows that together have ``TOKENS`` completion tokens."""
    chosen: list[Rationale] = []
    while len(chosen) < len(rows) and sum(len(r.completion_ids) for r in chosen) < TOKENS:
        chosen.append(rows[len(chosen)])
    return chosen


def problems_of(rows: Sequence[Rationale]) -> list[Problem]:
    """Up to ``PROMPTS`` distinct problems of the rows."""
    found = {r.problem_id: Problem(r.problem_id, r.question, r.gold, r.meta) for r in rows if r.question}
    return list(found.values())[:PROMPTS]


def collect(
    learner: Learner,
    policy: Policy,
    rows: Sequence[Rationale],
    problems: Sequence[Problem],
    grader: Grader,
) -> Evidence:
    """How ``policy`` behaves, under the prompt, decoding and reward of ``learner``'s recipe."""
    recipe = learner.recipe
    with policy.sampling():
        choices = torch.cat([_choices(policy, r) for r in rows])
        drawn = sample_rationales(
            policy,
            make_sampler(policy, "native", PROMPTS, False),
            problems,
            Decoding(recipe.sampler.max_new_tokens, temperature=0.0),
            samples=1,
            seed=0,
            step=EXPORT_STEP,
            policy_step=0,
        )
    return Evidence(choices, tuple(score(flatten(drawn.groups), grader, str(recipe.data.reward))))


def _choices(policy: Policy, r: Rationale) -> Tensor:
    """The most likely token at each position of a completion, ``(T_completion,)``, in one forward pass."""
    ids = torch.tensor([[*r.prompt_ids, *r.completion_ids]], device=policy.device)
    logits = policy.causal(input_ids=ids, use_cache=False).logits[0]
    start = len(r.prompt_ids) - 1
    return logits[start : start + len(r.completion_ids)].argmax(-1).cpu()


def _mean_reward(rows: Sequence[Rationale]) -> float:
    return sum(r.reward or 0.0 for r in rows) / max(1, len(rows))
