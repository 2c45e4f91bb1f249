"""Commands that train: train, sample, score, fit, eval."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from empg_lite.cli.options import (
    REWARDS,
    AllowChangeOption,
    AllowCodeOption,
    DebugOption,
    ForceOption,
    JsonOption,
    MaxMinutesOption,
    Output,
    OutputDirOption,
    RecipeOption,
    ResumeOption,
    SeedOption,
    SetOption,
    TargetArgument,
    TrackOption,
    command_line,
    reward_option,
)

if TYPE_CHECKING:
    from empg_lite.recipe.schema import Recipe


def register(app: typer.Typer) -> None:
    """Add the commands of this module."""
    for command in (train, sample, score, fit):
        app.command()(command)
    app.command("eval")(evaluate)


def train(
    recipe: RecipeOption = None,
    output_dir: OutputDirOption = None,
    max_steps: Annotated[
        int | None, typer.Option(min=1, help="Shorthand for run.steps.", show_default=False)
    ] = None,
    max_minutes: MaxMinutesOption = None,
    resume: ResumeOption = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print the resolved recipe and stop.")] = False,
    force: ForceOption = False,
    overrides: SetOption = None,
    seed: SeedOption = None,
    seeds: Annotated[
        str | None,
        typer.Option(
            "--seeds",
            metavar="N,N,...",
            help="Train once for each seed, into DIR/seed-N.",
            show_default=False,
        ),
    ] = None,
    allow_change: AllowChangeOption = None,
    allow_code: AllowCodeOption = False,
    track: TrackOption = None,
    profile: Annotated[
        bool, typer.Option("--profile", help="At the end, say where the time went; also RUN/profile.json.")
    ] = False,
    as_json: JsonOption = False,
    debug: DebugOption = False,
) -> None:
    """Train by a recipe: sample, score, fit; evaluate before and after."""
    from empg_lite.recipe.file import dump_recipe, load_recipe
    from empg_lite.recipe.reward import pin_reward
    from empg_lite.run.layout import RECIPE, is_run, next_run_dir

    out = Output(as_json)
    several = _seeds(seeds, seed)
    changes = [*(overrides or []), *([f"run.steps={max_steps}"] if max_steps else [])]
    name = recipe
    if recipe is None and resume and output_dir is not None and is_run(output_dir):
        name = str(output_dir / RECIPE)  # the run knows its own recipe
    plan = load_recipe(name or "tiny", changes, several[0] if several else seed)
    repin = "data.reward" in (allow_change or ())
    plan, code = pin_reward(plan, allow_code, repin=repin, runs=not dry_run)
    if dry_run:
        resolved = plan.resolved()
        if as_json:
            out.raw(resolved.model_dump(mode="json"))
        else:
            typer.echo(dump_recipe(resolved), nl=False)
        return
    from empg_lite.loop.train import TrainOptions
    from empg_lite.loop.train import train as run_training
    from empg_lite.run import trackers
    from empg_lite.run.parallel import join

    trackers.require(track or ())
    options = TrainOptions(
        resume,
        force,
        max_minutes,
        tuple(allow_change or ()),
        command_line(),
        code,
        profile,
        tuple(dict.fromkeys(track or ())),
    )
    with out.guarded(), join() as world, out.live_view() as view:
        title = _run_name(name) + ("-seeds" if several else "")
        run = world.once(lambda: output_dir or next_run_dir(title))
        out.print(f"run: {run}", markup=False, highlight=False)
        if several:
            from empg_lite.cli.sweep_table import show_sweep
            from empg_lite.loop.sweep import sweep

            result = sweep(plan, run, several, options, view, world)
            if world.main:
                from empg_lite.run.layout import runs_of
                from empg_lite.tools.report import write_report

                result["report"] = write_report(runs_of(run), run / "report.html", view)["report"]
                out.line(result)
                show_sweep(out, result)
            return
        result = run_training(plan, run, options, view, world)
        out.line(result)
        _say_result(out, result, run)
        if profile:
            from empg_lite.cli.profile_table import show_profile

            show_profile(out, run)


def _seeds(text: str | None, seed: int | None) -> list[int]:
    """The seeds of ``--seeds``; none where it was not said.

    Raises:
        UsageError: they are not whole numbers, all different, or ``--seed`` was said too.
    """
    from empg_lite.core.errors import UsageError

    if text is None:
        return []
    if seed is not None:
        raise UsageError("--seed and --seeds together", "--seeds", "say one of them")
    words = [word.strip() for word in text.split(",")]
    if not all(word.isdecimal() and word.isascii() and int(word) < 2**32 for word in words):
        raise UsageError(f"{text!r} is no list of seeds", "--seeds", "write it like 0,1,2; each below 2**32")
    if len({int(word) for word in words}) < len(words):
        raise UsageError(f"a seed stands twice in {text!r}", "--seeds", "each makes a folder of its own")
    return [int(word) for word in words]


def _run_name(recipe: str | None) -> str:
    """What runs of a recipe are called: its name, or its file's. A built-in name may hold a dot."""
    return re.sub(r"\.ya?ml$", "", Path(recipe or "tiny").name)


