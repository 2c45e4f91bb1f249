r"""How long an E-step takes with one process and with several, one thread each, on the tiny model.

    python benchmarks/two_processes.py [--processes 2] [--rounds 5] [--json]

An E-step is what ``train`` does first in a step: 16 problems x 8 samples, graded, gathered by every process.
The time of a round is that of the main process, from the first token to the last gathered verdict. On a
machine with fewer idle cores than processes it says nothing: processor seconds of the main process then say
what its share costs, without the waiting.

The samples are the same whatever the number of processes, but where two tokens lie within rounding: batches
of other sizes round differently. How many differ is counted; above one in a hundred the exit code is 1.
"""

from __future__ import annotations

import argparse
import json
import os
import socket
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from machine import headline, machine

PROBLEMS, SAMPLES = 16, 8


def worker(rounds: int) -> None:
    """One process: the seconds of each round, and what was drawn; the main process prints them."""
    from empg_lite.core.rationale import Problem, Rationale, flatten
    from empg_lite.data.sources import ProblemStream, load_splits
    from empg_lite.loop.estep import by_group, sample_rationales
    from empg_lite.loop.learner import build_learner
    from empg_lite.recipe.file import load_recipe
    from empg_lite.rewards import Grader
    from empg_lite.rewards.scorer import Scorer
    from empg_lite.run.parallel import join

    with join() as world, Grader(workers=1) as grader:
        learner = build_learner(load_recipe("tiny", []).resolved(), world)
        recipe, sampler = learner.recipe, learner.sampler()
        stream = ProblemStream(load_splits(recipe).train, recipe.run.seed)
        seconds, cpu, drawn = list[float](), list[float](), list[tuple[int, ...]]()
        for step in range(rounds + 1):  # the first one warms up

            def ask(mine: Sequence[Problem], step: int = step) -> list[list[Rationale]]:
                scorer = Scorer(grader, str(recipe.data.reward))
                draw = sample_rationales(
                    learner.policy,
                    sampler,
                    mine,
                    learner.decoding,
                    samples=SAMPLES,
                    seed=recipe.run.seed,
                    step=step,
                    policy_step=0,
                    on_rationale=scorer.submit,
                )
                return by_group(draw.groups, scorer.scored(flatten(draw.groups)))

            world.gather(None)
            started, busy = time.perf_counter(), time.process_time()
            rows = [r for group in world.share(stream.take(step * PROBLEMS, PROBLEMS), ask) for r in group]
            seconds.append(time.perf_counter() - started)
            cpu.append(time.process_time() - busy)
            drawn += [r.completion_ids for r in rows]
        if world.main:
            print(json.dumps({"seconds": seconds[1:], "cpu": cpu[1:], "drawn": drawn}))


def measure(processes: int, rounds: int) -> dict[str, Any]:
    """Start the workers with the variables that a launcher sets; what the main one says."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    shared = {**os.environ, "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
    shared |= {"WORLD_SIZE": str(processes), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    command = [sys.executable, str(Path(__file__).resolve()), "--worker", "--rounds", str(rounds)]
    started = [
        subprocess.Popen(
            command, env={**shared, "RANK": str(r), "LOCAL_RANK": str(r)}, stdout=subprocess.PIPE, text=True
        )
        for r in range(processes)
    ]
    said = [process.communicate()[0] for process in started]
    if any(process.returncode for process in started):
        sys.exit(f"a process ended with {[process.returncode for process in started]}")
    return dict(json.loads(said[0].splitlines()[-1]))


def main() -> None:
    parser = argparse.ArgumentParser(description="Time an E-step with one process and with several.")
    parser.add_argument("--processes", type=int, default=2, metavar="N")
    parser.add_argument("--rounds", type=int, default=5, metavar="N", help="E-steps timed; the median counts")
    parser.add_argument("--json", action="store_true", help="one JSON object instead of lines")
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.worker:
        worker(arguments.rounds)
        return
    found = {n: measure(n, arguments.rounds) for n in (1, arguments.processes)}
    medians = {n: statistics.median(each["seconds"]) for n, each in found.items()}
    cpu = {n: statistics.median(each["cpu"]) for n, each in found.items()}
    speed_up = medians[1] / medians[arguments.processes]
    pairs = list(zip(found[1]["drawn"], found[arguments.processes]["drawn"], strict=True))
    other = sum(a != b for a, b in pairs)
    if arguments.json:
        result = {
            "seconds": medians,
            "cpu": cpu,
            "speed_up": speed_up,
            "samples": len(pairs),
            "differ": other,
        }
        print(json.dumps({"machine": machine(), **result}))
    else:
        print(headline(machine()))
        for n, each in found.items():
            low, high = min(each["seconds"]), max(each["seconds"])
            print(
                f"{n} process{'es' * (n > 1)}: {medians[n]:.3f} s an E-step ({low:.3f} to {high:.3f}), "
                f"{cpu[n]:.3f} processor seconds of the main one"
            )
        print(f"speed-up {speed_up:.2f}; {other} of {len(pairs)} samples differ")
    if other > len(pairs) / 100:
        sys.exit(1)


if __name__ == "__main__":
    main()
