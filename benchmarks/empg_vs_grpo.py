"""EMPG beside GRPO and its relatives, on the bundled models: which learns more from equal samples?

    python benchmarks/empg_vs_grpo.py run                    # hours; what is done already is kept
    python benchmarks/empg_vs_grpo.py run --stages main stale --workers 2
    python benchmarks/empg_vs_grpo.py report                 # tables on stdout, figures into docs/figures/

Rates are chosen for every arm alike on seeds 100-103 and validation rows; results are on seeds 0-7 and test
problems. Every run is one line of ``benchmarks/results/arms.jsonl.gz``, keyed by its setting.
"""

from __future__ import annotations

import argparse
import gzip
import json
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Executor, Future, ProcessPoolExecutor, wait
from dataclasses import asdict, replace
from itertools import islice
from multiprocessing import get_context
from pathlib import Path
from statistics import mean
from typing import Any

from machine import machine
from study import Results, Study, shapes

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch: one thread a run, as many runs as cores

from arms import Setting, train_arm  # noqa: E402

RESULTS = Path(__file__).parent / "results" / "arms.jsonl.gz"
REAL_CPU = RESULTS.with_name("real_cpu.jsonl.gz")
ARMS = ("empg", "empg-b.5", "centered", "grpo", "dr_grpo")
SWEEP_SEEDS, SEEDS = (100, 101, 102, 103), tuple(range(8))
RATES = {"tiny": (1e-3, 2e-3, 4e-3), "tiny-hard": (1e-3, 2e-3, 4e-3)}
#: Rates tried for two passes: 4e-3 was the worst of every arm with one pass and with four.
TWO_PASSES = RATES["tiny-hard"][:2]
STEPS = {"tiny": 20, "tiny-hard": 30}
HARD, TINY = "tiny-hard", "tiny"

#: The arms of the ablations: EM, and GRPO mended and as published.
CLOSE = ("empg", "dr_grpo", "grpo")

#: Where an all-wrong group is common: the longest problems, four samples each.
SCARCE = {"samples": 4, "pool_steps": 5}

ROUND = ((32, 2), (64, 1), (16, 4))
#: The methods on the bundled hard model, 64 samples a step.
ON_TINY = Study(
    HARD,
    STEPS[HARD],
    RATES[HARD],
    {
        "EMPG, tries": shapes("empg", *ROUND, tries=8) | shapes("empg", *ROUND, tries=16),
        "EMPG, fixed groups": shapes("empg", (8, 8), (16, 4), (32, 2), (64, 1)),
        "Dr.GRPO": shapes("dr_grpo", (8, 8), (16, 4), (32, 2)),
        "GRPO": shapes("grpo", (8, 8), (16, 4), (32, 2)),
        "Dr.GRPO, dynamic sampling": shapes("dr_grpo-dynamic", (8, 8), (16, 4)),
        "REINFORCE, batch baseline": shapes("reinforce", (64, 1)),
    },
)
#: The same on a real model. Methods with groups take the shapes that were best on the bundled one.
REAL = {
    task: Study(
        task,
        30,
        (2e-4, 4e-4, 8e-4),
        {
            "EMPG, tries": shapes("empg", (64, 1), (32, 2), tries=8),
            "EMPG, fixed groups": shapes("empg", (16, 4)),
            "Dr.GRPO": shapes("dr_grpo", (16, 4)),
            "GRPO": shapes("grpo", (16, 4)),
            "REINFORCE, batch baseline": shapes("reinforce", (64, 1)),
        },
        first=(100,),
        rest=(101,),
        seeds=tuple(range(6)),
    )
    for task in ("smollm2-135m", "smollm2-135m-gym")
}

#: Steps of Dr.GRPO that take about as long on a CPU as 30 with three tries: groups that are all right cost
#: it no M-step.
AS_LONG = 66
CPU_SEEDS = tuple(range(6))

# --- which runs -----------------------------------------------------------------------------------


