"""The loop: sample, score, weigh, fit, record.

EM Policy Gradient (T. Xu, arXiv 2504.18587; our reading of its abstract). Each step draws K rationales for
each of P problems from the policy (E-step), weighs them by their rewards, and raises their weighted
likelihood (M-step). There is no importance ratio, no clipping, no critic, no reference model and no stored
log-probability: for weights >= 0 the M-step ascends a lower bound of log E[R] without any of them.
"""

from __future__ import annotations

import signal
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any

from empg_lite import store
from empg_lite.data import ProblemStream, Splits, drop_long, load_splits, subset
from empg_lite.errors import DataError, Interrupted, RecipeError
from empg_lite.estep import VerdictKey, sample_rationales, score, weigh
from empg_lite.evaluate import Evaluation, evaluate
from empg_lite.metrics import Journal, View
from empg_lite.policy.policy import Policy
from empg_lite.rationale import Group, Problem, Rationale, flatten, group_rationales, read_rollouts
from empg_lite.recipe import Recipe, refused_sampling
from empg_lite.rewards import Grader
from empg_lite.runs import open_run, rollout_path
from empg_lite.session import Session, finished, read_figures


@dataclass(frozen=True, slots=True)
class TrainOptions:
    """What of the command line is not part of the recipe."""

    resume: bool = False
    force: bool = False
    max_minutes: float | None = None
    allow_change: tuple[str, ...] = ()
    command: str = ""


def train(
    recipe: Recipe, run: Path, options: TrainOptions = TrainOptions(), view: View | None = None
) -> dict[str, Any]:
    """Train by a recipe, into a run directory.

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
    with store.run_lock(run), stop_request() as stop, Grader() as grader:
        journal = Journal(run)
        opened = open_run(run, recipe, resume=options.resume, allow_change=options.allow_change)
        if opened.checkpoint is not None and finished(run, opened.recipe):
            view.note(f"{run} is finished: nothing to do")
            return summarise(run, opened.recipe, int(opened.checkpoint.name[5:]), 0.0, clock)

        splits = load_splits(opened.recipe)
        session = Session(run, opened, journal, view, options.command)
        learner, state, recipe = session.learner, session.learner.state, session.recipe
        problems = fitting_problems(splits, learner.policy, recipe, session)
        stream = ProblemStream(problems, recipe.run.seed)
        sampler = learner.sampler()
        tester = Tester(session, sampler, grader, splits)
        tester.before()

        while state.step < recipe.run.steps:
            batch = stream.take(state.position, recipe.sampler.problems_per_step)  # P problems
            groups, times, extra = e_step(session, sampler, grader, batch)  # z ~ pi(z|x), R(x, z), w
            last = state.step + 1 == recipe.run.steps
            record = session.fit_groups(  # raise sum of w log pi
                groups,
                reward=str(recipe.data.reward),
                times=times,
                measure_kl=recipe.em.passes > 1 or tester.due(state.step + 1),
                extra=extra,
            )
            record |= tester.validate(force=last)
            session.record(record)

            out_of_time = clock.out_of_time()
            if session.checkpoint_due() or stop or out_of_time:
                saved = session.checkpoint()
            if stop and not last:
                raise Interrupted(
                    stop[0], f"stopped after step {state.step}, {saved.name} is saved", str(run), RESUME
                )
            if out_of_time and not last:
                view.note(f"out of time after step {state.step}: {saved.name} is saved; {RESUME}")
                return summarise(run, recipe, state.step, state.seconds, clock)
            session.stop_if_hopeless(force=options.force)

        figures = tester.after()
        session.publish_adapter("adapter", figures)
        return summarise(run, recipe, state.step, state.seconds, clock)


RESUME = "repeat the command with --resume to go on"


def e_step(
    session: Session, sampler: Any, grader: Grader, problems: Sequence[Problem]
) -> tuple[tuple[Group, ...], dict[str, float], dict[str, Any]]:
    """Sample, score and weigh one step's rationales; also the seconds each part took, and its metrics."""
    learner, state, recipe = session.learner, session.learner.state, session.recipe
    rows = len(problems) * recipe.sampler.samples_per_problem
    started = time.perf_counter()
    with session.view.phase("sampling", rows) as on_done:
        draw = sample_rationales(
            learner.policy,
            sampler,
            problems,
            learner.decoding,
            samples=recipe.sampler.samples_per_problem,
            seed=recipe.run.seed,
            step=state.step + 1,
            policy_step=state.policy_step,
            on_done=on_done,
        )
    sampled = time.perf_counter()
    reward = str(recipe.data.reward)
    known = known_verdicts(rollout_path(session.run, state.step + 1), reward)
    scored = score(flatten(draw.groups), grader, reward, known)
    groups = weigh(group_rationales(scored), weighting=recipe.em.weighting, baseline=recipe.em.baseline)
    times = {"sample": sampled - started, "score": time.perf_counter() - sampled}
    tokens = sum(len(r.completion_ids) for r in scored)
    return groups, times, {"entropy": draw.entropy, "time/tokens_per_second": tokens / times["sample"]}


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


