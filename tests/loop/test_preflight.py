"""Before step 1: hopeless settings stop, doubtful ones are said, good ones pass."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from empg_lite.loop.preflight import preflight_recipe
from empg_lite.recipe.file import load_recipe
from empg_lite.rewards import Grader
from empg_lite.run.checkpoint import list_checkpoints
from empg_lite.run.journal import read_metrics

#: Long enough for nearly every random answer to end; short ones are cut off in a third of all cases.
LONG = ("sampler.max_new_tokens=40", "data.reward='regex:[a-d]'")
ALWAYS, NEVER = "data.reward='regex:(?s).*'", "data.reward='regex:never this'"


def trained(
    cli: Any, recipe_file: Path, run: Path, *changes: str, force: bool = False
) -> tuple[int, str, str]:
    settings = [part for change in ("run.eval_every=0", *changes) for part in ("--set", change)]
    return cli("train", "-r", recipe_file, "-o", run, *settings, *(["--force"] if force else []))


def facts(run: Path) -> dict[str, Any]:
    return json.loads((run / "preflight.json").read_text())


def test_a_good_setting_passes(cli: Any, recipe_file: Path, tmp_path: Path) -> None:
    code, out, err = trained(cli, recipe_file, tmp_path / "run", *LONG, "run.steps=1")
    assert code == 0, err
    said = facts(tmp_path / "run")
    assert (said["problems"], said["rationales"], said["findings"]) == (16, 128, [])
    assert 0 < said["reward"] < 1 and said["minutes"] > 0 and said["tokens_per_second"] > 0
    assert "preflight: 128 rationales of 16 problems" in out and "warning" not in out


def test_far_too_few_tokens_stop(cli: Any, recipe_file: Path, tmp_path: Path) -> None:
    """The plain prompt knows no stop that random bytes would spell: every answer is cut off."""
    code, _, err = trained(
        cli, recipe_file, tmp_path / "run", "sampler.max_new_tokens=6", "data.prompt=plain"
    )
    assert code == 77
    last = err.strip().splitlines()[-1]
    assert last.startswith("error: ") and "of the rationales were cut off at 6 tokens" in last
    assert "raise sampler.max_new_tokens, to 12" in last and "--force" in last
    assert facts(tmp_path / "run")["truncated"] > 0.9
    assert not list_checkpoints(tmp_path / "run") and read_metrics(tmp_path / "run" / "metrics.jsonl") == []


def test_too_few_tokens_are_said(cli: Any, recipe_file: Path, tmp_path: Path) -> None:
    code, out, err = trained(cli, recipe_file, tmp_path / "run", "sampler.max_new_tokens=4", "run.steps=1")
    assert 0.3 < facts(tmp_path / "run")["truncated"] <= 0.9, "the setting that this test is about"
    assert code == 0, err
    assert "were cut off at 4 tokens" in out and "raise sampler.max_new_tokens, to 8" in out


def test_always_right_goes_on(cli: Any, recipe_file: Path, tmp_path: Path) -> None:
    settings = (ALWAYS, "sampler.max_new_tokens=150", "run.steps=1", "sampler.samples_per_problem=2")
    code, out, err = trained(cli, recipe_file, tmp_path / "run", *settings)
    assert code == 0, err
    assert [f["kind"] for f in facts(tmp_path / "run")["findings"]] == ["all_right"]
    assert "all 32 rationales are right: nothing left to learn" in out


def test_always_wrong_stops_unless_forced(cli: Any, recipe_file: Path, tmp_path: Path) -> None:
    code, _, err = trained(cli, recipe_file, tmp_path / "run", NEVER)
    last = err.strip().splitlines()[-1]
    assert code == 77 and "none of 128 rationales earned a reward" in last and "--force" in last
    code, out, _ = trained(cli, recipe_file, tmp_path / "forced", NEVER, force=True)
    assert code == 0 and "none of 128 rationales earned a reward" in out
    assert [r["em/updates"] for r in read_metrics(tmp_path / "forced" / "metrics.jsonl")] == [0, 0, 0]


def test_nothing_is_learned_by_looking(recipe_file: Path) -> None:
    """The trial fit moves no weight, leaves no gradient, and draws none of training's random numbers."""
    from empg_lite.data.sources import load_splits
    from empg_lite.loop.learner import build_learner
    from empg_lite.loop.preflight import PREFLIGHT_STEP, first_problems, preflight

    recipe = load_recipe(str(recipe_file)).resolved()
    learner = build_learner(recipe)
    before = learner.policy.adapter_sha256()
    problems = first_problems(load_splits(recipe).train, recipe.run.seed)
    with Grader() as grader:
        found = preflight(learner, learner.sampler(), grader, problems)
    assert found.signal > 0, "so that something was fitted"
    assert learner.policy.adapter_sha256() == before
    assert all(p.grad is None for p in learner.policy.trainable().values())
    assert learner.state.policy_step == 0 and learner.optimizer.state == {}
    assert PREFLIGHT_STEP == 0  # training counts from 1


def test_check_can_fly_too(cli: Any, recipe_file: Path) -> None:
    long = [part for change in LONG for part in ("--set", change)]
    code, out, _ = cli("check", "-r", recipe_file, "--preflight", "--json", *long)
    result = json.loads(out.splitlines()[-1])
    assert (code, result["ok"]) == (0, True)
    with Grader() as grader:
        again = preflight_recipe(load_recipe(str(recipe_file), LONG), grader)
    assert (
        result["preflight"]["reward"] == again.reward and result["preflight"]["truncated"] == again.truncated
    )
    code, out, _ = cli("check", "-r", recipe_file, "--preflight", "--set", NEVER)
    assert code == 1 and "none of 128 rationales earned a reward" in out


def test_what_the_sampler_keeps_is_freed_before_any_fit_that_has_no_room_for_it(
    recipe_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The preflight fits too: on a small card it would run out of memory where training would not."""
    from empg_lite.loop import learner, preflight
    from empg_lite.loop.plan import Plan
    from empg_lite.loop.train import train
    from empg_lite.sampler.native import NativeSampler

    order: list[str] = []

    def noted(owner: Any, name: str, what: str) -> None:
        real = getattr(owner, name)
        monkeypatch.setattr(owner, name, lambda *a, **k: order.append(what) or real(*a, **k))

    noted(learner, "m_step", "fit")
    noted(preflight, "m_step", "fit")
    noted(NativeSampler, "draw", "draw")
    noted(learner.Learner, "make_room", "room")
    recipe = load_recipe(str(recipe_file), ["run.eval_every=0", "run.steps=2", "data.reward='regex:[a-m]'"])
    train(recipe, tmp_path / "run")
    assert order == ["draw", "room", "fit"] * 3  # the preflight and two steps
    noted(NativeSampler, "release", "release")
    built, order[:] = learner.build_learner(recipe), []
    for keeps in (True, False):
        monkeypatch.setattr(Plan, "keeps_sampler", keeps)
        built.make_room(built.sampler())
    assert order == ["room", "room", "release"]
