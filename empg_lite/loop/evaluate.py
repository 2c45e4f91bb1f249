"""Evaluation: greedy pass@1 with its interval, and pass@k and maj@k from samples.

Base and tuned model get the same problems, prompt and decoding. Answers are stored as they come, so repeating
an interrupted evaluation completes it.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from empg_lite import __version__
from empg_lite.core.rationale import Problem, Rationale, flatten
from empg_lite.core.view import View
from empg_lite.data.sources import load_problems, subset
from empg_lite.loop.estep import draw_and_score
from empg_lite.loop.eval_summary import Evaluation, paired
from empg_lite.loop.learner import Learner, build_learner
from empg_lite.run import store
from empg_lite.run.answers import AnswerFile
from empg_lite.run.layout import RUNS
from empg_lite.sampler import Decoding, Sampler

if TYPE_CHECKING:
    from empg_lite.rewards import Grader
    from empg_lite.run.rollouts import RolloutHeader
    from empg_lite.run.target import Target

#: E-step number of evaluation draws: the same random numbers every time, different from training's.
EVAL_STEP = -1


@dataclass(frozen=True, slots=True)
class Evaluator:
    """Evaluates a learner's policy in its current state."""

    learner: Learner
    sampler: Sampler
    grader: Grader
    view: View

    def header(self, problems: Sequence[Problem]) -> RolloutHeader:
        """Everything an answer depends on, and the version that graded it."""
        recipe = self.learner.recipe
        asked = {
            "problems": hashlib.sha256("".join(p.id for p in problems).encode()).hexdigest(),
            "max_new_tokens": recipe.sampler.max_new_tokens,
            "dtype": recipe.model.dtype,
            "load_in_4bit": recipe.model.load_in_4bit,
            "batch_rows": int(recipe.sampler.batch_rows),
            "empg_lite": __version__,
        }
        return replace(self.learner.header(recipe.data.reward), sampler=asked)

    def evaluate(
        self,
        problems: Sequence[Problem],
        *,
        samples: int = 0,
        label: str = "evaluating",
        folder: Path | None = None,
        header: RolloutHeader | None = None,
        replace_other: bool = False,
    ) -> Evaluation:
        """Answer every problem greedily and, with ``samples`` = k > 0, also k times at temperature 1.

        Args:
            folder: stores the answers (``greedy.jsonl``, ``sampled.jsonl``); existing ones are reused.
            header: which model answers; None: the policy with its adapter.
            replace_other: see ``AnswerFile``.
        """
        assert problems, "no problems to evaluate"
        header = header or self.header(problems)
        # Questions of similar length share a batch: less padding.
        order = sorted(problems, key=lambda p: (len(p.question), p.id))

        def answers(name: str, decoding: Decoding, k: int) -> dict[str, list[Rationale]]:
            how = {"pass": name, "samples_per_problem": k, "temperature": decoding.temperature}
            kept = self.learner.world.once(
                lambda: AnswerFile(
                    folder / f"{name}.jsonl" if folder else None,
                    replace(header, sampler={**header.sampler, **how}),
                    problems=[p.id for p in order],
                    k=k,
                    replace_other=replace_other,
                )
            )
            self._complete(kept, order, decoding, k, label)
            by_problem: dict[str, list[Rationale]] = {}
            for r in kept.rows:
                by_problem.setdefault(r.problem_id, []).append(r)
            return by_problem

        limit = self.learner.recipe.sampler.max_new_tokens
        greedy = answers("greedy", Decoding(limit, temperature=0.0), 1)
        sampled = answers("sampled", Decoding(limit), samples) if samples else {}
        return Evaluation(
            tuple(greedy[p.id][0] for p in problems),
            tuple(tuple(sampled[p.id]) for p in problems) if samples else (),
        )

    def _complete(
        self, kept: AnswerFile, problems: Sequence[Problem], decoding: Decoding, k: int, label: str
    ) -> None:
        """Sample the missing answers; each is kept as soon as it is graded."""
        left = [p for p in problems if any((p.id, i) not in kept.answers for i in range(k))]
        with self.view.phase(label, len(problems) * k, len(kept.answers)) as on_done:
            for together in self._draws(left, k):
                drawn = draw_and_score(
                    self.learner,
                    self.sampler,
                    self.grader,
                    together,
                    decoding,
                    samples=k,
                    step=EVAL_STEP,
                    policy_step=0,
                    have=kept.answers,
                    on_scored=kept.add,
                    on_done=on_done,
                )
                for r in flatten(drawn.groups):  # those of the launch's other processes
                    kept.add(r)

    def _draws(self, problems: Sequence[Problem], k: int) -> Iterator[Sequence[Problem]]:
        """What to draw at once: everything, since the sampler refills the rows that end.

        Prompts longer than planned for come last: one would lengthen every row's cache. Processes of a launch
        exchange their answers when a draw ends: there it is a batch for each.
        """
        world, sampler = self.learner.world, self.learner.recipe.sampler
        limit = int(self.learner.recipe.data.max_prompt_tokens or 0)
        lengths = [len(self.learner.policy.encode_prompt(p.question)[1]) for p in problems]
        for long in (False, True):
            part = [p for p, n in zip(problems, lengths, strict=True) if (n > limit) == long]
            unit = max(1, int(sampler.batch_rows) // k) * world.size if world.size > 1 else len(part)
            for start in range(0, len(part), max(1, unit)):
                yield part[start : start + unit]


def evaluate_target(
    target: Target,
    grader: Grader,
    *,
    split: str | None = None,
    limit: int | None = None,
    k: int = 0,
    base: bool = False,
    out: Path | None = None,
    view: View | None = None,
) -> dict[str, Any]:
    """Load a model and evaluate it; with ``base``, also with its adapter off.

    Args:
        out: folder for the answers; None: ``RUN/eval``, or ``runs/eval`` outside a run. Answers of an earlier
            identical evaluation are reused.

    Returns:
        ``split``, ``answers`` (the folder), the figures of ``Evaluation.summary``; with ``base`` also an
        object ``base`` of them, and ``paired``: base first, tuned second.

    Raises:
        EmpgError: model or data are unusable.
        RunInUse: the same evaluation is running elsewhere.
    """
    recipe = target.recipe
    split = split or recipe.data.eval_split
    problems = subset(load_problems(recipe.data, split), limit or recipe.run.eval_limit)
    learner = build_learner(recipe)
    evaluator = Evaluator(learner, learner.sampler(), grader, view or View())
    out = out or (target.run / "eval" if target.run else RUNS / "eval")
    tuned_header = evaluator.header(problems)

    def run(label: str, header: RolloutHeader) -> tuple[Path, Evaluation, dict[str, Any]]:
        folder = out / f"{label}-{split}-{_digest(header)}"
        with store.run_lock(folder):
            evaluation = evaluator.evaluate(
                problems, samples=k, label=f"evaluating {label}", folder=folder, header=header
            )
            summary = evaluation.summary()
            store.write_file(folder / "figures.json", json.dumps({"split": split, **summary}, indent=1))
        return folder, evaluation, summary

    folder, tuned, figures = run(Path(target.label).name, tuned_header)
    result: dict[str, Any] = {"split": split, "answers": str(folder), **figures}
    if base:
        with learner.policy.reference():
            folder, reference, figures = run("base", replace(tuned_header, adapter=None))
        result["base"] = {"answers": str(folder), **figures}
        result["paired"] = paired(reference.greedy, tuned.greedy)
    return result


def _digest(header: RolloutHeader) -> str:
    """A short hash of an evaluation's settings."""
    facts = {**header.sampler, "batch_rows": None}
    identity = (header.model, header.revision, header.adapter, header.tokenizer, header.template, header.seed)
    text = json.dumps([identity, header.reward_name, facts], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:8]
