"""The commands from Python, in a few lines. The command line calls these functions.

    from empg_lite import api

    run = api.run("tiny", seed=0)                    # empg-lite train --recipe tiny --seed 0
    print(run.summary["accuracy_after"])
    policy = api.load_policy(run)                    # empg-lite chat
    print(policy.answer("Ben has 3 pens and buys 4. How many has he?").completion)

Nothing is printed unless you pass a ``view``. Expected failures raise ``empg_lite.core.errors.EmpgError``,
whose text is the line that the command would print. Functions import what they need when they are called,
and torch only after the recipe was found to be valid.

Arguments that mean the same everywhere:

* ``recipe``: a built-in name, a YAML file, or a ``Recipe`` from ``read_recipe``; None means ``tiny``, or the
  recipe of the run at hand. ``overrides`` and ``seed`` change a recipe that is read here.
* ``model``: a run, adapter, checkpoint or model; None means the newest run. A model outside a run needs a
  ``recipe``, which says how to prompt and grade it.
* ``allow_code``: permission to run the file of a ``python:FILE.py`` reward. It is not a sandbox.
* ``view``: receives progress; ``live_view()`` shows it.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

from empg_lite.core.errors import MissingInput, UsageError

if TYPE_CHECKING:
    from empg_lite.core.rationale import Group, Problem, Rationale
    from empg_lite.core.view import View
    from empg_lite.loop.learner import Learner
    from empg_lite.loop.plan import Plan
    from empg_lite.loop.preflight import Preflight
    from empg_lite.loop.train import TrainOptions
    from empg_lite.recipe.schema import Recipe
    from empg_lite.rewards import Grader, UserCode, Verdict
    from empg_lite.run.target import Target
    from empg_lite.tools.chat import Chat
    from empg_lite.tools.check import CheckReport

    RecipeSource: TypeAlias = str | Path | Recipe | None
    ModelSource: TypeAlias = "str | Path | Target | Run | None"

#: Recipe keys and values, ``{"run.steps": 50, "data.path": "mine.jsonl"}``, or strings as for ``--set``.
Overrides = Mapping[str, Any] | Sequence[str]


@dataclass(frozen=True, slots=True)
class Run:
    """A run directory, or the folder of a sweep. Its files are read on each call: a live run can be watched.

    Attributes:
        path: the directory.
        summary: what training returned; empty for a run that was only opened.
    """

    path: Path
    summary: Mapping[str, Any] = field(default_factory=dict)

    @property
    def recipe(self) -> Recipe:
        """Every setting, including what each ``auto`` became."""
        from empg_lite.run.layout import RECIPE

        return read_recipe(self.path / RECIPE)

    def metrics(self) -> list[dict[str, Any]]:
        """One record per step; ``docs/files.md`` lists the names."""
        from empg_lite.run import journal, layout

        return journal.read_metrics(self.path / layout.METRICS)

    def events(self) -> list[dict[str, Any]]:
        """Resumes, skipped steps, warnings."""
        from empg_lite.run import journal, layout

        return journal.read_metrics(self.path / layout.EVENTS)

    def rationales(self, step: int | None = None) -> list[Rationale]:
        """The rationales of a step (None: the last one), with rewards and weights.

        Raises:
            MissingInput: none are stored for it.
        """
        return read_rationales(self, step)[1]


# --- train --------------------------------------------------------------------------------------------


def run(
    recipe: RecipeSource = None,
    output_dir: str | Path | None = None,
    *,
    overrides: Overrides | None = None,
    seed: int | None = None,
    seeds: Sequence[int] = (),
    resume: bool = False,
    force: bool = False,
    max_minutes: float | None = None,
    allow_change: Sequence[str] = (),
    allow_code: bool = False,
    trackers: Sequence[str] = (),
    profile: bool = False,
    command: str = "",
    view: View | None = None,
) -> Run:
    """Train a recipe, as ``empg-lite train`` does.

    Args:
        output_dir: the run directory; None: ``runs/<recipe>-NNN``.
        seeds: train once per seed, into ``output_dir/seed-N``, and write one report. The returned ``Run`` is
            the sweep's folder, with the figures of ``loop.sweep`` as its summary.
        resume: continue the run in ``output_dir``; start it if there is none.
        force: ignore a hopeless preflight, the memory plan, refused sampling settings and a dead signal.
        max_minutes: stop with a checkpoint after this time.
        allow_change: recipe keys that may differ from the resumed run's.
        trackers: also log to these: ``tensorboard``, ``trackio``, ``wandb``.
        profile: write ``profile.json``: where the time went.
        command: recorded in the run's ``recipe.yaml``.

    Raises:
        EmpgError: any expected failure; its class says which.
    """
    from empg_lite.run.trackers import require

    settings, code = _training_recipe(
        recipe, output_dir, overrides, seed, seeds, resume, allow_change, allow_code
    )
    require(trackers)

    from empg_lite.loop.train import TrainOptions

    options = TrainOptions(
        resume=resume,
        force=force,
        max_minutes=max_minutes,
        allow_change=tuple(allow_change),
        command=command,
        code=code,
        profile=profile,
        trackers=tuple(dict.fromkeys(trackers)),
    )
    return _train(settings, _run_name(recipe), output_dir, seeds, options, view)


def _train(
    recipe: Recipe,
    name: str,
    output_dir: str | Path | None,
    seeds: Sequence[int],
    options: TrainOptions,
    view: View | None,
) -> Run:
    """Train one run or a sweep, in every process of a launch."""
    from empg_lite.core.view import View
    from empg_lite.loop.sweep import sweep
    from empg_lite.loop.train import train
    from empg_lite.run.layout import next_run_dir
    from empg_lite.run.parallel import join

    name += "-seeds" if seeds else ""
    with join() as world, view or View() as shown:
        folder = world.once(lambda: next_run_dir(name) if output_dir is None else Path(output_dir))
        shown.note(f"run: {folder}")
        if not seeds:
            return Run(folder, train(recipe, folder, options, shown, world))
        result = sweep(recipe, folder, seeds, options, shown, world)
        page = folder / "report.html"
        result["report"] = world.once(lambda: write_report(folder, page, shown)["report"])
        return Run(folder, result)


def resolve_recipe(
    recipe: RecipeSource = None,
    output_dir: str | Path | None = None,
    *,
    overrides: Overrides | None = None,
    seed: int | None = None,
    seeds: Sequence[int] = (),
    resume: bool = False,
    allow_change: Sequence[str] = (),
) -> Recipe:
    """The recipe that ``run`` would record for the same arguments, as ``empg-lite train --dry-run``.

    Each ``auto`` that does not depend on the machine is filled in; a reward file is pinned by its hash.
    """
    settings, _ = _training_recipe(recipe, output_dir, overrides, seed, seeds, resume, allow_change, None)
    return settings.resolved()


def live_view() -> View:
    """A view for where this runs: one display that is rewritten in a notebook, lines on a console."""
    from empg_lite.tools.view import view_here

    return view_here()


def load_run(path: str | Path | None = None) -> Run:
    """Open an existing run; None: the newest under ``runs/``.

    Raises:
        MissingInput: there is none.
    """
    from empg_lite.run.layout import is_run, newest_run

    folder = Path(path) if path is not None else newest_run()
    if not is_run(folder):
        raise MissingInput("not a run directory", str(folder))
    return Run(folder)


# --- before training ----------------------------------------------------------------------------------


def list_recipes() -> dict[str, str]:
    """The built-in recipes, each with its one-line summary."""
    from empg_lite.recipe.file import builtin_recipes, recipe_summary

    return {name: recipe_summary(path) for name, path in builtin_recipes().items()}


def read_recipe(
    recipe: str | Path | None = None, *, overrides: Overrides | None = None, seed: int | None = None
) -> Recipe:
    """Read and check a recipe.

    Raises:
        RecipeError, MissingInput: naming ``file:line: field`` or the override.
    """
    from empg_lite.recipe.file import load_recipe

    return load_recipe("tiny" if recipe is None else str(recipe), _as_texts(overrides), seed)


def load_problems(recipe: RecipeSource = None, split: str | None = None) -> list[Problem]:
    """The problems of a split (None: the evaluation split).

    Raises:
        DataError, MissingInput: the data cannot be read.
    """
    from empg_lite.data import sources

    section = _recipe(recipe).resolved().data
    return list(sources.load_problems(section, split or section.eval_split))


@dataclass(frozen=True, slots=True)
class CheckResult:
    """What ``check_recipe`` found; ``preflight`` is None unless it was requested."""

    report: CheckReport
    preflight: Preflight | None

    @property
    def ok(self) -> bool:
        """Whether training can start."""
        return self.report.ok and not (self.preflight and self.preflight.hopeless)

    def facts(self) -> dict[str, Any]:
        """As one JSON object."""
        flight = self.preflight and self.preflight.facts()
        return {"ok": self.ok, **asdict(self.report), "preflight": flight}


def check_recipe(
    recipe: RecipeSource = None,
    *,
    preflight: bool = False,
    overrides: Overrides | None = None,
    allow_code: bool = False,
    view: View | None = None,
) -> CheckResult:
    """Check data, prompts, and every gold answer against its own reward, as ``empg-lite check`` does.

    Args:
        preflight: also load the model and sample 16 problems.
    """
    with _grading(_recipe(recipe, overrides), allow_code) as (settings, grader):
        from empg_lite.tools.check import check

        report = check(settings, grader, view)
        if not preflight:
            return CheckResult(report, None)
        from empg_lite.loop.preflight import preflight_recipe

        return CheckResult(report, preflight_recipe(settings, grader, view))


def plan_memory(
    recipe: RecipeSource = None, gpu_memory: str | None = None, *, overrides: Overrides | None = None
) -> Plan:
    """Memory term by term before anything is loaded, as ``empg-lite plan``; ``.fits`` is the verdict.

    Args:
        gpu_memory: a card's size, like ``8GB``; None: this machine.
    """
    from empg_lite.loop.plan import plan_recipe
    from empg_lite.policy.memory.machine import card, this_machine
    from empg_lite.policy.memory.shape import read_shape

    machine = card(gpu_memory) if gpu_memory is not None else this_machine()
    settings = _recipe(recipe, overrides)
    return plan_recipe(settings, read_shape(settings.model.name, settings.model.revision), machine)


def advise_memory(plan: Plan) -> list[str] | None:
    """The smallest change that makes a plan fit, as overrides: [] if it fits, None if no change helps."""
    from empg_lite.loop.plan import advise, as_overrides

    change = advise(plan)
    return None if change is None else as_overrides(change)


def check_install() -> dict[str, Any]:
    """Installed packages against the tested versions, and the machine, as ``empg-lite doctor --json``."""
    from empg_lite.tools.doctor import device, packages

    found, machine = packages(), device()
    table = {f.name: {"installed": f.installed, "wanted": f.wanted, "ok": f.ok} for f in found}
    return {"ok": all(f.ok for f in found), "packages": table, **machine}


# --- grade --------------------------------------------------------------------------------------------


def grade_answer(
    prediction: str, gold: str, reward: str = "math", *, question: str | None = None, allow_code: bool = False
) -> Verdict:
    """The reward of one answer, with its reason, as ``empg-lite grade``.

    Args:
        reward: as ``data.reward``: ``math``, ``gsm8k``, ``exact``, ``python:FILE.py``, ...
        question: the problem's text, for rewards that read it (the options of ``choice``).

    Raises:
        UsageError: an unknown reward, or a file without ``allow_code``.
    """
    from empg_lite.rewards import Grader

    spec, code = _named_reward(reward, allow_code)
    with Grader(code=code) as grader:
        return grader.grade(spec, gold, prediction, question)


def grade_cases(file: str | Path, reward: str = "math", *, allow_code: bool = False) -> Iterator[Verdict]:
    """Grade each line of a JSONL file with ``gold`` and ``prediction``, in order."""
    from empg_lite.rewards import Grader
    from empg_lite.run.rollouts import read_cases

    spec, code = _named_reward(reward, allow_code)
    with Grader(code=code) as grader:
        for gold, prediction in read_cases(Path(file)):
            yield grader.grade(spec, gold, prediction)


def explain_grade(
    verdict: Verdict, prediction: str, reward: str = "math", *, question: str | None = None
) -> list[str]:
    """How a verdict came about, step by step: what was read, by which rule, what was compared."""
    from empg_lite.rewards.explain import explain

    return explain(reward, verdict.gold, prediction, question, verdict=verdict)


def pin_reward(reward: str, *, allow_code: bool = False) -> str:
    """A reward as runs record it: a ``python:`` file by absolute path and SHA-256, others unchanged.

    Raises:
        UsageError: an unknown reward, or a file without ``allow_code``.
    """
    return _named_reward(reward, allow_code)[0]


# --- a trained model ----------------------------------------------------------------------------------


def find_model(
    model: ModelSource = None,
    *,
    recipe: str | Path | None = None,
    overrides: Overrides | None = None,
) -> Target:
    """What a model argument means: its recipe, its run if it has one, and a label."""
    from empg_lite.run.target import Target, resolve_target

    if isinstance(model, Target):
        if recipe is not None or overrides:
            raise UsageError("overrides for a model already found", "model", "pass them to find_model")
        return model
    name = str(model.path) if isinstance(model, Run) else None if model is None else str(model)
    return resolve_target(name, None if recipe is None else str(recipe), _as_texts(overrides))


def evaluate_model(
    model: ModelSource = None,
    *,
    recipe: str | Path | None = None,
    overrides: Overrides | None = None,
    split: str | None = None,
    limit: int | None = None,
    k: int = 0,
    base: bool = False,
    out: str | Path | None = None,
    allow_code: bool = False,
    view: View | None = None,
) -> dict[str, Any]:
    """Greedy accuracy with its 95% interval, as ``empg-lite eval``.

    Args:
        split: None: ``data.eval_split``.
        limit: evaluate at most this many problems.
        k: also draw k samples at temperature 1: pass@k, maj@k.
        base: also evaluate with the adapter off, and compare problem by problem.
        out: folder for the answers; None: ``RUN/eval``.

    Returns:
        What ``empg-lite eval --json`` prints: ``n``, ``pass@1``, ``pass@1_ci95`` (fractions), ...
    """
    target = find_model(model, recipe=recipe, overrides=overrides)
    with _grading(target.recipe, allow_code) as (settings, grader):
        from empg_lite.loop.evaluate import evaluate_target

        return evaluate_target(
            replace(target, recipe=settings),
            grader,
            split=split,
            limit=limit,
            k=k,
            base=base,
            out=None if out is None else Path(out),
            view=view,
        )


def load_policy(
    model: ModelSource = None,
    *,
    recipe: str | Path | None = None,
    overrides: Overrides | None = None,
) -> LoadedPolicy:
    """Load a model to ask it questions."""
    target = find_model(model, recipe=recipe, overrides=overrides)
    from empg_lite.loop.learner import build_learner

    return LoadedPolicy(build_learner(target.recipe))


class LoadedPolicy:
    """A model in memory that samples exactly as it does in training.

    Attributes:
        learner: policy, tokenizer, template and recipe, for what this class does not cover.
    """

    def __init__(self, learner: Learner) -> None:
        self.learner = learner
        self._sampler = learner.sampler()

    def answer(self, question: str, *, temperature: float = 0.0, seed: int = 0) -> Rationale:
        """One rationale, greedy by default. It is not graded: its ``reward`` is None."""
        return self.sample(question, 1, temperature=temperature, seed=seed).rationales[0]

    def sample(
        self, question: str | Problem, samples: int = 8, *, temperature: float = 1.0, seed: int = 0
    ) -> Group:
        """K = ``samples`` rationales of one problem; the same seed draws the same ones.

        Raises:
            DataError: the prompt and the longest answer exceed the model's context.
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


