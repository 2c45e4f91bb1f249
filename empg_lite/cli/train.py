"""Commands that train: train, sample, score, fit."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from empg_lite import api
from empg_lite.cli.options import (
    REWARDS,
    AllowChangeOption,
    AllowCodeOption,
    ForceOption,
    MaxMinutesOption,
    OutputDirOption,
    RecipeOption,
    ResumeOption,
    SeedOption,
    SeedsOption,
    SetOption,
    TrackOption,
    changes,
)
from empg_lite.cli.output import Output, command_line
from empg_lite.core.errors import UsageError

if TYPE_CHECKING:
    from empg_lite.recipe.schema import Recipe


def train(
    out: Output,
    recipe: RecipeOption = None,
    output_dir: OutputDirOption = None,
    max_steps: Annotated[
        int | None, typer.Option(min=1, help="Short for --set run.steps=N.", show_default=False)
    ] = None,
    max_minutes: MaxMinutesOption = None,
    resume: ResumeOption = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Print the resolved recipe without training.")
    ] = False,
    force: ForceOption = False,
    overrides: SetOption = None,
    seed: SeedOption = None,
    seeds: SeedsOption = None,
    allow_change: AllowChangeOption = None,
    allow_code: AllowCodeOption = False,
    track: TrackOption = None,
    profile: Annotated[
        bool, typer.Option("--profile", help="Print where the time went, and save it as RUN/profile.json.")
    ] = False,
) -> None:
    """Train a recipe: sample, score, fit; evaluate before and after."""
    what: dict[str, Any] = {
        "recipe": recipe,
        "output_dir": output_dir,
        "overrides": [*(overrides or ()), *([f"run.steps={max_steps}"] if max_steps else ())],
        "seed": seed,
        "seeds": _seeds(seeds),
        "resume": resume,
        "allow_change": allow_change or (),
    }
    if dry_run:
        _print_recipe(out, api.resolve_recipe(**what))
        return
    run = api.run(
        **what,
        force=force,
        max_minutes=max_minutes,
        allow_code=allow_code,
        trackers=track or (),
        profile=profile,
        command=command_line(),
        view=out.live_view(),
    )
    _print_run(out, run, profile)


def _seeds(text: str | None) -> list[int]:
    """The seeds of ``--seeds``; [] without it.

    Raises:
        UsageError: they are not whole numbers.
    """
    words = [] if text is None else [word.strip() for word in text.split(",")]
    if not all(word.isdecimal() and word.isascii() for word in words):
        raise UsageError(f"{text!r} is not a valid seed list", "--seeds", "write it like 0,1,2")
    return [int(word) for word in words]


def _print_recipe(out: Output, recipe: Recipe) -> None:
    from empg_lite.recipe.file import dump_recipe

    if out.as_json:
        out.raw(recipe.model_dump(mode="json"))
    else:
        typer.echo(dump_recipe(recipe), nl=False)


def _print_run(out: Output, run: api.Run, profile: bool) -> None:
    """The result of a run or a sweep."""
    from empg_lite.cli.tables import show_profile, show_sweep

    result = run.summary
    out.line(result)
    if out.as_json:
        return
    if "sweep" in result:
        show_sweep(out, result)
        return
    before, after = result["accuracy_before"], result["accuracy_after"]
    if isinstance(before, float) and isinstance(after, float):
        out.say(
            f"greedy accuracy {before:.1%} -> {after:.1%} · "
            f"T=1 accuracy {result['t1_accuracy_before']:.1%} -> {result['t1_accuracy_after']:.1%} · "
            f"{result['steps']} steps, {result['seconds']:.0f} s of training",
            style="bold",
        )
    out.say(f"talk to it: empg-lite chat {shlex.quote(str(run.path))}")
    if profile:
        show_profile(out, run.path)


def sample(
    out: Output,
    source: Annotated[
        str | None,
        typer.Argument(
            metavar="[RUN|ADAPTER]",
            help="Policy to sample from; default: the untrained one.",
            show_default=False,
        ),
    ] = None,
    recipe: RecipeOption = None,
    out_file: Annotated[Path, typer.Option("--out", help="Rollout file to write or complete.")] = Path(
        "rollouts.jsonl"
    ),
    problems: Annotated[
        int | None, typer.Option(min=1, help="Sample this many problems.", show_default=False)
    ] = None,
    append: Annotated[
        bool, typer.Option("--append", help="Add to a file that was sampled with other arguments.")
    ] = False,
    force: ForceOption = False,
    allow_code: AllowCodeOption = False,
    overrides: SetOption = None,
    seed: SeedOption = None,
) -> None:
    """E-step only: sample rationales into a file (graded under sampler.tries). Repeat it to complete it."""
    result = api.sample_rationales(
        recipe,
        out_file,
        source=source,
        problems=problems,
        append=append,
        force=force,
        allow_code=allow_code,
        overrides=changes(overrides, seed),
        view=out.view(),
    )
    out.line(result)
    out.say(f"{result['rationales']} rationales in {out_file} ({result['new']} new)")


def score(
    out: Output,
    file: Annotated[Path, typer.Argument(help="Rollout file; graded in place.", show_default=False)],
    reward: Annotated[
        str | None,
        typer.Option(help=f"{REWARDS}; default: the file's own.", show_default=False),
    ] = None,
    allow_code: AllowCodeOption = False,
) -> None:
    """Grade, or regrade, the rationales of a file. No model is loaded."""
    result = api.score_rationales(file, reward, allow_code=allow_code, view=out.view())
    out.line(result)
    mean = "none could be graded" if result["reward"] is None else f"mean reward {result['reward']:.1%}"
    if "right_first" in result:
        mean = f"{result['right_first']:.1%} right at first try, {mean} of all tries"
    reasons = ", ".join(f"{n} {reason}" for reason, n in result["reasons"].items())
    workers = result.get("peak_rss_mb_workers")
    cost = f"{result['seconds']:.1f} s, peak {result['peak_rss_mb']:.0f} MB"
    cost += f" and {workers:.0f} MB per worker" if workers else ""
    out.say(f"{result['rationales']} rationales: {mean} ({reasons}); {cost}")


def fit(
    out: Output,
    files: Annotated[list[Path], typer.Argument(help="Scored rollout files.", show_default=False)],
    recipe: RecipeOption = None,
    output_dir: OutputDirOption = None,
    source: Annotated[
        Path | None,
        typer.Option("--from", metavar="RUN", help="Continue from a run's checkpoint.", show_default=False),
    ] = None,
    max_minutes: MaxMinutesOption = None,
    resume: ResumeOption = False,
    force: ForceOption = False,
    overrides: SetOption = None,
    seed: SeedOption = None,
    allow_change: AllowChangeOption = None,
) -> None:
    """M-step only: fit stored rationales. Nothing is sampled or graded."""
    run = api.fit_rationales(
        files,
        recipe,
        output_dir,
        source=source,
        overrides=changes(overrides, seed),
        resume=resume,
        force=force,
        max_minutes=max_minutes,
        allow_change=allow_change or (),
        command=command_line(),
        view=out.live_view(),
    )
    out.line(run.summary)
    out.say(f"{run.path}: {run.summary['steps']} steps, {run.summary['seconds']:.1f} s")
