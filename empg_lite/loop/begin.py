"""Before the first step: load the policy, restore a checkpoint, check the disk, run the preflight."""

from __future__ import annotations

import json
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from empg_lite.core.errors import RecipeError
from empg_lite.core.rationale import Rationale, flatten
from empg_lite.data.sources import ProblemStream, digest_of, load_splits
from empg_lite.loop.learner import Learner, build_learner
from empg_lite.loop.preflight import PREFLIGHT_STEP, first_problems, preflight, refuse_hopeless
from empg_lite.loop.recorder import Recorder
from empg_lite.loop.validation import Validation
from empg_lite.policy.adapter import adapter_files
from empg_lite.recipe.schema import refused_sampling
from empg_lite.run import store
from empg_lite.run.rollouts import rationale_line

if TYPE_CHECKING:
    from empg_lite.core.rationale import Problem
    from empg_lite.core.view import View
    from empg_lite.loop.train import TrainOptions
    from empg_lite.recipe.schema import Recipe
    from empg_lite.rewards import Grader
    from empg_lite.run.layout import Opened
    from empg_lite.run.parallel import World
    from empg_lite.sampler import Sampler

#: Disk estimate: bytes per metrics record, bytes per file-system block, characters per token.
METRICS_BYTES, BLOCK, CHARACTERS = 4000, 4096, 5


class Begun(NamedTuple):
    """Everything the loop works with."""

    learner: Learner
    sampler: Sampler
    stream: ProblemStream
    recorder: Recorder
    validation: Validation


def check_sampling(recipe: Recipe, *, force: bool) -> None:
    """Refuse to train on samples that are not the policy's own distribution.

    Raises:
        RecipeError: temperature, top-p or top-k change it, and ``force`` is off.
    """
    refusal = refused_sampling(recipe)
    if refusal and not force:
        raise RecipeError(refusal, "sampler", "reset it, or add --force")


def begin(
    run: Path,
    opened: Opened,
    options: TrainOptions,
    view: View,
    world: World,
    grader: Grader,
    stack: ExitStack,
) -> Begun:
    """Get a run to where its next step can start.

    Args:
        stack: closed when training ends, however it ends.

    Raises:
        EmpgError: model, data or grader are unusable, memory or disk too small, or nothing can be learned.
    """
    grader.self_test(str(opened.recipe.data.reward))
    splits = load_splits(opened.recipe)
    for note in splits.notes:
        view.note(note)
    # The memory plan may refuse a new run only: one that was begun has its sizes, and fitted once.
    learner = build_learner(opened.recipe, world, refuse=opened.checkpoint is None and not options.force)
    recorder = Recorder(run, opened, learner, view, options.command, data=digest_of(splits.train))
    stack.enter_context(recorder.saved_when_cut_short())
    if world.main:
        stack.enter_context(recorder.tracked(options.trackers))
    problems = fitting_problems(recorder, splits.train)
    sampler = learner.sampler()
    validation = Validation(recorder, sampler, grader, splits)
    if not learner.state.step:
        check_disk_space(recorder, problems, 2 * len(validation.evaluation) if validation.every else 0)
        first = first_problems(problems, recorder.recipe.run.seed)
        run_preflight(recorder, sampler, grader, first, options.force)
    validation.before()
    return Begun(learner, sampler, ProblemStream(problems, recorder.recipe.run.seed), recorder, validation)


def fitting_problems(recorder: Recorder, problems: Sequence[Problem]) -> list[Problem]:
    """Training problems whose prompt is within the limit; the number dropped is recorded and shown."""
    kept, dropped = recorder.learner.short_enough(problems)
    if dropped:
        limit = recorder.recipe.data.max_prompt_tokens
        recorder.journal.event("dropped_long_prompts", count=dropped, limit=limit)
        recorder.view.note(f"dropped {dropped} of {len(problems)} problems: prompt over {limit} tokens")
    return kept


def run_preflight(
    recorder: Recorder, sampler: Sampler, grader: Grader, problems: Sequence[Problem], force: bool
) -> None:
    """Preflight; its figures are kept in ``preflight.json``, its rationales as those of step 0.

    Raises:
        NoSignal: training cannot learn anything, and ``force`` is off.
        GraderUnusable: the grader does not work.
    """
    found = preflight(recorder.learner, sampler, grader, problems, recorder.view)
    store.write_file(recorder.run / "preflight.json", json.dumps(found.facts(), indent=1))
    recorder.keep_rollouts(PREFLIGHT_STEP, flatten(found.groups), str(recorder.recipe.data.reward))
    recorder.view.note(found.seen)
    recorder.report(PREFLIGHT_STEP, found.findings)
    if not force:
        refuse_hopeless(found, str(recorder.run))


def check_disk_space(recorder: Recorder, problems: Sequence[Problem], evaluated: int) -> None:
    """Before the first step: write a trial checkpoint, and ask whether all that is to come fits the disk.

    Every completion is counted at its longest, every file with a block of its own.

    Args:
        problems: those that are sampled for.
        evaluated: problems evaluated, counted before and after training; each stores a greedy and a sampled
            answer.

    Raises:
        StorageError: it does not fit, or nothing can be written there.
    """
    from empg_lite.policy.card import tokenizer_files

    r, policy = recorder.recipe, recorder.learner.policy
    adapter = sum(map(len, adapter_files(policy).values()))
    published = adapter + sum(map(len, tokenizer_files(policy).values()))
    one = 3 * adapter  # with Adam's two moments
    sampled = (r.run.steps + 1) * r.sampler.problems_per_step * r.sampler.samples_per_problem
    files = r.run.steps + 6 * (r.run.keep + 1) + 40
    needed = (
        (r.run.keep + 1) * one + 3 * published + (sampled + 2 * evaluated) * _longest_row(recorder, problems)
    )
    needed += r.run.steps * METRICS_BYTES + files * BLOCK
    store.check_disk_space(recorder.run / "checkpoints", one, needed)


def _longest_row(recorder: Recorder, problems: Sequence[Problem]) -> int:
    """Bytes of a stored rationale that runs to the limit, for a problem of middling length."""
    problem = sorted(problems, key=lambda p: len(p.question))[len(problems) // 2]
    prompt, ids = recorder.learner.policy.encode_prompt(problem.question)
    n = int(recorder.recipe.sampler.max_new_tokens)
    longest = Rationale(
        problem_id=problem.id,
        question=problem.question,
        gold=problem.gold,
        prompt=prompt,
        prompt_ids=ids,
        completion="x" * CHARACTERS * n,
        completion_ids=(len(recorder.learner.policy.tokenizer),) * n,
        finish_reason="length",
        step=recorder.recipe.run.steps,
        policy_step=recorder.recipe.run.steps,
        sample_index=0,
        reward=0.0,
        reason="truncated",
        weight=0.1234567890123456,
        meta=problem.meta,
    )
    return len(rationale_line(longest))