@contextmanager
def open_chat(
    model: ModelSource = None,
    *,
    temperature: float = 0.0,
    max_new_tokens: int | None = None,
    allow_code: bool = False,
) -> Iterator[tuple[Chat, Grader]]:
    """A conversation whose replies are graded, as ``empg-lite chat``: ``chat.ask(problem, grader)``.

    Args:
        temperature: 0 is greedy.
        max_new_tokens: None: the recipe's.
    """
    target = find_model(model)
    with _grading(target.recipe, allow_code) as (settings, grader):
        from empg_lite.tools.chat import Chat

        target = replace(target, recipe=settings)
        yield Chat(target, temperature=temperature, max_new_tokens=max_new_tokens), grader


# --- the loop in parts --------------------------------------------------------------------------------


def sample_rationales(
    recipe: RecipeSource = None,
    out: str | Path = "rollouts.jsonl",
    *,
    source: str | Path | Run | None = None,
    problems: int | None = None,
    append: bool = False,
    force: bool = False,
    allow_code: bool = False,
    overrides: Overrides | None = None,
    view: View | None = None,
) -> dict[str, Any]:
    """E-step only, as ``empg-lite sample``: draw rationales into a file, without rewards.

    With ``sampler.tries`` they are graded as they are drawn, because verdicts decide what is drawn next.

    Args:
        source: the run, checkpoint or adapter to sample from; None: the untrained policy.
        problems: how many to sample; None: ``run.steps`` x P, or one step of a run.
        append: add to a file that was sampled with other arguments.
        force: allow refused sampling settings.
    """
    settings, checkpoint = _policy_source(recipe, source, overrides)
    from empg_lite.loop.offline import SampleOptions, sample

    code = None
    if settings.tries:
        from empg_lite.recipe.reward import pin_reward

        settings, code = pin_reward(settings, allow_code)
    return sample(settings, checkpoint, Path(out), SampleOptions(problems, append, force, code), view)


