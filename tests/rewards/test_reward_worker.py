"""The grading worker: killed on time, replaced, ends with its parent, never runs a model's code."""

from __future__ import annotations

import fcntl
import os
import signal
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from processes import HANGS, alive, in_thread, wait_until, wait_until_busy

from empg_lite.core.errors import GraderUnusable
from empg_lite.rewards import Grader, Verdict
from empg_lite.rewards.worker.pool import Reply, WorkerPool

HANGING_REGEX = r"regex:^(a+)+$"
HANGING_TEXT = "a" * 60 + "!"
ALGEBRA = (r"3\sqrt{5}", r"\boxed{\sqrt{45}}")  # needs the worker, and is equal
MATCH = (r"regex:n = (\d+)", "7", "n = 7")  # as well, but its worker has nothing to import


@pytest.fixture(scope="module")
def grader() -> Iterator[Grader]:
    with Grader(workers=2, time_limit=1.0) as shared_grader:
        shared_grader.grade_many("math", [(*ALGEBRA, None)] * 4)
        yield shared_grader


def _boxed(text: str) -> str:
    return "\\boxed{" + text + "}"


#: No computer finishes these, and each is stuck in another kind of work.
ENDLESS = [
    r"\sum_{k=1}^{10^{9}} \sin k",
    r"\prod_{k=1}^{10000000} k",
    r"\gcd(10^{50}, 3^{100000000})",
    r"\lfloor 10^{10^{9}} \rfloor",
    r"\sin(10^{10^{8}})",
]
#: Takes about as long as the limit, so a fast machine finishes it.
EXPENSIVE = r"\int_0^1 \sin(\sin(\sin(x^x))) dx"


def test_from_another_thread() -> None:
    """The worker outlives the thread that first asked: it is tied to the pool's own."""

    def work() -> None:
        assert grader.grade("math", *ALGEBRA).reward == 1

    with Grader(workers=1) as grader:
        in_thread(work)
        pids = grader.worker_pids()
        time.sleep(0.2)
        assert pids and grader.worker_pids() == pids
        assert grader.grade("math", *ALGEBRA).reward == 1


@pytest.mark.parametrize(
    ("spec", "prediction"),
    [("math", _boxed(ENDLESS[0])), ("math", _boxed(ENDLESS[1])), (HANGING_REGEX, HANGING_TEXT)],
)
def test_a_hang_costs_the_limit(grader: Grader, spec: str, prediction: str) -> None:
    verdict = grader.grade(spec, "5", prediction)
    assert (verdict.reward, verdict.reason, verdict.failed) == (0.0, "timeout", True)
    assert 1.0 <= verdict.seconds <= HANGS
    assert grader.grade("math", *ALGEBRA).reward == 1


@pytest.mark.slow
@pytest.mark.parametrize("prediction", ENDLESS)
def test_every_hang_costs_the_limit(grader: Grader, prediction: str) -> None:
    verdict = grader.grade("math", "5", _boxed(prediction))
    assert verdict.reason in {"timeout", "memory"} and verdict.seconds <= HANGS
    assert grader.grade("math", *ALGEBRA).reward == 1


@pytest.mark.slow
def test_an_expensive_answer_is_graded_right_or_stopped(grader: Grader) -> None:
    """The outcome depends on the machine: the true verdict within the limit, or a timeout at the limit."""
    verdict = grader.grade("math", "5", _boxed(EXPENSIVE))
    assert verdict.reason in {"different", "timeout", "memory"} and verdict.seconds <= HANGS
    assert grader.grade("math", *ALGEBRA).reward == 1


def test_an_abort_for_lack_of_memory_is_not_a_crash() -> None:
    """GMP does not raise MemoryError: it aborts the worker."""
    with Grader(workers=1, time_limit=HANGS, memory_limit=256 << 20) as grader:
        assert grader.grade("math", *ALGEBRA).reward == 1
        verdict = grader.grade("math", "5", _boxed("99999999!!"))
        assert (verdict.reason, verdict.reward) == ("memory", 0.0)
        assert grader.grade("math", *ALGEBRA).reward == 1


