"""The commands from Python, in a few lines.

    from empg_lite import api

    run = api.run("tiny", seed=0)                    # empg-lite train --recipe tiny --seed 0
    print(run.summary["accuracy_after"])
    policy = api.load_policy(run)                    # empg-lite chat
    print(policy.answer("Ben has 3 pens and buys 4. How many has he?").completion)

Nothing is printed unless a ``view`` is given. Errors are exceptions (``empg_lite.core.errors``) whose text is
the line that the command would end with. Every function imports what it needs when it is called.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from empg_lite.core.errors import MissingInput, UsageError

if TYPE_CHECKING:
    from empg_lite.core.rationale import Group, Problem, Rationale
    from empg_lite.core.view import View
    from empg_lite.loop.learner import Learner
    from empg_lite.loop.plan import Plan
    from empg_lite.recipe.schema import Recipe
    from empg_lite.rewards import Verdict
    from empg_lite.run.target import Target

__all__ = [
    "LoadedPolicy",
    "Run",
    "evaluate_model",
    "export_run",
    "fit_rationales",
    "grade_answer",
    "live_view",
    "load_policy",
    "load_problems",
    "load_run",
    "plan_memory",
    "read_recipe",
    "run",
    "sample_rationales",
    "score_rationales",
    "write_report",
]

#: Recipe keys and their values: ``{"run.steps": 50, "data.path": "mine.jsonl"}``.
Overrides = Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Run:
    """A run directory, read anew at each question: one that is still going on can be watched.

    Attributes:
        path: the directory.
        summary: what ``train`` or ``fit`` returned; empty for a run that was only opened.
    """

    path: Path
    summary: Mapping[str, Any] = field(default_factory=dict)

    @property
    def recipe(self) -> Recipe:
        """Every setting, also what ``auto`` became."""
        from empg_lite.recipe.file import load_recipe
        from empg_lite.run.layout import RECIPE

        return load_recipe(str(self.path / RECIPE))

    def metrics(self) -> list[dict[str, Any]]:
        """One record a step; the names are listed in ``docs/files.md``."""
        from empg_lite.run.journal import read_metrics
        from empg_lite.run.layout import METRICS

        return read_metrics(self.path / METRICS)

    def events(self) -> list[dict[str, Any]]:
        """Resumes, skipped steps, warnings."""
        from empg_lite.run.journal import read_metrics
        from empg_lite.run.layout import EVENTS

        return read_metrics(self.path / EVENTS)

    def rationales(self, step: int | None = None) -> list[Rationale]:
        """What was sampled for a step, with rewards and weights; None: for the last one.

        Raises:
            MissingInput: nothing is stored for it.
        """
        from empg_lite.run.layout import find_rollouts

        return find_rollouts(self.path, step)[1]


def run(
    recipe: str | Path | Recipe = "tiny",
    output_dir: str | Path | None = None,
    *,
    overrides: Overrides | None = None,
    seed: int | None = None,
    resume: bool = False,
    force: bool = False,
    max_minutes: float | None = None,
    allow_code: bool = False,
    view: View | None = None,
) -> Run:
    """Train by a recipe, as ``empg-lite train`` does.

    Args:
        recipe: a built-in name, a YAML file, or a recipe from ``read_recipe``.
        output_dir: the run directory; None: ``runs/<recipe>-NNN``.
        overrides, seed: changes to the recipe; not beside a recipe that was read already.
        resume: go on where the run in ``output_dir`` stopped; one that has none begins.
        force: pass preflight, the memory plan, refused sampling settings and the dead-signal stop.
        max_minutes: end with a checkpoint after so long.
        allow_code: let a reward ``python:FILE.py`` run that file.
        view: told of every step; None: nobody. ``live_view()`` shows it.

    Raises:
        EmpgError: anything expected; its class says what.
    """
    from empg_lite.core.view import View
    from empg_lite.loop.train import TrainOptions, train
    from empg_lite.recipe.reward import pin_reward
    from empg_lite.run.layout import next_run_dir

    settings = _recipe(recipe, overrides, seed)
    name = Path(recipe).stem if isinstance(recipe, Path) else recipe if isinstance(recipe, str) else "run"
    folder = Path(output_dir) if output_dir is not None else next_run_dir(Path(name).name)
    settings, code = pin_reward(settings, allow_code)
    options = TrainOptions(resume, force, max_minutes, code=code)
    with view or View() as shown:
        return Run(folder, train(settings, folder, options, shown))


def live_view() -> View:
    """The view that suits where this runs: one display of a notebook, rewritten, or lines on the console."""
    from empg_lite.core.view import view_here

    return view_here()


def load_run(path: str | Path | None = None) -> Run:
    """A run that was made before; None: the newest under ``runs/``.

    Raises:
        MissingInput: there is none.
    """
    from empg_lite.run.layout import is_run, newest_run

    folder = Path(path) if path is not None else newest_run()
    if not is_run(folder):
        raise MissingInput("not a run directory", str(folder))
    return Run(folder)


def read_recipe(
    recipe: str | Path = "tiny", *, overrides: Overrides | None = None, seed: int | None = None
) -> Recipe:
    """A checked recipe, from a built-in name or a YAML file.

    Raises:
        RecipeError, MissingInput: naming ``file:line: field`` or the override.
    """
    from empg_lite.recipe.file import load_recipe

    return load_recipe(str(recipe), _as_text(overrides), seed)


def load_problems(recipe: str | Path | Recipe, split: str | None = None) -> list[Problem]:
    """The problems of a split (None: the one that accuracy is reported on).

    Raises:
        DataError, MissingInput: the data cannot be read.
    """
    from empg_lite.data import sources as data

    section = _recipe(recipe, None, None).resolved().data
    return list(data.load_problems(section, split or section.eval_split))


def evaluate_model(
    model: str | Path | Run | None = None,
    *,
    recipe: str | Path | None = None,
    overrides: Overrides | None = None,
    split: str | None = None,
    limit: int | None = None,
    k: int = 0,
    base: bool = False,
    allow_code: bool = False,
    view: View | None = None,
) -> dict[str, Any]:
    """Greedy accuracy with its 95% interval, as ``empg-lite eval`` finds it.

    Args:
        model: a run, an adapter or a model (then with ``recipe``); None: the newest run.
        k: also draw k samples at temperature 1: pass@k, maj@k.
        base: also evaluate with the adapter off, and compare problem by problem.

    Returns:
        What ``empg-lite eval --json`` prints: ``n``, ``pass@1``, ``pass@1_ci95`` (fractions), ...
    """
    from dataclasses import replace

    from empg_lite.loop.evaluate import evaluate_target
    from empg_lite.recipe.reward import pin_reward
    from empg_lite.rewards import Grader

    target = _target(model, recipe, overrides)
    settings, code = pin_reward(target.recipe, allow_code)
    with Grader(code=code) as grader:
        target = replace(target, recipe=settings)
        return evaluate_target(target, grader, split=split, limit=limit, k=k, base=base, view=view)


def load_policy(
    model: str | Path | Run | None = None,
    *,
    recipe: str | Path | None = None,
    overrides: Overrides | None = None,
) -> LoadedPolicy:
    """Load a run's model, an adapter or a base model, to ask it things.

    Args:
        model: as for ``evaluate_model``.
    """
    from empg_lite.loop.learner import build_learner

    return LoadedPolicy(build_learner(_target(model, recipe, overrides).recipe))


class LoadedPolicy:
    """A model in memory that samples as it does in training.

    Attributes:
        learner: policy, tokenizer, template and recipe, for those who want to go below this.
    """

    def __init__(self, learner: Learner) -> None:
        self.learner = learner
        self._sampler = learner.sampler()

    def answer(self, question: str, *, temperature: float = 0.0, seed: int = 0) -> Rationale:
        """One rationale, greedy by default; its ``reward`` is None: nothing is graded."""
        return self.sample(question, 1, temperature=temperature, seed=seed).rationales[0]

    def sample(
        self, question: str | Problem, samples: int = 8, *, temperature: float = 1.0, seed: int = 0
    ) -> Group:
        """K = ``samples`` rationales of one problem; the same seed draws the same ones again.

        Raises:
            DataError: the prompt and the longest answer do not fit the model's context.
        """
        from empg_lite.core.rationale import Problem
        from empg_lite.loop import estep
        from empg_lite.sampler import Decoding
        from empg_lite.tools.chat import CHAT_STEP

        if isinstance(question, str):
            question = Problem.asked(question)
        learner = self.learner
        decoding = Decoding(learner.recipe.sampler.max_new_tokens, temperature=temperature)
        learner.require_room(question.question, decoding.max_new_tokens)
        drawn = estep.sample_rationales(
            learner.policy,
            self._sampler,
            [question],
            decoding,
            samples=samples,
            seed=seed,
            step=CHAT_STEP,
            policy_step=learner.state.policy_step,
        )
        return drawn.groups[0]

    def as_base(self) -> AbstractContextManager[None]:
        """``with policy.as_base(): ...`` asks the base model: the adapter is off inside."""
        return self.learner.policy.reference()


def grade_answer(
    prediction: str, gold: str, reward: str = "math", *, question: str | None = None, allow_code: bool = False
) -> Verdict:
    """The reward of an answer, and why, as ``empg-lite grade`` says it.

    Args:
        reward: as ``data.reward``: ``math``, ``gsm8k``, ``exact``, ``python:FILE.py``, ...
        question: the problem's text, for rewards that read it (the options of ``choice``).

    Raises:
        UsageError: an unknown reward, or a file that was not allowed to run.
    """
    from empg_lite.rewards import Grader, pin, refuse_code

    try:
        spec, code = pin(reward)
    except ValueError as error:
        raise UsageError(str(error), "reward") from error
    if code is not None and not allow_code:
        raise refuse_code(code.ref, "reward", UsageError)
    with Grader(code=code) as grader:
        return grader.grade(spec, gold, prediction, question)


def sample_rationales(
    recipe: str | Path | Recipe,
    out: str | Path,
    *,
    source: str | Path | Run | None = None,
    problems: int | None = None,
    overrides: Overrides | None = None,
    view: View | None = None,
) -> dict[str, Any]:
    """E-step only, as ``empg-lite sample``: rationales into a file, without rewards.

    Args:
        source: the run or checkpoint whose policy samples; None: the untrained one.
        problems: how many to draw for; None: ``run.steps`` x P, or one step of a run.
    """
    from empg_lite.loop.offline import SampleOptions, sample

    return sample(_recipe(recipe, overrides, None), _path(source), Path(out), SampleOptions(problems), view)


def score_rationales(
    file: str | Path, reward: str | None = None, *, allow_code: bool = False, view: View | None = None
) -> dict[str, Any]:
    """Grade what a rollout file holds, in place, as ``empg-lite score``."""
    from empg_lite.tools.rescore import score_file

    return score_file(Path(file), reward, view, allow_code=allow_code)


def fit_rationales(
    files: Sequence[str | Path],
    recipe: str | Path | Recipe,
    output_dir: str | Path,
    *,
    source: str | Path | Run | None = None,
    overrides: Overrides | None = None,
    resume: bool = False,
    view: View | None = None,
) -> Run:
    """M-step only, as ``empg-lite fit``: fit scored rationales; nothing is sampled or graded.

    Args:
        source: the run to go on from; None: a fresh adapter.
    """
    from empg_lite.loop.offline import fit
    from empg_lite.loop.train import TrainOptions

    folder, options = Path(output_dir), TrainOptions(resume=resume)
    settings = _recipe(recipe, overrides, None)
    return Run(folder, fit(settings, [Path(f) for f in files], folder, _path(source), options, view))


def plan_memory(
    recipe: str | Path | Recipe, gpu_memory: str | None = None, *, overrides: Overrides | None = None
) -> Plan:
    """Memory term by term before anything is loaded, as ``empg-lite plan``; ``.fits`` is the verdict.

    Args:
        gpu_memory: a card's size like ``8GB``; None: this machine as it is.
    """
    from empg_lite.loop.plan import plan_recipe
    from empg_lite.policy.memory.machine import card, this_machine
    from empg_lite.policy.memory.shape import read_shape

    settings = _recipe(recipe, overrides, None)
    machine = card(gpu_memory) if gpu_memory is not None else this_machine()
    return plan_recipe(settings, read_shape(settings.model.name, settings.model.revision), machine)


def write_report(runs: str | Path | Run | Sequence[str | Path | Run], out: str | Path) -> dict[str, Any]:
    """One HTML page of a run, or of several (sweeps too) beside each other, as ``empg-lite report``."""
    from empg_lite.run.layout import runs_of
    from empg_lite.tools import report

    several = [runs] if isinstance(runs, str | Path | Run) else list(runs)
    folders = [run.path if isinstance(run, Run) else Path(run) for run in several]
    return report.write_report([run for folder in folders for run in runs_of(folder)], Path(out))


def export_run(
    model: str | Path | Run,
    to: str,
    out: str | Path,
    *,
    allow_code: bool = False,
    view: View | None = None,
    **options: str,
) -> dict[str, Any]:
    """Write a run's model in another form, load it again and compare, as ``empg-lite export``.

    Args:
        model: a run, or a checkpoint of one.
        to: ``adapter``, ``merged``, ``gguf``, or ``sft-dataset``.
        options: of that form: ``dtype`` and ``onto`` of ``merged``, ``kind`` of ``gguf``.

    Raises:
        CheckFailed: what was written acts otherwise; it is gone.
    """
    from dataclasses import replace

    from empg_lite.recipe.reward import pin_reward
    from empg_lite.rewards import Grader
    from empg_lite.tools import export

    target = _target(model, None, None)
    if to == "sft-dataset" and target.run is not None:
        return export.export_sft(target.run, Path(out))
    forms = {"adapter": export.export_adapter, "merged": export.export_merged, "gguf": export.export_gguf}
    if to not in forms:
        raise UsageError(f"unknown form {to!r}", "to", f"one of {', '.join([*forms, 'sft-dataset'])}")
    settings, code = pin_reward(target.recipe, allow_code)
    with Grader(code=code) as grader:
        return forms[to](replace(target, recipe=settings), Path(out), grader, view, **options)


# --- what the arguments mean --------------------------------------------------------------------------


def _as_text(overrides: Overrides | None) -> list[str]:
    """Overrides as ``--set`` takes them; text goes as it is."""
    return [f"{k}={v if isinstance(v, str) else json.dumps(v)}" for k, v in (overrides or {}).items()]


def _recipe(recipe: str | Path | Recipe, overrides: Overrides | None, seed: int | None) -> Recipe:
    if isinstance(recipe, str | Path):
        return read_recipe(recipe, overrides=overrides, seed=seed)
    if overrides or seed is not None:
        raise UsageError("overrides beside a recipe that was read", "recipe", "give them to read_recipe")
    return recipe


def _path(source: str | Path | Run | None) -> Path | None:
    return source.path if isinstance(source, Run) else None if source is None else Path(source)


def _target(model: str | Path | Run | None, recipe: str | Path | None, overrides: Overrides | None) -> Target:
    from empg_lite.run.target import resolve_target

    name = _path(model) if not isinstance(model, str) else model
    return resolve_target(
        None if name is None else str(name), None if recipe is None else str(recipe), _as_text(overrides)
    )
