"""Evaluation before, during and after training."""

from __future__ import annotations

from typing import Any

from empg_lite.core.rationale import Rationale
from empg_lite.data.sources import Splits, subset
from empg_lite.loop.eval_summary import Evaluation, paired
from empg_lite.loop.evaluate import Examiner
from empg_lite.loop.recorder import Session
from empg_lite.rewards import Grader
from empg_lite.run.rollouts import read_rollouts
from empg_lite.sampler import Sampler


class Tester:
    """Measures the policy of a session. ``run.eval_every`` 0 switches all of it off."""

    def __init__(self, session: Session, sampler: Sampler, grader: Grader, splits: Splits) -> None:
        self.session = session
        self.examiner = Examiner(session.learner, sampler, grader, session.view)
        self.every = session.recipe.run.eval_every
        self.validation = splits.validation
        self.evaluation = subset(splits.evaluation, session.recipe.run.eval_limit)

    def due(self, step: int) -> bool:
        """Is the policy measured after this step?"""
        return bool(self.every) and step % self.every == 0

    def before(self) -> None:
        """Accuracy of the untrained policy, once a run."""
        if not self.every or self.session.learner.state.step:
            return
        figures = self._report("before")
        scalars = {k: v for k, v in figures.items() if k != "step" and not isinstance(v, dict)}
        self.session.journal.metrics({"step": 0, **{f"eval/{k}": v for k, v in scalars.items()}})

    def validate(self, *, force: bool) -> dict[str, Any]:
        """Greedy accuracy on held-out training rows, where due; the best adapter so far goes to ``best/``."""
        state = self.session.learner.state
        if not self.validation or not (self.due(state.step) or (force and self.every)):
            return {}
        figures = self.examiner.evaluate(self.validation, label="validating").summary()
        accuracy = figures["pass@1"]
        if state.best_accuracy is None or accuracy > state.best_accuracy:
            state.best_accuracy, state.best_step = accuracy, state.step
            self.session.publish_adapter("best", {"validation accuracy": accuracy})
        behaviors = {f"eval/behavior/{name}": share for name, share in figures["behaviors"].items()}
        measured = {
            "eval/accuracy": accuracy,
            "eval/n": figures["n"],
            "eval/mean_length": figures["mean_length"],
        }
        return {**measured, **behaviors}

    def after(self) -> dict[str, Any]:
        """Accuracy of the trained policy on the same rows as before; {} without evaluation."""
        return self._report("after") if self.every else {}

    def _report(self, name: str) -> dict[str, Any]:
        session = self.session
        folder = session.run / "eval" / name
        evaluation = self.examiner.evaluate(
            self.evaluation,
            samples=1,
            label=f"evaluating {name} training",
            folder=folder,
            replace_other=True,  # of a shorter run that is being extended
        )
        figures = {
            "step": session.learner.state.step,
            "split": session.recipe.data.eval_split,
            **evaluation.summary(),
        }
        if name == "after" and (before := self._before(evaluation)):
            figures["paired"] = paired(before, evaluation.greedy)
        session.save_figures(name, figures)
        low, high = figures["pass@1_ci95"]
        session.view.note(
            f"{name} training: greedy accuracy {figures['pass@1']:.1%} [{low:.1%}, {high:.1%}] "
            f"of {figures['n']}, T=1 {figures['t1_accuracy']:.1%}, length {figures['mean_length']:.0f}"
        )
        return figures

    def _before(self, after: Evaluation) -> list[Rationale]:
        """The greedy answers to the same problems before training, in the same order; [] without them."""
        path = self.session.run / "eval" / "before" / "greedy.jsonl"
        found = {r.problem_id: r for r in read_rollouts(path)[0].rationales} if path.is_file() else {}
        same = found.keys() >= {r.problem_id for r in after.greedy}  # other rows where run.eval_limit changed
        return [found[r.problem_id] for r in after.greedy] if same else []
