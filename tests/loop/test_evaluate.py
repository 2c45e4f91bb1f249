"""Evaluation of real (small) models: the same figures by every way, kept answers, kills."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from empg_lite.api import load_policy
from empg_lite.core.errors import RunInUse
from empg_lite.core.view import Advance, View
from empg_lite.loop.evaluate import evaluate_target
from empg_lite.loop.train import train
from empg_lite.recipe.file import load_recipe
from empg_lite.rewards import Grader
from empg_lite.run import store
from empg_lite.run.rollouts import read_rollouts
from empg_lite.run.target import resolve_target
from empg_lite.tools.view import ConsoleView

Trained = tuple[Path, dict[str, Any]]

FIVE: dict[str, Any] = {"split": "train", "limit": 5, "k": 3}


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory, model_dir: Path) -> Trained:
    """Twelve steps of the fixture recipe: (run, result)."""
    from fixture_recipe import write_recipe

    folder = tmp_path_factory.mktemp("trained")
    recipe = load_recipe(str(write_recipe(folder, model_dir)), ["run.steps=12"])
    return folder / "run", train(recipe, folder / "run")


def evaluated(name: Path, **options: Any) -> dict[str, Any]:
    with Grader() as grader:
        return evaluate_target(resolve_target(str(name)), grader, **options)


def figures(result: dict[str, Any]) -> dict[str, Any]:
    return {k: v for k, v in result.items() if k not in ("answers", "base", "paired")}


def test_base_and_tuned_answer_the_same_problems(trained: Trained, tmp_path: Path) -> None:
    run, result = trained
    tuned = evaluated(run, k=3, base=True, out=tmp_path)
    assert tuned["pass@1"] == result["accuracy_after"]
    assert tuned["base"]["pass@1"] == result["accuracy_before"]
    assert tuned["n"] == tuned["base"]["n"] == 2
    assert {"pass@2", "pass@3", "maj@2", "maj@3", "t1_accuracy"} <= tuned.keys()
    assert figures(tuned).keys() - {"split"} == figures(tuned["base"]).keys()
    assert tuned["paired"]["gain"] == pytest.approx(tuned["pass@1"] - tuned["base"]["pass@1"])
    ids = [
        [r.problem_id for r in read_rollouts(Path(side["answers"]) / "greedy.jsonl")[0].rationales]
        for side in (tuned, tuned["base"])
    ]
    assert ids[0] == ids[1] and len(set(ids[0])) == 2
    by_path = evaluated(run / "adapter", out=tmp_path)
    assert by_path["pass@1"] == tuned["pass@1"]
    assert evaluated(run, split="train", limit=5, out=tmp_path)["n"] == 5


def test_training_evaluation_and_chat_ask_with_the_same_tokens(trained: Trained, tmp_path: Path) -> None:
    run, _ = trained
    asked = {
        r.question: r.prompt_ids
        for path in sorted((run / "rollouts").glob("step-*.jsonl"))
        for segment in read_rollouts(path)
        for r in segment.rationales
    }
    side = evaluated(run, split="train", out=tmp_path)
    rows = read_rollouts(Path(side["answers"]) / "greedy.jsonl")[0].rationales
    seen = {r.question: r.prompt_ids for r in rows}
    policy = load_policy(run)
    assert len(asked) > 2 and {q: seen[q] for q in asked} == asked
    assert {q: policy.answer(q).prompt_ids for q in asked} == asked


def test_training_keeps_its_answers_too(trained: Trained) -> None:
    run, result = trained
    for name in ("before", "after"):
        said = json.loads((run / "eval" / name / "figures.json").read_text())
        assert said["pass@1"] == result[f"accuracy_{name}"]
        rows = read_rollouts(run / "eval" / name / "greedy.jsonl")[0].rationales
        assert sum(r.right for r in rows) / len(rows) == said["pass@1"] and len(rows) == said["n"]
    gain = result["accuracy_after"] - result["accuracy_before"]
    assert said["paired"]["gain"] == pytest.approx(gain) and 0 < said["paired"]["p_value"] <= 1


class Counting(View):
    """Counts the phases in which something was left to do, by label."""

    def __init__(self) -> None:
        self.asked = 0

    @contextmanager
    def phase(self, name: str, total: int, done: int = 0) -> Iterator[Advance]:
        def asked(rows: int) -> None:
            self.asked += rows

        yield asked


def test_asking_again_asks_nothing(trained: Trained, tmp_path: Path) -> None:
    run, _ = trained
    first, again, more = Counting(), Counting(), Counting()
    one = evaluated(run, split="train", k=2, out=tmp_path, view=first)
    two = evaluated(run, split="train", k=2, out=tmp_path, view=again)
    assert one == two and first.asked == one["n"] * 3 and again.asked == 0
    evaluated(run, split="train", k=4, out=tmp_path / "other", view=more)
    assert more.asked == one["n"] * 5


def test_another_model_is_another_evaluation(trained: Trained, tmp_path: Path) -> None:
    """Nothing is taken over from other weights or settings: each has a folder of its own."""
    run, _ = trained
    checkpoint = sorted((run / "checkpoints").iterdir())[0]
    best = evaluated(run, limit=2, split="train", out=tmp_path)
    other = [
        evaluated(checkpoint, limit=2, split="train", out=tmp_path),
        evaluated(run, limit=3, split="train", out=tmp_path),
        evaluated(run, limit=2, split="test", out=tmp_path),
    ]
    assert len({best["answers"], *(o["answers"] for o in other)}) == 4


def command(run: Path, out: Path) -> list[str]:
    options = ["--split", "train", "--k", "8", "--base", "--set", "sampler.batch_rows=8", "--out", str(out)]
    return [sys.executable, "-m", "empg_lite", "eval", str(run), *options, "--json"]


def stored(out: Path) -> dict[str, bytes]:
    return {str(p.relative_to(out)): p.read_bytes() for p in sorted(out.rglob("*.json*"))}


def written(out: Path) -> int:
    """Bytes written so far; a temporary file may vanish while one looks."""
    return sum(p.stat().st_size for p in out.rglob("[!.]*.json*"))


def kill_and_repeat(run: Path, out: Path, kills: int) -> dict[str, Any]:
    """Kill the command ``kills`` times, each time after it has written more, then let it end.

    Where the machine is busy it may end before the signal comes: then from the beginning.
    """
    rng = random.Random(kills)
    while kills:
        victim = subprocess.Popen(command(run, out), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        before, deadline = written(out), time.monotonic() + 120
        while victim.poll() is None and written(out) <= before:
            assert time.monotonic() < deadline
            time.sleep(0.005)
        time.sleep(rng.random() * 0.05)
        victim.send_signal(signal.SIGKILL)
        if victim.wait() == -signal.SIGKILL:
            kills -= 1
        else:
            shutil.rmtree(out)
    done = subprocess.run(command(run, out), capture_output=True, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.slow
def test_killed_evaluations_end_with_the_same_rows(trained: Trained, tmp_path: Path) -> None:
    """The real command, killed with -9 twenty times, each time after it has written more."""
    run, _ = trained
    straight, out = tmp_path / "straight", tmp_path / "killed"
    done = subprocess.run(command(run, straight), capture_output=True, text=True, check=True)
    expected = json.loads(done.stdout.splitlines()[-1])
    result = kill_and_repeat(run, out, 20)
    assert stored(out) == stored(straight)
    assert figures(result) == figures(expected) and result["paired"] == expected["paired"]
    (sampled,) = out.glob("adapter-train-*/sampled.jsonl")
    keys = [(r.problem_id, r.sample_index) for r in read_rollouts(sampled)[0].rationales]
    assert len(keys) == len(set(keys)) == 8 * result["n"]


def killed_at(answer: int, job: Callable[[], Any]) -> None:
    """Do the job in a forked child that dies with -9 in the middle of writing an answer, counted from 1."""
    pid = os.fork()
    if pid == 0:
        real, left = store.append_text, answer

        def append(path: Path, text: str, **options: Any) -> None:
            nonlocal left
            left -= 1
            real(path, text if left else text[: len(text) // 2], **options)
            if not left:
                os.kill(os.getpid(), signal.SIGKILL)

        try:
            store.append_text = append  # type: ignore[assignment]
            job()
        finally:
            os._exit(70)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == -signal.SIGKILL


@pytest.fixture(scope="module")
def whole(trained: Trained, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """The files of an uninterrupted evaluation: five problems, greedy and three samples."""
    out = tmp_path_factory.mktemp("whole")
    evaluated(trained[0], out=out, **FIVE)
    return stored(out)


@pytest.mark.parametrize(
    "kills", [(2, 11), *(pytest.param((n,), marks=pytest.mark.slow) for n in range(1, 21))]
)
def test_killed_at_any_answer(
    trained: Trained, whole: dict[str, bytes], tmp_path: Path, kills: tuple[int, ...]
) -> None:
    """What was written is never asked again, and the files end up the same; the last line is always torn."""
    for answer in kills:
        killed_at(answer, lambda: evaluated(trained[0], out=tmp_path, **FIVE))
    rest = Counting()
    evaluated(trained[0], out=tmp_path, view=rest, **FIVE)
    assert rest.asked == 20 - sum(answer - 1 for answer in kills)
    assert stored(tmp_path) == whole


def test_the_same_evaluation_twice_at_once(trained: Trained, whole: dict[str, bytes], tmp_path: Path) -> None:
    """The second is refused and changes nothing."""
    (folder,) = {Path(name).parent for name in whole}
    with store.run_lock(tmp_path / folder), pytest.raises(RunInUse, match=f"process {os.getpid()}"):
        evaluated(trained[0], out=tmp_path, **FIVE)
    assert stored(tmp_path) == {}


def test_progress_is_on_stderr(
    trained: Trained,
    tmp_path: Path,
    cli: Callable[..., tuple[int, str, str]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """With and without ``--json``: a log of the result holds nothing else."""
    monkeypatch.setattr(ConsoleView, "QUIET", 0.0)
    words = ("eval", trained[0], "--split", "train", "--limit", 4, "--out")
    code, out, err = cli(*words, tmp_path / "json", "--json")
    assert code == 0 and json.loads(out)["n"] == 4 and out.count("\n") == 1
    assert [line for line in err.splitlines() if line.startswith("evaluating adapter: 4 of 4")], err
    code, out, err = cli(*words, tmp_path / "plain")
    assert code == 0 and "evaluating adapter: 4 of 4" in err and "of 4" not in out and "(4 problems)" in out


class Interrupting(View):
    """Raises after so many answers."""

    def __init__(self, answers: int) -> None:
        self.left = answers

    @contextmanager
    def phase(self, name: str, total: int, done: int = 0) -> Iterator[Advance]:
        def on_done(rows: int) -> None:
            self.left -= rows
            if self.left < 0:
                raise KeyboardInterrupt

        yield on_done


def test_interrupted_evaluations_end_with_the_same_rows(trained: Trained, tmp_path: Path) -> None:
    """Stopped again and again, never twice at the same place, until it ends."""
    run, _ = trained
    options: dict[str, Any] = {"split": "train", "k": 4}
    target = resolve_target(str(run), None, ["sampler.batch_rows=8"])
    lives, result = 0, None
    with Grader() as grader:
        expected = evaluate_target(target, grader, **options, out=tmp_path / "straight")
        while result is None:
            lives += 1
            try:
                result = evaluate_target(
                    target, grader, **options, out=tmp_path / "cut", view=Interrupting(10 + lives % 7)
                )
            except KeyboardInterrupt:
                continue
    assert lives > 5
    assert stored(tmp_path / "cut") == stored(tmp_path / "straight")
    assert figures(result) == figures(expected)
