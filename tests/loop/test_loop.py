"""sample, score, fit as processes, killed and repeated: the adapter that train gives, to the bit."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from empg_lite.run.checkpoint import list_checkpoints
from empg_lite.run.journal import read_metrics
from empg_lite.run.rollouts import read_rollouts

REWARD = "regex:[a-m]"  # graded in a worker
NO_EVAL = ("--set", "run.eval_every=0")
PATIENCE = 240.0


def start(arguments: tuple[object, ...]) -> subprocess.Popen[str]:
    """A command in a process of its own."""
    command = [sys.executable, "-m", "empg_lite", *map(str, arguments), "--json"]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def finish(*arguments: object) -> dict[str, object]:
    """Run a command to its end; what it says last."""
    process = start(arguments)
    out, err = process.communicate(timeout=PATIENCE)
    assert process.returncode == 0, err
    return json.loads(out.splitlines()[-1])


def kill(began: Callable[[int], bool], *arguments: object) -> None:
    """Start a command and end it with SIGKILL as soon as ``began``, which is asked with its process id."""
    process, deadline = start(arguments), time.monotonic() + PATIENCE
    while not began(process.pid) and process.poll() is None:
        assert time.monotonic() < deadline
        time.sleep(0.0005)
    process.send_signal(signal.SIGKILL)
    _, err = process.communicate()
    assert process.returncode in (0, -signal.SIGKILL), err


def cut_short(
    began: Callable[[int], bool], short: Callable[[], bool], undo: Callable[[], object], *arguments: object
) -> None:
    """``kill`` until it was in time: where the machine is busy, this process may look too late."""
    for _ in range(20):
        kill(began, *arguments)
        if short():
            return
        undo()
    raise AssertionError(f"{arguments} always ended before it was killed")


def has_child(pid: int) -> bool:
    """The process has started another one: a grading worker."""
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            if int(stat.read_text().rpartition(")")[2].split()[1]) == pid:
                return True
        except (OSError, ValueError):  # it has just ended
            continue
    return False


def has(pattern: str) -> Callable[[Path], Callable[[int], bool]]:
    """Something that matches the pattern lies in a folder, and is not empty."""
    return lambda folder: lambda pid: any(os.stat(p).st_size for p in folder.glob(pattern))


def adapter(run: Path) -> bytes:
    return (list_checkpoints(run)[-1] / "adapter_model.safetensors").read_bytes()


def optimizer(run: Path) -> bytes:
    return (list_checkpoints(run)[-1] / "optimizer.safetensors").read_bytes()


#: When each round's `fit` is killed: before, while and after the step that it makes.
FIT_KILLS = (has("recipe.yaml"), has("rollouts/step-*.jsonl"), has("checkpoints/step-*"))


def killed_round(
    folder: Path,
    recipe: Path,
    n: int,
    do: Callable[..., object],
    fit_kill: Callable[[Path], Callable[[int], bool]],
) -> None:
    """The n-th round; each of its commands is cut short by a kill, then repeated by ``do``."""
    before, run, file = folder / f"fit-{n - 1}", folder / f"fit-{n}", folder / f"r-{n}.jsonl"
    source = [before] if n > 1 else []
    sample = ("sample", *source, "--recipe", recipe, *NO_EVAL, "--problems", 3, "--out", file)

    def incomplete() -> bool:
        return sum(len(s.rationales) for s in read_rollouts(file, torn_tail=True)) < 24

    cut_short(lambda pid: file.exists() and file.stat().st_size > 0, incomplete, file.unlink, *sample)
    do(*sample)
    assert len(read_rollouts(file)[0].rationales) == 24

    score, unscored = ("score", file, "--reward", REWARD), file.read_bytes()
    cut_short(has_child, lambda: file.read_bytes() == unscored, lambda: file.write_bytes(unscored), *score)
    do(*score)

    source = ["--from", before] if n > 1 else []
    fit = ("fit", file, "--recipe", recipe, *NO_EVAL, *source, "--output-dir", run, "--resume")
    cut_short(fit_kill(run), lambda: not (run / "adapter").exists(), lambda: shutil.rmtree(run), *fit)
    do(*fit)


@pytest.mark.slow
def test_a_round_whose_commands_are_killed_is_a_step_of_train(
    recipe_file: Path,
    tmp_path: Path,
    cli: Callable[..., tuple[int, str, str]],
) -> None:
    """Real processes are killed; they are repeated in this one, which is quicker and the same commands."""

    def here(*arguments: object) -> None:
        code, _, err = cli(*arguments, "--json")
        assert code == 0, err

    here(
        "train", "--recipe", recipe_file, *NO_EVAL, "--set", "run.steps=1", "--output-dir", tmp_path / "train"
    )
    killed_round(tmp_path, recipe_file, 1, here, FIT_KILLS[1])
    assert adapter(tmp_path / "fit-1") == adapter(tmp_path / "train")
    assert optimizer(tmp_path / "fit-1") == optimizer(tmp_path / "train")


@pytest.mark.slow
def test_three_rounds_of_killed_processes_are_three_steps_of_train(recipe_file: Path, tmp_path: Path) -> None:
    train = ("train", "--recipe", recipe_file, *NO_EVAL, "--output-dir")
    finish(*train, tmp_path / "train")
    finish(*train, tmp_path / "other", "--seed", 1)
    for n in (1, 2, 3):
        killed_round(tmp_path, recipe_file, n, finish, FIT_KILLS[n - 1])
    assert adapter(tmp_path / "fit-3") == adapter(tmp_path / "train") != adapter(tmp_path / "other")
    assert optimizer(tmp_path / "fit-3") == optimizer(tmp_path / "train") != optimizer(tmp_path / "other")
    ours, theirs = (read_metrics(tmp_path / run / "metrics.jsonl")[-1] for run in ("fit-3", "train"))
    assert ours["step"] == 3 and ours["loss"] == theirs["loss"] and ours["grad_norm"] == theirs["grad_norm"]
