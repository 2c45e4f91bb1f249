"""The layout of a run directory, and how a run is opened or resumed."""

from __future__ import annotations

import json
import platform
import shutil
import subprocess
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from empg_lite.core.errors import MissingInput, RecipeError, UsageError
from empg_lite.core.rationale import Rationale
from empg_lite.recipe.file import dump_recipe, load_recipe
from empg_lite.recipe.schema import Recipe, changed_fields
from empg_lite.run import store
from empg_lite.run.checkpoint import newest_valid
from empg_lite.run.parallel import processes
from empg_lite.run.rollouts import read_rollouts

RUNS = Path("runs")
RECIPE, METRICS, EVENTS, ENVIRONMENT = "recipe.yaml", "metrics.jsonl", "events.jsonl", "environment.json"
PROFILE = "profile.json"
#: Packages whose versions are recorded.
_PACKAGES = "empg-lite torch transformers peft bitsandbytes unsloth datasets math-verify".split()


def is_run(path: Path) -> bool:
    """Whether ``path`` is a directory written by ``train`` or ``fit``."""
    return (path / RECIPE).is_file()


def next_run_dir(name: str) -> Path:
    """``runs/<name>-NNN``, with the first free number."""
    n = 1
    while (RUNS / f"{name}-{n:03d}").exists():
        n += 1
    return RUNS / f"{name}-{n:03d}"


def seed_dir(sweep: Path, seed: int) -> Path:
    """``SWEEP/seed-N``."""
    return sweep / f"seed-{seed}"


def runs_of(folder: Path) -> list[Path]:
    """The runs in a folder: itself if it is a run, or the runs of a sweep by seed.

    Raises:
        MissingInput: it is neither.
    """
    if is_run(folder):
        return [folder]
    found = [p for p in folder.glob("seed-*") if is_run(p) and p.name[5:].isdecimal()]
    if not found:
        raise MissingInput("not a run directory", str(folder), "empg-lite train makes one under runs/")
    return sorted(found, key=lambda p: int(p.name[5:]))


def newest_run() -> Path:
    """The newest run under ``runs/``, including runs of sweeps.

    Raises:
        MissingInput: there are no runs.
    """
    found = [p for pattern in ("*", "*/seed-*") for p in RUNS.glob(pattern) if is_run(p)]
    if not found:
        raise MissingInput("no run found", f"{RUNS}/", "train one: empg-lite train --recipe tiny")
    return max(found, key=lambda p: ((p / RECIPE).stat().st_mtime, p.name))


def rollout_path(run: Path, step: int) -> Path:
    """``RUN/rollouts/step-NNNNNN.jsonl``."""
    return run / "rollouts" / f"step-{step:06d}.jsonl"


def find_rollouts(source: Path | None, step: int | None) -> tuple[Path, list[Rationale]]:
    """The rollout file of RUN|FILE and a step, and its rationales; default: the last step of the newest run.

    Raises:
        MissingInput: it does not exist.
        DataError: it cannot be read.
    """
    source = source or newest_run()
    if source.is_dir():
        if not is_run(source) and not (source / "rollouts").is_dir():
            raise MissingInput("not a run directory", str(source), "empg-lite train makes one under runs/")
        found = sorted((source / "rollouts").glob("step-*.jsonl"))
        wanted = rollout_path(source, step) if step is not None else found[-1] if found else None
        if wanted is None or not wanted.is_file():
            stored = (
                f"stored: steps {found[0].stem[5:]} to {found[-1].stem[5:]}" if found else "none stored yet"
            )
            raise MissingInput(
                f"no rationales of step {step}" if step else "no rationales", str(source), stored
            )
        source = wanted
    return source, [r for segment in read_rollouts(source) for r in segment.rationales]


def run_of(path: Path) -> Path | None:
    """The run that contains a folder such as RUN/adapter, RUN/best or RUN/checkpoints/step-N."""
    return next((p for p in list(path.resolve().parents)[:2] if is_run(p)), None)


def trained_adapter(run: Path) -> Path:
    """The run's final adapter, else its newest valid checkpoint.

    Raises:
        MissingInput: nothing has been saved yet.
        CheckpointError: checkpoints exist but none is valid.
    """
    if (run / "adapter").is_dir():
        return run / "adapter"
    found = newest_valid(run)
    if found is None:
        raise MissingInput(
            "the run has no adapter yet", str(run), "wait for its first checkpoint, or resume it"
        )
    return found


#: Recipe fields that may change on resume.
FREE_ON_RESUME = frozenset({"run.steps", "run.eval_every", "run.eval_limit", "run.save_every", "run.keep"})


