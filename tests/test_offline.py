"""sample, score, fit: the loop in three commands, to the bit."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from empg_lite.checkpoint import list_checkpoints
from empg_lite.errors import DataError, MissingInput, UsageError
from empg_lite.metrics import read_metrics
from empg_lite.offline import SampleOptions, fit, sample
from empg_lite.rationale import read_rollouts
from empg_lite.recipe import Recipe
from empg_lite.recipe_file import load_recipe
from empg_lite.rescore import score_file
from empg_lite.rewards import Grader
from empg_lite.train import TrainOptions, train

NO_EVAL = ["run.eval_every=0"]


@pytest.fixture
def recipe(recipe_file: Path) -> Recipe:
    return load_recipe(str(recipe_file), NO_EVAL)


def adapter(run: Path) -> bytes:
    return (list_checkpoints(run)[-1] / "adapter_model.safetensors").read_bytes()


def optimizer(run: Path) -> bytes:
    return (list_checkpoints(run)[-1] / "optimizer.safetensors").read_bytes()


def test_a_loop_of_the_three_is_train(recipe: Recipe, tmp_path: Path) -> None:
    train(recipe, tmp_path / "train")
    run: Path | None = None
    for n in range(1, 4):
        file = tmp_path / f"rollouts-{n}.jsonl"
        sample(recipe, run, file, SampleOptions(problems=3))
        score_file(file, recipe.data.reward)
        ours = read_rollouts(file)[0].rationales
        theirs = read_rollouts(tmp_path / "train" / "rollouts" / f"step-{n:06d}.jsonl")[0].rationales
        assert [(r.problem_id, r.completion_ids, r.step, r.reward) for r in ours] == [
            (r.problem_id, r.completion_ids, r.step, r.reward) for r in theirs
        ]
        new = tmp_path / f"fit-{n}"
        fit(recipe, [file], new, run)
        run = new
    assert adapter(tmp_path / "fit-3") == adapter(tmp_path / "train")
    assert optimizer(tmp_path / "fit-3") == optimizer(tmp_path / "train")
    assert read_metrics(tmp_path / "fit-3" / "metrics.jsonl")[-1]["step"] == 3


def test_sample_completes_its_file_and_then_changes_nothing(recipe: Recipe, tmp_path: Path) -> None:
    whole, cut = tmp_path / "whole.jsonl", tmp_path / "cut.jsonl"
    result = sample(recipe, None, whole, SampleOptions(problems=7))
    assert (result["rationales"], result["new"]) == (7 * 8, 7 * 8)
    data = whole.read_bytes()
    assert sample(recipe, None, whole, SampleOptions(problems=7))["new"] == 0
    assert whole.read_bytes() == data
    for length in (data.index(b"\n") + 1, len(data) // 3, len(data) // 2, len(data) - 5):
        cut.write_bytes(data[:length])  # a kill may cut anywhere, also inside a line
        sample(recipe, None, cut, SampleOptions(problems=7))
        assert cut.read_bytes() == data
    rows = read_rollouts(whole)[0].rationales
    assert [r.step for r in rows[::8]] == [1, 1, 1, 2, 2, 2, 3]
    assert all((r.reward, r.reason, r.weight) == (None, None, None) for r in rows)


def test_other_arguments_need_append(recipe: Recipe, recipe_file: Path, tmp_path: Path) -> None:
    out = tmp_path / "r.jsonl"
    sample(recipe, None, out, SampleOptions(problems=3))
    before = out.read_bytes()
    other = load_recipe(str(recipe_file), [*NO_EVAL, "run.seed=5"])
    for changed, options in ((recipe, SampleOptions(problems=4)), (other, SampleOptions(problems=3))):
        with pytest.raises(UsageError, match="sampled with other arguments.*--append"):
            sample(changed, None, out, options)
        assert out.read_bytes() == before
    sample(other, None, out, SampleOptions(problems=3, append=True))
    assert out.read_bytes().startswith(before)
    first, second = read_rollouts(out)
    assert (first.header.seed, second.header.seed) == (0, 5)
    sample(recipe, None, tmp_path / "s.jsonl", SampleOptions(problems=3))
    sample(recipe, None, tmp_path / "s.jsonl", SampleOptions(problems=3, append=True))
    one, two = read_rollouts(tmp_path / "s.jsonl")  # the same arguments: the problems that follow
    assert {r.problem_id for r in one.rationales}.isdisjoint({r.problem_id for r in two.rationales})
    assert {r.step for r in two.rationales} == {2}


def test_score_in_place_and_again(recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "r.jsonl"
    sample(recipe, None, file, SampleOptions(problems=3))
    with pytest.raises(UsageError, match="--reward"):
        score_file(file, None)
    first = score_file(file, "regex:[a-m]")
    assert 0 < first["reward"] < 1 and sum(first["reasons"].values()) == 24
    second = score_file(file, "regex:.")
    assert second["reward"] > first["reward"]
    assert read_rollouts(file)[0].header.reward_name == "regex:."
    assert score_file(file, None)["reward"] == second["reward"]
    data = file.read_bytes()

    def broken(*_: object) -> list[object]:
        raise RuntimeError("grader fell over")

    monkeypatch.setattr(Grader, "submit", broken)
    with pytest.raises(RuntimeError):
        score_file(file, "exact")
    assert file.read_bytes() == data


def test_fit_refuses_what_was_never_scored(recipe: Recipe, tmp_path: Path) -> None:
    file = tmp_path / "r.jsonl"
    sample(recipe, None, file, SampleOptions(problems=3))
    with pytest.raises(DataError, match="24 of 24 rationales have no reward.*empg-lite score") as raised:
        fit(recipe, [file], tmp_path / "run")
    assert raised.value.exit_code == 65
    assert not (tmp_path / "run").exists()
    with pytest.raises(MissingInput):
        fit(recipe, [tmp_path / "absent.jsonl"], tmp_path / "run")


def nll(recipe: Recipe, run: Path | None, texts: list[tuple[str, str]]) -> float:
    """Mean negative log-likelihood of written solutions, nats a token."""
    from empg_lite.learner import build_learner
    from empg_lite.policy.adapter import load_adapter
    from empg_lite.policy.policy import collate

    policy = build_learner(recipe.resolved()).policy
    if run is not None:
        load_adapter(policy, run / "adapter")
    rows = [(policy.encode_prompt(question)[1], policy.encode_completion(text)) for question, text in texts]
    with torch.no_grad():
        logprobs, mask = policy.token_logprobs(collate(rows, policy.pad_id))
    return float(-logprobs[mask].mean())


def test_fit_on_written_solutions_lowers_their_nll(recipe: Recipe, tmp_path: Path) -> None:
    """Text from elsewhere: no ids, no header, a reward of 1."""
    texts = [(f"{a} + {a} = ?", f" {a} + {a} = {2 * a}. #### {2 * a}") for a in range(9)]
    file = tmp_path / "theirs.jsonl"
    rows = [{"question": q, "completion": c, "gold": c.split()[-1], "reward": 1.0} for q, c in texts]
    file.write_text("".join(json.dumps(r) + "\n" for r in rows))
    result = fit(recipe, [file, file], tmp_path / "run")
    assert result["steps"] == 6  # 18 groups, three problems to a step
    assert nll(recipe, tmp_path / "run", texts) < nll(recipe, None, texts) - 0.1
    stored = read_rollouts(tmp_path / "run" / "rollouts" / "step-000001.jsonl")[0].rationales[0]
    assert stored.completion_ids[-1] == 256 and len(stored.prompt_ids) > 0


def test_fit_goes_on_where_it_was_cut_off(recipe: Recipe, tmp_path: Path) -> None:
    file = tmp_path / "r.jsonl"
    sample(recipe, None, file, SampleOptions(problems=9))
    score_file(file, recipe.data.reward)
    fit(recipe, [file], tmp_path / "straight")
    assert fit(recipe, [file], tmp_path / "cut", options=TrainOptions(max_minutes=0.0))["steps"] == 1
    assert fit(recipe, [file], tmp_path / "cut", options=TrainOptions(resume=True))["steps"] == 3
    assert adapter(tmp_path / "cut") == adapter(tmp_path / "straight")
    assert optimizer(tmp_path / "cut") == optimizer(tmp_path / "straight")
    records = read_metrics(tmp_path / "straight" / "metrics.jsonl")
    assert [r["em/staleness"] for r in records] == [0.0, 1.0, 2.0]  # drawn at step 0, fitted later


def test_fit_loads_no_sampler_and_no_reward(
    recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "r.jsonl"
    sample(recipe, None, file, SampleOptions(problems=3))
    score_file(file, recipe.data.reward)

    def never(*_: object, **__: object) -> None:
        raise AssertionError("fit must not sample or grade")

    monkeypatch.setattr("empg_lite.learner.make_sampler", never)
    monkeypatch.setattr(Grader, "grade_many", never)
    assert fit(recipe, [file], tmp_path / "run")["steps"] == 1