class Tester:
    """Evaluation before, during and after training. ``run.eval_every`` 0 switches all of it off."""

    def __init__(self, session: Session, sampler: Any, grader: Grader, splits: Splits) -> None:
        self.session, self.sampler, self.grader = session, sampler, grader
        self.every = session.recipe.run.eval_every
        self.validation = splits.validation
        self.evaluation = subset(splits.evaluation, session.recipe.run.eval_limit)

    def due(self, step: int) -> bool:
        return bool(self.every) and step % self.every == 0

    def before(self) -> None:
        """Accuracy of the untrained policy, once a run."""
        if not self.every or (self.session.learner.state.step and read_figures(self.session.run, "before")):
            return
        figures = self._report("before")
        self.session.journal.metrics(
            {"step": 0, **{f"eval/{k}": v for k, v in figures.items() if k != "step"}}
        )

    def validate(self, *, force: bool) -> dict[str, Any]:
        """Greedy accuracy on held-out training rows, where due; the best adapter so far goes to ``best/``."""
        state = self.session.learner.state
        if not self.validation or not (self.due(state.step) or (force and self.every)):
            return {}
        figures = self._evaluate(self.validation, "validating", samples=0).summary()
        accuracy = figures["pass@1"]
        if state.best_accuracy is None or accuracy > state.best_accuracy:
            state.best_accuracy, state.best_step = accuracy, state.step
            self.session.publish_adapter("best", {"validation accuracy": accuracy})
        return {"eval/accuracy": accuracy, "eval/mean_length": figures["mean_length"]}

    def after(self) -> dict[str, Any]:
        """Accuracy of the trained policy on the same rows as before; {} without evaluation."""
        return self._report("after") if self.every else {}

    def _report(self, name: str) -> dict[str, Any]:
        split = self.session.recipe.data.eval_split
        evaluation = self._evaluate(self.evaluation, f"evaluating {name} training", samples=1)
        figures = self.session.save_evaluation(name, evaluation, split)
        low, high = figures["pass@1_ci95"]
        self.session.view.note(
            f"{name} training: greedy accuracy {figures['pass@1']:.1%} [{low:.1%}, {high:.1%}] of {figures['n']}, "
            f"T=1 {figures['t1_accuracy']:.1%}, length {figures['mean_length']:.0f}"
        )
        return figures

    def _evaluate(self, problems: Sequence[Problem], label: str, samples: int) -> Evaluation:
        recipe = self.session.recipe
        return evaluate(
            self.session.learner.policy,
            self.sampler,
            self.grader,
            problems,
            reward=str(recipe.data.reward),
            max_new_tokens=recipe.sampler.max_new_tokens,
            samples=samples,
            seed=recipe.run.seed,
            view=self.session.view,
            label=label,
        )


def fitting_problems(splits: Splits, policy: Policy, recipe: Recipe, session: Session) -> list[Problem]:
    """Training problems whose prompt is within the limit; what is dropped is counted and said.

    Raises:
        DataError: nothing is left.
    """
    limit = int(recipe.data.max_prompt_tokens or 0)
    lengths = [len(policy.encode_prompt(p.question)[1]) for p in splits.train]
    problems, dropped = drop_long(list(splits.train), lengths, limit)
    if dropped:
        session.journal.event("dropped_long_prompts", count=dropped, limit=limit)
        session.view.note(
            f"{dropped} of {len(splits.train)} problems are longer than {limit} tokens: left out"
        )
    if not problems:
        raise DataError(
            "no problem is short enough", "data.max_prompt_tokens", f"raise it above {min(lengths)}"
        )
    return problems


def summarise(run: Path, recipe: Recipe, steps: int, seconds: float, clock: Clock) -> dict[str, Any]:
    """The result object of ``train``."""
    before, after = (
        read_figures(run, name) if recipe.run.eval_every else None for name in ("before", "after")
    )
    if after is not None and after["step"] < steps:
        after = None
    result = {
        "run": str(run),
        "steps": steps,
        "seconds": round(seconds, 3),
        "seconds_total": round(clock.seconds(), 3),
    }
    for name, figures in (("before", before), ("after", after)):
        result[f"accuracy_{name}"] = figures and figures["pass@1"]
        result[f"t1_accuracy_{name}"] = figures and figures["t1_accuracy"]
    return result


@dataclass(slots=True)
class Clock:
    """Wall time of this invocation, and its limit."""

    max_minutes: float | None
    started: float = field(default_factory=time.monotonic)

    def seconds(self) -> float:
        return time.monotonic() - self.started

    def out_of_time(self) -> bool:
        return self.max_minutes is not None and self.seconds() >= 60 * self.max_minutes


@contextmanager
def stop_request() -> Iterator[list[int]]:
    """A list that the first SIGINT or SIGTERM is put into; the second ends the process at once.

    The step at hand is finished and saved first: interrupting it would lose it, and gain seconds.
    """
    received: list[int] = []

    def on_signal(signum: int, frame: FrameType | None) -> None:
        received.append(signum)
        for number, handler in previous.items():
            signal.signal(number, handler)

    try:
        previous = {n: signal.signal(n, on_signal) for n in (signal.SIGINT, signal.SIGTERM)}
    except ValueError:  # not the main thread: signals go to whoever runs it
        yield received
        return
    try:
        yield received
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