@dataclass(frozen=True, slots=True)
class Opened:
    """A run directory, ready to be started or resumed.

    Attributes:
        recipe: resolved; on resume with the settled values of ``auto``.
        checkpoint: where to resume from; None starts from the beginning.
        events: findings from opening the run, for ``events.jsonl`` after it has been cut back.
        anew: ``--resume`` was given, but there is no run to resume.
    """

    recipe: Recipe
    checkpoint: Path | None
    events: tuple[dict[str, Any], ...] = ()
    anew: bool = False


def open_run(run: Path, recipe: Recipe, *, resume: bool, allow_change: Sequence[str] = ()) -> Opened:
    """Decide whether to start or resume, and with which settings.

    Raises:
        UsageError: the folder already contains a run and ``resume`` is False.
        RecipeError: the recipe differs from the run's in a field that may not change.
        CheckpointError: checkpoints exist but none is valid.
    """
    recipe = recipe.resolved()
    store.sweep(run)
    store.sweep(run / "checkpoints")
    if not is_run(run):
        return Opened(recipe, None, anew=resume)
    if not resume:
        raise UsageError(
            "the folder already contains a run", str(run), "add --resume to continue, or name another folder"
        )
    recipe, events = _agree(load_recipe(str(run / RECIPE)), recipe, run, allow_change)
    invalid: list[tuple[Path, str]] = []
    checkpoint = newest_valid(run, on_invalid=lambda path, reason: invalid.append((path, reason)))
    for path, reason in invalid:  # or the next save under that name would collide with it
        moved = store.set_aside(path).name
        events.append({"event": "invalid_checkpoint", "path": path.name, "reason": reason, "moved_to": moved})
    return Opened(recipe, checkpoint, tuple(events))


def _agree(
    old: Recipe, new: Recipe, run: Path, allow_change: Sequence[str]
) -> tuple[Recipe, list[dict[str, Any]]]:
    """The new recipe with the old one's settled ``auto`` values, and events for the allowed changes."""
    events = []
    for field, (before, after) in changed_fields(old, new).items():
        section, name = field.split(".")
        if after == "auto":  # decided once, at the start of the run
            part = getattr(new, section).model_copy(update={name: before})
            new = new.model_copy(update={section: part})
        elif field in allow_change:
            events.append({"event": "changed", "field": field, "old": before, "new": after})
        elif field not in FREE_ON_RESUME:
            raise RecipeError(
                f"{field} is {after!r}, the run was started with {before!r}",
                str(run / RECIPE),
                f"set it back, or pass --allow-change {field}",
            )
    return new, events


def compare_environment(run: Path, inputs: Mapping[str, str]) -> list[dict[str, Any]]:
    """Events for differences from the environment in which a run was started.

    Args:
        inputs: digests of the run's inputs, by display name.

    Raises:
        RecipeError: an input has changed.
    """
    try:
        old = json.loads((run / ENVIRONMENT).read_text("utf-8"))
        known, before = dict(old["inputs"]), {"torch": old["versions"]["torch"], "threads": old["threads"]}
    except (OSError, ValueError, KeyError, TypeError):
        return []  # from an older version, or damaged: it is written again
    for name, digest in inputs.items():
        if known.get(name, digest) != digest:
            raise RecipeError(
                f"the {name} has changed since the run was started",
                str(run / ENVIRONMENT),
                "restore it, or start a new run",
            )
    found = environment()
    now = {"torch": found["versions"]["torch"], "threads": found["threads"]}
    return [
        {"event": "environment_changed", "what": what, "old": before[what], "new": now[what]}
        for what in now
        if before[what] != now[what]
    ]


def write_run_files(
    run: Path, recipe: Recipe, command: str, inputs: Mapping[str, str], engine: Mapping[str, Any]
) -> None:
    """Write ``recipe.yaml`` (every value, and the command that made it) and ``environment.json``.

    Args:
        engine: the sampling and fitting backends.
    """
    facts = {**environment(), "engine": dict(engine), "inputs": dict(inputs)}
    store.write_file(run / ENVIRONMENT, json.dumps(facts, indent=1))
    store.write_file(run / RECIPE, dump_recipe(recipe, header=f"made by: {command}" if command else ""))


def environment() -> dict[str, Any]:
    """Versions, device and commit: what the numbers depend on besides the recipe."""
    import torch

    versions = {}
    for name in _PACKAGES:
        with suppress(PackageNotFoundError):
            versions[name] = version(name)
    return {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "versions": versions,
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
        "threads": torch.get_num_threads(),
        "processes": processes(),
        "commit": _commit(),
    }


def _commit() -> str | None:
    """Git commit of this package's checkout, if it runs from one."""
    source = Path(__file__).resolve().parents[2]
    if not (source / ".git").exists() or shutil.which("git") is None:
        return None
    found = subprocess.run(
        ["git", "-C", str(source), "rev-parse", "HEAD"],
        capture_output=True,
        text=True,
        timeout=10,
        check=False,
    )
    return found.stdout.strip() or None
