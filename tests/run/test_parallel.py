"""Several processes match one: the same samples, gradient, metrics, decisions and files."""

from __future__ import annotations

import copy
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from fixture_recipe import write_recipe
from hypothesis import given
from hypothesis import strategies as st
from rationales import rationale
from run_files import digest, stable
from team_probe import CASES

from empg_lite import cli as command_line
from empg_lite.core.errors import EmpgError, Interrupted, NumericalStop, OutOfMemory, StorageError, explained
from empg_lite.loop.batching import whole_problems
from empg_lite.loop.train import TrainOptions, train
from empg_lite.recipe.file import load_recipe
from empg_lite.run import store
from empg_lite.run.checkpoint import list_checkpoints, stored_state
from empg_lite.run.journal import read_metrics
from empg_lite.run.parallel import SINGLE, World, join

ROOT = Path(__file__).parents[2]


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return int(s.getsockname()[1])


def start(*words: object, size: int = 2) -> list[subprocess.Popen[str]]:
    """Run a Python command in several processes, with the variables a launcher sets."""
    shared = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join((str(ROOT), str(ROOT / "tests" / "support"))),
        "WORLD_SIZE": str(size),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(free_port()),
    }
    return [
        subprocess.Popen(
            [sys.executable, *map(str, words)],
            env={**shared, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )
        for rank in range(size)
    ]


def finish(started: Sequence[subprocess.Popen[str]], seconds: float = 300) -> list[tuple[int, str, str]]:
    """Exit code, stdout and stderr of each process; none outlives the test."""
    try:
        said = [process.communicate(timeout=seconds) for process in started]
    finally:
        for process in started:
            process.kill()
    return [(process.returncode, *texts) for process, texts in zip(started, said, strict=True)]


def train_words(recipe: Path, run: Path, *more: object) -> tuple[object, ...]:
    return ("-m", "empg_lite", "train", "--recipe", recipe, "--output-dir", run, *more)


# --- two processes and one, side by side --------------------------------------------------------------


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder with the recipe that the two processes train."""
    return tmp_path_factory.mktemp("world")


@pytest.fixture(scope="module")
def probes(model_dir: Path, folder: Path) -> list[dict[str, Any]]:
    """The findings of each of two processes (``team_probe.py``)."""
    recipe = write_recipe(folder, model_dir)
    done = finish(start(ROOT / "tests" / "support" / "team_probe.py", model_dir, recipe, folder / "two"))
    assert [code for code, *_ in done] == [0, 0], done
    return [json.loads(out.splitlines()[-1]) for _, out, _ in done]


@pytest.mark.parametrize("case", CASES)
def test_the_gradient_is_that_of_one_process(probes: list[dict[str, Any]], case: str) -> None:
    total = sum(map(len, CASES[case]))
    kept = sum(w != 0 for group in CASES[case] for w in group)
    for found in (probe[case] for probe in probes):
        assert found["error"] <= 1e-10
        assert found["mean"] > 0.4, "negative control: an average is seen"
        for name in ("loss", "grad_norm", "kl"):
            assert found[name][0] == pytest.approx(found[name][1], rel=1e-10)
        assert found["fitted"] == [kept, kept]
    # Two measurements of all rows and one fit of the kept ones, shared: nothing is computed twice.
    assert sum(probe[case]["rows_here"] for probe in probes) == 2 * total + kept


def test_a_per_process_denominator_is_detected(probes: list[dict[str, Any]]) -> None:
    assert all(probe["own denominator"] > 0.1 for probe in probes)


def test_passes_end_together(probes: list[dict[str, Any]]) -> None:
    for found in (probe["passes"] for probe in probes):
        assert (found["all"]["updates"], found["stopped"]["updates"]) == (3, 1)
        assert max(found["all"]["error"], found["stopped"]["error"]) <= 1e-10


def test_a_failure_in_one_process_reaches_all(probes: list[dict[str, Any]]) -> None:
    """Process 1 alone runs out of memory, or a row is infinite: budgets and decisions stay equal."""
    for found in (probe["trouble"] for probe in probes):
        assert found["short"]["budget"] == 20 and found["short"]["error"] <= 1e-10
        assert found["hopeless"].startswith(
            "out of memory with one rationale at a time, the longest of 18 tokens"
        )
        assert found["infinite"] == [0, 1, 0.0]


def test_the_samples_are_those_of_one_process(probes: list[dict[str, Any]]) -> None:
    for found in (probe["samples"] for probe in probes):
        assert found == {"same": True, "distinct": 20, "none": [], "one": True}


def test_collectives(probes: list[dict[str, Any]]) -> None:
    for probe in probes:
        assert probe["once"] == "rank 0"
        assert probe["first"] == [None, "last"] and probe["any"] == [False, True]
        assert probe["error"] == ["Interrupted", 143, "what", "where", "todo"]


# --- a run --------------------------------------------------------------------------------------------


def adapter(run: Path) -> dict[str, Any]:
    from safetensors.torch import load_file

    return load_file(list_checkpoints(run)[-1] / "adapter_model.safetensors")


def rows_of(run: Path) -> list[dict[str, Any]]:
    """Every rationale and header of a run, without the adapter hash: its last bits may differ."""
    lines = [x for p in sorted((run / "rollouts").iterdir()) for x in p.read_text("utf-8").splitlines()]
    return [{k: v for k, v in json.loads(line).items() if k != "adapter"} for line in lines]


def assert_close(a: dict[str, Any], b: dict[str, Any]) -> None:
    """Compare metrics: numbers up to float32 rounding, everything else exactly."""
    assert a.keys() == b.keys()
    for name, value in a.items():
        same = pytest.approx(value, rel=1e-4, abs=1e-6) if isinstance(value, float) else value
        assert b[name] == same, name


def assert_same_run(run: Path, other: Path) -> None:
    """The same samples, rewards and weights; the same metrics and adapter up to float32 rounding."""
    assert rows_of(run) == rows_of(other)
    mine, theirs = ([stable(r) for r in read_metrics(folder / "metrics.jsonl")] for folder in (run, other))
    assert len(mine) == len(theirs) > 1
    for a, b in zip(mine, theirs, strict=True):
        assert_close(a, b)
    ours, others = adapter(run), adapter(other)
    assert ours.keys() == others.keys()
    # Adam divides by the gradient's own size: of a gradient near 0 the rounding decides. A step is 1e-2.
    assert max(float((ours[name] - others[name]).abs().max()) for name in ours) < 1e-4
    assert {p.name for p in run.iterdir()} == {p.name for p in other.iterdir()}


def test_two_processes_train_as_one(probes: list[dict[str, Any]], folder: Path) -> None:
    """Three steps by two processes and one more by a single process match a single process throughout."""
    one, two, recipe = folder / "one", folder / "two", str(folder / "fixture.yaml")
    assert [probe["train"] for probe in probes] == [3, 3]
    train(load_recipe(recipe), one)
    assert_same_run(one, two)
    assert json.loads((two / "environment.json").read_text())["processes"] == 2

    for run in (one, two):
        train(load_recipe(recipe, ["run.steps=4"]), run, TrainOptions(resume=True))
    assert_same_run(one, two)


@pytest.mark.slow
def test_two_processes_resume_the_run_of_one(model_dir: Path, tmp_path: Path) -> None:
    """The reverse, through the command line; only one process prints."""
    recipe = write_recipe(tmp_path, model_dir)
    one, two = tmp_path / "one", tmp_path / "two"
    for run in (one, two):
        train(load_recipe(str(recipe), ["run.steps=2"]), run)
    done = finish(start(*train_words(recipe, two, "--max-steps", 3, "--resume", "--json")))
    assert [code for code, *_ in done] == [0, 0], done
    assert json.loads(done[0][1].splitlines()[-1])["steps"] == 3
    assert done[1][1] == ""
    train(load_recipe(str(recipe)), one, TrainOptions(resume=True))
    assert_same_run(one, two)


@pytest.mark.slow
def test_two_processes_resume_to_the_bit(model_dir: Path, tmp_path: Path) -> None:
    """Two steps, then one more by the same number of processes, equal three steps bit for bit."""
    recipe = write_recipe(tmp_path, model_dir)
    straight, resumed = tmp_path / "straight", tmp_path / "resumed"
    for run, more in ((straight, (3,)), (resumed, (2,)), (resumed, (3, "--resume"))):
        done = finish(start(*train_words(recipe, run, "--max-steps", *more)))
        assert [code for code, *_ in done] == [0, 0], done
    assert digest(straight) == digest(resumed)


@pytest.mark.slow
def test_two_processes_ask_in_turns_as_one(model_dir: Path, tmp_path: Path) -> None:
    """They share the slots; each process knows where all of them stand."""
    recipe = write_recipe(tmp_path, model_dir)
    one, two = tmp_path / "one", tmp_path / "two"
    settings = ["sampler.tries=3", "sampler.problems_per_step=9", "sampler.samples_per_problem=2"]
    done = finish(start(*train_words(recipe, two, *(word for s in settings for word in ("--set", s)))))
    assert [code for code, *_ in done] == [0, 0], done
    train(load_recipe(str(recipe), settings), one)
    assert_same_run(one, two)
    states = [stored_state(list_checkpoints(run)[-1]) for run in (one, two)]
    assert states[0].slots == states[1].slots and max(slot.tries for slot in states[0].slots) > 0
    for run in (one, two):
        train(load_recipe(str(recipe), [*settings, "run.steps=4"]), run, TrainOptions(resume=True))
    assert_same_run(one, two)


@pytest.mark.slow
def test_an_error_is_printed_once(model_dir: Path, tmp_path: Path) -> None:
    """The main process finds the folder in use; both exit with its code, and only it says why."""
    recipe, run = write_recipe(tmp_path, model_dir), tmp_path / "run"
    with store.run_lock(run):
        done = finish(start(*train_words(recipe, run)))
    assert [code for code, *_ in done] == [73, 73]
    assert "error: run directory in use by process" in done[0][2]
    assert "error" not in done[1][2]


# --- the parts ----------------------------------------------------------------------------------------


@given(st.lists(st.integers(), max_size=20), st.integers(1, 5))
def test_gathering_undoes_dealing(items: list[int], size: int) -> None:
    """``share`` puts results back in the order of the items, for any number of processes."""
    parts = [[-x for x in World(rank, size).mine(items)] for rank in range(size)]

    class Rehearsed(World):
        def gather(self, value):  # type: ignore[no-untyped-def]
            assert value == parts[self.rank]
            return parts

    for rank in range(size):
        assert Rehearsed(rank, size).share(items, lambda mine: [-x for x in mine]) == [-x for x in items]


@given(st.lists(st.tuples(st.integers(0, 5), st.integers(1, 40)), max_size=30), st.integers(1, 4))
def test_rows_are_dealt_in_whole_problems(drawn: list[tuple[int, int]], size: int) -> None:
    rows = [rationale(problem_id=f"p{p}", completion_ids=(7,) * n) for p, n in drawn]
    kept = [i for i in range(len(rows)) if i % 3]
    shares = [whole_problems(rows, kept, World(rank, size)) for rank in range(size)]
    assert sorted(i for share in shares for i in share) == kept
    owners = [{rows[i].problem_id for i in share} for share in shares]
    assert sum(map(len, owners)) == len({rows[i].problem_id for i in kept}), "no problem is cut"
    loads = [sum(rows[i].tokens for i in share) for share in shares]
    problems = [sum(rows[i].tokens for i in kept if rows[i].problem_id == p) for s in owners for p in s]
    assert max(loads) - min(loads) <= max(problems, default=0), "the next problem goes to the lightest"


def test_one_process_needs_nothing() -> None:
    code = (
        "import sys\nfrom empg_lite.run.parallel import join\n"
        "with join() as world: assert world.share([1, 2], list) == [1, 2] and world.once(lambda: 3) == 3\n"
        "print(sorted({'torch', 'accelerate'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    assert done.stdout.strip() == "[]"
    with join() as world:
        assert world is SINGLE


def test_errors_survive_pickling() -> None:
    """Their classes take different arguments; ``copy`` uses the same protocol as a message."""
    for error in (NumericalStop("a", "b", "c"), Interrupted(2, "a"), OutOfMemory("a", todo="c")):
        twin = copy.copy(error)
        assert type(twin) is type(error) and str(twin) == str(error)
        assert (twin.exit_code, twin.what, twin.where, twin.todo) == (
            error.exit_code,
            error.what,
            error.where,
            error.todo,
        )
    known = [explained(e) for e in (OSError(28, "No space left", "/x"), MemoryError(), ValueError("v"))]
    assert [type(e) for e in known] == [StorageError, OutOfMemory, EmpgError]


def test_other_processes_write_nothing(tmp_path: Path) -> None:
    kept, folder = tmp_path / "kept", tmp_path / "folder"
    store.write_file(kept, "old")
    store.write_dir(folder, {"a": b"1"})
    before = sorted((p, p.stat().st_mtime_ns) for p in tmp_path.rglob("*"))

    def write() -> None:
        store.write_file(kept, "new")
        store.append_text(kept, "more")
        store.append_line(kept, {"a": 1})
        store.truncate(kept, 1)
        store.write_dir(folder, {"b": b"2"})
        with store.run_lock(tmp_path / "run"):
            store.remove_dir(folder)

    with store.reading_only():
        write()
        assert sorted((p, p.stat().st_mtime_ns) for p in tmp_path.rglob("*")) == before
    write()
    assert not folder.exists() and kept.read_text() == "n"


@pytest.mark.parametrize("rank", ["0", "1"])
def test_only_train_is_launched(cli, monkeypatch: pytest.MonkeyPatch, rank: str) -> None:  # type: ignore[no-untyped-def]
    monkeypatch.setattr(command_line, "GRACE", 0.0)
    for name, value in (("RANK", rank), ("LOCAL_RANK", rank), ("WORLD_SIZE", "2")):
        monkeypatch.setenv(name, value)
    code, out, err = cli("eval")
    assert (code, out) == (2, "")
    assert ("2 processes were launched, and only train shares its work" in err) == (rank == "0")


# --- the launcher -------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_a_launched_run_stops_and_resumes(model_dir: Path, tmp_path: Path, signum: int) -> None:
    """``accelerate launch``, stopped by a signal after the first steps, resumes with two and equals one."""
    recipe, run = write_recipe(tmp_path, model_dir), tmp_path / "run"
    launcher = Path(sys.executable).with_name("accelerate")
    words = [launcher, "launch", "--multi_gpu", "--num_processes", 2, "--main_process_port", 0]
    more = ("--set", "run.steps=40", "--set", "run.keep=40", "--resume")
    command = [*map(str, (*words, *train_words(recipe, run, *more)))]
    env = {**os.environ, "PYTHONPATH": str(ROOT)}

    launched = subprocess.Popen(command, env=env, stderr=subprocess.PIPE, text=True, start_new_session=True)
    deadline = time.monotonic() + 600
    while len(list_checkpoints(run)) < 2:
        assert launched.poll() is None and time.monotonic() < deadline
        time.sleep(0.05)
    holder = int((run / "LOCK").read_text().split()[1])
    os.kill(holder if signum == signal.SIGKILL else launched.pid, signum)
    _, said = launched.communicate(timeout=120)
    assert launched.returncode != 0
    reached = len(list_checkpoints(run))
    assert 2 <= reached < 40
    if signum != signal.SIGKILL:
        assert f"stopped after step {reached}; step-{reached:06d} is saved" in said
        assert said.count("stopping after this step") == 1

    subprocess.run(command, env=env, check=True, timeout=240)
    train(load_recipe(str(recipe), ["run.steps=40", "run.keep=40"]), tmp_path / "alone")
    assert [r["step"] for r in read_metrics(run / "metrics.jsonl")] == list(range(41))
    a, b = (read_metrics(r / "metrics.jsonl")[3] for r in (run, tmp_path / "alone"))
    assert_close(stable(a), stable(b))
