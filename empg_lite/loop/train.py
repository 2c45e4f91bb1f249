"""The loop: sample, score, weigh, fit, record.

EM Policy Gradient (T. Xu, arXiv 2504.18587; our reading of its abstract). Each step draws K rationales for
each of P problems from the policy and weighs them by their rewards (E-step), then raises their weighted
likelihood (M-step). There is no importance ratio, no clipping, no critic, no reference model and no stored
log-probability: for weights >= 0 the M-step ascends a lower bound of log E[R] without any of them.
"""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from empg_lite.core.control import Clock, stop_request
from empg_lite.core.rationale import flatten
from empg_lite.core.view import View
from empg_lite.loop.estep import Drawn, draw_and_score, known_verdicts, weigh
from empg_lite.loop.recorder import finished, summarize
from empg_lite.rewards import Grader
from empg_lite.run import store
from empg_lite.run.checkpoint import stored_state
from empg_lite.run.layout import open_run, rollout_path
from empg_lite.run.parallel import SINGLE, World

if TYPE_CHECKING:
    from empg_lite.data.sources import ProblemStream
    from empg_lite.loop.recorder import Recorder
    from empg_lite.recipe.schema import Recipe
    from empg_lite.rewards import UserCode
    from empg_lite.sampler import Sampler


@dataclass(frozen=True, slots=True)
class TrainOptions:
    """What ``train`` is told beyond the recipe."""

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
    """Train a recipe in a run directory; every process of ``world`` calls this with the same arguments.

    Returns:
        ``recorder.summarize``: steps, seconds, accuracy before and after.

    Raises:
        EmpgError: any anticipated failure; its class says which, its ``exit_code`` is the command's.
    """
    from empg_lite.loop.begin import begin, check_sampling  # pulls in data, policy and evaluation

    clock, view = Clock(options.max_minutes), view or View()
    check_sampling(recipe, force=options.force)
    stopping = stop_request(announce=world.main, midway=world.size == 1)
    with store.run_lock(run), stopping as stop, Grader(code=options.code) as grader, ExitStack() as stack:
        opened = world.once(
            lambda: open_run(run, recipe, resume=options.resume, allow_change=options.allow_change)
        )
        if opened.checkpoint is not None and world.once(lambda: finished(run, opened.recipe)):
            view.note(f"{run} is already finished")
            return summarize(run, opened.recipe, stored_state(opened.checkpoint), clock)

        learner, sampler, stream, recorder, validation = begin(
            run, opened, options, view, world, grader, stack
        )
        state, recipe = learner.state, learner.recipe
        while state.step < recipe.run.steps or state.pending:
            recorder.arm_watchdog()
            if not state.pending:  # else the run was stopped while this step was being validated
                drawn = e_step(sampler, grader, stream, recorder)  # z ~ pi(z|x), R(x, z), w
                recorder.keep_rollouts(state.step + 1, flatten(drawn.groups), str(recipe.data.reward))
                learner.make_room(sampler)
                measure_kl = recipe.em.passes > 1 or validation.due(state.step + 1)
                stats = learner.fit(flatten(drawn.groups), view, measure_kl=measure_kl)  # sum of w log pi
                state.pending = recorder.advance(drawn.groups, stats, drawn)
            recorder.record(state.pending | validation.validate(last=state.step >= recipe.run.steps))
            state.pending = None
            if recorder.end_step(stop, clock, force=options.force, profile=options.profile):
                return summarize(run, recipe, state, clock)

        recorder.publish_adapter("adapter", validation.after())
        if options.profile:
            recorder.write_profile(clock.seconds())
        return summarize(run, recipe, state, clock)


def e_step(sampler: Sampler, grader: Grader, stream: ProblemStream, recorder: Recorder) -> Drawn:
    """Sample, score and weigh one step's rationales: K for each of P problems, or in turns (``tries``)."""
    learner, recipe, state, before = recorder.learner, recorder.recipe, recorder.learner.state, sampler.work
    p, k, step = recipe.sampler.problems_per_step, recipe.sampler.samples_per_problem, state.step + 1
    known = known_verdicts(rollout_path(recorder.run, step), str(recipe.data.reward))
    with recorder.view.phase("sampling", p * k) as on_done:
        if recipe.tries:
            from empg_lite.loop.turns import draw_in_turns, slots_now

            state.slots = slots_now(learner, stream)
            drawn = draw_in_turns(
                learner, sampler, grader, stream, state.slots, step=step, known=known, on_done=on_done
            )
        else:
            problems = stream.take(state.position, p)
            drawn = draw_and_score(
                learner,
                sampler,
                grader,
                problems,
                samples=k,
                step=step,
                policy_step=state.policy_step,
                known=known,
                on_done=on_done,
            )
    recorder.grader_error = drawn.grader_error
    recorder.view.sampled(flatten(drawn.groups))
    recorder.note_sampler(sampler)
    weighed = weigh(drawn.groups, weighting=recipe.em.weighting, baseline=recipe.em.baseline)
    return drawn.with_groups(weighed).with_work(sampler.work.since(before), learner.world)
