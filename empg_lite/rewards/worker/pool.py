"""A small pool of grading workers that the parent owns, times and kills.

One thread serves each worker for as long as the pool lives. It starts the worker (the kernel then kills the
worker together with the thread, hence with us), sends it one request at a time, and kills and replaces it
when time runs out. Nothing here uses signals or timers, so any thread may call.
"""

from __future__ import annotations

import json
import os
import queue
import select
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import Future
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from empg_lite.core.errors import GraderUnusable
from empg_lite.rewards.kind import ALGEBRA

#: Importing sympy takes half a second on an idle machine.
_START_SECONDS = 60.0
_START_ATTEMPTS = 3
_MAX_REPLY = 1 << 26
_TODO = "reinstall math-verify and sympy, then try: empg-lite grade --gold 1/2 --prediction 0.5"

_BOOTSTRAP = """
import sys
root = sys.argv.pop(1)
if root not in sys.path:
    sys.path.insert(0, root)
from empg_lite.rewards.worker.main import main
main()
"""


@dataclass(frozen=True, slots=True)
class Reply:
    """A worker's answer, or how it failed (``timeout``, ``memory``, ``crash``), and after how long.

    ``error`` is the message of a crash.
    """

    result: Mapping[str, Any]
    failure: str | None
    seconds: float
    error: str | None = None


@dataclass(frozen=True, slots=True)
class _Job:
    request: bytes
    future: Future[Reply] = field(default_factory=Future)


def _line(message: Mapping[str, Any]) -> bytes:
    return json.dumps(message).encode("ascii") + b"\n"


class _StartFailed(Exception):
    """A worker ended before it was ready."""


class _Worker:
    """One child process and the two pipes to it."""

    def __init__(self, time_limit: float, memory_limit: int, setup: Mapping[str, Any]) -> None:
        self._setup = setup
        root = str(Path(__file__).resolve().parents[2])
        self.complaints = tempfile.TemporaryFile()
        limits = [str(os.getpid()), str(time_limit), str(memory_limit)]
        # -P: the current folder must not shadow sympy. New session: the terminal's Ctrl-C is for the parent.
        self.process = subprocess.Popen(
            [sys.executable, "-P", "-c", _BOOTSTRAP, root, *limits],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self.complaints,
            bufsize=0,
            close_fds=True,
            start_new_session=True,
            env={**os.environ, "PYTHONHASHSEED": "0"},
        )
        assert self.process.stdin is not None and self.process.stdout is not None
        self.requests, self.replies = self.process.stdin.fileno(), self.process.stdout.fileno()
        os.set_blocking(self.requests, False)
        os.set_blocking(self.replies, False)
        self.ready = False

    def wait_ready(self) -> None:
        """Block until the imports are done.

        Raises:
            _StartFailed: it ended.
            GraderUnusable: its setup is broken or takes forever; a second try would not help.
        """
        if self.ready:
            return
        deadline = time.monotonic() + _START_SECONDS
        line = self._receive(_line(self._setup), deadline)
        said = _object(line)
        if line is not None and said is None:
            self.kill()
            raise _StartFailed("it sent something other than a JSON object")
        if said is not None and (broken := said.get("broken")):
            self.kill()
            raise GraderUnusable(broken["what"], broken["where"], broken["todo"])
        if line is None and time.monotonic() >= deadline:
            self.kill()
            raise GraderUnusable(f"the grading worker is not ready after {_START_SECONDS:g} s", "", _TODO)
        if line is None:
            with suppress(subprocess.TimeoutExpired):  # it has closed its pipe and is ending
                self.process.wait(_START_SECONDS)
            self.complaints.seek(0)
            lines = self.complaints.read()[-4000:].decode(errors="replace").strip().splitlines()
            self.kill()
            raise _StartFailed(lines[-1] if lines else f"it {self._how_it_ended()} before it was ready")
        self.ready = True

    def ask(self, request: bytes, limit: float) -> Reply:
        """Send one request and wait for its reply; unless it came in time, the process is dead afterwards."""
        start = time.monotonic()
        line = self._receive(request, start + limit)
        seconds = time.monotonic() - start
        if line is not None:
            result = _object(line)
            if result is None:  # no later reply can be trusted
                self.kill()
                return Reply({}, "crash", seconds, "the worker sent something other than one JSON object")
            if not result.get("memory"):
                error = result.get("error")
                return Reply(result, "crash" if error is not None else None, seconds, error)
            self.kill()
            return Reply({}, "memory", seconds)
        out_of_time = seconds >= limit
        self.kill()
        if out_of_time or self.process.returncode == -signal.SIGXCPU:
            return Reply({}, "timeout", seconds)
        if self._setup["kind"] == "algebra" and self.process.returncode == -signal.SIGABRT:
            return Reply({}, "memory", seconds)  # GMP, which sympy computes with, aborts where malloc fails
        return Reply({}, "crash", seconds, f"the worker {self._how_it_ended()}")

    def _how_it_ended(self) -> str:
        code = self.process.returncode
        return f"ended by signal {-code}" if code < 0 else f"ended with exit code {code}"

    def _receive(self, unsent: bytes, deadline: float) -> bytes | None:
        """Send ``unsent`` and read one line; None when the process ended or the deadline passed."""
        left, received = memoryview(unsent), bytearray()
        poll = select.poll()
        poll.register(self.replies, select.POLLIN)
        if left:
            poll.register(self.requests, select.POLLOUT)
        while (patience := deadline - time.monotonic()) > 0:
            for descriptor, _ in poll.poll(1000 * patience):
                if descriptor == self.requests:
                    try:
                        left = left[os.write(self.requests, left[: 1 << 16]) :]
                    except BrokenPipeError:
                        return None
                    if not left:
                        poll.unregister(self.requests)
                    continue
                chunk = os.read(self.replies, 1 << 16)
                received += chunk
                if not chunk or len(received) > _MAX_REPLY:
                    return None
                if chunk.endswith(b"\n"):
                    return bytes(received)
        return None

    def alive(self) -> bool:
        return self.process.poll() is None

    def kill_group(self) -> None:
        """SIGKILL the worker and everything it started."""
        if self.process.returncode is None:  # not reaped, so its process group id cannot have been reused
            with suppress(ProcessLookupError):
                os.killpg(self.process.pid, signal.SIGKILL)

    def kill(self) -> None:
        """End the worker and everything it started; safe to call twice."""
        self.kill_group()
        self.process.wait()
        for stream in (self.process.stdin, self.process.stdout, self.complaints):
            assert stream is not None
            stream.close()


