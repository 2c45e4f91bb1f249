"""Train by a recipe, evaluate base and tuned, and write one row of docs/results.md: one command, one row.

    python benchmarks/real_models.py --recipe gsm8k-0.5b [--seed N] [--set KEY=VALUE] [--limit N]

``empg-lite train`` and ``empg-lite eval --base --k 8`` run as processes of their own, as a person would
start them: each has the card to itself. Repeating the command goes on where it stopped; the row is written
when both have ended well, never before. docs/results.md explains the columns.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import shlex
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from child import CODE, run_command
from machine import card, code_commit, cpu
from results_page import add_record, check_page, read_records

import empg_lite
from empg_lite.core.bundled import BUNDLED
from empg_lite.core.errors import DataError, EmpgError, Interrupted, UsageError
from empg_lite.recipe.file import find_recipe, load_recipe
from empg_lite.recipe.schema import Recipe
from empg_lite.run.journal import read_metrics
from empg_lite.run.layout import ENVIRONMENT, METRICS
from empg_lite.run.rollouts import read_rollouts
from empg_lite.run.store import write_file

DOCS = Path(__file__).resolve().parents[1] / "docs"
#: Samples a problem at temperature 1: the columns are pass@8 and maj@8.
K = 8
#: In the run directory: what is known so far.
STATE = "row.json"
LIBRARIES = ("torch", "transformers", "peft", "bitsandbytes", "unsloth")
REPEAT = "repeat this command to go on"


class ChildFailed(Exception):
    """A command ended with an exit code, and has said why."""

    def __init__(self, code: int) -> None:
        super().__init__(code)
        self.code = code


def main(argv: Sequence[str] | None = None) -> int:
    """The exit code: that of ``train`` or ``eval`` where one of them failed and has said its line."""
    argv = sys.argv[1:] if argv is None else argv
    try:
        print(make_row(arguments(argv), argv))
    except ChildFailed as failed:
        return failed.code
    except (EmpgError, KeyboardInterrupt) as error:
        known = error if isinstance(error, EmpgError) else Interrupted(2, "interrupted", "", REPEAT)
        print("error:", *str(known).split(), file=sys.stderr)
        return known.exit_code
    return 0


def arguments(argv: Sequence[str]) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description="One command, one row of docs/results.md.")
    add = parser.add_argument
    add("--recipe", required=True, help="built-in recipe or a YAML file; a bundled model is a rehearsal")
    add("--set", action="append", default=[], metavar="KEY=VALUE", help="change a recipe key; repeatable")
    add("--seed", type=int, help="shorthand for --set run.seed=N")
    add("--limit", type=int, help="evaluate on at most so many problems")
    add("--max-minutes", type=float, help="stop training with a checkpoint after M minutes")
    add("--cpu", action="store_true", help="use no GPU, also for a real model")
    add("--runs", type=Path, default=Path("runs/real"), help="folder of the runs")
    add("--docs", type=Path, default=DOCS, help="folder of results.md")
    return parser.parse_args(argv)


def make_row(args: argparse.Namespace, argv: Sequence[str]) -> str:
    """Train, evaluate, write the row; what came of it, in one line.

    Raises:
        EmpgError: recipe or page cannot be used, there is no GPU, or a signal arrived.
        ChildFailed: training or evaluation did not end well.
    """
    check_page(args.docs)
    read_records(args.docs)  # before the hours, not after them
    job = plan(args)
    print(f"{job.run}: the row comes at the end; interrupted, {REPEAT}", file=sys.stderr)
    steps = job.recipe.run.steps
    trained = job.phase("train", train_options(args, job.run))
    if trained["steps"] < steps:
        return f"no row yet: out of time after {trained['steps']} of {steps} steps; {REPEAT}"
    evaluation = job.phase("eval", eval_options(args, job.run))
    record = row_record(args, argv, job, trained, evaluation)
    add_record(args.docs, record)
    greedy = " -> ".join(f"{side['pass@1']:.1%}" for side in (evaluation["base"], evaluation))
    return f"{record['name']}: greedy {greedy}; a row of {args.docs / 'results.md'}"


def train_options(args: argparse.Namespace, run: Path) -> list[str]:
    """Of ``empg-lite train``: starts, goes on, or finds that there is nothing to do."""
    options = ["--recipe", args.recipe, "--output-dir", str(run), "--resume"]
    options += [word for change in args.set for word in ("--set", change)]
    options += ["--seed", str(args.seed)] if args.seed is not None else []
    return options + (["--max-minutes", str(args.max_minutes)] if args.max_minutes is not None else [])


def eval_options(args: argparse.Namespace, run: Path) -> list[str]:
    """Of ``empg-lite eval``, by the run's own recipe."""
    return [str(run), "--base", "--k", str(K), *(["--limit", str(args.limit)] if args.limit else [])]


