"""What ``train`` and ``fit`` share: a run directory being written while a learner learns.

The order within a step is what makes a resumption exact: rollouts, fit, validation, metrics line, checkpoint.
Whatever happened after the newest checkpoint happens again, the same.
"""

from __future__ import annotations

import faulthandler
import json
import time
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from empg_lite.core.control import RESUME, Clock, StopRequested
from empg_lite.core.errors import (
    EmpgError,
    GraderUnusable,
    Interrupted,
    NoSignal,
    NumericalStop,
    OutOfMemory,
)
from empg_lite.core.rationale import Group, Problem, Rationale, flatten
from empg_lite.core.view import View
from empg_lite.em import Drift
from empg_lite.loop.estep import estep_metrics, mixture_metrics
from empg_lite.loop.health import FAILURES_STOP, Finding, diagnose, graded_failures
from empg_lite.loop.learner import Learner, build_learner
from empg_lite.loop.mstep import FitStats
from empg_lite.policy.adapter import WEIGHTS, adapter_files
from empg_lite.policy.card import tokenizer_files
from empg_lite.policy.integrity import fingerprint, resolve_model
from empg_lite.policy.memory.profile import probe, profile
from empg_lite.recipe.schema import Recipe
from empg_lite.run import store
from empg_lite.run.checkpoint import TrainState, list_checkpoints, load_checkpoint, save_checkpoint
from empg_lite.run.journal import Journal, read_metrics
from empg_lite.run.layout import METRICS, PROFILE, Opened, compare_environment, rollout_path, write_run_files
from empg_lite.run.parallel import SINGLE, World
from empg_lite.run.rollouts import encode_rollouts, rationale_line
from empg_lite.run.trackers import tracked

#: Steps in a row without any signal, or with a non-finite gradient, after which going on is pointless.
DEAD_STEPS = 10
NONFINITE_STEPS = 3
#: Share of the steps so far with a non-finite gradient above which the same holds.
NONFINITE_SHARE = 0.05
#: Passes above which reuse trades with the learning rate and gains nothing (measured on toy tasks).
MANY_PASSES = 4
#: Times the median step, at which a step counts as stuck.
STUCK, SURELY_STUCK = 10, 60.0  # and no less than so many seconds
#: Of a run on disk: bytes of a metrics record, of a block, and characters of text that a token stands for.
METRICS_BYTES, BLOCK, CHARACTERS = 4000, 4096, 5
#: Steps within which the same finding is not said again.
SILENCE = 10


