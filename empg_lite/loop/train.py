"""The loop: sample, score, weigh, fit, record.

EM Policy Gradient (T. Xu, arXiv 2504.18587; our reading of its abstract). Each step draws K rationales for
each of P problems from the policy (E-step), weighs them by their rewards, and raises their weighted
likelihood (M-step). There is no importance ratio, no clipping, no critic, no reference model and no stored
log-probability: for weights >= 0 the M-step ascends a lower bound of log E[R] without any of them.
"""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from empg_lite.core.control import RESUME, Clock, stop_request
from empg_lite.core.errors import DataError, Interrupted, RecipeError
from empg_lite.core.rationale import Group, Problem, Rationale, flatten, group_rationales
from empg_lite.core.view import View
from empg_lite.data.sources import ProblemStream, digest_of, load_splits
from empg_lite.loop.estep import by_group, sample_rationales, weigh
from empg_lite.loop.preflight import PREFLIGHT_STEP, first_problems, preflight, refuse_hopeless
from empg_lite.loop.recorder import Session, finished, summarise
from empg_lite.loop.tester import Tester
from empg_lite.recipe.schema import Recipe, refused_sampling
from empg_lite.rewards import Grader, UserCode
from empg_lite.rewards.scorer import Scorer, VerdictKey
from empg_lite.run import store
from empg_lite.run.checkpoint import stored_state
from empg_lite.run.journal import Journal
from empg_lite.run.layout import open_run, rollout_path
from empg_lite.run.parallel import SINGLE, World
from empg_lite.run.rollouts import read_rollouts
from empg_lite.sampler import Sampler, SampleWork


@dataclass(frozen=True, slots=True)
class TrainOptions:
    """What of the command line is not part of the recipe."""

    resume: bool = False
    force: bool = False
    max_minutes: float | None = None
    allow_change: tuple[str, ...] = ()
    command: str = ""
    code: UserCode | None = None
    profile: bool = False
    trackers: tuple[str, ...] = ()