# --- a job ----------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Job:
    """A run on its way to a row.

    Attributes:
        recipe: resolved.
        run: the run directory; its name is the row's.
        commit: of the code that runs.
        machine: the one it is on now; ``gpu_gib`` is None where no GPU is to be used.
        state: ``RUN/row.json``: ``seconds`` of each command over all attempts, the ``machines`` of these, and
            the results of the commands that have ended well.
    """

    recipe: Recipe
    run: Path
    commit: str
    machine: dict[str, Any]
    state: dict[str, Any]

    def phase(self, name: str, options: Sequence[str]) -> dict[str, Any]:
        """The result of ``empg-lite NAME``; once it has ended well it is kept, and not run again.

        Raises:
            ChildFailed: it has said why.
            Interrupted: a signal arrived, or it was killed.
        """
        if name in self.state:
            return self.state[name]
        if self.machine not in self.state["machines"]:
            self.state["machines"].append(self.machine)
        spent, began = self.state["seconds"].get(name, 0.0), time.monotonic()

        def keep() -> None:
            self.state["seconds"][name] = round(spent + time.monotonic() - began, 1)
            write_file(self.run / STATE, json.dumps(self.state, indent=1))

        self.state.setdefault("load", {})[name] = round(os.getloadavg()[0], 1)
        ended = run_command([name, *options, "--json"], cpu=self.machine["gpu_gib"] is None, beat=keep)
        result = json.loads(ended.out.splitlines()[-1]) if ended.code == 0 else {}
        if ended.code == 0 and result.get("steps", self.recipe.run.steps) == self.recipe.run.steps:
            self.state.update({name: result, "finished": datetime.now(UTC).isoformat(timespec="seconds")})
        keep()
        if ended.code > 0:
            raise ChildFailed(ended.code)
        if ended.code < 0 or ended.signum:
            signum = ended.signum or -ended.code
            raise Interrupted(signum, f"signal {signum} ended {name}", str(self.run), REPEAT)
        return result


def plan(args: argparse.Namespace) -> Job:
    """The job of a command line. The name of its run tells apart whatever would make it another one.

    Raises:
        EmpgError: the recipe cannot be used, or there is no GPU for it.
    """
    if args.limit is not None and args.limit < 1:
        raise UsageError(f"--limit {args.limit} leaves no problem", "--limit", "give 1 or more")
    recipe = load_recipe(args.recipe, args.set, args.seed).resolved()
    no_gpu = args.cpu or recipe.model.name in BUNDLED
    here = {"name": cpu(), "gpu_gib": None, "cuda": None} if no_gpu else card()
    if here is None:
        raise UsageError("torch finds no GPU", f"--recipe {args.recipe}", "say --cpu to go on without")
    commit = code_commit(CODE, "empg_lite", "recipes") or f"v{empg_lite.__version__}"
    identity = json.dumps([recipe.model_dump(mode="json"), args.limit], sort_keys=True)
    digest = hashlib.sha256(identity.encode()).hexdigest()[:6]
    run = args.runs / f"{find_recipe(args.recipe).stem}-seed{recipe.run.seed}-{commit}-{digest}"
    return Job(recipe, run, commit, here, read_state(run / STATE))


def read_state(path: Path) -> dict[str, Any]:
    """What earlier attempts left.

    Raises:
        DataError: the file is not what was written.
    """
    if not path.is_file():
        return {"seconds": {}, "machines": []}
    try:
        state = json.loads(path.read_text("utf-8"))
        return {**state, "seconds": dict(state["seconds"]), "machines": list(state["machines"])}
    except (ValueError, KeyError, TypeError) as error:
        raise DataError(f"damaged ({error})", str(path), "remove it: only the hours are lost") from error


# --- a row ----------------------------------------------------------------------------------------


def row_record(
    args: argparse.Namespace, argv: Sequence[str], job: Job, trained: dict[str, Any], found: dict[str, Any]
) -> dict[str, Any]:
    """The raw figures of a row: all that ``results_page`` shows, and more."""
    environment = json.loads((job.run / ENVIRONMENT).read_text("utf-8"))
    versions = {name: v for name in LIBRARIES if (v := environment["versions"].get(name))}
    cuda = job.state["machines"][-1]["cuda"]
    header = read_rollouts(Path(found["answers"]) / "greedy.jsonl")[0].header
    return {
        "name": job.run.name,
        "rehearsal": job.recipe.model.name in BUNDLED,
        "recipe": find_recipe(args.recipe).stem,
        "changed": args.set,
        "limit": args.limit,
        "model": job.recipe.model.name,
        "revision": header.revision,
        "seed": job.recipe.run.seed,
        "commit": job.commit,
        "command": shlex.join(["python", "benchmarks/real_models.py", *argv]),
        "finished": job.state["finished"],
        "machines": job.state["machines"],
        "threads": environment["threads"],
        "load": job.state["load"],
        "versions": versions | ({"CUDA": cuda} if cuda else {}),
        "seconds": job.state["seconds"],
        "training": without(trained, "run", "seconds_total"),
        "peak_mib": peaks(job.run),
        "evaluation": without(found, "answers") | {"base": without(found["base"], "answers")},
    }


def without(figures: dict[str, Any], *names: str) -> dict[str, Any]:
    """All but these: folders of this machine, and a time that ``seconds`` holds better."""
    return {name: value for name, value in figures.items() if name not in names}


def peaks(run: Path) -> dict[str, float | None]:
    """Peak memory of training in MiB, over all attempts; ``gpu`` is None without a card."""
    records = read_metrics(run / METRICS)
    names = {"gpu": "memory/peak_gpu_mb", "rss": "memory/peak_rss_mb"}
    return {key: max((r[name] for r in records if name in r), default=None) for key, name in names.items()}


if __name__ == "__main__":
    raise SystemExit(main())
