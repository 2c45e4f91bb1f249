"""Runs the real ``train`` in forked children that die, or meet an error, at a chosen change to the disk.

torch is imported and the model loaded once; a child is a fork, ready in milliseconds. To save time a child
replaces two things: ``load_policy`` returns the policy that the parent loaded, and the regular-expression
reward runs in the child instead of a worker, whose start takes longer than a run. (The test of the real
command uses both.) The package has no switch for this: the child wraps the eight functions of ``store`` that
change the disk.
"""

from __future__ import annotations

import errno
import gc
import hashlib
import itertools
import json
import mmap
import os
import re
import resource
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fixture_recipe import write_recipe
from run_files import stable

from empg_lite.core.errors import explained
from empg_lite.core.view import View
from empg_lite.loop import learner
from empg_lite.loop.recorder import Recorder
from empg_lite.loop.train import TrainOptions, train
from empg_lite.recipe.file import load_recipe
from empg_lite.recipe.schema import Recipe
from empg_lite.rewards import Case, Grader, Verdict
from empg_lite.rewards.scorer import Scorer
from empg_lite.run import store
from empg_lite.run.checkpoint import list_checkpoints
from empg_lite.run.journal import read_metrics

CALLS = ("_open", "_write", "_fsync", "_rename", "_unlink", "_mkdir", "_rmdir", "_cut")
#: Phases of a child, by the number it keeps in shared memory.
PHASES = ("other", "sampling", "grading", "fitting", "evaluating", "saving")
SETTINGS = ["run.steps=2", "run.eval_every=2", "run.keep=1", "sampler.max_new_tokens=4"]


@dataclass(frozen=True)
class Ended:
    """How a child ended: exit code or minus the signal, its error, and its changes to the disk."""

    code: int
    said: str = ""
    calls: tuple[tuple[str, str], ...] = ()
    notes: tuple[tuple[int, str], ...] = ()  # (number of calls before it, message to the user)


class _Told(View):
    """Records what the user sees, with its position among the calls, and the current phase."""

    def __init__(self, report: _Report) -> None:
        self.report = report

    def note(self, text: str) -> None:
        self.report.notes.append((len(self.report.calls), text))

    warn = note

    def step(self, record: Any, total: int) -> None:
        self.note(f"step {record['step']}")

    @contextmanager
    def phase(self, name: str, total: int, done: int = 0) -> Iterator[Any]:
        doing = {"sampling": "sampling", "fitting": "fitting"}.get(name, "evaluating")
        with self.report.doing("sampling" if name == "preflight" else doing):
            yield lambda done: None


