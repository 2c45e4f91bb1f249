"""On a signal a run saves, says how to resume, and resumes to the same result."""

from __future__ import annotations

import mmap
import os
import random
import shutil
import signal
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from crash_harness import PHASES, Ended, Plant, digest, side_by_side

from empg_lite.run.checkpoint import list_checkpoints
from empg_lite.run.store import verify_dir
from empg_lite.sampler.decoder import Decoder

slow = pytest.mark.slow


# --- told to stop ------------------------------------------------------------------------------------------


def stopped_at(plant: Plant, seed: int, signum: int, seconds: float) -> list[Any]:
    """Signal at a random time: [exit code, output, phase, seconds to exit, intact, digest]."""
    plant.phase, rng, run = mmap.mmap(-1, 1), random.Random(seed), plant.fresh()
    while True:
        pid = plant.start(run)
        time.sleep(rng.uniform(0.05, 1.0) * seconds)
        phase, sent = plant.phase[0], time.perf_counter()
        os.kill(pid, signum)
        ended = plant.wait(pid)
        took = time.perf_counter() - sent
        if ended.code in (0, 128 + signum):
            break
        assert ended.code == -signum, ended  # before its handlers were there
        shutil.rmtree(run, ignore_errors=True)
    return [ended.code, ended.said, PHASES[phase], took, *resumed(plant, run)]


def stopped_within(plant: Plant, phase: str, calls: int, signum: int) -> list[Any]:
    """The same, after a given number of Python calls within a phase."""
    plant.phase, run = mmap.mmap(-1, 2), plant.fresh()

    def send() -> None:
        plant.phase[1] = plant.phase[0]
        os.kill(os.getpid(), signum)

    ended = plant.run(run, change=plant.once_in(phase, calls, send))
    return [ended.code, ended.said, PHASES[plant.phase[1]], 0.0, *resumed(plant, run)]


def resumed(plant: Plant, run: Path) -> list[Any]:
    """[whether its checkpoints are intact, digest after resume]; removes the folder."""
    whole = all(verify_dir(p) is None for p in list_checkpoints(run))
    ended = plant.run(run)
    found = digest(run) if ended.code == 0 else ended.said
    shutil.rmtree(run)
    return [whole, found]


@pytest.mark.parametrize("each", [5, pytest.param(150, marks=slow)])
def test_a_signal_saves_and_the_run_resumes_to_the_same(
    plant: Plant, straight_child: tuple[Ended, str], each: int
) -> None:
    """At random times, some after the run has finished, and a fifth as often in each phase."""
    started = time.perf_counter()
    plant.run(plant.fresh())
    seconds = time.perf_counter() - started
    both, rng = (signal.SIGINT, signal.SIGTERM), random.Random(each)
    jobs = [lambda s=s, n=n: stopped_at(plant, s, n, seconds) for s in range(each) for n in both]
    for phase in PHASES[1:]:
        for calls in rng.sample(range(1, 1000), each // 5):
            jobs += [lambda p=phase, c=calls, n=n: stopped_within(plant, p, c, n) for n in both]
    found = side_by_side(jobs)
    stopped, aimed = [f for f in found if f[0] != 0], found[2 * each :]
    phases, slowest = Counter(f[2] for f in stopped), max(f[3] for f in stopped)
    print(f"\nI1: {len(found)} signals, {len(stopped)} stopped, {dict(phases)}, slowest {slowest:.2f} s")
    assert [f for f in found if not f[4] or f[5] != straight_child[1]] == []
    assert [f[:2] for f in aimed if f[0] not in (130, 143)] == []
    for _, said, *_ in stopped:
        assert "repeat the command with --resume" in said and "\n" not in said
        assert "is saved" in said or "before the first step" in said
    assert {f[2] for f in aimed} == set(PHASES[1:])


@pytest.mark.parametrize("times", [4, pytest.param(10, marks=slow)])
def test_a_second_signal_ends_at_once_and_harms_nothing(
    plant: Plant, straight_child: tuple[Ended, str], times: int
) -> None:
    """Both at the same instant: the last checkpoint stays intact, and the run resumes."""
    slowest = 0.0
    for seed in range(times):
        rng, run = random.Random(seed), plant.fresh()
        pid = plant.start(run)
        time.sleep(rng.uniform(0.08, 0.2))
        os.kill(pid, signal.SIGINT)
        time.sleep(rng.uniform(0, 0.003))
        os.kill(pid, signal.SIGINT)
        sent = time.perf_counter()
        assert plant.wait(pid).code in (0, 130, -signal.SIGINT)
        slowest = max(slowest, time.perf_counter() - sent)
        assert all(verify_dir(p) is None for p in list_checkpoints(run))
        assert plant.run(run).code == 0 and digest(run) == straight_child[1]
        shutil.rmtree(run)
    print(f"\nI1: the slowest of {times} ended {slowest:.3f} s after the second signal")


def test_control_without_the_stop_points_the_step_is_finished(plant: Plant) -> None:
    """Decoding steps after the signal: at most one with the stop points, else all the remaining ones."""
    from empg_lite.core import control

    after = mmap.mmap(-1, 1)

    def counting(polls: bool) -> Callable[[], None]:
        def change() -> None:
            real, steps = Decoder.step, 0

            def step(self: Decoder, n: int, seen: int) -> None:
                nonlocal steps
                steps += 1
                after[0] += steps > 4
                if steps == 4:
                    os.kill(os.getpid(), signal.SIGTERM)
                real(self, n, seen)

            Decoder.step = step  # type: ignore[method-assign]
            if not polls:
                control._listened = _Deaf()

        return change

    taken = {}
    for polls in (True, False):
        after[0] = 0
        assert plant.run(plant.fresh(), change=counting(polls)).code == 143
        taken[polls] = after[0]
    assert taken[True] == 0 and taken[False] > 4


class _Deaf(list[int]):
    def append(self, signum: int) -> None:
        pass