def _object(line: bytes | None) -> dict[str, Any] | None:
    """The one JSON object of a line, or None."""
    try:
        return dict(json.loads(line)) if line is not None else None
    except (ValueError, TypeError):
        return None


class WorkerPool:
    """Killable workers behind a queue.

    Args:
        workers: maximum number of processes; they start when there is work for them.
        time_limit: wall-clock seconds that a request may take.
        memory_limit: address space of a worker in bytes.
        setup: what a worker loads before its first request; see ``worker.main``.
    """

    def __init__(
        self,
        *,
        workers: int,
        time_limit: float,
        memory_limit: int,
        setup: Mapping[str, Any] = ALGEBRA,
    ) -> None:
        self._setup = dict(setup)
        self._workers, self._time_limit, self._memory_limit = workers, time_limit, memory_limit
        self._queue: queue.SimpleQueue[_Job | None] = queue.SimpleQueue()
        self._lock = threading.Lock()
        self._threads: list[threading.Thread] = []
        self._running: dict[int, _Worker] = {}
        self._outstanding = 0
        self._broken: GraderUnusable | None = None

    def run(self, requests: Sequence[Mapping[str, Any]]) -> list[Reply]:
        """Send all requests, in parallel; replies in order. Thread-safe.

        Raises:
            GraderUnusable: workers cannot be started, or the pool was closed.
        """
        futures = [self.submit(request) for request in requests]
        return [future.result() for future in futures]

    def submit(self, request: Mapping[str, Any]) -> Future[Reply]:
        """Send one request. Callbacks of the future run in a thread of the pool.

        Raises:
            GraderUnusable: the pool was closed. The future raises it where workers do not start.
        """
        job = _Job(_line(request))
        with self._lock:
            if self._broken is not None:
                raise self._broken
            self._outstanding += 1
            self._queue.put(job)
            if len(self._threads) < min(self._workers, self._outstanding):
                self._start_thread()
        return job.future

    def pids(self) -> list[int]:
        """Process ids of the workers that are running."""
        with self._lock:
            return [worker.process.pid for worker in self._running.values() if worker.alive()]

    def close(self) -> None:
        """Kill the workers and end their threads; a second call does nothing."""
        self._break(GraderUnusable("the grader is closed"))
        for thread in self._threads:
            thread.join()

    def _break(self, error: GraderUnusable) -> None:
        """Refuse new work, fail waiting jobs, kill running workers, end every thread."""
        waiting = []
        with self._lock:
            self._broken = self._broken or error
            for worker in self._running.values():
                worker.kill_group()
            while not self._queue.empty():
                waiting.append(self._queue.get_nowait())
            # One for every thread, again: the drain may have taken another call's end markers.
            for _ in self._threads:
                self._queue.put(None)
        for job in waiting:
            if job is not None:
                job.future.set_exception(error)  # without the lock: a callback may call us

    def _start_thread(self) -> None:
        index = len(self._threads)
        thread = threading.Thread(target=self._serve, args=(index,), name=f"empg-grader-{index}", daemon=True)
        self._threads.append(thread)
        thread.start()

    def _ready_worker(self, index: int) -> _Worker:
        """This thread's worker, ready for requests; a new one if the old one ended.

        Raises:
            GraderUnusable: it failed to start several times.
        """
        failure = ""
        for _ in range(_START_ATTEMPTS):
            with self._lock:
                if self._broken is not None:
                    raise self._broken
                worker = self._running.get(index)
                if worker is None or not worker.alive():
                    worker = self._running[index] = _Worker(self._time_limit, self._memory_limit, self._setup)
            try:
                worker.wait_ready()
                return worker
            except _StartFailed as error:
                failure = str(error)
        raise GraderUnusable("the grading worker does not start", failure, _TODO)

    def _serve(self, index: int) -> None:
        """The life of one worker's thread."""
        job: _Job | None = None
        try:
            while True:
                self._ready_worker(index)  # replaces a killed worker before there is work for it
                job = self._queue.get()
                if job is None:
                    break
                reply = self._ready_worker(index).ask(job.request, self._time_limit)
                with self._lock:
                    self._outstanding -= 1
                job.future.set_result(reply)
                job = None
        except Exception as error:  # nobody may wait forever for this thread
            unusable = error if isinstance(error, GraderUnusable) else GraderUnusable(str(error), todo=_TODO)
            if job is not None:
                job.future.set_exception(unusable)
            self._break(unusable)
        finally:
            with self._lock:
                worker = self._running.pop(index, None)
            if worker is not None:
                worker.kill()