def score_rationales(
    file: str | Path, reward: str | None = None, *, allow_code: bool = False, view: View | None = None
) -> dict[str, Any]:
    """Grade a rollout file in place, as ``empg-lite score``.

    Args:
        reward: None: the reward in the file's header.
    """
    from empg_lite.tools.rescore import score_file

    named = None if reward is None else pin_reward(reward, allow_code=allow_code)
    return score_file(Path(file), named, view, allow_code=allow_code)


def fit_rationales(
    files: Sequence[str | Path],
    recipe: RecipeSource = None,
    output_dir: str | Path | None = None,
    *,
    source: str | Path | Run | None = None,
    overrides: Overrides | None = None,
    resume: bool = False,
    force: bool = False,
    max_minutes: float | None = None,
    allow_change: Sequence[str] = (),
    command: str = "",
    view: View | None = None,
) -> Run:
    """M-step only, as ``empg-lite fit``: fit scored rationales; nothing is sampled or graded.

    Args:
        output_dir: the run directory; None: ``runs/<recipe>-fit-NNN``.
        source: the run or checkpoint to continue from; None: a fresh adapter.
        resume, force, max_minutes, allow_change, command: as for ``run``.
    """
    settings, _ = _policy_source(recipe, source, overrides)
    from empg_lite.core.view import View
    from empg_lite.loop.offline import fit
    from empg_lite.loop.train import TrainOptions
    from empg_lite.run.layout import next_run_dir

    folder = next_run_dir(f"{_run_name(recipe)}-fit") if output_dir is None else Path(output_dir)
    options = TrainOptions(
        resume=resume,
        force=force,
        max_minutes=max_minutes,
        allow_change=tuple(allow_change),
        command=command,
    )
    with view or View() as shown:
        return Run(folder, fit(settings, [Path(f) for f in files], folder, _path(source), options, shown))


