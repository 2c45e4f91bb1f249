"""Killed at any instant, or out of disk at any call, a run resumes to the uninterrupted result."""

from __future__ import annotations

import json
import mmap
import os
import random
import re
import resource
import shutil
import signal
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import crash_harness as harness
import pytest
from crash_harness import PHASES, Ended, Plant, digest, side_by_side, violations

from empg_lite.loop import estep
from empg_lite.loop import recorder as session
from empg_lite.run import checkpoint, store
from empg_lite.run.checkpoint import list_checkpoints
from empg_lite.run.journal import Journal

slow = pytest.mark.slow


def finish(plant: Plant, run: Path) -> str:
    """Resume to the end and remove the folder; returns the digest, or what went wrong."""
    ended = plant.run(run)
    found = digest(run) if ended.code == 0 else f"exit {ended.code}: {ended.said}"
    shutil.rmtree(run)
    return found


def first_save(ended: Ended) -> int:
    """Index of the call that publishes and syncs the first checkpoint."""
    calls = list(enumerate(ended.calls, 1))
    renamed = next(n for n, (name, path) in calls if name == "_rename" and "/checkpoints/.tmp-step-" in path)
    return next(n for n, (name, path) in calls if n > renamed and name == "_fsync")


def places(calls: Sequence[tuple[str, str]], every: int) -> list[int]:
    """Call indices, from 1: each ``every``-th, and the first of each kind not among them.

    A kind is the call and the folder that it changes, whatever the step.
    """
    kinds = [(name, re.sub(r"\d+", "", Path(path).parent.name)) for name, path in calls]
    chosen = set(range(0, len(calls), every))
    chosen |= {kinds.index(kind) for kind in set(kinds) - {kinds[n] for n in chosen}}
    return [n + 1 for n in sorted(chosen)]


# --- kills ------------------------------------------------------------------------------------------------


def killed_at(plant: Plant, at: int, saved_by: int) -> list[Any]:
    """Kill at a call: [signal, whether what is published is intact, digest of the resumed run]."""
    run = plant.fresh()
    ended = plant.run(run, at=at)
    found = list_checkpoints(run)
    whole = all(store.verify_dir(p) is None for p in found) and (at <= saved_by or len(found) >= 1)
    return [ended.code, whole, finish(plant, run)]


@pytest.mark.parametrize("every", [13, pytest.param(1, marks=slow)])
def test_killed_at_every_change_to_the_disk(
    plant: Plant, straight_child: tuple[Ended, str], every: int
) -> None:
    """The quick set: every thirteenth change and one of each kind."""
    reference, expected = straight_child
    saved_by, chosen = first_save(reference), places(reference.calls, every)
    found = side_by_side(lambda at=at: killed_at(plant, at, saved_by) for at in chosen)
    wrong = [(at, f) for at, f in zip(chosen, found, strict=True) if f != [-signal.SIGKILL, True, expected]]
    print(f"\nK1: {len(found)} kills at {len(reference.calls)} changes, {len(wrong)} mismatches")
    assert wrong == []
    assert every > 1 or len(found) == len(reference.calls)


def killed_at_random(plant: Plant, seed: int, seconds: float) -> list[Any]:
    """Kill repeatedly until the run finishes: [[phase of each kill], digest]."""
    plant.phase, rng, run, phases = mmap.mmap(-1, 1), random.Random(seed), plant.fresh(), []
    while True:
        pid = plant.start(run)
        # More patience with each kill: a machine that has become busy would never save the first step.
        time.sleep(rng.uniform(0, 0.8 * seconds * 1.02 ** len(phases)))
        os.kill(pid, signal.SIGKILL)  # one that has ended waits to be asked how
        ended = plant.wait(pid)
        if ended.code == 0:
            return [phases, finish(plant, run)]
        assert ended.code == -signal.SIGKILL, ended
        phases.append(PHASES[plant.phase[0]])


def killed_within(plant: Plant, phase: str, calls: int) -> list[Any]:
    """Kill in a phase after a given number of Python calls: [[phase], digest]."""
    plant.phase, run = mmap.mmap(-1, 1), plant.fresh()
    ended = plant.run(run, change=plant.once_in(phase, calls, lambda: os.kill(os.getpid(), signal.SIGKILL)))
    assert ended.code == -signal.SIGKILL, ended
    return [[PHASES[plant.phase[0]]], finish(plant, run)]