class Session:
    """A learner and the run directory it is recorded in."""

    def __init__(
        self,
        run: Path,
        opened: Opened,
        journal: Journal,
        view: View,
        command: str,
        source: Path | None = None,
        world: World = SINGLE,
        *,
        refuse: bool = False,
        data: str | None = None,
    ) -> None:
        """``data``: digest of the problems; with another one a run does not resume."""
        self.run, self.journal, self.view = run, journal, view
        self.learner: Learner = build_learner(opened.recipe, world, refuse=refuse)
        self.recipe: Recipe = self.learner.recipe
        self.grader_error: str | None = None  # what the last grader failure said
        self._graph_failure: str | None = None
        m = self.recipe.model
        inputs = {"base model": fingerprint(resolve_model(m.name, m.revision)[0])}
        inputs |= {"training data": data} if data else {}
        changed = compare_environment(run, inputs) if opened.checkpoint else []
        if opened.checkpoint is None:
            journal.cut_back({})
            if source is not None:
                self._restore(source)
                self.learner.state.first_step = self.learner.state.step
                journal.event("started_from", step=self.learner.state.step, checkpoint=str(source))
        else:
            journal.cut_back(self._restore(opened.checkpoint))
            journal.event("resumed", step=self.learner.state.step, checkpoint=opened.checkpoint.name)
            view.note(f"resumed from {opened.checkpoint.name}")
        past = world.once(lambda: read_metrics(run / METRICS)[-SILENCE:])
        self._recent: deque[Mapping[str, Any]] = deque(past, SILENCE)
        if self.recipe.em.passes > MANY_PASSES:
            view.warn(
                f"em.passes is {self.recipe.em.passes}: above {MANY_PASSES} they gain little, and drift"
            )
        for event in opened.events:
            journal.event(**event)
            if event["event"] == "invalid_checkpoint":
                view.warn(f"{event['path']} is damaged: {event['reason']}; it is kept as {event['moved_to']}")
        for event in changed:
            journal.event(**event)
            view.warn(
                f"{event['what']} was {event['old']} when the run was started and is {event['new']} now: "
                "numbers may differ in their last digits"
            )
        self._facts = self.learner.engine_facts()
        for note in self._facts["notes"]:
            view.note(f"without Unsloth's {note}")
        write_run_files(run, self.recipe, command, inputs, self._facts)

    @contextmanager
    def tracked(self, trackers: Sequence[str]) -> Iterator[None]:
        """Within the block every metrics record goes to these trackers too."""
        with tracked(
            trackers, self.run, self.recipe, self.learner.state.step, self.view.warn
        ) as self.journal.sinks:
            yield
        self.journal.sinks = []

    def check_disk_space(self, problems: Sequence[Problem], evaluated: int) -> None:
        """Before the first step: write a trial checkpoint, and ask whether all that is to come fits the disk.

        Every completion is counted at its longest, every file with a block of its own.

        Args:
            problems: those that are sampled for.
            evaluated: how many problems are answered, each greedily and once more.

        Raises:
            StorageError: it does not fit, or nothing can be written there.
        """
        r, policy = self.recipe, self.learner.policy
        adapter = sum(map(len, adapter_files(policy).values()))
        published = adapter + sum(map(len, tokenizer_files(policy).values()))
        one = 3 * adapter  # with Adam's two moments
        sampled = (r.run.steps + 1) * r.sampler.problems_per_step * r.sampler.samples_per_problem
        files = r.run.steps + 6 * (r.run.keep + 1) + 40
        needed = (
            (r.run.keep + 1) * one + 3 * published + (sampled + 2 * evaluated) * self._longest_row(problems)
        )
        needed += r.run.steps * METRICS_BYTES + files * BLOCK
        store.check_disk_space(self.run / "checkpoints", one, needed)

    def _longest_row(self, problems: Sequence[Problem]) -> int:
        """Bytes of a stored rationale that runs to the limit, for a problem of middling length."""
        problem = sorted(problems, key=lambda p: len(p.question))[len(problems) // 2]
        prompt, ids = self.learner.policy.encode_prompt(problem.question)
        n = int(self.recipe.sampler.max_new_tokens)
        longest = Rationale(
            problem_id=problem.id,
            question=problem.question,
            gold=problem.gold,
            prompt=prompt,
            prompt_ids=ids,
            completion="x" * CHARACTERS * n,
            completion_ids=(len(self.learner.policy.tokenizer),) * n,
            finish_reason="length",
            step=self.recipe.run.steps,
            policy_step=self.recipe.run.steps,
            sample_index=0,
            reward=0.0,
            reason="truncated",
            weight=0.1234567890123456,
            meta=problem.meta,
        )
        return len(rationale_line(longest))

    def _restore(self, checkpoint: Path) -> dict[str, int]:
        learner = self.learner
        learner.state, logs = load_checkpoint(checkpoint, learner.policy, learner.optimizer, learner.scaler)
        return logs

    # --- one step ---------------------------------------------------------------------------------

    def fit_groups(
        self,
        groups: Sequence[Group],
        *,
        reward: str | None,
        times: dict[str, float],
        measure_kl: bool,
        extra: Mapping[str, Any],
    ) -> dict[str, Any]:
        """Write the rollouts of the step at hand, fit them, advance the state; returns the metrics record."""
        learner, state = self.learner, self.learner.state
        rows = flatten(groups)
        rate, step = learner.learning_rate(), state.step + 1
        mixture = mixture_metrics(rows, state.policy_step)
        self.keep_rollouts(step, rows, reward)
        started = time.perf_counter()
        budget = state.micro_batch_tokens or self.recipe.optim.micro_batch_tokens
        with self.view.phase("fitting", sum(r.weight != 0 for r in rows) * self.recipe.em.passes) as on_done:
            stats = learner.fit(
                rows, measure_kl=measure_kl, on_done=lambda n: on_done(n * learner.world.size)
            )
        times["fit"] = time.perf_counter() - started
        if stats.micro_batch_tokens != budget:
            self.journal.event("micro_batch_shrunk", step=step, old=budget, new=stats.micro_batch_tokens)
        if stats.skipped_nonfinite:
            self.journal.event("nonfinite_gradient", step=step, skipped=stats.skipped_nonfinite)
        if stats.scale_halvings:
            self.journal.event(
                "loss_scale_halved", step=step, times=stats.scale_halvings, scale=stats.loss_scale
            )
        state.step = step
        state.position += len(groups)
        state.num_tokens += sum(len(r.completion_ids) for r in rows)
        state.seconds += sum(times.values())
        return {
            "step": step,
            **estep_metrics(groups),
            **mixture,
            **extra,
            "loss": stats.loss,
            "grad_norm": stats.grad_norm,
            "learning_rate": rate,
            "num_tokens": state.num_tokens,
            "em/rows_fitted": stats.rows_fitted,
            "em/rows_skipped": len(rows) - stats.rows_fitted,
            "em/updates": stats.updates,
            "em/policy_step": state.policy_step,
            "em/skipped_nonfinite": stats.skipped_nonfinite,
            "em/tokens_computed": stats.tokens_computed,
            **_loss_scale(stats),
            "time/tokens_padded": stats.tokens_padded,
            **_drift_metrics(stats.drift),
            "step_time": sum(times.values()),
            **{f"time/{name}": seconds for name, seconds in times.items()},
            "engine": self._facts["engine"],
            "kernels": ", ".join(self._facts["kernels"]),
            "attention": ", ".join(f"{where} {kernel}" for where, kernel in self._facts["attention"].items()),
            **_memory(learner.held + learner.planned.peak),
        }

    def keep_rollouts(self, step: int, rows: Sequence[Rationale], reward: str | None) -> None:
        """The rationales of a step, by the policy as it is, before they are fitted."""
        header = self.learner.header(reward)
        store.write_file(rollout_path(self.run, step), encode_rollouts(header, rows))

    def record(self, record: Mapping[str, Any]) -> None:
        """Log a step's metrics and show them; what keeps it from teaching is said in words."""
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
                self.view.warn(f"step {step}: {why}; nothing was learned")
        if self.grader_error:  # a user's function that raises, say: seen here before it is frequent
            self.journal.event("grader_error", step=step, error=self.grader_error)
        self.say(step, findings)
        self._recent.append(record)

    def say(self, step: int, findings: Sequence[Finding]) -> None:
        """Each finding once in ``SILENCE`` steps, also across a resumption; step 0 is the preflight."""
        for finding in findings:
            if not any(finding.kind in record.get("health", ()) for record in self._recent):
                self.journal.event("health", step=step, **asdict(finding))
                self.view.warn(f"step {step}: {finding}" if step else str(finding))
        if not step:
            self._recent.append({"health": [f.kind for f in findings]})

    def stop_if_hopeless(self, *, force: bool) -> None:
        """End a run that cannot learn.

        Raises:
            NoSignal: no rationale has earned anything for ``DEAD_STEPS`` steps (passed over by ``force``).
            NumericalStop: ``NONFINITE_STEPS`` gradients in a row were not finite, or as many in all and more
                than ``NONFINITE_SHARE`` of the steps. None of them moved anything.
            GraderUnusable: the grader failed on most answers, two steps in a row.
        """
        state = self.learner.state
        failing = [graded_failures(r) for r in self._recent if "reasons/failed" in r][-2:]
        if len(failing) == 2 and min(failing) > FAILURES_STOP:
            self.checkpoint()
            raise GraderUnusable(
                f"the grader failed on {failing[0]:.0%} and {failing[1]:.0%} of the answers of two steps",
                f"{self.run}, step {state.step}",
                self.grader_error or "events.jsonl and `empg-lite inspect` say on what; then --resume",
            )
        bad = state.skipped_nonfinite
        often = bad >= NONFINITE_STEPS and bad > NONFINITE_SHARE * state.step
        if state.nonfinite_in_a_row >= NONFINITE_STEPS or often:
            self.checkpoint()
            raise NumericalStop(
                f"{bad} gradients of {state.step} steps were not finite, {state.nonfinite_in_a_row} in a row",
                f"{self.run}, step {state.step}",
                "lower optim.learning_rate; the checkpoint holds the weights from before them",
            )
        if state.no_signal >= DEAD_STEPS and not force:
            self.checkpoint()
            raise NoSignal(
                f"no signal in {state.no_signal} steps in a row: every weight was 0",
                f"{self.run}, step {state.step}",
                "look at `empg-lite inspect`: easier problems, a longer sampler.max_new_tokens, a larger "
                "sampler.samples_per_problem; --force goes on regardless",
            )

    @contextmanager
    def saved_when_cut_short(self) -> Iterator[None]:
        """What a signal or a lack of memory leaves half done has changed nothing: the state is saved as is.

        Raises:
            Interrupted: a signal came.
            OutOfMemory, NumericalStop: as it came.
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
        return f"after step {step}, {self.checkpoint().name} is saved" if step else "before the first step"

    def arm_watchdog(self) -> None:
        """A step that takes ``STUCK`` times the median, from now on, says on stderr where it is."""
        times = sorted(r["step_time"] for r in self._recent if "step_time" in r)
        if len(times) >= 3:
            wait = max(SURELY_STUCK, STUCK * times[len(times) // 2])
            faulthandler.dump_traceback_later(wait, file=2)

    def note_graphs(self, failure: str | None) -> None:
        """That a GPU decodes without captured graphs, once."""
        if failure is not None and failure != self._graph_failure:
            self._graph_failure = failure
            self.journal.event("graphs_not_captured", step=self.learner.state.step + 1, why=failure)

    def note_rows(self, rows: int | None) -> None:
        """Rows that the sampler draws at once now, if fewer than before."""
        state, before = self.learner.state, self.learner.state.batch_rows or self.recipe.sampler.batch_rows
        if rows is not None and rows < int(before):
            self.journal.event("sampler_rows_shrunk", step=state.step + 1, old=before, new=rows)
            state.batch_rows = rows

    # --- what stays on disk -----------------------------------------------------------------------

    def checkpoint(self) -> Path:
        """Publish a checkpoint of the state as it is.

        Raises:
            EmpgError: the processes of a launch no longer hold the same adapter.
        """
        learner = self.learner
        if len(set(learner.world.gather(learner.policy.adapter_sha256()))) > 1:
            raise EmpgError(
                "the processes hold different adapters",
                f"{self.run}, step {learner.state.step}",
                "launch on cards of one kind; then --resume goes on from the last checkpoint",
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
        """After every ``save_every`` steps and after the last."""
        step, r = self.learner.state.step, self.recipe.run
        return step % r.save_every == 0 or step >= r.steps

    def publish_adapter(self, folder: str, figures: Mapping[str, Any]) -> None:
        """``adapter/`` or ``best/``: plain PEFT files, tokenizer, template, stop tokens and a card."""
        from empg_lite.policy.card import Provenance, adapter_card

        policy = self.learner.policy
        before = read_figures(self.run, "before") if "pass@1" in figures else None
        card = adapter_card(Provenance(self.recipe, policy.revision, figures, before))
        store.write_dir(
            self.run / folder,
            adapter_files(policy) | tokenizer_files(policy) | {"README.md": card.encode()},
        )

    def write_profile(self, begun: int, seconds: float) -> None:
        """``profile.json``: where the time of the steps after ``begun`` went; probes the device."""
        learner = self.learner
        policy = learner.policy
        steps = (r for r in read_metrics(self.run / METRICS) if "step_time" in r)  # the rest are evaluations
        records = [r for r in steps if r["step"] > begun]
        if not records:
            return
        rates = probe(policy.device, policy.dtype)
        found = profile(records, learner.planned.shape, learner.planned.settings, rates, seconds)
        store.write_file(self.run / PROFILE, json.dumps(found, indent=1))

    def save_figures(self, name: str, figures: Mapping[str, Any]) -> None:
        """``eval/NAME/figures.json``; the answers lie beside it."""
        store.write_file(self.run / "eval" / name / "figures.json", json.dumps(figures, indent=1))


def read_figures(run: Path, name: str) -> dict[str, Any] | None:
    """What ``eval/NAME/figures.json`` says, or None."""
    path = run / "eval" / name / "figures.json"
    return json.loads(path.read_text("utf-8")) if path.is_file() else None


def finished(run: Path, recipe: Recipe) -> bool:
    """The run has reached ``recipe.run.steps`` and written everything that follows the last step."""
    found = list_checkpoints(run)
    if not found or int(found[-1].name[5:]) < recipe.run.steps:
        return False
    if store.file_digest(run / "adapter", WEIGHTS) != store.file_digest(found[-1], WEIGHTS):
        return False  # adapter/ is absent, or that of a shorter run which is being extended
    after = read_figures(run, "after")
    return recipe.run.eval_every == 0 or (after is not None and after["step"] >= recipe.run.steps)


def summarise(run: Path, recipe: Recipe, state: TrainState, clock: Clock) -> dict[str, Any]:
    """The result object of ``train`` and ``fit``."""
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


def _loss_scale(stats: FitStats) -> dict[str, float]:
    """Of a float16 run: the scale after the step, and how often it was halved to get there."""
    if stats.loss_scale is None:
        return {}
    return {"em/loss_scale": stats.loss_scale, "em/loss_scale_halvings": stats.scale_halvings}


def _drift_metrics(drift: Drift | None) -> dict[str, float]:
    if drift is None:
        return {}
    return {
        "em/kl_old": drift.k3,
        "em/kl_old_k1": drift.k1,
        "em/dlogp_right": drift.right,
        "em/dlogp_wrong": drift.wrong,
        "em/logratio_max": drift.largest,
    }


def _memory(predicted: int) -> dict[str, float]:
    """Peak memory so far in MB, of the process and of the card where there is one; and what was planned: on a
    card beside ``peak_gpu_mb``, else beside ``peak_rss_mb``."""
    import resource

    peak = {
        "memory/peak_rss_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
        "memory/predicted_mb": predicted / 2**20,
    }
    if torch.cuda.is_available():
        peak["memory/peak_gpu_mb"] = torch.cuda.max_memory_allocated() / 2**20
    return peak