# --- look at runs -------------------------------------------------------------------------------------


def read_rationales(
    source: str | Path | Run | None = None, step: int | None = None
) -> tuple[Path, list[Rationale]]:
    """The rollout file of a run's step (None: the last), or a file itself, and its rationales.

    Raises:
        MissingInput: there is none.
        DataError: it cannot be read.
    """
    from empg_lite.run.layout import find_rollouts

    return find_rollouts(_path(source), step)


def write_report(
    runs: str | Path | Run | Sequence[str | Path | Run] | None = None,
    out: str | Path | None = None,
    view: View | None = None,
) -> dict[str, Any]:
    """One HTML page comparing runs and sweeps, with its figures, as ``empg-lite report``.

    Args:
        runs: None: the newest run.
        out: the page; None: ``report.html`` in the run or sweep, in the current folder for several.
    """
    from empg_lite.run.layout import newest_run, runs_of
    from empg_lite.tools import report

    named = [runs] if isinstance(runs, str | Path | Run) else list(runs or [newest_run()])
    folders = [run.path if isinstance(run, Run) else Path(run) for run in named]
    page = Path(out) if out is not None else (folders[0] if len(folders) == 1 else Path()) / "report.html"
    if page.suffix not in (".html", ".htm"):
        raise UsageError("a report is an HTML page", f"--out {page}", "use a name that ends in .html")
    chosen = [run for folder in folders for run in runs_of(folder)]
    if len({run.resolve() for run in chosen}) < len(chosen):
        raise UsageError("a run is listed twice", "report")
    return report.write_report(chosen, page, view)