def test_memory_limit() -> None:
    pool = WorkerPool(workers=1, time_limit=HANGS, memory_limit=64 << 20, setup={"kind": "regex"})
    try:
        texts = ["x" * (24 << 20), "x"]
        replies = pool.run([{"op": "regex", "pattern": "(?s)(.+)", "text": text} for text in texts])
        assert replies[0].failure == "memory"
        assert replies[1].result == {"match": {"group": "x"}}
    finally:
        pool.close()


def _while_grading(grader: Grader, do: Callable[[int], object]) -> Verdict:
    """The verdict on a text that hangs, with ``do`` called on the worker's process id once it is at it."""
    (pid,) = grader.worker_pids()

    def later() -> None:
        wait_until_busy(pid)
        do(pid)

    with ThreadPoolExecutor(1) as pool:
        done = pool.submit(later)
        verdict = grader.grade(HANGING_REGEX, "5", HANGING_TEXT)
        done.result()
    return verdict


def test_killed_worker_is_a_crash_and_is_replaced() -> None:
    with Grader(workers=1, time_limit=HANGS) as grader:
        assert grader.grade(*MATCH).reward == 1
        first = grader.worker_pids()
        for _ in range(2):
            verdict = _while_grading(grader, lambda pid: os.kill(pid, signal.SIGKILL))
            assert (verdict.reward, verdict.reason) == (0.0, "crash")
            assert grader.grade(*MATCH).reward == 1
        assert grader.worker_pids() != first


