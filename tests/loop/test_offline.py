"""sample, score, fit: the loop in three commands, to the bit."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from crash_harness import dies
from rationales import rationale

from empg_lite.core.errors import DataError, MissingInput, UsageError
from empg_lite.core.rationale import Rationale
from empg_lite.loop.offline import SampleOptions, fit, sample
from empg_lite.loop.train import TrainOptions, train
from empg_lite.recipe.file import load_recipe
from empg_lite.recipe.schema import Recipe
from empg_lite.rewards import Grader
from empg_lite.run.checkpoint import list_checkpoints
from empg_lite.run.journal import read_metrics
from empg_lite.run.rollouts import RolloutHeader, encode_rollouts, rationale_line, read_rollouts
from empg_lite.tools.rescore import score_file

NO_EVAL = ["run.eval_every=0"]


@pytest.fixture
def recipe(recipe_file: Path) -> Recipe:
    return load_recipe(str(recipe_file), NO_EVAL)


def adapter(run: Path) -> bytes:
    return (list_checkpoints(run)[-1] / "adapter_model.safetensors").read_bytes()


def optimizer(run: Path) -> bytes:
    return (list_checkpoints(run)[-1] / "optimizer.safetensors").read_bytes()


def test_a_loop_of_the_three_is_train(recipe_file: Path, tmp_path: Path) -> None:
    recipe = load_recipe(str(recipe_file), [*NO_EVAL, "optim.decay_after=2"])  # a rate that never stays
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
    header = data.index(b"\n") + 1
    for length in (0, 1, header - 1, header, len(data) // 3, len(data) // 2, len(data) - 5):
        cut.write_bytes(data[:length])  # a kill may cut anywhere, also inside a line
        sample(recipe, None, cut, SampleOptions(problems=7))
        assert cut.read_bytes() == data
    cut.write_bytes(b"no rollouts")
    with pytest.raises(UsageError, match="sampled with other arguments"):
        sample(recipe, None, cut, SampleOptions(problems=7))
    assert cut.read_bytes() == b"no rollouts"
    rows = read_rollouts(whole)[0].rationales
    assert [r.step for r in rows[::8]] == [1, 1, 1, 2, 2, 2, 3]
    assert all((r.reward, r.reason, r.weight) == (None, None, None) for r in rows)


@pytest.mark.parametrize("every", [7, pytest.param(1, marks=pytest.mark.slow)])
def test_sample_killed_at_a_change_to_the_disk(recipe_file: Path, tmp_path: Path, every: int) -> None:
    """And again while it completes the file, which begins with cutting off what the first kill left."""
    recipe = load_recipe(str(recipe_file), [*NO_EVAL, "sampler.max_new_tokens=4"])

    def job() -> object:
        return sample(recipe, None, out, SampleOptions(problems=7))

    out, first = tmp_path / "whole.jsonl", 1
    job()
    whole, out = out.read_bytes(), tmp_path / f"{first}.jsonl"
    while dies(job, first):
        for second in range(1, 12) if every == 1 else [first % 4 + 1]:
            left = out.read_bytes() if out.exists() else None
            dies(job, second)
            job()
            assert out.read_bytes() == whole, (first, second)
            out.unlink()
            if left is not None:
                out.write_bytes(left)
        first += every
        out = tmp_path / f"{first}.jsonl"
    assert out.read_bytes() == whole and first > 14


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
    appended = (tmp_path / "s.jsonl").read_bytes()
    for cut in (appended.rindex(b'{"model"') + 9, len(appended) - 9):  # a kill within the second segment
        (tmp_path / "s.jsonl").write_bytes(appended[:cut])
        sample(recipe, None, tmp_path / "s.jsonl", SampleOptions(problems=3, append=True))
        assert (tmp_path / "s.jsonl").read_bytes() == appended


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
    from empg_lite.loop.learner import build_learner
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
    path = tmp_path / "run" / "rollouts" / "step-000001.jsonl"
    stored = read_rollouts(path)[0].rationales[0]
    assert stored.completion_ids[-1] == 256 and len(stored.prompt_ids) > 0 and stored.origin == "text"
    # Tokenised once: changed ids are taken as they are, and say the same of where they come from.
    line = json.loads(rationale_line(stored)) | {"completion_ids": [5, 6, 256]}
    file.write_text(json.dumps(line) + "\n")
    fit(recipe, [file], tmp_path / "again")
    again = read_rollouts(tmp_path / "again" / "rollouts" / "step-000001.jsonl")[0].rationales[0]
    assert (again.completion_ids, again.origin) == ((5, 6, 256), "text")
    file.write_text(json.dumps({"problem_id": "p", "completion": "x", "reward": 1}) + "\n")
    with pytest.raises(DataError, match="no question, no prompt and no ids.*problem p"):
        fit(recipe, [file], tmp_path / "bare")


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

    monkeypatch.setattr("empg_lite.loop.learner.make_sampler", never)
    monkeypatch.setattr(Grader, "grade_many", never)
    assert fit(recipe, [file], tmp_path / "run")["steps"] == 1


def stored_rows(run: Path, step: int = 1) -> list[Rationale]:
    """What a run keeps of a step."""
    return [r for s in read_rollouts(run / "rollouts" / f"step-{step:06d}.jsonl") for r in s.rationales]


def drawn(problem: str, rewards: list[float], header: RolloutHeader, **more: Any) -> str:
    """A segment of one problem's rationales, with ids."""
    rows = [
        rationale(
            problem_id=problem, prompt_ids=(70, 71), completion_ids=(72, 73 + k, 256), step=1, policy_step=0,
            sample_index=k, reward=reward, **more,
        )
        for k, reward in enumerate(rewards)
    ]  # fmt: skip
    return encode_rollouts(header, rows)