def train(
    recipe: Recipe,
    run: Path,
    options: TrainOptions = TrainOptions(),
    view: View | None = None,
    world: World = SINGLE,
) -> dict[str, Any]:
    """Train by a recipe, into a run directory.

    Args:
        world: the processes that train together, each calling this alike (``parallel.join``).

    Returns:
        ``run``, ``steps``, ``seconds`` (training alone), ``seconds_total``, ``accuracy_before``,
        ``accuracy_after`` (fractions; None without evaluation), and their T=1 counterparts.

    Raises:
        EmpgError: anything expected; its class says what, its ``exit_code`` how the command ends.
    """
    clock = Clock(options.max_minutes)
    view = view or View()
    refusal = refused_sampling(recipe)
    if refusal and not options.force:
        raise RecipeError(refusal, "sampler", "set it back, or say --force")
    grading = Grader(code=options.code)
    stopping = stop_request(announce=world.main, midway=world.size == 1)
    with store.run_lock(run), stopping as stop, grading as grader, ExitStack() as saving:
        journal = Journal(run)
        opened = world.once(
            lambda: open_run(run, recipe, resume=options.resume, allow_change=options.allow_change)
        )
        if opened.checkpoint is not None and world.once(lambda: finished(run, opened.recipe)):
            view.note(f"{run} is finished: nothing to do")
            return summarise(run, opened.recipe, stored_state(opened.checkpoint), clock)

        grader.self_test(str(opened.recipe.data.reward))
        splits = load_splits(opened.recipe)
        new = opened.checkpoint is None  # what was begun has its sizes, and fitted once
        session = Session(
            run,
            opened,
            journal,
            view,
            options.command,
            world=world,
            refuse=new and not options.force,
            data=digest_of(splits.train),
        )
        saving.enter_context(session.saved_when_cut_short())
        if world.main:
            saving.enter_context(session.tracked(options.trackers))
        learner, state, recipe = session.learner, session.learner.state, session.recipe
        problems = fitting_problems(session, splits.train)
        stream = ProblemStream(problems, recipe.run.seed)
        sampler = learner.sampler()
        tester = Tester(session, sampler, grader, splits)
        begun = state.step
        if not state.step:
            session.check_disk_space(problems, 2 * len(tester.evaluation) if tester.every else 0)
            run_preflight(session, sampler, grader, first_problems(problems, recipe.run.seed), options.force)
        tester.before()

        while state.step < recipe.run.steps or state.pending:
            session.arm_watchdog()
            if not state.pending:  # else the run was stopped while this step was validated
                groups, times, extra = e_step(session, sampler, grader, stream)  # z ~ pi(z|x), R(x, z), w
                learner.make_room(sampler)
                state.pending = session.fit_groups(  # raise sum of w log pi
                    groups,
                    reward=str(recipe.data.reward),
                    times=times,
                    measure_kl=recipe.em.passes > 1 or tester.due(state.step + 1),
                    extra=extra,
                )
            last = state.step >= recipe.run.steps
            session.record(state.pending | tester.validate(force=last))
            state.pending = None

            signum, out_of_time = world.first(next(iter(stop), None)), world.any(clock.out_of_time())
            if session.checkpoint_due() or signum or out_of_time:
                saved = session.checkpoint()
            if options.profile and not last and (signum or out_of_time):
                session.write_profile(begun, clock.seconds())
            if signum and not last:
                raise Interrupted(
                    signum, f"stopped after step {state.step}, {saved.name} is saved", str(run), RESUME
                )
            if out_of_time and not last:
                view.note(f"out of time after step {state.step}: {saved.name} is saved; {RESUME}")
                return summarise(run, recipe, state, clock)
            session.stop_if_hopeless(force=options.force)

        figures = tester.after()
        session.publish_adapter("adapter", figures)
        if options.profile:
            session.write_profile(begun, clock.seconds())
        return summarise(run, recipe, state, clock)


def e_step(
    session: Session, sampler: Sampler, grader: Grader, stream: ProblemStream
) -> tuple[tuple[Group, ...], dict[str, float], dict[str, Any]]:
    """Sample, score and weigh one step's rationales; also the seconds each part took, and its metrics.

    P problems, and where fewer than P teach anything as many more, up to ``sampler.refill`` of them.
    """
    s, position, before = session.recipe.sampler, session.learner.state.position, sampler.work
    p, session.grader_error = s.problems_per_step, None
    groups, sums = _draw(session, sampler, grader, stream.take(position, p))
    spare = min(s.refill, len(stream) - p)
    while spare and (lacking := p - sum(teaches(g) for g in groups)) > 0:
        further = stream.take(position, len(groups) + min(lacking, spare))[len(groups) :]
        more, more_sums = _draw(session, sampler, grader, further)
        groups, spare = groups + more, spare - len(more)
        sums = {name: value + more_sums[name] for name, value in sums.items()}
    tokens = sum(len(r.completion_ids) for r in flatten(groups))
    own = sampler.work.since(before)
    session.note_rows(sampler.batch_rows)
    session.note_graphs(sampler.graph_failure)
    work = sum(session.learner.world.gather(own), SampleWork())
    extra = {
        "entropy": sums.pop("nats") / max(tokens, 1),
        "em/refilled": len(groups) - p,
        "em/prompt_tokens": work.prompt_tokens,
        "time/row_steps": work.row_steps,
        "em/context_tokens": sum(context_tokens(r) for r in flatten(groups)),
        "time/refresh": own.refresh_seconds,
        "time/graphs_captured": work.graphs_captured,
        "time/graphs_replayed": work.graphs_replayed,
        "time/eager_steps": work.eager_steps,
        "time/tokens_per_second": tokens / sums["sample"],
    }
    return groups, sums, extra