def _say_result(out: Output, result: dict[str, Any], run: Path) -> None:
    if out.as_json:
        return
    before, after = result["accuracy_before"], result["accuracy_after"]
    if isinstance(before, float) and isinstance(after, float):
        out.print(
            f"greedy accuracy {before:.1%} -> {after:.1%} · "
            f"T=1 accuracy {result['t1_accuracy_before']:.1%} -> {result['t1_accuracy_after']:.1%} · "
            f"{result['steps']} steps, {result['seconds']:.0f} s of training",
            style="bold",
            highlight=False,
        )
    out.print(f"talk to it: empg-lite chat {run}", markup=False, highlight=False)


def sample(
    source: Annotated[
        str | None,
        typer.Argument(
            metavar="[RUN|ADAPTER]", help="Policy to sample from; default: untrained.", show_default=False
        ),
    ] = None,
    recipe: RecipeOption = None,
    out_file: Annotated[Path, typer.Option("--out", help="Rollout file to write or complete.")] = Path(
        "rollouts.jsonl"
    ),
    problems: Annotated[
        int | None, typer.Option(min=1, help="Problems to draw for.", show_default=False)
    ] = None,
    append: Annotated[
        bool, typer.Option("--append", help="Add to a file sampled with other arguments.")
    ] = False,
    force: ForceOption = False,
    overrides: SetOption = None,
    seed: SeedOption = None,
    as_json: JsonOption = False,
    debug: DebugOption = False,
) -> None:
    """E-step only: draw rationales into a file, without rewards. Repeating it completes the file."""
    plan, run = _policy_of(source, recipe, overrides, seed)
    from empg_lite.loop.offline import SampleOptions
    from empg_lite.loop.offline import sample as draw

    out = Output(as_json)
    with out.guarded():
        result = draw(plan, run, out_file, SampleOptions(problems, append, force), out.view())
        out.line(result)
        out.print(f"{result['rationales']} rationales in {out_file} ({result['new']} new)", markup=False)


def _policy_of(
    source: str | None, recipe: str | None, overrides: list[str] | None, seed: int | None
) -> tuple[Recipe, Path | None]:
    """Recipe and run (None: bare adapter or untrained policy) that RUN|ADAPTER and the options mean."""
    from empg_lite.recipe.file import load_recipe
    from empg_lite.run.layout import RECIPE, is_run, run_of
    from empg_lite.run.target import resolve_target

    path = Path(source) if source is not None else None
    if path is None:
        return load_recipe(recipe or "tiny", overrides or [], seed), None
    run = path if is_run(path) else run_of(path)
    if run is None or (
        path != run and path.parent.name != "checkpoints"
    ):  # weights alone: no step, no moments
        return resolve_target(source, recipe, overrides or [], seed).recipe, None
    return load_recipe(recipe or str(run / RECIPE), overrides or [], seed), path