def export_run(
    model: ModelSource,
    to: str,
    out: str | Path | None = None,
    *,
    allow_code: bool = False,
    view: View | None = None,
    **options: Any,
) -> dict[str, Any]:
    """Write a run's model in another format, load it again and compare, as ``empg-lite export``.

    Args:
        model: a run, or one of its checkpoints.
        to: a name in ``tools.export.FORMATS``, which also lists the ``options`` of each format.
        out: None: ``RUN/export/FORMAT``.

    Raises:
        UsageError: an unknown format or option, or the model is not part of a run.
        CheckFailed: the export behaves differently from the adapter; nothing was written.
    """
    from empg_lite.tools.export import export

    where = None if out is None else Path(out)
    return export(find_model(model), to, where, allow_code=allow_code, view=view, **options)


# --- what the arguments mean --------------------------------------------------------------------------


def _as_texts(overrides: Overrides | None) -> list[str]:
    """Overrides as ``--set`` takes them; text values are passed through as they are."""
    if isinstance(overrides, Mapping):
        return [f"{k}={v if isinstance(v, str) else json.dumps(v)}" for k, v in overrides.items()]
    return list(overrides or ())


def _path(source: str | Path | Run | None) -> Path | None:
    return source.path if isinstance(source, Run) else None if source is None else Path(source)