def context_tokens(rationale: Rationale) -> int:
    """Keys that the completion's tokens looked at, one by one: what was read of a layer's cache."""
    n = len(rationale.completion_ids)
    return n * len(rationale.prompt_ids) + n * (n - 1) // 2


def teaches(group: Group) -> bool:
    """Whether a weighed group moves the policy at all."""
    return any(r.weight for r in group.rationales)


def _draw(
    session: Session, sampler: Sampler, grader: Grader, problems: Sequence[Problem]
) -> tuple[tuple[Group, ...], dict[str, float]]:
    """Weighed rationales of some problems; the seconds of each part, and all tokens' surprise in nats."""
    learner, state, recipe, world = (
        session.learner,
        session.learner.state,
        session.recipe,
        session.learner.world,
    )
    rows = len(problems) * recipe.sampler.samples_per_problem
    started, sampled, nats = time.perf_counter(), 0.0, 0.0
    reward = str(recipe.data.reward)
    known = known_verdicts(rollout_path(session.run, state.step + 1), reward)
    with session.view.phase("sampling", rows) as on_done:
        # It grades what has ended while the rest is sampled.
        scorer = Scorer(grader, reward, known, lambda n: on_done(n * world.size))

        def ask(mine: Sequence[Problem]) -> list[list[Rationale]]:
            nonlocal sampled, nats
            draw = sample_rationales(
                learner.policy,
                sampler,
                mine,
                learner.decoding,
                samples=recipe.sampler.samples_per_problem,
                seed=recipe.run.seed,
                step=state.step + 1,
                policy_step=state.policy_step,
                on_rationale=scorer.submit,
            )
            sampled = time.perf_counter()
            nats = draw.entropy * sum(len(r.completion_ids) for r in flatten(draw.groups))
            return by_group(draw.groups, scorer.scored(flatten(draw.groups)))

        scored = [r for rows in world.share(problems, ask) for r in rows]
    session.grader_error = world.first(scorer.error) or session.grader_error
    session.view.sampled(scored)
    groups = weigh(group_rationales(scored), weighting=recipe.em.weighting, baseline=recipe.em.baseline)
    seconds = {"sample": sampled - started, "score": time.perf_counter() - sampled}
    return groups, {**seconds, "nats": sum(world.gather(nats))}


def run_preflight(
    session: Session, sampler: Sampler, grader: Grader, problems: Sequence[Problem], force: bool
) -> None:
    """Preflight; its figures stay in ``preflight.json``, its rationales are those of step 0.

    Raises:
        NoSignal: training cannot learn anything, and ``force`` was not said.
        GraderUnusable: the grader does not work.
    """
    found = preflight(session.learner, sampler, grader, problems, session.view)
    store.write_file(session.run / "preflight.json", json.dumps(found.facts(), indent=1))
    session.keep_rollouts(PREFLIGHT_STEP, flatten(found.groups), str(session.recipe.data.reward))
    session.view.note(found.seen)
    session.say(PREFLIGHT_STEP, found.findings)
    if not force:
        refuse_hopeless(found, str(session.run))


def known_verdicts(path: Path, reward: str) -> dict[VerdictKey, Rationale]:
    """Verdicts of a step that was graded before the run was cut off: they are not asked for again."""
    if not path.is_file():
        return {}
    try:
        (segment,) = read_rollouts(path)
    except (DataError, ValueError):
        return {}
    if segment.header.reward_name != reward:
        return {}
    return {(r.problem_id, r.completion): r for r in segment.rationales if r.reward is not None}


def fitting_problems(session: Session, problems: Sequence[Problem]) -> list[Problem]:
    """Training problems whose prompt is within the limit; what is dropped is counted and said."""
    kept, dropped = session.learner.short_enough(problems)
    if dropped:
        limit = session.recipe.data.max_prompt_tokens
        session.journal.event("dropped_long_prompts", count=dropped, limit=limit)
        session.view.note(f"{dropped} of {len(problems)} problems are longer than {limit} tokens: left out")
    return kept