def score(
    file: Annotated[Path, typer.Argument(help="Rollout file; graded in place.", show_default=False)],
    reward: Annotated[
        str | None,
        typer.Option(help=f"{REWARDS}; default: the file's own.", show_default=False),
    ] = None,
    allow_code: AllowCodeOption = False,
    as_json: JsonOption = False,
    debug: DebugOption = False,
) -> None:
    """Grade, or grade again, the rationales of a file. No model is loaded."""
    from empg_lite.tools.rescore import score_file

    out = Output(as_json)
    if reward is not None:
        reward, _ = reward_option(reward, allow_code)
    with out.guarded():
        result = score_file(file, reward, out.view(), allow_code=allow_code)
        out.line(result)
        mean = "none could be graded" if result["reward"] is None else f"mean reward {result['reward']:.1%}"
        reasons = ", ".join(f"{n} {reason}" for reason, n in result["reasons"].items())
        workers = result.get("peak_rss_mb_workers")
        cost = f"{result['seconds']:.1f} s, at most {result['peak_rss_mb']:.0f} MB"
        cost += f" and {workers:.0f} MB a worker" if workers else ""
        out.print(
            f"{result['rationales']} rationales: {mean} ({reasons}); {cost}", markup=False, highlight=False
        )


def fit(
    files: Annotated[list[Path], typer.Argument(help="Scored rollout files.", show_default=False)],
    recipe: RecipeOption = None,
    output_dir: OutputDirOption = None,
    source: Annotated[
        Path | None,
        typer.Option("--from", metavar="RUN", help="Go on from a run's checkpoint.", show_default=False),
    ] = None,
    max_minutes: MaxMinutesOption = None,
    resume: ResumeOption = False,
    force: ForceOption = False,
    overrides: SetOption = None,
    seed: SeedOption = None,
    allow_change: AllowChangeOption = None,
    as_json: JsonOption = False,
    debug: DebugOption = False,
) -> None:
    """M-step only: fit stored rationales. Nothing is sampled or graded."""
    plan, _ = _policy_of(str(source) if source else None, recipe, overrides, seed)
    from empg_lite.loop.offline import fit as run_fit
    from empg_lite.loop.train import TrainOptions
    from empg_lite.run.layout import next_run_dir

    out = Output(as_json)
    run = output_dir or next_run_dir(f"{_run_name(recipe)}-fit")
    options = TrainOptions(resume, force, max_minutes, tuple(allow_change or ()), command_line())
    with out.guarded(), out.live_view() as view:
        result = run_fit(plan, files, run, source, options, view)
        out.line(result)
        out.print(f"{run}: {result['steps']} steps, {result['seconds']:.1f} s", markup=False, highlight=False)


def evaluate(
    target: TargetArgument = None,
    recipe: RecipeOption = None,
    split: Annotated[
        str | None, typer.Option(help="Split to answer; default data.eval_split.", show_default=False)
    ] = None,
    limit: Annotated[
        int | None, typer.Option(min=1, help="At most so many problems.", show_default=False)
    ] = None,
    k: Annotated[int, typer.Option("--k", min=0, help="Also draw k samples at T=1: pass@k, maj@k.")] = 0,
    base: Annotated[
        bool, typer.Option("--base", help="Also evaluate with the adapter off, and compare.")
    ] = False,
    out_dir: Annotated[
        Path | None,
        typer.Option("--out", help="Folder of the answers; default RUN/eval.", show_default=False),
    ] = None,
    allow_code: AllowCodeOption = False,
    overrides: SetOption = None,
    seed: SeedOption = None,
    as_json: JsonOption = False,
    debug: DebugOption = False,
) -> None:
    """Greedy accuracy with a 95% interval, on held-out problems. Interrupted: repeat the command to go on."""
    from empg_lite.recipe.reward import pin_reward
    from empg_lite.run.target import resolve_target

    out = Output(as_json)
    chosen = resolve_target(target, recipe, overrides or [], seed)
    plan, code = pin_reward(chosen.recipe, allow_code)
    chosen = replace(chosen, recipe=plan)
    from empg_lite.loop.evaluate import evaluate_target
    from empg_lite.rewards import Grader

    with out.guarded(), Grader(code=code) as grader:
        result = evaluate_target(
            chosen, grader, split=split, limit=limit, k=k, base=base, out=out_dir, view=out.view()
        )
        out.line(result)
        if not out.as_json:
            from empg_lite.cli.eval_table import show_evaluation

            show_evaluation(out, chosen.label, result)