@pytest.mark.parametrize("kills", [25, pytest.param(3000, marks=slow)])
def test_killed_at_random(plant: Plant, straight_child: tuple[Ended, str], kills: int) -> None:
    """At random times, and a twentieth as often in each phase: random times may miss short phases."""
    started = time.perf_counter()
    plant.run(plant.fresh())
    seconds = time.perf_counter() - started
    rng, jobs = random.Random(kills), []
    for phase in PHASES[1:]:
        for calls in rng.sample(range(1, 1000), kills // 20):
            jobs.append(lambda p=phase, c=calls: killed_within(plant, p, c))
    aimed = side_by_side(jobs)
    mismatches = sum(found != straight_child[1] for _, found in aimed)
    seen: Counter[str] = Counter()
    runs = 0
    while seen.total() < kills:
        seeds = range(runs, runs + min(20, kills // 10))
        for phases, found in side_by_side(lambda s=s: killed_at_random(plant, s, seconds) for s in seeds):
            seen.update(phases)
            mismatches += found != straight_child[1]
        runs += len(seeds)
    kinds = f"{seen.total()} kills of {runs} runs at random, {len(aimed)} aimed"
    print(f"\nK2: {kinds}, {mismatches} mismatches; {dict(seen)}")
    assert mismatches == 0
    assert {phase for phases, _ in aimed for phase in phases} == set(PHASES[1:]), "every phase was hit"


def killed_twice(plant: Plant, first: int, second: int) -> list[Any]:
    """[exit code of the second run, whether an existing checkpoint survived, digest]."""
    run = plant.fresh()
    plant.run(run, at=first)
    had = len(list_checkpoints(run))
    code = plant.run(run, at=second).code
    found = list_checkpoints(run)
    whole = all(store.verify_dir(p) is None for p in found) and (not had or len(found) >= 1)
    return [code in (0, -signal.SIGKILL), whole, finish(plant, run)]


@pytest.mark.parametrize("pairs", [12, pytest.param(1500, marks=slow)])
def test_killed_while_resuming(plant: Plant, straight_child: tuple[Ended, str], pairs: int) -> None:
    """Includes calls within the first save and within pruning."""
    n, rng = len(straight_child[0].calls), random.Random(pairs)
    chosen = [(rng.randint(1, n), rng.randint(1, n)) for _ in range(pairs)]
    found = side_by_side(lambda pair=pair: killed_twice(plant, *pair) for pair in chosen)
    wrong = [(pair, f) for pair, f in zip(chosen, found, strict=True) if f != [True, True, straight_child[1]]]
    print(f"\nK4: {pairs} runs killed twice, {len(wrong)} mismatches")
    assert wrong == []


def forget_optimizer() -> None:
    checkpoint._load_optimizer = lambda *_: None


def forget(**values: Any) -> None:
    real = session.load_checkpoint

    def load(*args: Any) -> Any:
        state, logs = real(*args)
        for name, value in values.items():
            setattr(state, name, value)
        return state, logs

    session.load_checkpoint = load


def other_random_numbers() -> None:
    real = estep.sample_rationales
    estep.sample_rationales = lambda *args, **kw: real(*args, **{**kw, "seed": kw["seed"] + 1})


def keep_logs() -> None:
    Journal.cut_back = lambda *_: None  # type: ignore[method-assign,assignment]


@pytest.mark.parametrize(
    "defect",
    [
        forget_optimizer,
        lambda: forget(position=0),
        lambda: forget(policy_step=0),
        lambda: forget(num_tokens=0),
        other_random_numbers,
        keep_logs,
    ],
    ids=["optimizer", "data position", "counters", "token count", "random numbers", "logs"],
)
def test_control_what_is_not_restored_is_noticed(
    plant: Plant, straight_child: tuple[Ended, str], defect
) -> None:  # type: ignore[no-untyped-def]
    """Kill just before the second checkpoint is published, so that its whole step is repeated."""
    calls = list(enumerate(straight_child[0].calls, 1))
    at = next(n for n, (name, path) in calls if name == "_rename" and "/checkpoints/.tmp-step-000002" in path)
    run = plant.fresh()
    assert plant.run(run, at=at).code == -signal.SIGKILL
    assert plant.run(run, change=defect).code == 0
    assert digest(run) != straight_child[1]


def write_in_place() -> None:
    def write_dir(path: Path, files: dict[str, bytes]) -> None:
        store._make_dirs(path)
        manifest = {
            n: {"bytes": len(d), "sha256": store.hashlib.sha256(d).hexdigest()} for n, d in files.items()
        }
        for name, data in {"manifest.json": json.dumps(manifest).encode(), **files}.items():
            store._write_synced(path / name, data)

    checkpoint.store.write_dir = write_dir  # type: ignore[assignment]


def test_control_a_checkpoint_written_in_place_is_found(
    plant: Plant, straight_child: tuple[Ended, str]
) -> None:
    run = plant.fresh()
    calls = list(enumerate(plant.run(run, change=write_in_place).calls, 1))
    at = next(n for n, (name, path) in calls if name == "_write" and "step-000001/optimizer" in path)
    run = plant.fresh()
    assert plant.run(run, at=at, change=write_in_place).code == -signal.SIGKILL
    assert any(store.verify_dir(p) is not None for p in list_checkpoints(run))
    assert finish(plant, run) != straight_child[1]


# --- the order of writing, syncing and renaming -----------------------------------------------------------


def without_file_sync() -> None:
    def write(path: Path, data: bytes, flags: int = os.O_TRUNC) -> None:
        fd = store._open(path, os.O_WRONLY | flags)
        store._write_all(fd, data)
        os.close(fd)

    store._write_synced = write


def without_folder_sync() -> None:
    store._fsync_dir = lambda path: None


def test_everything_is_synced_before_it_is_published(plant: Plant, straight_child: tuple[Ended, str]) -> None:
    ended = straight_child[0]
    renames = sum(name == "_rename" for name, _ in ended.calls)
    assert renames > 10
    assert violations(list(ended.calls), [n for n, _ in ended.notes]) == []
    for defect, least in ((without_file_sync, 10), (without_folder_sync, 10)):  # the control
        broken = plant.run(plant.fresh(), change=defect)
        assert len(violations(list(broken.calls), [n for n, _ in broken.notes])) >= least
    print(f"\nK5: {renames} renames, 0 violations")


# --- a disk that is full or broken ------------------------------------------------------------------------


def failed_at(plant: Plant, at: int, how: str) -> list[Any]:
    """A call fails: [exit code, one line naming the run, space reported, intact, digest after resume]."""
    run = plant.fresh()
    ended = plant.run(run, at=at, how=how)
    whole = all(store.verify_dir(p) is None for p in list_checkpoints(run))
    room = " bytes needed, " in ended.said and " free)" in ended.said
    full = how in ("ENOSPC", "EDQUOT", "EFBIG")
    one_line = "\n" not in ended.said and str(run) in ended.said
    return [ended.code, one_line, room is full, whole, finish(plant, run)]


def failing(plant: Plant, straight_child: tuple[Ended, str]) -> tuple[tuple[str, str], ...]:
    """The calls of a run with each write counted once: a full disk does not split writes."""
    calls = plant.run(plant.fresh(), at=10**9, how="ENOSPC").calls
    assert 0.6 < len(calls) / len(straight_child[0].calls) < 0.9
    return calls


def fail_everywhere(plant: Plant, straight_child: tuple[Ended, str], cases: list[tuple[int, str]]) -> None:
    found = side_by_side(lambda c=c: failed_at(plant, *c) for c in cases)
    good = [74, True, True, True, straight_child[1]]
    wrong = [(case, f) for case, f in zip(cases, found, strict=True) if f != good]
    print(f"\nD1: {len(cases)} failures, {len(wrong)} mismatches")
    assert wrong == []


@pytest.mark.parametrize("every", [13, pytest.param(1, marks=slow)])
def test_a_full_disk_at_every_call(plant: Plant, straight_child: tuple[Ended, str], every: int) -> None:
    """ENOSPC at each call; the quick set takes a sample of calls and lets the other errors take turns."""
    calls, others = failing(plant, straight_child), ("EDQUOT", "EIO", "EROFS", "EFBIG")
    cases = [(at, "ENOSPC") for at in places(calls, every)]
    cases += [(at, others[at // 25 % 4]) for at in range(1, len(calls) + 1, 25)]
    assert every > 1 or len(cases) > len(calls)
    fail_everywhere(plant, straight_child, cases)


@slow
def test_every_error_at_every_call(plant: Plant, straight_child: tuple[Ended, str]) -> None:
    n = len(failing(plant, straight_child))
    fail_everywhere(
        plant,
        straight_child,
        [(at, e) for e in ("EDQUOT", "EIO", "EROFS", "EFBIG") for at in range(1, n + 1)],
    )


@pytest.mark.parametrize("limit", [100, 1_000, 10_000, 30_000, 60_000])
def test_a_real_limit_on_the_size_of_files(
    plant: Plant, straight_child: tuple[Ended, str], limit: int
) -> None:
    """The kernel refuses the first write past the limit, wherever in the run it happens."""
    run = plant.fresh()
    hard = resource.getrlimit(resource.RLIMIT_FSIZE)[1]
    ended = plant.run(run, change=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard)))
    assert ended.code == 74 and "bytes needed" in ended.said and "File too large" in ended.said
    assert finish(plant, run) == straight_child[1]


# --- two at once ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("times", [10, pytest.param(50, marks=slow)])
def test_of_two_simultaneous_starts_one_wins(
    plant: Plant, straight_child: tuple[Ended, str], times: int
) -> None:
    for _ in range(times):
        run, (ready, go) = plant.fresh(), os.pipe()
        pids = [
            plant.start(run, change=lambda fd=ready, end=go: (os.close(end), os.read(fd, 1))) for _ in "ab"
        ]
        os.close(ready)
        os.close(go)  # both wait for this
        ended = sorted((plant.wait(pid) for pid in pids), key=lambda e: e.code)
        assert [e.code for e in ended] == [0, 73], [e.said for e in ended]
        holder = f"in use by process (?:{pids[0]}|{pids[1]}) on {os.uname().nodename} since 20"
        assert harness.re.search(holder, ended[1].said), ended[1].said
        assert digest(run) == straight_child[1]
        shutil.rmtree(run)


def test_a_holder_that_is_killed_frees_the_run_at_once(
    plant: Plant, straight_child: tuple[Ended, str]
) -> None:
    run = plant.fresh()
    assert plant.run(run, at=first_save(straight_child[0])).code == -signal.SIGKILL
    assert "process" in (run / "LOCK").read_text()  # it had no time to wipe it out, and nobody minds
    assert finish(plant, run) == straight_child[1]