def test_groups_never_cross_files_or_segments(recipe: Recipe, tmp_path: Path) -> None:
    """The same problem and step in two segments of one file and in another: three groups."""
    header, other = RolloutHeader(seed=1), RolloutHeader(seed=2)
    one, two = tmp_path / "one.jsonl", tmp_path / "two.jsonl"
    one.write_text(drawn("p", [1, 0, 0, 0], header) + drawn("p", [1, 1, 0, 0], other))
    two.write_text(drawn("p", [1, 1, 1, 0], header))
    apart = [4, 0, 0, 0, 2, 2, 0, 0, 4 / 3, 4 / 3, 4 / 3, 0]  # R / mean R of its own four
    assert fit(recipe, [one, two], tmp_path / "run")["steps"] == 1
    assert [r.weight for r in stored_rows(tmp_path / "run")] == pytest.approx(apart, rel=1e-12)
    # What the run stored is three segments still: fitted again, the weights are the same.
    kept = tmp_path / "run" / "rollouts" / "step-000001.jsonl"
    assert [s.header.seed for s in read_rollouts(kept)] == [1, 2, 1]
    fit(recipe, [kept], tmp_path / "again")
    assert [r.weight for r in stored_rows(tmp_path / "again")] == pytest.approx(apart, rel=1e-12)
    assert adapter(tmp_path / "again") == adapter(tmp_path / "run")
    # Control: below one header they are one group.
    rows = [r for s in read_rollouts(kept) for r in s.rationales]
    two.write_text(encode_rollouts(header, rows))
    fit(recipe, [two], tmp_path / "mixed")
    assert {r.weight for r in stored_rows(tmp_path / "mixed")} == {0.0, 2.0}


def test_files_of_several_ages_keep_positive_weights_only_where_stale(
    recipe_file: Path, tmp_path: Path
) -> None:
    recipe = load_recipe(str(recipe_file), [*NO_EVAL, "em.weighting=centered"])
    fresh, stale, text = (tmp_path / f"{name}.jsonl" for name in ("fresh", "stale", "text"))
    fresh.write_text(drawn("a", [1, 0], RolloutHeader()))
    stale.write_text(drawn("b", [1, 0], RolloutHeader()).replace('"policy_step": 0', '"policy_step": 9'))
    text.write_text(
        "".join(
            json.dumps({"question": "c", "completion": c, "reward": r}) + "\n"
            for c, r in (("x", 1), ("y", 0))
        )
    )
    fit(recipe, [fresh, stale, text], tmp_path / "run")
    assert [r.weight for r in stored_rows(tmp_path / "run")] == [0.5, -0.5, 0.5, 0, 0.5, 0]
    (record,) = read_metrics(tmp_path / "run" / "metrics.jsonl")
    named = {name: record[f"em/{name}"] for name in ("frac_text", "frac_stale", "staleness_max")}
    assert named == {"frac_text": 2 / 6, "frac_stale": 2 / 6, "staleness_max": 9}
    assert record["em/staleness"] == (0 + 0 + 9 + 9) / 4


def test_the_same_step_of_another_run_is_not_fresh(recipe_file: Path, tmp_path: Path) -> None:
    """Optimiser steps are counted by each run for itself: the adapter says whose they are."""
    recipe = load_recipe(str(recipe_file), [*NO_EVAL, "em.weighting=centered"])
    other = load_recipe(str(recipe_file), [*NO_EVAL, "em.weighting=centered", "run.seed=1"])  # other LoRA A
    weights = {}
    for name, drew in (("own", recipe), ("other", other)):
        file = tmp_path / f"{name}.jsonl"
        sample(drew, None, file, SampleOptions(problems=3))
        score_file(file, recipe.data.reward)
        fit(recipe, [file], tmp_path / name)
        rows = stored_rows(tmp_path / name)
        weights[name] = min(r.weight for r in rows if r.weight is not None)
        assert {r.policy_step for r in rows} == ({0} if name == "own" else {-1})
    assert weights["own"] < 0 == weights["other"]


