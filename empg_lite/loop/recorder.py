"""Records a training run: events, metrics, rollouts, checkpoints; stops a run that cannot learn.

The order within a step makes resuming exact: rollouts, fit, validation, metrics line, checkpoint. Steps
after the newest checkpoint are repeated, on a CPU to the same bytes.
"""

from __future__ import annotations

import faulthandler
import json
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from empg_lite.core.control import RESUME, Clock, StopRequested
from empg_lite.core.errors import EmpgError, GraderUnusable, Interrupted, NoSignal, NumericalStop, OutOfMemory
from empg_lite.core.rationale import Group, Rationale, flatten
from empg_lite.loop.health import FAILURES_STOP, Finding, diagnose, graded_failures
from empg_lite.loop.metrics import (
    estep_metrics,
    fit_metrics,
    memory_metrics,
    mixture_metrics,
    sampling_metrics,
    turn_metrics,
)
from empg_lite.policy.adapter import WEIGHTS, adapter_files
from empg_lite.run import store
from empg_lite.run.checkpoint import list_checkpoints, load_checkpoint, save_checkpoint
from empg_lite.run.journal import Journal, read_metrics
from empg_lite.run.layout import METRICS, PROFILE, Opened, compare_environment, rollout_path, write_run_files
from empg_lite.run.rollouts import encode_rollouts

if TYPE_CHECKING:
    from empg_lite.core.slots import Ended
    from empg_lite.core.view import View
    from empg_lite.loop.estep import Drawn
    from empg_lite.loop.learner import Learner
    from empg_lite.loop.mstep import FitStats
    from empg_lite.recipe.schema import Recipe
    from empg_lite.run.checkpoint import TrainState
    from empg_lite.sampler import Sampler

#: Consecutive steps without signal, or with a non-finite gradient, after which a run stops.
DEAD_STEPS = 10
NONFINITE_STEPS = 3
#: Share of all steps with a non-finite gradient above which a run stops.
NONFINITE_SHARE = 0.05
#: More passes than this gained nothing over a higher learning rate (measured on toy tasks).
MANY_PASSES = 4
#: A step counts as stuck after this multiple of the median step time, and at least this many seconds.
STUCK, SURELY_STUCK = 10, 60.0
#: A finding is not repeated within this many steps.
SILENCE = 10


