"""The loop: it learns, it stops when it should, and it resumes to the bit."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import pytest
import torch
from fixture_recipe import write_recipe
from processes import wait_until
from run_files import digest, events, stable

from empg_lite.core.errors import (
    CheckpointError,
    GraderUnusable,
    Interrupted,
    NoSignal,
    RecipeError,
    UsageError,
)
from empg_lite.core.view import View
from empg_lite.loop.plan import Plan
from empg_lite.loop.train import TrainOptions, train
from empg_lite.recipe.file import load_recipe
from empg_lite.recipe.schema import Recipe
from empg_lite.rewards import Verdict
from empg_lite.run.checkpoint import list_checkpoints
from empg_lite.run.journal import read_metrics
from empg_lite.run.rollouts import read_rollouts


class StopAfter(View):
    """Sends this process a signal after a step, as a person at the keyboard would."""

    def __init__(self, step: int, signum: int = signal.SIGINT) -> None:
        self.at, self.signum = step, signum

    def step(self, record, total) -> None:  # type: ignore[no-untyped-def]
        if record["step"] == self.at:
            os.kill(os.getpid(), self.signum)


@pytest.fixture(scope="module")
def straight(tmp_path_factory: pytest.TempPathFactory, model_dir: Path) -> Path:
    """Six steps without interruption; read only."""
    folder = tmp_path_factory.mktemp("straight")
    write_recipe(folder, model_dir).rename(folder / "r.yaml")
    train(load_recipe(str(folder / "r.yaml"), ["run.steps=6"]), folder / "run")
    updates = [r["em/updates"] for r in read_metrics(folder / "run" / "metrics.jsonl")[1:]]
    assert updates == [1] * 6, "the fixture's samples earn rewards"
    return folder


# --- what a run leaves --------------------------------------------------------------------------------


def test_a_run_directory(straight: Path) -> None:
    run = straight / "run"
    names = {p.name for p in run.iterdir()}
    assert names == {
        "LOCK",
        "recipe.yaml",
        "environment.json",
        "metrics.jsonl",
        "events.jsonl",
        "rollouts",
        "checkpoints",
        "adapter",
        "best",
        "eval",
        "preflight.json",
    } - ({"events.jsonl"} if not (run / "events.jsonl").exists() else set())
    assert [p.name for p in list_checkpoints(run)] == ["step-000005", "step-000006"]  # keep 2
    recipe = load_recipe(str(run / "recipe.yaml"))
    for section in ("model", "sampler", "optim"):
        assert "auto" not in getattr(recipe, section).model_dump().values()
    for folder in (run / "adapter", run / "best", list_checkpoints(run)[-1]):
        assert {"adapter_model.safetensors", "adapter_config.json", "manifest.json"} <= {
            p.name for p in folder.iterdir()
        }
    assert json.loads((run / "adapter" / "generation_config.json").read_text())["eos_token_id"] == [256, 258]


def test_a_run_says_what_it_computed_with(straight: Path) -> None:
    """Engine, kernels, attention, graphs: in ``environment.json`` and in each step's record."""
    run = straight / "run"
    facts = json.loads((run / "environment.json").read_text())["engine"]
    assert (facts["engine"], facts["backend"], facts["fit"]) == ("native", "transformers", "packed")
    assert facts["kernels"] == ["plain torch"] and facts["notes"] == []
    assert facts["attention"].keys() == {"prompts", "decoding", "fitting"}
    for record in read_metrics(run / "metrics.jsonl")[1:]:
        assert (record["engine"], record["kernels"]) == ("native", "plain torch")
        assert record["attention"].startswith("prompts ") and "decoding two products" in record["attention"]
        graphs = [record[f"time/{name}"] for name in ("graphs_captured", "graphs_replayed", "eager_steps")]
        assert graphs == [0, 0, 0]  # of a GPU


