"""Evaluation before, during and after training."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from empg_lite.data.sources import Splits, subset
from empg_lite.loop.eval_summary import Evaluation, paired
from empg_lite.loop.evaluate import Evaluator
from empg_lite.run.rollouts import read_rollouts

if TYPE_CHECKING:
    from empg_lite.core.rationale import Rationale
    from empg_lite.loop.recorder import Recorder
    from empg_lite.rewards import Grader
    from empg_lite.sampler import Sampler


class Validation:
    """Evaluates a run's policy before, during and after training; ``run.eval_every`` 0 turns it off."""

    def __init__(self, recorder: Recorder, sampler: Sampler, grader: Grader, splits: Splits) -> None:
        self.recorder = recorder
        self.evaluator = Evaluator(recorder.learner, sampler, grader, recorder.view)
        self.every = recorder.recipe.run.eval_every
        self.validation = splits.validation
        self.evaluation = subset(splits.evaluation, recorder.recipe.run.eval_limit)

    def due(self, step: int) -> bool:
        """Whether ``step`` is a multiple of ``run.eval_every``; the last step is validated regardless."""
        return bool(self.every) and step % self.every == 0

    def before(self) -> None:
        """Accuracy of the untrained policy, once per run."""
        if not self.every or self.recorder.learner.state.step:
            return
        figures = self._report("before")
        scalars = {k: v for k, v in figures.items() if k != "step" and not isinstance(v, dict)}
        self.recorder.journal.metrics({"step": 0, **{f"eval/{k}": v for k, v in scalars.items()}})

    def validate(self, *, last: bool) -> dict[str, Any]:
        """Greedy accuracy on held-out training problems, if due; ``best/`` gets the best adapter so far."""
        state = self.recorder.learner.state
        if not self.validation or not (self.due(state.step) or (last and self.every)):
            return {}
        figures = self.evaluator.evaluate(self.validation, label="validating").summary()
        accuracy = figures["pass@1"]
        if state.best_accuracy is None or accuracy > state.best_accuracy:
            state.best_accuracy, state.best_step = accuracy, state.step
            self.recorder.publish_adapter("best", {"validation accuracy": accuracy})
        behaviors = {f"eval/behavior/{name}": share for name, share in figures["behaviors"].items()}
        measured = {
            "eval/accuracy": accuracy,
            "eval/n": figures["n"],
            "eval/mean_length": figures["mean_length"],
        }
        return {**measured, **behaviors}

    def after(self) -> dict[str, Any]:
        """Accuracy of the trained policy on the same problems as before; {} without evaluation."""
        return self._report("after") if self.every else {}

    def _report(self, name: str) -> dict[str, Any]:
        recorder = self.recorder
        folder = recorder.run / "eval" / name
        evaluation = self.evaluator.evaluate(
            self.evaluation,
            samples=1,
            label=f"evaluating {name} training",
            folder=folder,
            replace_other=True,  # from a shorter run being extended
        )
        figures = {
            "step": recorder.learner.state.step,
            "split": recorder.recipe.data.eval_split,
            **evaluation.summary(),
        }
        if name == "after" and (before := self._before(evaluation)):
            figures["paired"] = paired(before, evaluation.greedy)
        recorder.save_figures(name, figures)
        low, high = figures["pass@1_ci95"]
        recorder.view.note(
            f"{name} training: greedy accuracy {figures['pass@1']:.1%} [{low:.1%}, {high:.1%}] "
            f"of {figures['n']}, T=1 {figures['t1_accuracy']:.1%}, length {figures['mean_length']:.0f}"
        )
        return figures

    def _before(self, after: Evaluation) -> list[Rationale]:
        """The greedy answers to the same problems before training, in order; [] if there are none."""
        path = self.recorder.run / "eval" / "before" / "greedy.jsonl"
        found = {r.problem_id: r for r in read_rollouts(path)[0].rationales} if path.is_file() else {}
        same = found.keys() >= {r.problem_id for r in after.greedy}  # not if run.eval_limit changed
        return [found[r.problem_id] for r in after.greedy] if same else []