def test_ids_of_another_vocabulary_are_not_taken(recipe: Recipe, tmp_path: Path) -> None:
    file = tmp_path / "r.jsonl"
    file.write_text(drawn("p", [1, 0], RolloutHeader(tokenizer="f" * 64), completion="ab", prompt="q"))
    fit(recipe, [file], tmp_path / "run")
    rows = stored_rows(tmp_path / "run")
    assert {(r.prompt_ids, r.completion_ids, r.origin) for r in rows} == {((80,), (64, 65, 256), "text")}
    (segment,) = read_rollouts(tmp_path / "run" / "rollouts" / "step-000001.jsonl")
    assert segment.header.tokenizer not in ("", "f" * 64)  # whose the ids are now


def test_score_loads_no_model_and_says_what_it_cost(recipe: Recipe, tmp_path: Path) -> None:
    file = tmp_path / "r.jsonl"
    file.write_text(drawn("p", [1, 0], RolloutHeader(), completion="a"))
    code = (
        "import sys\nfrom empg_lite.cli import main\n"
        f"try: main(['score', {str(file)!r}, '--reward', 'regex:a', '--json'])\n"
        "except SystemExit as stopped: assert not stopped.code\n"
        "print([m for m in ('torch', 'transformers', 'datasets', 'peft') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    line, loaded = done.stdout.splitlines()
    result = json.loads(line)
    assert loaded == "[]" and result["reasons"] == {"equal": 2}
    assert 0 < result["seconds"] < 60
    # Neither is the other's, or in other units: an interpreter takes 10 to 200 MB, no torch fits into that.
    assert 10 < result["peak_rss_mb"] < 200 and 10 < result["peak_rss_mb_workers"] < 200
    assert "peak_rss_mb_workers" not in score_file(file, "exact")  # needs none


def test_rows_keep_what_the_user_wrote_into_them(recipe: Recipe, tmp_path: Path) -> None:
    """Sampled, annotated, cut off by a kill, completed, graded, fitted: the notes are there still."""
    file = tmp_path / "r.jsonl"
    sample(recipe, None, file, SampleOptions(problems=6))
    header, *rows = (json.loads(line) for line in file.read_text().splitlines())
    noted = [row | {"note": f"n{k}", "label": None} for k, row in enumerate(rows)]
    lines = [json.dumps(line) for line in (header, *noted)]
    cut = 1 + len(rows) * 3 // 4  # in the second step of three problems
    file.write_text("\n".join(lines[:cut]) + "\n" + lines[cut][:40])
    sample(recipe, None, file, SampleOptions(problems=6))
    again = file.read_text().splitlines()
    half = 1 + len(rows) // 2
    assert again[:half] == lines[:half] and list(map(json.loads, again[half:])) == rows[half - 1 :]
    score_file(file, recipe.data.reward)
    graded = [json.loads(line) for line in file.read_text().splitlines()][1:half]
    assert [list(row) for row in graded] == [list(row) for row in noted[: half - 1]]
    assert [row["note"] for row in graded] == [row["note"] for row in noted[: half - 1]]
    fit(recipe, [file], tmp_path / "run")
    assert [r.meta["note"] for r in stored_rows(tmp_path / "run")] == [row["note"] for row in graded]


def test_rationales_are_appended_to_a_users_file(recipe: Recipe, tmp_path: Path) -> None:
    """Whose last line lacks its line break, as editors leave it; a broken one is not ours to cut off."""
    file, own = tmp_path / "theirs.jsonl", b'{"id": 1, "question": "q", "completion": "5", "answer": "5"}'
    file.write_bytes(own)
    with pytest.raises(UsageError, match="add --append"):
        sample(recipe, None, file, SampleOptions(problems=1))
    assert file.read_bytes() == own
    sample(recipe, None, file, SampleOptions(problems=1, append=True))
    assert file.read_bytes().startswith(own + b'\n{"model"')
    assert [len(s.rationales) for s in read_rollouts(file)] == [1, 8]
    file.write_bytes(own + b"\n" + own[:-9])
    with pytest.raises(DataError, match=r"theirs.jsonl:2 · repair the row"):
        sample(recipe, None, file, SampleOptions(problems=1, append=True))
    assert file.read_bytes() == own + b"\n" + own[:-9]