def sweep(task: str, passes: int = 1, arms: Sequence[str] = ARMS) -> list[Setting]:
    """Every rate for every arm, on seeds that no result uses."""
    return [
        Setting(task, arm, rate, seed, passes, steps=STEPS[task], test=False)
        for seed in SWEEP_SEEDS
        for rate in rates(task, passes)
        for arm in arms
    ]


def rates(task: str, passes: int = 1) -> tuple[float, ...]:
    """The grid of a sweep, the same for every arm."""
    return TWO_PASSES if passes == 2 else RATES[task]


def best_rate(results: Results, task: str, arm: str, passes: int = 1) -> float:
    """The rate with the best mean greedy accuracy on validation rows; KeyError before the sweep is done."""
    score = {
        rate: mean(results[s]["pass@1"] for s in sweep(task, passes, [arm]) if s.rate == rate)
        for rate in rates(task, passes)
    }
    return max(score, key=lambda rate: score[rate])


def chosen(
    results: Results, task: str, arms: Sequence[str] = ARMS, passes: int = 1, **changes: Any
) -> list[Setting]:
    """Every arm at its own rate on the seeds of the results, with ``changes`` made."""
    return [
        replace(
            Setting(task, arm, best_rate(results, task, arm, passes), seed, passes, steps=STEPS[task]),
            **changes,
        )
        for seed in SEEDS
        for arm in arms
    ]


def remembering(
    results: Results, size: int, weights: Sequence[str] = ("group", "one"), **changes: Any
) -> list[Setting]:
    """EM on 64 problems that come back six times, with a success memory of ``size``."""
    return [
        replace(s, steps=48, pool=64, memory=size, memory_weight=weight, **changes)
        for weight in (weights if size else weights[:1])
        for s in chosen(results, HARD, ("empg",))
    ]


def on_a_cpu(seed: int) -> list[Setting]:
    """The recipe's own way and its nearest rival, at the rate that is best for both.

    The rival goes on after as many samples, for as long as ours takes, and is examined at both points.
    """
    plain = Setting("smollm2-135m", "empg", 4e-4, seed, steps=30)
    return [
        replace(plain, problems=64, samples=1, tries=3),
        replace(plain, arm="dr_grpo", problems=16, samples=4, steps=AS_LONG, examined=30),
    ]


def _each(values: Sequence[Any], runs: Callable[[Any], list[Setting]]) -> list[Setting]:
    return [setting for value in values for setting in runs(value)]


#: Stage -> its runs, given what is there: all but the sweeps need the rates that a sweep has chosen.
STAGES: dict[str, Callable[[Results], list[Setting]]] = {
    "base": lambda _: [Setting(t, "empg", 1e-3, seed, steps=0) for t in (HARD, TINY) for seed in SEEDS],
    "sweep": lambda _: sweep(HARD),
    "main": lambda r: chosen(r, HARD),
    "memory": lambda r: _each((0, 1), lambda size: remembering(r, size)),
    "memory-hard": lambda r: _each((0, 1), lambda size: remembering(r, size, **SCARCE)),
    "stale-4": lambda r: chosen(r, HARD, stale=4),
    "sweep-tiny": lambda _: sweep(TINY),
    "main-tiny": lambda r: chosen(r, TINY),
    "stale-1": lambda r: chosen(r, HARD, CLOSE, stale=1),
    "noise": lambda r: _each((0.05, 0.02), lambda share: chosen(r, HARD, ("empg",), noise=share)),
    "sweep-4": lambda _: sweep(HARD, 4, CLOSE),
    "passes-4": lambda r: chosen(r, HARD, CLOSE, passes=4),
    "sweep-2": lambda _: sweep(HARD, 2, CLOSE),
    "passes-2": lambda r: chosen(r, HARD, CLOSE, passes=2),
    "k": lambda r: _each(
        ((16, 4), (4, 16)), lambda pk: chosen(r, HARD, ("empg",), problems=pk[0], samples=pk[1])
    ),
    # No larger value: at the default 0.005 the passes already end early in one step of a hundred.
    "kl-stop": lambda r: chosen(r, HARD, ("empg",), passes=4, kl_stop=0.001),
    "sweep-shapes-first": lambda _: ON_TINY.sweep_first(),
    "sweep-shapes": ON_TINY.sweep_rest,
    "methods": lambda r: ON_TINY.every(r),
    "methods-time": lambda r: _each(tuple(ON_TINY.methods), lambda m: ON_TINY.equal_time(r, m)),
    "methods-noise": lambda r: _each((0.05, 0.02), lambda share: ON_TINY.every(r, noise=share)),
    "methods-stale": lambda r: ON_TINY.every(r, stale=4),
    "sweep-relatives": lambda _: sweep(HARD, arms=("rloo", "raft")),
    "relatives": lambda r: chosen(r, HARD, ("rloo", "raft")),
    # `--into benchmarks/results/real_cpu.jsonl.gz`: all else of this model ran on a card, in bfloat16.
    "real-cpu": lambda _: _each(CPU_SEEDS, on_a_cpu),
}


