"""The halves of the loop as separate commands: sample now, grade later, fit any number of times, anywhere.

A rationale is text and a reward; no ratio or stored log-probability ties it to the machine that drew it.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Any

from empg_lite.core.control import Clock, stop_request
from empg_lite.core.errors import DataError, MissingInput, UsageError
from empg_lite.core.rationale import Group, Rationale, flatten, group_rationales
from empg_lite.core.sizes import round_up
from empg_lite.core.view import View
from empg_lite.data.sources import ProblemStream, load_splits
from empg_lite.loop.begin import check_sampling
from empg_lite.loop.estep import sample_rationales, weigh
from empg_lite.loop.learner import Learner, build_learner
from empg_lite.loop.recorder import Recorder, finished, summarize
from empg_lite.loop.train import TrainOptions
from empg_lite.loop.turns import draw_in_turns, slots_now
from empg_lite.rewards import Grader
from empg_lite.run import store
from empg_lite.run.checkpoint import load_checkpoint, newest_valid, require_valid, stored_state
from empg_lite.run.layout import is_run, open_run, rollout_path
from empg_lite.run.rollouts import (
    EXTERNAL,
    RolloutHeader,
    Segment,
    check_scored,
    encode_rollouts,
    header_line,
    is_torn,
    kept_length,
    rationale_line,
    read_rollouts,
)

if TYPE_CHECKING:
    from empg_lite.core.rationale import Problem
    from empg_lite.core.slots import Slot
    from empg_lite.policy.policy import Policy
    from empg_lite.recipe.schema import Recipe
    from empg_lite.rewards import UserCode
    from empg_lite.sampler import Sampler

NO_OPTIONS = TrainOptions()


@dataclass(frozen=True, slots=True)
class SampleOptions:
    """What ``sample`` is told beyond the recipe.

    Attributes:
        problems: number of problems to sample, under ``sampler.tries`` of slots filled, in whole steps; None:
            ``run.steps`` x P, or one step of a RUN.
        code: the user's reward function, needed under ``sampler.tries``.
    """

    problems: int | None = None
    append: bool = False
    force: bool = False
    code: UserCode | None = None


def checkpoint_of(source: Path) -> Path:
    """The checkpoint that RUN or RUN/checkpoints/step-N refers to.

    Raises:
        MissingInput, CheckpointError: there is none, or it is not valid.
    """
    if (source / "state.json").is_file():
        return require_valid(source)
    if source.parent.name == "checkpoints" and source.is_dir():
        return require_valid(source)
    if not is_run(source):
        raise MissingInput("not a run or a checkpoint of one", str(source))
    found = newest_valid(source)
    if found is None:
        raise MissingInput("the run has no checkpoint yet", str(source))
    return found


def sample(
    recipe: Recipe,
    source: Path | None,
    out: Path,
    options: SampleOptions = SampleOptions(),
    view: View | None = None,
) -> dict[str, Any]:
    """E-step only: sample rationales into a rollout file. Repeating it completes the file.

    They have no rewards yet, except under ``sampler.tries``, where verdicts decide what is sampled next.

    Args:
        source: run or checkpoint that sets policy, step and data position; None starts at step 0.

    Raises:
        UsageError: the file was sampled with other arguments, and ``append`` is off.
    """
    started = time.monotonic()
    view = view or View()
    recipe = recipe.resolved()
    check_sampling(recipe, force=options.force)
    splits = load_splits(recipe)
    learner = build_learner(recipe)
    if source is not None:
        learner.state, _ = load_checkpoint(
            checkpoint_of(source), learner.policy, learner.optimizer, learner.scaler
        )
    recipe = learner.recipe
    problems, _ = learner.short_enough(splits.train)
    stream = ProblemStream(problems, recipe.run.seed)

    p, k = recipe.sampler.problems_per_step, recipe.sampler.samples_per_problem
    wanted = options.problems or (p if source is not None else p * recipe.run.steps)
    if recipe.tries:
        wanted = round_up(wanted, p)
        view.note("rationales are graded as they are drawn: sampler.tries stops at a right one")
    first, done = _open_segment(out, learner, wanted, options.append)
    sampler = learner.sampler()
    slots = _slots_after(out, learner, stream) if recipe.tries else ()
    with Grader(code=options.code) as grader, view.phase("sampling", (wanted - done) * k) as on_done:
        for offset in range(done, wanted, p):
            step = learner.state.step + 1 + -(-first // p) + offset // p
            if recipe.tries:
                groups = draw_in_turns(
                    learner, sampler, grader, stream, slots, step=step, on_done=on_done
                ).groups
                slots, _ = recipe.tries.after_step(slots, flatten(groups))
            else:
                here = stream.take(learner.state.position + first + offset, min(p, wanted - offset))
                groups = _draw_groups(learner, sampler, here, step, on_done)
            store.append_text(out, "".join(rationale_line(r) + "\n" for r in flatten(groups)))
    total = sum(len(s.rationales) for s in read_rollouts(out))
    seconds = round(time.monotonic() - started, 3)
    return {"out": str(out), "rationales": total, "new": (wanted - done) * k, "seconds": seconds}


def _draw_groups(
    learner: Learner,
    sampler: Sampler,
    problems: Sequence[Problem],
    step: int,
    on_done: Callable[[int], None],
) -> tuple[Group, ...]:
    """Draw K rationales for each problem, ungraded."""
    recipe = learner.recipe
    return sample_rationales(
        learner.policy,
        sampler,
        problems,
        learner.decoding,
        samples=recipe.sampler.samples_per_problem,
        seed=recipe.run.seed,
        step=step,
        policy_step=learner.state.policy_step,
        on_rationale=lambda r: on_done(1),
    ).groups


def _slots_after(out: Path, learner: Learner, stream: ProblemStream) -> tuple[Slot, ...]:
    """What the slots hold after the steps that the file has from this policy."""
    rule, slots = learner.recipe.tries, slots_now(learner, stream)
    assert rule is not None
    adapter = learner.policy.adapter_sha256()
    rows = [r for s in read_rollouts(out) if s.header.adapter == adapter for r in s.rationales]
    for _, step in groupby((r for r in rows if r.position is not None), key=lambda r: r.step):
        slots, _ = rule.after_step(slots, step)
    return slots


def _open_segment(out: Path, learner: Learner, wanted: int, append: bool) -> tuple[int, int]:
    """Make ``out`` end in a segment for this request: (its first problem, problems already sampled).

    Partial E-steps left by a kill are cut off.
    """
    base = learner.header(None)
    reward = str(learner.recipe.data.reward) if learner.recipe.tries else None  # graded as they are drawn

    def header(first: int) -> RolloutHeader:
        asked = {"problems": wanted, "first": first, "from_step": learner.state.step}
        return replace(base, sampler={**base.sampler, **asked})

    def line(first: int) -> str:
        return header_line(replace(header(first), reward_name=reward)) + "\n"

    other = UsageError(
        "the file was sampled with other arguments", str(out), "add --append, or name another --out"
    )
    data = out.read_bytes() if out.exists() else b""
    tail = data[data.rfind(b"\n") + 1 :].decode("utf-8", "replace")
    if b"\n" not in data and is_torn(tail or "{"):  # empty, or what a kill left of the header
        if not line(0).startswith(tail):
            raise other
        store.write_file(out, line(0))
        return 0, 0
    segments = read_rollouts(out, torn_tail=True)
    last = segments[-1]
    first = int(last.header.sampler.get("first", 0))
    same = replace(last.header, reward_name=None) == header(first)
    done = _whole_problems(last, learner, wanted) if same else 0
    if not (same or append):
        raise other
    if last.header.model == EXTERNAL and tail and not line(0).startswith(tail):
        read_rollouts(out)  # names the broken line: it is not ours to cut off
    dropped = same and done < wanted
    rows = len(last.rationales) - done * learner.recipe.sampler.samples_per_problem if dropped else 0
    _cut_back(out, rows)
    if dropped:
        return first, done
    if not append:
        return first, wanted
    first = first + wanted if same else 0
    store.append_text(out, line(first))
    return first, 0


def _cut_back(out: Path, rows: int) -> None:
    """Cut off a torn line and the last rows, and end the file in a line break; all else stays."""
    store.truncate(out, kept_length(out, rows))
    if not out.read_bytes().endswith(b"\n"):
        store.append_text(out, "\n")


def _whole_problems(segment: Segment, learner: Learner, wanted: int) -> int:
    """Number of problems in the complete E-steps of a segment."""
    s = learner.recipe.sampler
    problems = len(segment.rationales) // s.samples_per_problem
    return problems if problems >= wanted else problems // s.problems_per_step * s.problems_per_step


def fit(
    recipe: Recipe,
    files: Sequence[Path],
    run: Path,
    source: Path | None = None,
    options: TrainOptions = NO_OPTIONS,
    view: View | None = None,
) -> dict[str, Any]:
    """M-step only: fit stored rationales, P problems per optimizer step. Nothing is sampled or graded.

    Args:
        files: scored rollout files of any age and source; statistics never cross files or segments.
        source: run or checkpoint to continue from: adapter, moments, step and schedule.

    Raises:
        DataError: a row is unusable or not scored.
    """
    clock = Clock(options.max_minutes)
    view = view or View()
    segments = [segment for path in files for segment in _scored_segments(path)]
    batches = _batches(segments, recipe.sampler.problems_per_step)
    if any(_in_turns(b[0][0]) for b in batches) and (
        recipe.em.weighting != "posterior" or recipe.em.baseline
    ):
        raise DataError(
            "rationales sampled under sampler.tries have no group to compare them with",
            f"em.weighting: {recipe.em.weighting}, em.baseline: {recipe.em.baseline:g}",
            "set posterior and 0",
        )
    source = source and checkpoint_of(source)
    # The files determine the number of steps. Nothing is sampled, so nothing is evaluated.
    steps = (stored_state(source).step if source else 0) + len(batches)
    recipe = recipe.model_copy(
        update={"run": recipe.run.model_copy(update={"eval_every": 0, "steps": steps})}
    )
    with store.run_lock(run), stop_request() as stop:
        opened = open_run(run, recipe, resume=options.resume, allow_change=options.allow_change)
        if opened.checkpoint is not None and finished(run, opened.recipe):
            view.note(f"{run} is already finished")
            return summarize(run, opened.recipe, stored_state(opened.checkpoint), clock)
        learner = build_learner(opened.recipe)
        recorder = _FitRecorder(run, opened, learner, view, options.command, source=source)
        state, recipe = learner.state, learner.recipe
        batches = _batches([_with_ids(s, learner.policy) for s in segments], recipe.sampler.problems_per_step)
        while state.step < recipe.run.steps:
            batch = weigh(
                recorder.take(batches[state.step - state.first_step]),
                weighting=recipe.em.weighting,
                baseline=recipe.em.baseline,
                current_step=state.policy_step,
                max_age=recipe.em.max_age,
            )
            recorder.keep_rollouts(state.step + 1, flatten(batch), None)
            stats = learner.fit(flatten(batch), view, measure_kl=recipe.em.passes > 1)
            recorder.record(recorder.advance(batch, stats))
            if recorder.end_step(stop, clock, force=options.force):
                return summarize(run, recipe, state, clock)
        recorder.publish_adapter("adapter", {})
        return summarize(run, recipe, state, clock)


#: Groups that make one step, each with the header it came under.
Batch = list[tuple[Group, RolloutHeader]]


def _batches(segments: Sequence[Segment], p: int) -> list[Batch]:
    """Groups of P problems; of rationales drawn in turns, those of a step."""
    groups = [(g, segment.header) for segment in segments for g in group_rationales(segment.rationales)]
    batches: list[Batch] = []
    for key, part in groupby(groups, key=lambda item: (id(item[1]), item[0].step, _in_turns(item[0]))):
        in_turns, found = key[-1], list(part)
        if in_turns:
            batches.append(found)
            continue
        if batches and not _in_turns(batches[-1][0][0]):
            found = batches.pop() + found  # the last ones may be fewer than P
        batches += [found[at : at + p] for at in range(0, len(found), p)]
    return batches


def _in_turns(group: Group) -> bool:
    return group.rationales[0].position is not None


def _scored_segments(path: Path) -> list[Segment]:
    segments = read_rollouts(path)
    check_scored(segments, path)
    return [s for s in segments if s.rationales]


def _with_ids(segment: Segment, policy: Policy) -> Segment:
    """Tokenize rows that came as text, or with ids of another vocabulary.

    A completion that stopped gets the template's end token; a truncated one does not.

    Raises:
        DataError: a row has no prompt.
    """
    ours = policy.tokenizer_sha256
    foreign = bool(segment.header.tokenizer) and segment.header.tokenizer != ours

    def with_ids(r: Rationale) -> Rationale:
        prompt_ids, completion_ids, origin = r.prompt_ids, r.completion_ids, r.origin
        if foreign or not prompt_ids:
            if not (r.prompt or r.question):
                raise DataError("row has no question, no prompt and no ids", f"problem {r.problem_id}")
            r = replace(r, prompt=r.prompt or policy.template.render(r.question))
            prompt_ids = tuple(policy.tokenizer.encode(r.prompt, add_special_tokens=False))
        if foreign or not completion_ids:
            ended, origin = policy.encode_completion(r.completion), "text"
            completion_ids = ended if r.finish_reason == "stop" else ended[:-1]
        return replace(r, prompt_ids=prompt_ids, completion_ids=completion_ids, origin=origin)

    return Segment(replace(segment.header, tokenizer=ours), tuple(map(with_ids, segment.rationales)))


class _FitRecorder(Recorder):
    """A recorder that keeps each step's rows under the headers they came with.

    Two files may contain the same problem and step; under one header they would merge into one group.
    """

    _headers: tuple[RolloutHeader, ...] = ()

    def take(self, groups: Sequence[tuple[Group, RolloutHeader]]) -> list[Group]:
        """The groups of the current step; their rows will be stored under these headers.

        A row's ``policy_step`` counts the steps of the run that drew it. If it equals the current one but
        another adapter drew the row, it is from another run: its age is unknown (-1).
        """
        self._headers = tuple(header for group, header in groups for _ in group.rationales)
        now, adapter = self.learner.state.policy_step, self.learner.policy.adapter_sha256()

        def aged(r: Rationale, header: RolloutHeader) -> Rationale:
            theirs = r.policy_step == now and header.adapter not in (None, adapter)
            return replace(r, policy_step=-1) if theirs else r

        return [
            replace(group, rationales=tuple(aged(r, header) for r in group.rationales))
            for group, header in groups
        ]

    def keep_rollouts(self, step: int, rows: Sequence[Rationale], reward: str | None) -> None:
        """See ``Recorder``; the headers name the reward."""
        pairs = zip(self._headers, rows, strict=True)
        segments = [list(part) for _, part in groupby(pairs, key=lambda pair: id(pair[0]))]
        text = "".join(encode_rollouts(part[0][0], [r for _, r in part]) for part in segments)
        store.write_file(rollout_path(self.run, step), text)