def test_graphs_are_counted_and_a_capture_that_fails_is_an_event(
    recipe_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from empg_lite.sampler.graphs import Graphs
    from empg_lite.sampler.native import NativeSampler

    class Replayed:
        def __init__(self, graphs: Graphs, work: Any) -> None:
            self.replay = work

    recipe = load_recipe(str(recipe_file), ["run.eval_every=0"])
    monkeypatch.setattr(Plan, "keeps_sampler", True)
    monkeypatch.setattr(NativeSampler, "_captures", True)
    monkeypatch.setattr(Graphs, "_capture", lambda self, work: Replayed(self, work))
    train(recipe, tmp_path / "run")
    for step, record in enumerate(read_metrics(tmp_path / "run" / "metrics.jsonl"), 1):
        (segment,) = read_rollouts(tmp_path / "run" / "rollouts" / f"step-{step:06d}.jsonl")
        longest = max(len(r.completion_ids) for r in segment.rationales)
        assert record["time/graphs_replayed"] == 2 * (longest - 1)  # the prompts' pass draws the first
        assert record["time/eager_steps"] == 0
        assert step == 1 or record["time/graphs_captured"] == 0  # a size is captured once

    monkeypatch.setattr(Plan, "keeps_sampler", False)
    train(recipe, tmp_path / "released")
    records = read_metrics(tmp_path / "released" / "metrics.jsonl")
    assert all(r["time/graphs_captured"] >= 4 for r in records)  # anew in each step

    def refused(self: Graphs, work: Any) -> None:
        raise RuntimeError("operation not permitted when stream is capturing")

    monkeypatch.setattr(Graphs, "_capture", refused)
    with pytest.warns(match="cannot be captured"):
        train(recipe, tmp_path / "eager")
    (said,) = [e for e in events(tmp_path / "eager") if e["event"] == "graphs_not_captured"]
    assert said["why"] == "operation not permitted when stream is capturing"
    for record in read_metrics(tmp_path / "eager" / "metrics.jsonl"):
        assert record["time/graphs_replayed"] == 0 < record["time/eager_steps"]


def test_metrics_of_every_step(straight: Path) -> None:
    records = read_metrics(straight / "run" / "metrics.jsonl")
    assert [r["step"] for r in records] == list(range(7))
    assert "eval/pass@1" in records[0]  # before training
    steps = records[1:]
    assert [("eval/accuracy" in r) for r in steps] == [False, True, False, True, False, True]
    assert ["em/kl_old" in r for r in steps] == [False, True, False, True, False, True]
    assert steps[0]["learning_rate"] == pytest.approx(0.5e-2) and steps[1]["learning_rate"] == pytest.approx(
        1e-2
    )
    rows = read_rollouts(straight / "run" / "rollouts" / "step-000003.jsonl")[0].rationales
    assert len(rows) == 24 and {r.step for r in rows} == {3}
    assert steps[2]["reward"] == pytest.approx(sum(r.reward for r in rows) / 24)
    assert steps[2]["num_tokens"] == sum(
        len(r.completion_ids)
        for n in (1, 2, 3)
        for r in read_rollouts(straight / "run" / "rollouts" / f"step-{n:06d}.jsonl")[0].rationales
    )


def test_it_learns(recipe_file: Path, tmp_path: Path) -> None:
    """A letter a-m before a capital: a random model does it by chance, a trained one nearly always."""
    recipe = load_recipe(
        str(recipe_file), ["run.steps=30", "run.eval_every=0", "sampler.problems_per_step=8"]
    )
    train(recipe, tmp_path / "run")
    rewards = [r["reward"] for r in read_metrics(tmp_path / "run" / "metrics.jsonl")]
    assert sum(rewards[:3]) / 3 < 0.4
    assert sum(rewards[-10:]) / 10 > 0.8


def test_without_signal_nothing_moves(recipe_file: Path, tmp_path: Path) -> None:
    changes = ["data.reward='regex:never this'", "run.eval_every=0", "run.steps=2"]
    recipe = load_recipe(str(recipe_file), changes)
    train(recipe, tmp_path / "run", TrainOptions(force=True))
    first, last = (p / "adapter_model.safetensors" for p in list_checkpoints(tmp_path / "run"))
    assert first.read_bytes() == last.read_bytes()
    records = read_metrics(tmp_path / "run" / "metrics.jsonl")
    assert [(r["loss"], r["em/updates"], r["em/frac_all_wrong"]) for r in records] == [(None, 0, 1.0)] * 2
    events = [json.loads(line) for line in (tmp_path / "run" / "events.jsonl").read_text().splitlines()]
    assert [(e["event"], e["step"]) for e in events if e["event"] != "health"] == [
        ("no_update", 1),
        ("no_update", 2),
    ]
    said = [e["step"] for e in events if e["event"] == "health" and e["kind"] == "all_wrong"]
    assert said == [0], "by the preflight, and not again at every step"


def test_a_dead_signal_stops_the_run_unless_forced(
    recipe_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("empg_lite.loop.recorder.DEAD_STEPS", 2)
    monkeypatch.setattr(
        "empg_lite.loop.begin.run_preflight", lambda *_: None
    )  # it would stop the run before step 1
    recipe = load_recipe(str(recipe_file), ["data.reward='regex:never this'", "run.eval_every=0"])
    with pytest.raises(NoSignal, match="no signal in 2 steps") as raised:
        train(recipe, tmp_path / "a")
    assert raised.value.exit_code == 77
    assert list_checkpoints(tmp_path / "a")[-1].name == "step-000002"
    assert train(recipe, tmp_path / "b", TrainOptions(force=True))["steps"] == 3


def test_a_broken_grader_is_found_before_step_1(
    cli: Any, recipe_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "sympy.py").write_text("raise ImportError('half installed')\n")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    for reward in ("math", "gsm8k"):
        run = tmp_path / reward[:4]
        code, _, err = cli("train", "-r", recipe_file, "-o", run, "--set", f"data.reward='{reward}'")
        assert code == 69 and "half installed" in err.strip().splitlines()[-1], (reward, err)
        assert read_metrics(run / "metrics.jsonl") == [] and not (run / "rollouts").exists()


def test_a_grader_that_fails_stops_the_run(
    recipe_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two steps in a row with most answers ungraded: exit 69, the checkpoint stays."""
    from empg_lite.loop import train as module

    recipe = load_recipe(str(recipe_file), ["run.eval_every=0", "run.steps=6", "run.save_every=100"])
    real, run = module.e_step, tmp_path / "run"

    def failing(*given: Any) -> Any:
        if given[-1].learner.state.step >= 2:
            crashed = Verdict(0.0, "crash", None, None, "", 0.0, error="no such module")
            future: Future[Verdict] = Future()
            future.set_result(crashed)
            monkeypatch.setattr(module.Grader, "submit", lambda *_: future)
        return real(*given)

    monkeypatch.setattr(module, "e_step", failing)
    with pytest.raises(
        GraderUnusable, match="failed on 100% and 100% of the answers.*no such module"
    ) as raised:
        train(recipe, run)
    assert raised.value.exit_code == 69
    assert list_checkpoints(run)[-1].name == "step-000004"
    records = read_metrics(run / "metrics.jsonl")
    assert [r["em/updates"] for r in records] == [1, 1, 0, 0]
    assert [r["reasons/crash"] > 0 for r in records[2:]] == [True, True]
    assert ["grader_failures" in r["health"] for r in records] == [False, False, True, True]
    monkeypatch.undo()
    assert train(recipe, run, TrainOptions(resume=True))["steps"] == 6


def test_eval_every_0_evaluates_nothing(recipe_file: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    result = train(load_recipe(str(recipe_file), ["run.eval_every=0", "run.steps=1"]), run)
    assert (result["accuracy_before"], result["accuracy_after"]) == (None, None)
    assert not (run / "eval").exists() and not (run / "best").exists()
    later = load_recipe(str(recipe_file), ["run.eval_every=1", "run.steps=2"])
    result = train(later, run, TrainOptions(resume=True))
    assert result["accuracy_before"] is None and result["accuracy_after"] is not None  # "before" is past


def test_refused_sampling_needs_force(recipe_file: Path, tmp_path: Path) -> None:
    recipe = load_recipe(str(recipe_file), ["sampler.temperature=0.7", "run.steps=1", "run.eval_every=0"])
    with pytest.raises(RecipeError, match="temperature.*--force"):
        train(recipe, tmp_path / "run")
    assert not (tmp_path / "run").exists()
    assert train(recipe, tmp_path / "run", TrainOptions(force=True))["steps"] == 1


# --- resume -------------------------------------------------------------------------------------------


def test_interrupted_and_resumed_equals_straight(straight: Path) -> None:
    recipe = load_recipe(str(straight / "r.yaml"), ["run.steps=6"])
    run = straight / "resumed"
    with pytest.raises(Interrupted, match="stopped after step 2; step-000002 is saved.*--resume") as raised:
        train(recipe, run, view=StopAfter(2))
    assert raised.value.exit_code == 130
    with pytest.raises(Interrupted) as raised:
        train(recipe, run, TrainOptions(resume=True), view=StopAfter(4, signal.SIGTERM))
    assert raised.value.exit_code == 143
    train(recipe, run, TrainOptions(resume=True))
    assert digest(run) == digest(straight / "run")


@pytest.mark.slow
def test_kill_9_and_resumed_equals_straight(straight: Path) -> None:
    """The real command in a process of its own, killed in the middle of a step."""
    run = straight / "killed"
    command = [
        sys.executable,
        "-m",
        "empg_lite",
        "train",
        "--recipe",
        str(straight / "r.yaml"),
        "--max-steps",
        "6",
    ]
    command += ["--output-dir", str(run), "--resume", "--json"]
    for _ in range(20):  # a busy machine may look too late
        victim = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        wait_until(lambda: len(read_metrics(run / "metrics.jsonl")) >= 4)  # before training, and three steps
        victim.kill()
        victim.wait()
        if len(read_metrics(run / "metrics.jsonl")) < 7:
            break
        shutil.rmtree(run)
    assert len(read_metrics(run / "metrics.jsonl")) < 7, "killed before the end"
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    result = json.loads(done.stdout.splitlines()[-1])
    assert result["steps"] == 6 and result["run"] == str(run)
    assert digest(run) == digest(straight / "run")


def test_negative_control_other_numbers_are_noticed(straight: Path) -> None:
    """The same six steps with another seed do not have the same digest in any part."""
    run = straight / "other-seed"
    train(load_recipe(str(straight / "r.yaml"), ["run.steps=6"], seed=1), run)
    assert all(a != b for a, b in zip(digest(run), digest(straight / "run"), strict=True))


def test_batch_layout_does_not_change_the_run(straight: Path) -> None:
    """Other batch and micro-batch sizes: same samples, and the same gradient to rounding."""
    run = straight / "layout"
    changes = ["run.steps=2", "sampler.batch_rows=8", "optim.micro_batch_tokens=40"]
    train(load_recipe(str(straight / "r.yaml"), changes), run)
    ours, theirs = (read_metrics(straight / name / "metrics.jsonl") for name in ("layout", "run"))
    for a, b in zip(ours[:3], theirs[:3], strict=True):
        for name, value in stable(a).items():
            close = pytest.approx(b[name], rel=1e-4, abs=1e-6) if isinstance(value, float) else b[name]
            assert value == close, name


def test_resume_starts_where_there_is_nothing(recipe_file: Path, tmp_path: Path) -> None:
    recipe = load_recipe(str(recipe_file), ["run.steps=1", "run.eval_every=0"])
    (tmp_path / "empty").mkdir()
    for name in ("absent", "empty"):
        assert train(recipe, tmp_path / name, TrainOptions(resume=True))["steps"] == 1


def snapshot(run: Path) -> dict[str, tuple[bytes, int]]:
    return {str(p.relative_to(run)): (p.read_bytes(), 0) for p in sorted(run.rglob("*")) if p.is_file()}


def test_a_finished_run_is_left_alone_and_can_be_extended(recipe_file: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    recipe = load_recipe(str(recipe_file), ["run.steps=2"])
    first = train(recipe, run)
    before = snapshot(run)
    again = train(recipe, run, TrainOptions(resume=True))
    assert snapshot(run) == before
    assert {k: v for k, v in again.items() if "seconds" not in k} == {
        k: v for k, v in first.items() if "seconds" not in k
    }
    with pytest.raises(UsageError, match="already contains a run.*--resume"):
        train(recipe, run)
    longer = load_recipe(str(recipe_file), ["run.steps=3"])
    assert train(longer, run, TrainOptions(resume=True))["steps"] == 3
    straight = tmp_path / "straight"
    train(longer, straight)
    assert digest(run)[:2] == digest(straight)[:2]


def test_a_falling_rate_does_not_depend_on_the_last_step(recipe_file: Path, tmp_path: Path) -> None:
    """1e-2 after two warmup steps, then as 2/step; an extended run ends as the longer one does."""

    def falling(steps: int) -> Recipe:
        return load_recipe(
            str(recipe_file), [f"run.steps={steps}", "run.eval_every=0", "optim.decay_after=2"]
        )

    run, straight = tmp_path / "run", tmp_path / "straight"
    train(falling(3), run)
    train(falling(5), run, TrainOptions(resume=True))
    train(falling(5), straight)
    assert digest(run)[:2] == digest(straight)[:2]
    rates = [r["learning_rate"] for r in read_metrics(straight / "metrics.jsonl")]
    assert rates == pytest.approx([5e-3, 1e-2, 2e-2 / 3, 5e-3, 4e-3], rel=1e-12)


def test_a_stale_adapter_is_not_taken_for_a_finished_run(recipe_file: Path, tmp_path: Path) -> None:
    """Killed between the last checkpoint of an extension and its adapter/: resuming writes the adapter."""
    run = tmp_path / "run"
    train(load_recipe(str(recipe_file), ["run.steps=1", "run.eval_every=0"]), run)
    stale = (run / "adapter").rename(tmp_path / "stale")
    longer = load_recipe(str(recipe_file), ["run.steps=2", "run.eval_every=0"])
    train(longer, run, TrainOptions(resume=True))
    final = (run / "adapter" / "adapter_model.safetensors").read_bytes()
    shutil.rmtree(run / "adapter")
    stale.rename(run / "adapter")
    train(longer, run, TrainOptions(resume=True))
    assert (run / "adapter" / "adapter_model.safetensors").read_bytes() == final


def test_changed_science_is_refused_by_name(recipe_file: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    train(load_recipe(str(recipe_file), ["run.steps=1", "run.eval_every=0"]), run)
    changed = load_recipe(str(recipe_file), ["run.steps=2", "run.eval_every=0", "optim.learning_rate=0.5"])
    with pytest.raises(RecipeError, match="optim.learning_rate is 0.5, the run was started with 0.01"):
        train(changed, run, TrainOptions(resume=True))
    train(changed, run, TrainOptions(resume=True, allow_change=("optim.learning_rate",)))
    events = [json.loads(line) for line in (run / "events.jsonl").read_text().splitlines()]
    assert {"event": "changed", "field": "optim.learning_rate", "old": 0.01, "new": 0.5} in events


def test_max_minutes_ends_with_a_checkpoint(recipe_file: Path, tmp_path: Path) -> None:
    recipe = load_recipe(str(recipe_file), ["run.eval_every=0", "run.save_every=100"])
    result = train(recipe, tmp_path / "run", TrainOptions(max_minutes=0.0))
    assert result["steps"] == 1 and [p.name for p in list_checkpoints(tmp_path / "run")] == ["step-000001"]
    assert not (tmp_path / "run" / "adapter").exists()
    assert train(recipe, tmp_path / "run", TrainOptions(resume=True))["steps"] == 3


def test_a_damaged_newest_checkpoint_falls_back_and_a_named_one_does_not(
    recipe_file: Path, tmp_path: Path
) -> None:
    from empg_lite.run.target import resolve_target

    run, recipe = tmp_path / "run", load_recipe(str(recipe_file), ["run.eval_every=0"])
    straight = tmp_path / "straight"
    train(recipe, straight)
    with pytest.raises(Interrupted):
        train(recipe, run, view=StopAfter(2))
    newest = list_checkpoints(run)[-1]
    data = bytearray((newest / "optimizer.safetensors").read_bytes())
    data[-1] ^= 1
    (newest / "optimizer.safetensors").write_bytes(data)
    with pytest.raises(CheckpointError, match="sha256"):
        resolve_target(str(newest))
    train(recipe, run, TrainOptions(resume=True))
    assert digest(run) == digest(straight)
    assert (run / "checkpoints" / ".corrupt-step-000002").is_dir()
    for path in list_checkpoints(run):
        (path / "state.json").write_text("{}")
    with pytest.raises(CheckpointError, match="none of 2 checkpoints is valid") as raised:
        train(recipe, run, TrainOptions(resume=True))
    assert raised.value.exit_code == 76


def test_verdicts_are_not_asked_for_twice(
    recipe_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A step that was graded before the run was cut off is not graded again."""
    from empg_lite.loop import begin
    from empg_lite.loop import train as module
    from empg_lite.loop.recorder import Recorder

    recipe = load_recipe(str(recipe_file), ["run.eval_every=0", "run.save_every=100"])
    run = tmp_path / "run"
    monkeypatch.setattr(Recorder, "checkpoint_due", lambda self: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        train(recipe, run)  # dies after step 1, before any checkpoint
    monkeypatch.undo()
    monkeypatch.setattr(begin, "run_preflight", lambda *_: None)  # this and the self-test grade too
    monkeypatch.setattr(module.Grader, "self_test", lambda *_: None)
    stored = run / "rollouts" / "step-000001.jsonl"
    assert stored.is_file() and not list_checkpoints(run)
    asked: list[str] = []
    real = module.Grader.submit
    monkeypatch.setattr(
        module.Grader, "submit", lambda s, r, case: asked.append(case.prediction) or real(s, r, case)
    )
    train(recipe, run, TrainOptions(resume=True))

    def ended(step: int) -> int:
        rows = read_rollouts(run / "rollouts" / f"step-{step:06d}.jsonl")[0].rationales
        return sum(r.finish_reason == "stop" for r in rows)

    assert ended(1) > 4 and len(asked) == ended(2) + ended(3)


def test_the_optimizer_is_stored_by_name(straight: Path) -> None:
    from safetensors import safe_open

    with safe_open(list_checkpoints(straight / "run")[-1] / "optimizer.safetensors", "pt") as tensors:
        names = list(tensors.keys())
        assert all(name.rsplit("/", 1)[1] in ("step", "exp_avg", "exp_avg_sq") for name in names)
        assert len(names) == 3 * 2 * 7 * 2 and any("layers.1.mlp.up_proj.lora_B" in name for name in names)
        assert torch.equal(
            tensors.get_tensor(next(n for n in names if n.endswith("/step"))), torch.tensor(6.0)
        )


def test_the_sampler_lets_go_before_the_fit_where_the_plan_has_no_room(
    cli: Any, recipe_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from empg_lite.loop.learner import Learner
    from empg_lite.loop.plan import Plan
    from empg_lite.sampler.native import NativeSampler

    steps: list[str] = []
    release, fit = NativeSampler.release, Learner.fit
    monkeypatch.setattr(NativeSampler, "release", lambda self: steps.append("release") or release(self))
    monkeypatch.setattr(Learner, "fit", lambda *a, **k: steps.append("fit") or fit(*a, **k))
    monkeypatch.setattr(NativeSampler, "_captures", False)
    orders = []
    for keeps in (True, False):
        steps.clear()
        monkeypatch.setattr(Plan, "keeps_sampler", keeps)
        out = tmp_path / str(keeps)
        assert cli("train", "--recipe", recipe_file, "--output-dir", out)[0] == 0
        orders.append(list(steps))
    kept, released = orders
    assert kept.count("fit") == released.count("fit") == 3
    assert released.count("release") == kept.count("release") + 4  # before each fit and the preflight's


def test_every_metric_is_explained(straight: Path) -> None:
    """Each name of a real record is in docs/files.md; so a new metric needs a line there."""
    page = (Path(__file__).parents[2] / "docs" / "files.md").read_text("utf-8")
    patterns = {"reasons": "reasons/REASON", "eval/behavior": "eval/behavior/NAME"}
    names = {
        name
        for record in read_metrics(straight / "run" / "metrics.jsonl")
        if record["step"]
        for name in record
    }
    assert len(names) > 40
    missing = sorted(n for n in names if f"`{patterns.get(n.rpartition('/')[0], n)}`" not in page)
    assert not missing, missing
    assert "`em/no_such_metric`" not in page
