"""Everything that wants a GPU in one command: does it run, on which kernels, how fast, does it learn.

    python benchmarks/gpu.py [--out FOLDER] [--parts runs,profile,...] [--rivals empg,...] [--minutes 9]
    python benchmarks/gpu.py --rehearse      the same code on a CPU, with small models

Nine minutes at most, offline, the most valuable parts first. Every job has a process and a time limit of its
own; one that hangs is killed with everything it started, and the next one runs. FOLDER (``$OUT``, else
``gpu-results``) gets ``results.json`` and ``results.txt``, rewritten as figures arrive, and ``log.txt``.
benchmarks/README.md says what to carry to a machine without a network, and how to read the results.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import IO, Any

from gpu_parts import PARTS, RIVALS, TOTAL, Job, chosen
from gpu_report import checks, report
from machine import import_from

ROOT = Path(__file__).resolve().parents[1]
#: Seconds between two looks at a job's rows, and those for a job to say where it hangs.
LOOK, LAST_WORDS = 0.1, 0.5
#: Seconds below which a job is not begun: libraries alone take longer.
LEAST = 5.0
#: A job may take time that others saved: up to twice its limit, or this.
MOST = 60.0
Row = dict[str, Any]


# --- processes ---------------------------------------------------------------------------------------


class Child:
    """A job's process. It loads its libraries while the job before it still runs, then waits for ``begin``.

    It leads a session of its own, so that a signal at the keyboard reaches the parent only.
    """

    def __init__(self, job: Job, folder: Path, number: int) -> None:
        self.job = job
        self.rows, self.log = folder / f"{number}.jsonl", folder / f"{number}.log"
        with self.log.open("wb") as log:
            self.process = subprocess.Popen(
                [sys.executable, __file__, "--job", job.dump(), str(folder), str(self.rows)],
                stdin=subprocess.PIPE, stdout=log, stderr=log, start_new_session=True, env=environment(job),
            )  # fmt: skip

    def begin(self) -> None:
        """Let it work."""
        assert self.process.stdin is not None
        with suppress(OSError):  # it may have died over its libraries
            self.process.stdin.write(b"begin\n")
            self.process.stdin.close()

    def wait(self, seconds: float, look: Callable[[], None]) -> str | None:
        """Until it ends, or is killed when the time is over; why it did not end well."""
        until = time.monotonic() + seconds
        while self.process.poll() is None and time.monotonic() < until:
            look()
            time.sleep(LOOK)
        code = self.process.poll()
        self.kill(last_words=True)
        look()
        if code is None:
            return f"killed after {seconds:.0f} s"
        return f"exit code {code}: {last_line(self.log)}" if code else None

    def kill(self, last_words: bool = False) -> None:
        """End it and everything that it started, sessions of their own included.

        Args:
            last_words: a process that still runs first writes the stack of every thread into its log.
        """
        running = self.process.poll() is None
        doomed = [self.process.pid, *descendants(self.process.pid)] if running else []
        if running and last_words:
            self.process.send_signal(signal.SIGUSR1)
            time.sleep(LAST_WORDS)
        with suppress(ProcessLookupError, PermissionError):
            os.killpg(self.process.pid, signal.SIGKILL)
        for pid in doomed:
            with suppress(ProcessLookupError, PermissionError):
                os.kill(pid, signal.SIGKILL)
        self.process.wait()


def environment(job: Job) -> dict[str, str]:
    """For a job's process: the checkout's package, no network, no GPU in a rehearsal."""
    return import_from(
        PYTHONUNBUFFERED="1",
        HF_HUB_OFFLINE="1",
        TRANSFORMERS_OFFLINE="1",
        UNSLOTH_DISABLE_STATISTICS="1",
        TOKENIZERS_PARALLELISM="false",
        **({"CUDA_VISIBLE_DEVICES": ""} if job.small else {}),
    )


def descendants(pid: int) -> list[int]:
    """The processes that a process has started, and they theirs (Linux; elsewhere none are found)."""
    children: dict[int, list[int]] = {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with suppress(OSError, ValueError, IndexError):
            parent = int(stat.read_text("utf-8", "replace").rpartition(")")[2].split()[1])
            children.setdefault(parent, []).append(int(stat.parent.name))
    found, todo = list[int](), [pid]
    while todo:
        todo = [child for parent in todo for child in children.get(parent, [])]
        found += todo
    return found


def last_line(log: Path) -> str:
    """What a process said last."""
    lines = [line for line in log.read_text("utf-8", "replace").splitlines() if line.strip()]
    return lines[-1].strip()[:300] if lines else ""


def told(file: Path) -> list[Row]:
    """The rows in a job's file; the last one of each figure counts."""
    rows: dict[Any, Row] = {}
    with suppress(OSError):
        for line in file.read_text("utf-8", "replace").splitlines():
            with suppress(ValueError):  # cut off in the middle
                row = json.loads(line)
                rows[row["figure"], row.get("rows")] = row
    return list(rows.values())