@dataclass
class _Report:
    phase: mmap.mmap
    calls: list[tuple[str, str]] = field(default_factory=list)
    notes: list[tuple[int, str]] = field(default_factory=list)

    @contextmanager
    def doing(self, phase: str) -> Iterator[None]:
        before, self.phase[0] = self.phase[0], PHASES.index(phase)
        yield
        self.phase[0] = before

    def within(self, phase: str, real: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            with self.doing(phase):
                return real(*args, **kwargs)

        return call


class Plant:
    """What all children share: the loaded model, the recipe, a folder for runs."""

    def __init__(self, folder: Path, model_dir: Path, settings: Iterable[str] = SETTINGS) -> None:
        self.folder = folder
        self.recipe: Recipe = load_recipe(str(write_recipe(folder, model_dir)), list(settings))
        resolved = self.recipe.resolved()
        train(resolved, folder / "warm")  # triggers the late imports
        self.policy = learner.load_policy(
            resolved.model, str(resolved.data.prompt), seed=resolved.run.seed, gradient_checkpointing=False
        )
        self.phase = mmap.mmap(-1, 1)
        gc.collect()
        gc.freeze()  # or a child's first collection would copy every page
        self._names = itertools.count()

    def fresh(self) -> Path:
        """A run folder that does not exist yet."""
        return self.folder / f"run-{os.getpid()}-{next(self._names)}"

    def start(
        self, run: Path, *, at: int = 0, how: str = "kill", change: Callable[[], None] | None = None
    ) -> int:
        """Fork a child that trains in ``run`` with ``--resume``; its process id.

        Args:
            at: the change to the disk, from 1, at which it meets ``how``: ``kill``, or an errno's name.
            change: called in the child first: a deliberate defect.
        """
        self.phase[0] = 0
        pid = os.fork()
        if pid:
            return pid
        code = 70
        signal.signal(signal.SIGINT, signal.SIG_DFL)  # a command does not have pytest's handler
        try:
            code = self._work(run, at, how, change)
        finally:
            os._exit(code)

    def wait(self, pid: int) -> Ended:
        code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        report = self._report_of(pid)
        if not report.is_file():
            return Ended(code)
        found = json.loads(report.read_text("utf-8"))
        report.unlink()
        return Ended(code, found["said"], *(tuple(map(tuple, found[n])) for n in ("calls", "notes")))

    def run(self, run: Path, **how: Any) -> Ended:
        """``start`` and ``wait``."""
        return self.wait(self.start(run, **how))

    def once_in(self, phase: str, calls: int, do: Callable[[], None]) -> Callable[[], None]:
        """A ``change`` for ``start``: call ``do`` once, after this many Python calls within a phase.

        Counted, not timed: the same place on a fast machine and on a busy one.
        """
        wanted = PHASES.index(phase)

        def watch(frame: Any, event: str, argument: Any) -> None:
            nonlocal calls
            calls -= event == "call" and self.phase[0] == wanted
            if calls <= 0:
                sys.setprofile(None)
                do()

        return lambda: sys.setprofile(watch)

    @contextmanager
    def measured(self) -> Iterator[Callable[[], int]]:
        """Memory in bytes by which the largest child of the block exceeded this process."""
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        yield lambda: max(0, resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss - before) * 1024

    def _report_of(self, pid: int) -> Path:
        return self.folder / f"report-{pid}.json"

    def _work(self, run: Path, at: int, how: str, change: Callable[[], None] | None) -> int:
        report = _Report(self.phase)
        learner.load_policy = lambda *_, **__: self.policy  # type: ignore[assignment]
        Grader.self_test = lambda *_: None  # type: ignore[method-assign,assignment]
        Grader.submit = _graded  # type: ignore[method-assign,assignment]
        Scorer.scored = report.within("grading", _slowly(Scorer.scored))  # type: ignore[method-assign]
        Recorder.checkpoint = report.within("saving", Recorder.checkpoint)  # type: ignore[method-assign]
        if change is not None:
            change()
        _wrap_store(report.calls, at, how)
        code, said = 0, ""
        try:
            train(self.recipe, run, TrainOptions(resume=True), view=_Told(report))
        except BaseException as error:
            known = explained(error)
            code, said = known.exit_code, str(known)
        hard = resource.getrlimit(resource.RLIMIT_FSIZE)[1]
        resource.setrlimit(resource.RLIMIT_FSIZE, (hard, hard))  # the report is not the run's
        facts = {"said": said, "calls": report.calls, "notes": report.notes}
        self._report_of(os.getpid()).write_text(json.dumps(facts), "utf-8")
        return code


def _slowly(real: Callable[..., Any]) -> Callable[..., Any]:
    """Grade as a worker would."""

    def call(*args: Any) -> Any:
        time.sleep(0.002)
        return real(*args)

    return call


def _graded(grader: Grader, spec: str, case: Case) -> Future[Verdict]:
    """The verdict of the fixture's reward."""
    found = re.search(spec.removeprefix("regex:"), case.prediction)
    verdict: Future[Verdict] = Future()
    verdict.set_result(
        Verdict(float(bool(found)), "equal" if found else "different", None, None, case.gold, 0.0)
    )
    return verdict


def _wrap_store(calls: list[tuple[str, str]], at: int, how: str) -> None:
    names: dict[int, str] = {}  # open descriptor -> path
    halved: set[int] = set()

    def wrap(name: str, real: Callable[..., Any]) -> Callable[..., Any]:
        def call(first: Any, *rest: Any) -> Any:
            calls.append((name, names.get(first, "") if isinstance(first, int) else str(first)))
            if name == "_write" and how == "kill":  # two calls, so that a file can be torn in the middle
                first_half = first not in halved
                halved.add(first) if first_half else halved.discard(first)
                if first_half:
                    rest = (rest[0][: max(1, len(rest[0]) // 2)],)
            if len(calls) == at:
                if how == "kill":
                    os.kill(os.getpid(), signal.SIGKILL)
                number = getattr(errno, how)
                raise OSError(number, os.strerror(number))
            result = real(first, *rest)
            if name == "_open":
                names[result] = str(first)
                halved.discard(result)
            return result

        return call

    for name in CALLS:
        setattr(store, name, wrap(name, getattr(store, name)))
    open_dir = store._fsync_dir

    def fsync_dir(path: Path) -> None:
        """Opened for reading, bypassing ``_open``: the log needs its name."""
        real = os.open

        def opened(*args: Any, **kwargs: Any) -> int:
            fd = real(*args, **kwargs)
            names[fd] = str(path)
            return fd

        os.open = opened
        try:
            open_dir(path)
        finally:
            os.open = real

    store._fsync_dir = fsync_dir


def dies(job: Callable[[], object], at: int) -> bool:
    """Do a job in a forked child, killed at its ``at``-th change to the disk; False where it has fewer."""
    pid = os.fork()
    if not pid:
        code = 70
        try:
            _wrap_store([], at, "kill")
            job()
            code = 0
        finally:
            os._exit(code)
    code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    assert code in (0, -signal.SIGKILL), code
    return code != 0


def record_durable(run: Path, trees: Path) -> None:
    """Save, as ``trees/N``, the state that is guaranteed to survive a power failure after call N.

    A file has the content of its last fsync; a folder has the entries that it had at its own. What was
    written or renamed after that is dropped. Call it in the child, before the calls are wrapped.
    """
    contents: dict[int, bytes] = {}  # inode -> synced content
    entries: dict[int, dict[str, int]] = {}  # inode of a folder -> its synced entries
    folders: set[int] = set()
    kept: list[Any] = [None]
    count = itertools.count()

    def state(inode: int) -> Any:
        if inode in folders:
            return {name: state(child) for name, child in sorted(entries.get(inode, {}).items())}
        return contents.get(inode, b"")

    def write(at: Path, node: Any) -> None:
        if isinstance(node, bytes):
            at.write_bytes(node)
            return
        at.mkdir()
        for name, child in node.items():
            write(at / name, child)

    def keep(fd: int) -> None:
        inode = os.fstat(fd).st_ino
        path = Path(os.readlink(f"/proc/self/fd/{fd}"))
        if path.is_dir():
            folders.add(inode)
            found = {e.name: e for e in os.scandir(path)}
            folders.update(e.inode() for e in found.values() if e.is_dir(follow_symlinks=False))
            entries[inode] = {name: e.inode() for name, e in found.items()}
        else:
            contents[inode] = path.read_bytes()
        top = entries.get(run.parent.stat().st_ino, {}).get(run.name)
        now = state(top) if top is not None else None
        if now is not None and now != kept[-1]:
            kept.append(now)
            write(trees / str(next(count)), now)

    real = store._fsync

    def fsync(fd: int) -> None:
        real(fd)
        keep(fd)

    store._fsync = fsync


def digest(run: Path) -> str:
    """What a resumed run shares with an uninterrupted one: adapters, optimizer, metrics without clocks."""
    newest = list_checkpoints(run)[-1]
    parts = [(newest / n).read_bytes() for n in ("adapter_model.safetensors", "optimizer.safetensors")]
    parts += [(run / n / "adapter_model.safetensors").read_bytes() for n in ("adapter", "best")]
    parts.append(json.dumps([stable(r) for r in read_metrics(run / "metrics.jsonl")]).encode())
    return hashlib.sha256(b"".join(hashlib.sha256(part).digest() for part in parts)).hexdigest()


def side_by_side(jobs: Iterable[Callable[[], Any]], processes: int = 2) -> list[Any]:
    """Run each job in a forked process, ``processes`` at a time; returns their JSON results in order."""
    results: dict[int, Any] = {}
    waiting, running = list(enumerate(jobs)), dict[int, tuple[int, str]]()
    with tempfile.TemporaryDirectory() as folder:
        while waiting or running:
            while waiting and len(running) < processes:
                number, job = waiting.pop(0)
                file = f"{folder}/{number}.json"
                pid = os.fork()
                if not pid:
                    code = 1
                    try:
                        Path(file).write_text(json.dumps(job()), "utf-8")
                        code = 0
                    except BaseException:
                        traceback.print_exc()
                    finally:
                        os._exit(code)
                running[pid] = number, file
            pid, status = os.wait()
            if pid in running:
                number, file = running.pop(pid)
                assert status == 0, f"job {number} failed"
                results[number] = json.loads(Path(file).read_text("utf-8"))
    return [results[number] for number in sorted(results)]


def violations(calls: list[tuple[str, str]], told: list[int]) -> list[str]:
    """Violations in a log of calls: what a power failure would lose or tear.

    What a rename publishes was synced before it: each file after its last write, and the folder; the folder
    above is synced after it, before the next change under another name, and before the user is told anything.
    """
    found, dirty, made = [], set(), set()
    unsynced: str | None = None  # folder whose entries changed by the rename just done
    for n, (name, path) in enumerate(calls):
        if unsynced is not None and (name != "_fsync" or path != unsynced):
            if not (name == "_rename" and str(Path(path).parent) == unsynced):  # the second of two
                found.append(f"{n}: {name} {path} before {unsynced} is synced")
                unsynced = None
        if unsynced is not None and n in told:
            found.append(f"{n}: told before {unsynced} is synced")
        if name in ("_write", "_cut"):
            dirty.add(path)
        elif name == "_mkdir":
            made.add(path)
        elif name == "_fsync":
            dirty.discard(path)
            made.discard(path)
            unsynced = None if path == unsynced else unsynced
        elif name == "_rename":
            below = [p for p in dirty | made if p == path or p.startswith(f"{path}/")]
            if below:
                found.append(f"{n}: {path} is renamed, {below[0]} is not synced")
            dirty.difference_update(below)
            made.difference_update(below)
            unsynced = str(Path(path).parent)
    return found