# --- running and keeping --------------------------------------------------------------------------


def read_results(path: Path = RESULTS) -> Results:
    """Every run by its setting; of two of the same the later counts."""
    if not path.is_file():
        return {}
    with gzip.open(path, "rt", encoding="utf-8") as file:
        records = [json.loads(line) for line in file]
    return {Setting(**record["setting"]): record for record in records}


def run(names: Sequence[str], workers: int, path: Path = RESULTS) -> None:
    """Every stage of ``names`` (none: all), without the runs that are there already."""
    path.parent.mkdir(parents=True, exist_ok=True)
    results, where = read_results(path), machine()
    with ProcessPoolExecutor(workers, mp_context=get_context("spawn")) as pool:
        for name in names or STAGES:
            settings = STAGES[name](results)
            missing = [s for s in settings if s not in results]
            print(f"{name}: {len(settings) - len(missing)} of {len(settings)} runs there", flush=True)
            for record in _trained(pool, missing, workers):
                setting = Setting(**record["setting"])
                results[setting] = record
                with gzip.open(path, "at", encoding="utf-8") as file:
                    file.write(json.dumps({**record, "machine": where}) + "\n")
                print(f"  {_label(setting)}: {record['pass@1']:.1%}, {record['seconds']:.0f} s", flush=True)


def _trained(pool: Executor, settings: Iterable[Setting], workers: int) -> Iterator[dict[str, Any]]:
    """Records as they come. No more is handed out than is worked on: a kill leaves little running."""
    waiting, running = iter(settings), set[Future[dict[str, Any]]]()
    while True:
        running |= {pool.submit(train_arm, s) for s in islice(waiting, workers - len(running))}
        if not running:
            return
        done, running = wait(running, return_when=FIRST_COMPLETED)
        yield from (future.result() for future in done)


def _label(setting: Setting) -> str:
    return " ".join(f"{name}={value}" for name, value in asdict(setting).items() if value not in (None, 0.0))


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    commands = parser.add_subparsers(dest="command", required=True)
    runner = commands.add_parser("run", help="train what is missing")
    runner.add_argument("--stages", nargs="*", choices=STAGES, default=[], help="default: all, in order")
    runner.add_argument("--workers", type=int, default=os.cpu_count() or 1)
    runner.add_argument("--into", type=Path, default=RESULTS, help="file of the results")
    commands.add_parser("report", help="tables and figures of what is there")
    args = parser.parse_args()
    if args.command == "run":
        run(args.stages, args.workers, args.into)
    else:
        from empg_vs_grpo_figures import draw
        from empg_vs_grpo_report import report

        results = read_results(REAL_CPU) | read_results()
        report(results)
        print(*draw(results), sep="\n")


if __name__ == "__main__":
    main()