def _run_name(recipe: RecipeSource) -> str:
    """What runs of a recipe are called: its name, or its file's. A built-in name may contain a dot."""
    if recipe is not None and not isinstance(recipe, str | Path):
        return "run"
    return re.sub(r"\.ya?ml$", "", Path(recipe or "tiny").name)


def _recipe(recipe: RecipeSource, overrides: Overrides | None = None, seed: int | None = None) -> Recipe:
    if recipe is None or isinstance(recipe, str | Path):
        return read_recipe(recipe, overrides=overrides, seed=seed)
    if overrides or seed is not None:
        raise UsageError("overrides for a recipe that was already read", "recipe", "pass them to read_recipe")
    return recipe


def _training_recipe(
    recipe: RecipeSource,
    output_dir: str | Path | None,
    overrides: Overrides | None,
    seed: int | None,
    seeds: Sequence[int],
    resume: bool,
    allow_change: Sequence[str],
    allow_code: bool | None,
) -> tuple[Recipe, UserCode | None]:
    """The recipe to train, with its reward pinned, and the file that the reward runs.

    Args:
        allow_code: None: the caller will not run it.
    """
    from empg_lite.recipe.reward import pin_reward
    from empg_lite.run.layout import RECIPE, is_run

    if seeds and seed is not None:
        raise UsageError("--seed and --seeds exclude each other", "--seeds", "use only one of them")
    if len(set(seeds)) < len(seeds):
        raise UsageError(f"duplicate seed in {','.join(map(str, seeds))}", "--seeds", "list each seed once")
    if any(not 0 <= n < 2**32 for n in seeds):
        raise UsageError("a seed is out of range", "--seeds", "use whole numbers from 0 to 2**32 - 1")
    if recipe is None and resume and output_dir is not None and is_run(Path(output_dir)):
        recipe = Path(output_dir) / RECIPE
    settings = _recipe(recipe, overrides, seed)
    if seeds:
        settings = settings.model_copy(update={"run": settings.run.model_copy(update={"seed": seeds[0]})})
    repin = "data.reward" in allow_change
    return pin_reward(settings, bool(allow_code), repin=repin, runs=allow_code is not None)


def _policy_source(
    recipe: RecipeSource, source: str | Path | Run | None, overrides: Overrides | None
) -> tuple[Recipe, Path | None]:
    """The recipe, and the run or checkpoint to continue from (None: bare adapter or untrained policy)."""
    from empg_lite.run.layout import RECIPE, is_run, run_of
    from empg_lite.run.target import resolve_target

    path = _path(source)
    if path is None or not (recipe is None or isinstance(recipe, str | Path)):
        return _recipe(recipe, overrides), path
    run = path if is_run(path) else run_of(path)
    if run is None or (
        path != run and path.parent.name != "checkpoints"
    ):  # weights alone: no step, no moments
        named = None if recipe is None else str(recipe)
        return resolve_target(str(source), named, _as_texts(overrides)).recipe, None
    return _recipe(recipe or run / RECIPE, overrides), path


def _named_reward(reward: str, allow_code: bool) -> tuple[str, UserCode | None]:
    """A reward pinned, and the file it runs. An unknown one is refused before any work."""
    from empg_lite.rewards import pin, refuse_code, with_absolute_file

    try:
        spec, code = pin(with_absolute_file(reward, Path.cwd()))
    except ValueError as error:
        raise UsageError(str(error), "--reward") from error
    if code is not None and not allow_code:
        raise refuse_code(code.ref, "--reward", UsageError)
    return spec, code


@contextmanager
def _grading(recipe: Recipe, allow_code: bool) -> Iterator[tuple[Recipe, Grader]]:
    """The recipe with its reward pinned, and a grader for it."""
    from empg_lite.recipe.reward import pin_reward
    from empg_lite.rewards import Grader

    settings, code = pin_reward(recipe, allow_code)
    with Grader(code=code) as grader:
        yield settings, grader