class Recorder:
    """Writes what a learner does into its run directory, shows it, and ends a run that cannot learn.

    Attributes:
        recipe: the learner's, every ``auto`` decided.
        begun: step at which this process started.
        grader_error: message of the current step's last grader failure.
    """

    def __init__(
        self,
        run: Path,
        opened: Opened,
        learner: Learner,
        view: View,
        command: str = "",
        *,
        source: Path | None = None,
        data: str | None = None,
    ) -> None:
        """Restore the run's checkpoint, or that of ``source``, into the learner.

        Args:
            source: checkpoint that a new run starts from.
            data: digest of the training problems; a run does not resume with others.
        """
        self.run, self.learner, self.view, self.journal = run, learner, view, Journal(run)
        self.recipe: Recipe = learner.recipe
        self.grader_error: str | None = None
        self._graph_failure: str | None = None
        self._restore(opened, source, data, command)
        self.begun = learner.state.step
        self._budget = learner.micro_batch_tokens
        past = learner.world.once(lambda: read_metrics(run / METRICS)[-SILENCE:])
        self._recent: deque[Mapping[str, Any]] = deque(past, SILENCE)

    def _restore(self, opened: Opened, source: Path | None, data: str | None, command: str) -> None:
        from empg_lite.policy.integrity import fingerprint, resolve_model

        learner, journal, m = self.learner, self.journal, self.recipe.model
        inputs = {"base model": fingerprint(resolve_model(m.name, m.revision)[0])}
        inputs |= {"training data": data} if data else {}
        changed = compare_environment(self.run, inputs) if opened.checkpoint else []
        logs: dict[str, int] = {}
        if start := opened.checkpoint or source:
            learner.state, logs = load_checkpoint(start, learner.policy, learner.optimizer, learner.scaler)
        journal.cut_back(logs if opened.checkpoint else {})
        if opened.checkpoint:
            journal.event("resumed", step=learner.state.step, checkpoint=opened.checkpoint.name)
            self.view.note(f"resumed from {opened.checkpoint.name}")
        elif source:
            learner.state.first_step = learner.state.step
            journal.event("started_from", step=learner.state.step, checkpoint=str(source))
        self._announce(opened, changed)
        self._facts = learner.engine_facts()
        for note in self._facts["notes"]:
            of_model = note.startswith(("prompt: ", "tokenizer: "))
            self.view.note(note if of_model else f"without Unsloth's {note}")
        write_run_files(self.run, self.recipe, command, inputs, self._facts)

    def _announce(self, opened: Opened, changed: Sequence[Mapping[str, Any]]) -> None:
        """Record and show what is unusual about this start."""
        if opened.anew:
            self.view.note(f"there is no run to resume in {self.run}: a new one starts")
        if self.recipe.em.passes > MANY_PASSES:
            passes = self.recipe.em.passes
            self.view.warn(f"em.passes is {passes}: more than {MANY_PASSES} gain little and drift")
        for event in opened.events:
            self.journal.event(**event)
            if event["event"] == "invalid_checkpoint":
                what = f"{event['path']} is damaged: {event['reason']}"
                self.view.warn(f"{what}; it is kept as {event['moved_to']}")
        for change in changed:
            self.journal.event(**change)
            self.view.warn(
                f"{change['what']} was {change['old']} when the run started and is {change['new']} now: "
                "numbers may differ in their last digits"
            )

    @contextmanager
    def tracked(self, trackers: Sequence[str]) -> Iterator[None]:
        """Within the block, every metrics record also goes to these trackers."""
        from empg_lite.run.trackers import tracked

        step = self.learner.state.step
        with tracked(trackers, self.run, self.recipe, step, self.view.warn) as self.journal.sinks:
            yield
        self.journal.sinks = []

    # --- one step ---------------------------------------------------------------------------------

    def advance(self, groups: Sequence[Group], stats: FitStats, drawn: Drawn | None = None) -> dict[str, Any]:
        """Advance the state past the step just fitted; returns its metrics, not yet logged.

        Args:
            drawn: the E-step's result, with its timings; None if another command ran the E-step.
        """
        learner, state, rows = self.learner, self.learner.state, flatten(groups)
        rate, step = learner.learning_rate(), state.step + 1
        self._note_fit(step, stats)
        times = {"fit": stats.seconds}
        if drawn:
            times = {"sample": drawn.sample_seconds, "score": drawn.score_seconds} | times
        state.step = step
        ended = self._advance_data(groups, rows)
        state.num_tokens += sum(len(r.completion_ids) for r in rows)
        state.seconds += sum(times.values())
        return {
            "step": step,
            **estep_metrics(groups),
            **(turn_metrics(rows, ended, state.slots) if ended is not None else {}),
            **mixture_metrics(rows, state.policy_step - stats.updates),
            **(sampling_metrics(drawn) if drawn else {}),
            **fit_metrics(stats, rate, state, len(rows)),
            "step_time": sum(times.values()),
            **{f"time/{name}": seconds for name, seconds in times.items()},
            "engine": self._facts["engine"],
            "kernels": ", ".join(self._facts["kernels"]),
            "attention": ", ".join(f"{where} {kernel}" for where, kernel in self._facts["attention"].items()),
            **memory_metrics(learner.held + learner.planned.peak),
        }

    def _advance_data(self, groups: Sequence[Group], rows: Sequence[Rationale]) -> list[Ended] | None:
        """Move the data position, or the slots of rows drawn in turns, whose ended problems it returns."""
        rule, state = self.recipe.tries, self.learner.state
        last = max(r.sample_index for r in rows)
        if rule is None or rows[0].position is None or last >= rule.slots * rule.draws:
            state.position += len(groups)
            return None
        slots = state.slots if len(state.slots) == rule.slots else rule.opened(state.position)
        state.slots, ended = rule.after_step(slots, rows)
        state.position = 1 + max(slot.position for slot in state.slots)
        return ended

    def _note_fit(self, step: int, stats: FitStats) -> None:
        """Events for whatever the fit had to work around."""
        if stats.micro_batch_tokens != self._budget:
            new = stats.micro_batch_tokens
            self.journal.event("micro_batch_shrunk", step=step, old=self._budget, new=new)
            self._budget = new
        if stats.skipped_nonfinite:
            self.journal.event("nonfinite_gradient", step=step, skipped=stats.skipped_nonfinite)
        if stats.scale_halvings:
            times, scale = stats.scale_halvings, stats.loss_scale
            self.journal.event("loss_scale_halved", step=step, times=times, scale=scale)

    def keep_rollouts(self, step: int, rows: Sequence[Rationale], reward: str | None) -> None:
        """Write a step's rationales, before they are fitted."""
        header = self.learner.header(reward)
        store.write_file(rollout_path(self.run, step), encode_rollouts(header, rows))

    def record(self, record: Mapping[str, Any]) -> None:
        """Log a step's metrics and show them, with a diagnosis where there is little to learn from."""
        step, rows = record["step"], record["em/rows_fitted"] + record["em/rows_skipped"]
        limit = self.recipe.sampler.max_new_tokens
        findings = diagnose(record, rows=rows, max_new_tokens=limit, error=self.grader_error)
        record = {**record, "health": [f.kind for f in findings]}
        self.journal.metrics(record)
        self.view.step(record, self.recipe.run.steps)
        if record["em/updates"] == 0:
            why = "no signal: every weight is 0" if record["em/rows_fitted"] == 0 else "gradient not finite"
            self.journal.event("no_update", step=step, why=why)
            if record["em/rows_fitted"]:
                self.view.warn(f"step {step}: {why}; no update was made")
        if self.grader_error:  # e.g. a user's reward function that raises
            self.journal.event("grader_error", step=step, error=self.grader_error)
        self.report(step, findings)
        self._recent.append(record)

    def report(self, step: int, findings: Sequence[Finding]) -> None:
        """Show each finding once in ``SILENCE`` steps, also across a resumption; step 0 is preflight."""
        for finding in findings:
            if not any(finding.kind in record.get("health", ()) for record in self._recent):
                self.journal.event("health", step=step, **asdict(finding))
                self.view.warn(f"step {step}: {finding}" if step else str(finding))
        if not step:
            self._recent.append({"health": [f.kind for f in findings]})

    def stop_if_hopeless(self, *, force: bool) -> None:
        """Stop a run that cannot learn.

        Raises:
            NoSignal: no signal for ``DEAD_STEPS`` steps (unless ``force``).
            NumericalStop: ``NONFINITE_STEPS`` non-finite gradients in a row, or that many in total and more
                than ``NONFINITE_SHARE`` of the steps. None of them changed the weights.
            GraderUnusable: the grader failed on most answers for two steps in a row.
        """
        state = self.learner.state
        failing = [graded_failures(r) for r in self._recent if "reasons/failed" in r][-2:]
        if len(failing) == 2 and min(failing) > FAILURES_STOP:
            self.checkpoint()
            raise GraderUnusable(
                f"the grader failed on {failing[0]:.0%} and {failing[1]:.0%} of the answers in two steps",
                f"{self.run}, step {state.step}",
                self.grader_error or "see events.jsonl and `empg-lite inspect`, then --resume",
            )
        bad = state.skipped_nonfinite
        often = bad >= NONFINITE_STEPS and bad > NONFINITE_SHARE * state.step
        if state.nonfinite_in_a_row >= NONFINITE_STEPS or often:
            self.checkpoint()
            raise NumericalStop(
                f"{bad} gradients of {state.step} steps were not finite, {state.nonfinite_in_a_row} in a row",
                f"{self.run}, step {state.step}",
                "lower optim.learning_rate; the checkpoint has the last good weights",
            )
        if state.no_signal >= DEAD_STEPS and not force:
            self.checkpoint()
            raise NoSignal(
                f"no signal in {state.no_signal} steps in a row: every weight was 0",
                f"{self.run}, step {state.step}",
                "see `empg-lite inspect`; try easier problems, a larger sampler.max_new_tokens or "
                "sampler.samples_per_problem; --force continues anyway",
            )

    @contextmanager
    def saved_when_cut_short(self) -> Iterator[None]:
        """Save the state when a signal or lack of memory cuts a step short; a partial step changes nothing.

        Raises:
            Interrupted: a signal came.
            OutOfMemory, NumericalStop: as raised, with where the run was saved.
        """
        try:
            yield
        except StopRequested as stop:
            raise Interrupted(stop.signum, f"stopped {self._where_saved()}", str(self.run), RESUME) from None
        except (OutOfMemory, NumericalStop) as error:
            if error.between_steps and self.learner.world.size == 1 and self.learner.is_finite():
                kind = "out_of_memory" if isinstance(error, OutOfMemory) else "not_finite"
                self.journal.event(kind, step=self.learner.state.step, what=error.what)
                error.where = f"{error.where}, {self._where_saved()}"
                error.args = (" · ".join((error.what, error.where, error.todo)),)
            raise
        finally:
            faulthandler.cancel_dump_traceback_later()

    def _where_saved(self) -> str:
        step = self.learner.state.step
        return f"after step {step}; {self.checkpoint().name} is saved" if step else "before the first step"

    def arm_watchdog(self) -> None:
        """Dump a traceback to stderr if the coming step takes ``STUCK`` times the median."""
        times = sorted(r["step_time"] for r in self._recent if "step_time" in r)
        if len(times) >= 3:
            wait = max(SURELY_STUCK, STUCK * times[len(times) // 2])
            faulthandler.dump_traceback_later(wait, file=2)

    def note_sampler(self, sampler: Sampler) -> None:
        """Log the sampler's back-offs, and keep a reduced batch size for the rest of the run."""
        state = self.learner.state
        before, rows = state.batch_rows or self.recipe.sampler.batch_rows, sampler.batch_rows
        if rows is not None and rows < int(before):
            self.journal.event("sampler_rows_shrunk", step=state.step + 1, old=before, new=rows)
            state.batch_rows = rows
        failure = sampler.graph_failure
        if failure is not None and failure != self._graph_failure:  # once per cause
            self._graph_failure = failure
            self.journal.event("graphs_not_captured", step=state.step + 1, why=failure)

    def end_step(self, stop: Sequence[int], clock: Clock, *, force: bool, profile: bool = False) -> bool:
        """After a step is recorded: checkpoint if due, and stop the run if it should stop.

        Returns:
            Whether the time limit was reached before the last step.

        Raises:
            Interrupted: a signal came; a checkpoint is saved.
            what ``stop_if_hopeless`` raises.
        """
        world, state, last = self.learner.world, self.learner.state, self._last
        signum, out_of_time = world.first(next(iter(stop), None)), world.any(clock.out_of_time())
        if self.checkpoint_due() or signum or out_of_time:
            saved = self.checkpoint()
        if profile and not last and (signum or out_of_time):
            self.write_profile(clock.seconds())
        if signum and not last:
            what = f"stopped after step {state.step}; {saved.name} is saved"
            raise Interrupted(signum, what, str(self.run), RESUME)
        if out_of_time and not last:
            self.view.note(f"out of time after step {state.step}; {saved.name} is saved; {RESUME}")
            return True
        self.stop_if_hopeless(force=force)
        return False

    @property
    def _last(self) -> bool:
        return self.learner.state.step >= self.recipe.run.steps

    # --- what stays on disk -----------------------------------------------------------------------

    def checkpoint(self) -> Path:
        """Publish a checkpoint of the current state.

        Raises:
            EmpgError: the processes no longer hold the same adapter.
        """
        learner = self.learner
        if len(set(learner.world.gather(learner.policy.adapter_sha256()))) > 1:
            raise EmpgError(
                "the processes hold different adapters",
                f"{self.run}, step {learner.state.step}",
                "use identical cards, then --resume from the last checkpoint",
            )
        return save_checkpoint(
            self.run,
            learner.policy,
            learner.optimizer,
            learner.scaler,
            learner.state,
            logs=self.journal.lengths(),
            keep=self.recipe.run.keep,
        )

    def checkpoint_due(self) -> bool:
        """Whether a checkpoint is due: every ``save_every`` steps and after the last."""
        return self.learner.state.step % self.recipe.run.save_every == 0 or self._last

    def publish_adapter(self, folder: str, figures: Mapping[str, Any]) -> None:
        """Write ``adapter/`` or ``best/``: plain PEFT files, tokenizer, template, stop tokens, model card."""
        from empg_lite.policy.card import Provenance, adapter_card, tokenizer_files

        policy = self.learner.policy
        before = read_figures(self.run, "before") if "pass@1" in figures else None
        card = adapter_card(Provenance(self.recipe, policy.revision, figures, before))
        store.write_dir(
            self.run / folder,
            adapter_files(policy) | tokenizer_files(policy) | {"README.md": card.encode()},
        )

    def write_profile(self, seconds: float) -> None:
        """Write ``profile.json``: where this process's steps spent their time; probes the device."""
        from empg_lite.policy.memory.profile import probe, profile

        learner, policy = self.learner, self.learner.policy
        steps = (r for r in read_metrics(self.run / METRICS) if "step_time" in r)  # the rest are evaluations
        records = [r for r in steps if r["step"] > self.begun]
        if not records:
            return
        rates = probe(policy.device, policy.dtype)
        found = profile(records, learner.planned.shape, learner.planned.settings, rates, seconds)
        store.write_file(self.run / PROFILE, json.dumps(found, indent=1))

    def save_figures(self, name: str, figures: Mapping[str, Any]) -> None:
        """Write ``eval/NAME/figures.json``, next to the answers."""
        store.write_file(self.run / "eval" / name / "figures.json", json.dumps(figures, indent=1))


def read_figures(run: Path, name: str) -> dict[str, Any] | None:
    """Read ``eval/NAME/figures.json``; None if absent."""
    path = run / "eval" / name / "figures.json"
    return json.loads(path.read_text("utf-8")) if path.is_file() else None


def finished(run: Path, recipe: Recipe) -> bool:
    """Whether the run has reached ``recipe.run.steps`` and written everything after the last step."""
    found = list_checkpoints(run)
    if not found or int(found[-1].name[5:]) < recipe.run.steps:
        return False
    if store.file_digest(run / "adapter", WEIGHTS) != store.file_digest(found[-1], WEIGHTS):
        return False  # adapter/ is missing, or from a shorter run being extended
    after = read_figures(run, "after")
    return recipe.run.eval_every == 0 or (after is not None and after["step"] >= recipe.run.steps)


def summarize(run: Path, recipe: Recipe, state: TrainState, clock: Clock) -> dict[str, Any]:
    """The result of ``train`` and ``fit``: steps, seconds, accuracy before and after."""
    before, after = (
        read_figures(run, name) if recipe.run.eval_every else None for name in ("before", "after")
    )
    if after is not None and after["step"] < state.step:
        after = None
    result: dict[str, Any] = {
        "run": str(run),
        "steps": state.step,
        "steps_without_update": state.steps_without_update,
        "seconds": round(state.seconds, 3),
        "seconds_total": round(clock.seconds(), 3),
    }
    for name, figures in (("before", before), ("after", after)):
        result[f"accuracy_{name}"] = figures and figures["pass@1"]
        result[f"t1_accuracy_{name}"] = figures and figures["t1_accuracy"]
    return result