def unheard(job: Job, rows: Sequence[Row], why: str) -> list[Row]:
    """A row with an error for each figure that a job has not told."""
    heard = {row["figure"] for row in rows}
    facts = {"part": job.part, "rival": job.rival, "shape": job.shape, "cap_gb": job.cap_gb, "error": why}
    return [{**facts, "figure": figure} for figure in job.figures if figure not in heard]


# --- all jobs ----------------------------------------------------------------------------------------


class Results:
    """What was found so far, and its files."""

    def __init__(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.folder = folder
        self.done: list[Row] = []
        self.now: list[Row] = []  # of the job at work
        self.jobs: list[Row] = []
        self._log: IO[bytes] = (folder / "log.txt").open("wb")
        self._copied = 0

    @property
    def rows(self) -> list[Row]:
        """All rows."""
        return [*self.done, *self.now]

    def look(self, child: Child) -> None:
        """Take over what a job has told since the last look."""
        self._copy(child.log)
        rows = told(child.rows)
        if rows != self.now:
            self.now = rows
            self.write()

    def end(self, job: Job, seconds: float, why: str | None) -> None:
        """A job is over, or was not begun."""
        self.done = [*self.rows, *unheard(job, self.now, why or "not told")]
        self.now, self._copied = [], 0
        about = {"part": job.part, "job": job.name, "limit": job.limit, "seconds": seconds, "ended": why}
        self.jobs.append(about)
        self.write()

    def write(self) -> None:
        """Both files anew; whoever reads them meanwhile sees the old ones or the new ones."""
        self._put("results.json", json.dumps({"jobs": self.jobs, "rows": self.rows}, indent=1))
        self._put("results.txt", self.text())

    def text(self) -> str:
        """What a person reads. A row that it trips over must not cost the ones to come."""
        try:
            return report(self.rows, self.jobs)
        except Exception as error:
            return f"results.json has the figures, this text failed: {type(error).__name__}: {error}\n"

    def _put(self, name: str, text: str) -> None:
        part = self.folder / f"{name}.part"
        part.write_text(text, "utf-8")
        os.replace(part, self.folder / name)

    def say(self, text: str) -> None:
        """A line for whoever watches, and for the log."""
        print(text, flush=True)
        self._log.write(f"=== {text}\n".encode())
        self._log.flush()

    def _copy(self, log: Path) -> None:
        with log.open("rb") as file:
            file.seek(self._copied)
            new = file.read()
        self._copied += len(new)
        self._log.write(new)
        self._log.flush()


def allowed(job: Job, spare: float, scale: float) -> float:
    """Seconds that a job may take where earlier ones have left ``spare``."""
    return min(job.limit + spare, max(2 * job.limit, MOST * scale))


def measure(jobs: Sequence[Job], results: Results, scale: float = 1.0) -> None:
    """Do the jobs in order. Time that a job does not use is left to later ones, beyond their own limits."""
    spare, following = 0.0, None
    with tempfile.TemporaryDirectory(prefix="empg-gpu-", ignore_cleanup_errors=True) as work:
        try:
            for n, job in enumerate(jobs):
                seconds = allowed(job, spare, scale)
                child, following = following or Child(job, Path(work), n), None
                if seconds < LEAST * scale:
                    child.kill()
                    results.end(job, 0.0, f"not begun: {seconds:.0f} s left")
                    spare += job.limit
                    continue
                results.say(f"[{n + 1}/{len(jobs)}] {job.name}: {', '.join(job.figures)} ({seconds:.0f} s)")
                started = time.monotonic()
                child.begin()
                following = Child(jobs[n + 1], Path(work), n + 1) if n + 1 < len(jobs) else None
                why = child.wait(seconds, lambda c=child: results.look(c))
                took = time.monotonic() - started
                spare += job.limit - took
                results.end(job, took, why)
                if why:
                    results.say(f"    {why}")
        finally:
            for left in (following, locals().get("child")):
                if left is not None:
                    left.kill()


# --- the command -------------------------------------------------------------------------------------


def child(text: str, folder: str, rows: str) -> None:
    """One job, in this process."""
    import faulthandler

    faulthandler.enable()
    faulthandler.register(signal.SIGUSR1)
    job = Job.load(text)
    prepare(job)
    if not sys.stdin.readline():  # the parent has gone
        return
    from gpu_work import Work

    Work(job, Path(folder), Path(rows)).do()


def prepare(job: Job) -> None:
    """Load what the job needs. Unsloth comes before what it patches."""
    if job.rival == "pytest":
        return
    if "unsloth" in job.rival:
        from empg_lite.policy.backends import choose_backend, import_unsloth

        choose_backend("unsloth")
        import_unsloth()
    import peft  # noqa: F401
    import transformers  # noqa: F401

    import empg_lite.loop.train  # noqa: F401


def plan_text(jobs: Sequence[Job]) -> str:
    """The parts and their limits."""
    limits = {part: sum(job.limit for job in jobs if job.part == part) for part in PARTS}
    lines = [f"{part:8s} {limit:5.0f} s" for part, limit in limits.items() if limit]
    return "\n".join([*lines, f"{'all':8s} {sum(limits.values()):5.0f} s"])


def main() -> int:
    """The exit code: 1 where a check failed or could not be made, 0 otherwise."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, help="folder of the results ($OUT, else gpu-results)")
    parser.add_argument("--parts", default=",".join(PARTS), help=f"some of {','.join(PARTS)}")
    parser.add_argument("--rivals", default=",".join(RIVALS), help=f"some of {','.join(RIVALS)}")
    parser.add_argument("--minutes", type=float, help="time for all limits together (9)")
    parser.add_argument("--rehearse", action="store_true", help="small models and few rows, on a CPU")
    parser.add_argument("--job", nargs=3, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.job:
        child(*arguments.job)
        return 0
    parts, rivals = arguments.parts.split(","), arguments.rivals.split(",")
    if odd := [name for name in (*parts, *rivals) if name not in (*PARTS, *RIVALS)]:
        parser.error(f"unknown: {', '.join(odd)} (there are {', '.join((*PARTS, *RIVALS))})")
    minutes = arguments.minutes or TOTAL / 60
    jobs = chosen(parts, rivals, minutes, arguments.rehearse)
    print(plan_text(jobs), flush=True)
    results = Results(arguments.out or Path(os.environ.get("OUT") or "gpu-results"))
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # as Ctrl-C: children are killed
    try:
        measure(jobs, results, 60 * minutes / TOTAL)
    except KeyboardInterrupt:
        results.say("interrupted")
    results.write()
    print("\n" + results.text())
    good = all(holds for _, _, holds in checks(results.rows))
    whole = len(results.jobs) == len(jobs) and not any("error" in row for row in results.rows)
    return 0 if good and whole else 1


if __name__ == "__main__":
    raise SystemExit(main())