def test_a_worker_killed_while_idle_costs_nothing() -> None:
    with Grader(workers=1) as grader:
        grader.grade("math", *ALGEBRA)
        (pid,) = grader.worker_pids()
        os.kill(pid, signal.SIGKILL)
        wait_until(lambda: not alive(pid))
        assert grader.grade("math", *ALGEBRA).reward == 1


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGSEGV])
@pytest.mark.parametrize("calls", [30, pytest.param(100, marks=pytest.mark.slow)])
def test_every_tenth_call_kills(calls: int, how: signal.Signals) -> None:
    """Every tenth call is on a worker that dies under it: that many crashes, every other verdict right."""
    spec, gold, prediction = MATCH
    verdicts: list[Verdict] = []
    with Grader(workers=1, time_limit=HANGS) as grader:
        for _ in range(calls // 10):
            verdicts += grader.grade_many(spec, [(gold, prediction, None)] * 9)
            verdicts.append(_while_grading(grader, lambda pid: os.kill(pid, how)))
    assert [v.reason for v in verdicts] == (["equal"] * 9 + ["crash"]) * (calls // 10)


def test_a_worker_that_cannot_be_replaced_is_reported(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first worker works; then it dies and math-verify is broken: three tries, then exit code 69."""
    starts = tmp_path / "starts"
    with Grader(workers=1) as grader:
        assert grader.grade("math", *ALGEBRA).reward == 1
        broken = f"open({str(starts)!r}, 'a').write('x')\nraise ImportError('gone')\n"
        (tmp_path / "math_verify.py").write_text(broken)
        monkeypatch.setenv("PYTHONPATH", str(tmp_path))
        (pid,) = grader.worker_pids()
        os.kill(pid, signal.SIGKILL)
        wait_until(lambda: not alive(pid))
        with pytest.raises(GraderUnusable, match="gone") as caught:
            grader.grade("math", *ALGEBRA)
        assert caught.value.exit_code == 69
        assert starts.read_text() == "xxx"
        assert grader.grade("math", "18", "A: 18").reward == 1  # needs no worker


def test_interrupted_while_waiting() -> None:
    """Ctrl-C reaches the caller at once, whatever the worker does, and closing does not wait for it."""
    grader = Grader(workers=1, time_limit=2 * HANGS)
    assert grader.grade(*MATCH).reward == 1
    start = time.monotonic()
    with pytest.raises(KeyboardInterrupt):
        _while_grading(grader, lambda pid: os.kill(os.getpid(), signal.SIGINT))
    grader.close()
    assert time.monotonic() - start < HANGS
    assert grader.worker_pids() == []


# ---- a worker that answers what it should not ----------------------------------------------------------

#: Stands in for a worker: answers the text it is given, but for the texts that name a fault.
FAULTY = """
import json, os, sys, time
answer = lambda text: json.dumps({"match": {"group": text}})
print(json.dumps({"ready": True}), flush=True)
for line in sys.stdin:
    request = json.loads(line)
    text = request.get("text")
    if text == "half":
        os.write(1, b'{"match": {"gro')
        os._exit(0)
    elif text == "twice":
        os.write(1, ((answer("first") + "\\n") * 2).encode())
    elif text == "garbage":
        os.write(1, b"Segmentation fault\\n")
    elif text == "list":
        os.write(1, b"[1]\\n")
    elif text == "flood":
        while True:
            os.write(1, b"x" * 65536)
    elif text == "late":
        time.sleep(3)
        print(answer("late"), flush=True)
    elif text is not None:
        print(answer(text), flush=True)
"""


@pytest.mark.parametrize(
    ("fault", "failure"),
    [("half", "crash"), ("twice", "crash"), ("garbage", "crash"), ("list", "crash"), ("flood", "crash")]
    + [("late", "timeout")],
)
def test_a_faulty_reply_is_not_another_answers(
    fault: str, failure: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The request that met it fails, the caller gets an answer, and no later one is answered by its rest."""
    monkeypatch.setattr("empg_lite.rewards.worker.pool._BOOTSTRAP", FAULTY)
    limit = 2.0 if fault == "late" else HANGS
    pool = WorkerPool(workers=1, time_limit=limit, memory_limit=1 << 30)
    try:
        texts = ["a", fault, "b", "c"]
        replies: list[Reply] = []
        requests = [{"op": "regex", "pattern": "(.*)", "text": text} for text in texts]
        asking = threading.Thread(target=lambda: replies.extend(pool.run(requests)), daemon=True)
        asking.start()
        asking.join(HANGS)
        assert [reply.failure for reply in replies] == [None, failure, None, None]
        groups = [reply.result["match"]["group"] for reply in replies if reply.failure is None]
        assert groups == ["a", "b", "c"]
    finally:
        pool.close()


def test_plain_answers_start_no_worker() -> None:
    with Grader() as grader:
        assert grader.grade("math", "18", r"\boxed{18}").reward == 1
        assert grader.worker_pids() == []


def test_two_workers_share_a_batch(grader: Grader) -> None:
    items: list[tuple[str, str, str | None]] = [
        (rf"{n}\sqrt{{5}}", rf"\boxed{{\sqrt{{{5 * n * n}}}}}", None) for n in range(2, 22)
    ]
    assert [v.reward for v in grader.grade_many("math", items)] == [1.0] * 20
    assert len(grader._pool.pids()) == 2


def test_odd_strings_survive_the_pipe(grader: Grader) -> None:
    text = "\ud800\x00\u2028\n" * 40_000 + "end"
    verdict = grader.grade("regex:(?s)(\ud800\x00.*)", text, text)
    assert (verdict.reward, verdict.extracted) == (1.0, text)


def test_interrupt_does_not_reach_the_worker(grader: Grader) -> None:
    pids = sorted(grader._pool.pids())
    for pid in pids:
        os.kill(pid, signal.SIGINT)
        assert os.getpgid(pid) != os.getpgid(0)
    time.sleep(0.2)
    assert grader.grade("math", *ALGEBRA).reward == 1
    assert sorted(grader._pool.pids()) == pids


def test_a_closed_grader_refuses_work_and_leaves_no_process() -> None:
    grader = Grader(workers=1)
    grader.grade(*MATCH)
    (pid,) = grader.worker_pids()
    grader.close()
    grader.close()
    assert not alive(pid)
    with pytest.raises(GraderUnusable, match="closed"):
        grader.grade("math", *ALGEBRA)


def test_closing_under_work_ends_it() -> None:
    grader = Grader(workers=1, time_limit=2 * HANGS)
    grader.grade(*MATCH)
    start = time.monotonic()
    assert _while_grading(grader, lambda pid: grader.close()).failed
    assert time.monotonic() - start < HANGS


# ---- starting ----------------------------------------------------------------------------------------


def test_breaking_twice_still_ends_every_thread() -> None:
    """Two workers fail as the pool closes: neither may take the other's end marker (it hung once)."""
    pool = WorkerPool(workers=2, time_limit=1.0, memory_limit=1 << 30)
    pool._threads = [threading.Thread(), threading.Thread()]
    for _ in range(3):
        pool._break(GraderUnusable("closing"))
    waiting = [pool._queue.get_nowait() for _ in range(pool._queue.qsize())]
    assert waiting == [None, None]


def test_closing_while_a_worker_starts() -> None:
    """One request starts the first worker; closing meets the second one at any point of its start."""
    for pause in (0.0, 0.01, 0.05, 0.2):
        grader = Grader(workers=2)
        hard = ("\\sqrt{2}", "\\boxed{\\frac{2}{\\sqrt{2}}}", None)
        assert [v.reward for v in grader.grade_many("math", [hard, hard])] == [1.0, 1.0]
        time.sleep(pause)
        closing = threading.Thread(target=grader.close, daemon=True)
        closing.start()
        closing.join(HANGS)
        assert not closing.is_alive(), f"close() hangs {pause} s after the first answers"


def test_a_broken_import_is_reported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "math_verify.py").write_text("raise ImportError('half installed')\n")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    with Grader() as grader:
        assert grader.grade("math", "18", "A: 18").reward == 1  # needs no worker
        for _ in range(2):
            with pytest.raises(GraderUnusable, match="half installed") as caught:
                grader.grade_many("math", [(*ALGEBRA, None)] * 3)
            assert caught.value.exit_code == 69


def test_the_current_folder_cannot_shadow(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("sympy", "json", "empg_lite"):
        (tmp_path / f"{name}.py").write_text("raise ImportError('shadowed')\n")
    monkeypatch.chdir(tmp_path)
    with Grader(workers=1) as grader:
        assert grader.grade("math", *ALGEBRA).reward == 1


def test_a_worker_inherits_neither_torch_nor_our_descriptors(tmp_path: Path) -> None:
    path = tmp_path / "LOCK"
    with path.open("w") as lock, Grader(workers=1) as grader:
        os.set_inheritable(lock.fileno(), True)
        grader.grade("math", *ALGEBRA)
        (pid,) = grader.worker_pids()
        if sys.platform != "linux":
            pytest.skip("reads /proc")
        targets = {os.readlink(entry) for entry in Path(f"/proc/{pid}/fd").iterdir()}
        assert str(path) not in targets
        maps = Path(f"/proc/{pid}/maps").read_text()
        assert "torch" not in maps and "numpy" not in maps


# ---- the parent's end --------------------------------------------------------------------------------

PARENT = """
import fcntl, os, sys, threading
from empg_lite.rewards import Grader

lock = open(sys.argv[1], "w")
os.set_inheritable(lock.fileno(), True)
fcntl.flock(lock, fcntl.LOCK_EX)
grader = Grader(workers=2, time_limit=60.0)
grader.grade_many("regex:n = (7)", [("7", "n = 7", None)] * 4)
busy = threading.Thread(target=grader.grade, args=("regex:^(a+)+$", "5", "a" * 60 + "!"), daemon=True)
busy.start()
print(*grader.worker_pids(), flush=True)
busy.join()
"""


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGTERM])
def test_workers_die_with_the_parent_and_free_its_lock(tmp_path: Path, how: signal.Signals) -> None:
    """One worker is idle, one deep in C code that no end of input can reach."""
    root = str(Path(__file__).resolve().parents[2])
    path = tmp_path / "LOCK"
    parent = subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(PARENT), str(path)],
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": root},
    )
    assert parent.stdout is not None
    pids = [int(pid) for pid in parent.stdout.readline().split()]
    assert len(pids) == 2 and all(map(alive, pids))
    wait_until_busy(*pids)
    parent.send_signal(how)
    parent.wait()
    with path.open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)  # free at once
    wait_until(lambda: not any(map(alive, pids)))
    parent.stdout.close()


def test_pool_replies_in_order() -> None:
    pool = WorkerPool(workers=2, time_limit=5.0, memory_limit=1 << 30, setup={"kind": "regex"})
    try:
        texts = [f"n{n}" for n in range(40)]
        replies = pool.run([{"op": "regex", "pattern": r"n(\d+)", "text": text} for text in texts])
        assert [reply.result for reply in replies] == [{"match": {"group": text[1:]}} for text in texts]
        assert pool.run([{"op": "no such"}])[0].failure == "crash"
    finally:
        pool.close()
