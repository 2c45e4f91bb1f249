"""What a step may take beside its own samples: remembered successes, further problems."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from empg_lite.checkpoint import list_checkpoints, load_memory
from empg_lite.errors import CheckpointError
from empg_lite.estep import weigh
from empg_lite.memory import SuccessMemory
from empg_lite.metrics import read_metrics
from empg_lite.offline import SampleOptions, fit, sample
from empg_lite.rationale import Group, Rationale, read_rollouts
from empg_lite.recipe import Recipe
from empg_lite.recipe_file import load_recipe
from empg_lite.rescore import score_file
from empg_lite.train import TrainOptions, train


def group(pid: str, step: int, rewards: list[float | str]) -> Group:
    """A group; a text for a reward is a grader failure. Completions differ by (step mod 3, place)."""
    rows = [
        Rationale(
            problem_id=pid,
            question=pid,
            gold="1",
            prompt=pid,
            prompt_ids=(1,),
            completion=f"{step % 3}/{k}",
            completion_ids=(step % 3, k),
            finish_reason="stop",
            step=step,
            policy_step=2 * step,
            sample_index=k,
            reward=r if isinstance(r, float) else 0.0,
            reason=r if isinstance(r, str) else "equal" if r else "different",
        )
        for k, r in enumerate(rewards)
    ]
    return Group(pid, step, tuple(rows))


def places(groups: tuple[Group, ...]) -> list[tuple[str, int, int]]:
    """(problem, step, sample) of what came back."""
    return [(r.problem_id, r.step, r.sample_index) for g in groups for r in g.rationales]


def test_only_what_earned_nothing_is_helped_out() -> None:
    memory = SuccessMemory(1)
    memory.keep([group(pid, 1, [0.0, 1.0]) for pid in "abcde"])
    now = [
        group("a", 2, [0.0, 0.0]),  # unsolved
        group("b", 2, [0.0, 1.0]),  # solved
        group("c", 2, [0.0, 0.3]),  # not right, and not without a signal
        group("d", 2, [0.0, "timeout"]),  # the grader failed: nobody knows
        group("f", 2, [0.0, 0.0]),  # never solved
    ]
    (back,) = memory.recall(now, policy_step=4)
    assert places((back,)) == [("a", 1, 1)]
    assert (back.rationales[0].origin, back.rationales[0].policy_step) == ("memory", 2)
    assert places(memory.recall(now, policy_step=4, max_age=2)) == [("a", 1, 1)]
    assert memory.recall(now, policy_step=5, max_age=2) == ()  # three optimiser steps old


History = list[tuple[str, list[float]]]


@settings(max_examples=100, deadline=None)
@given(
    history=st.lists(
        st.tuples(st.sampled_from("ab"), st.lists(st.sampled_from([0.0, 0.5, 1.0]), min_size=1, max_size=3)),
        max_size=12,
    ),
    size=st.integers(0, 3),
)
def test_it_holds_the_last_right_ones(history: History, size: int) -> None:
    """Against a search through the whole history, backwards."""
    memory, past = SuccessMemory(size), list[Rationale]()
    for step, (pid, rewards) in enumerate(history, 1):
        memory.keep([group(pid, step, list(rewards))])
        past += group(pid, step, list(rewards)).rationales
    memory = SuccessMemory.decode(size, memory.encode())  # and a checkpoint in between changes nothing
    for pid in "ab":
        expected: dict[tuple[int, ...], Rationale] = {}
        for r in reversed(past):
            if r.problem_id == pid and r.reward == 1.0 and len(expected) < size:
                expected.setdefault(r.completion_ids, r)
        found = memory.recall([group(pid, 99, [0.0])], policy_step=0)
        assert sorted(places(found)) == sorted((pid, r.step, r.sample_index) for r in expected.values())
        assert all(len({r.step for r in g.rationales}) == 1 for g in found), "ages never mix in a group"


def test_old_groups_weigh_nothing() -> None:
    old, new = group("a", 1, [1.0, 0.0]), group("a", 3, [1.0, 0.0])
    text = Group(
        "a", 0, tuple(r.__class__(**{**_fields(r), "policy_step": -1, "step": 0}) for r in old.rationales)
    )
    weighed = weigh([old, new, text], weighting="posterior", current_step=8, max_age=5)
    assert [[r.weight for r in g.rationales] for g in weighed] == [[0.0, 0.0], [2.0, 0.0], [2.0, 0.0]]
    assert [r.weight for r in weigh([old], weighting="posterior", current_step=8)[0].rationales] == [2.0, 0.0]


def _fields(r: Rationale) -> dict[str, object]:
    return {name: getattr(r, name) for name in r.__dataclass_fields__}


#: Of the fixture's twenty, two are for validation and two for evaluation.
PROBLEMS = 16


# --- in a run ---------------------------------------------------------------------------------------


def small(recipe_file: Path, *changes: str) -> Recipe:
    """Two samples a problem, few of them right; six problems a step, so that they come back at step 3."""
    common = ["run.eval_every=0", "sampler.samples_per_problem=2"]
    return load_recipe(str(recipe_file), [*common, "sampler.problems_per_step=6", "run.steps=6", *changes])


def last(run: Path) -> dict[str, bytes]:
    """Every file of the newest checkpoint but its clock."""
    names = ("adapter_model.safetensors", "optimizer.safetensors", "memory.jsonl")
    folder = list_checkpoints(run)[-1]
    return {name: (folder / name).read_bytes() for name in names if (folder / name).exists()}


def resumed(recipe: Recipe, run: Path) -> Path:
    """The run, cut off after every step."""
    while train(recipe, run, TrainOptions(resume=True, max_minutes=0.0, force=True))["steps"] < 6:
        pass
    return run


@pytest.fixture
def remembering(recipe_file: Path) -> Recipe:
    return small(recipe_file, "em.memory=1")


def test_a_run_with_memory_resumes_to_the_bit(remembering: Recipe, recipe_file: Path, tmp_path: Path) -> None:
    train(remembering, tmp_path / "straight", TrainOptions(force=True))
    assert last(resumed(remembering, tmp_path / "cut")) == last(tmp_path / "straight")
    train(small(recipe_file), tmp_path / "without", TrainOptions(force=True))
    records = read_metrics(tmp_path / "straight" / "metrics.jsonl")
    assert [r["em/frac_memory"] > 0 for r in records][:2] == [False] * 2, "every problem comes once"
    assert any(r["em/frac_memory"] > 0 and r["em/staleness_max"] >= 3 for r in records[2:])
    assert (
        last(tmp_path / "without")["adapter_model.safetensors"]
        != last(tmp_path / "straight")["adapter_model.safetensors"]
    )
    assert "memory.jsonl" not in last(tmp_path / "without")


def test_rewards_and_lengths_are_those_of_the_step_s_own_samples(remembering: Recipe, tmp_path: Path) -> None:
    train(remembering, tmp_path / "run", TrainOptions(force=True))
    records, tokens = read_metrics(tmp_path / "run" / "metrics.jsonl"), 0
    for record in records:
        (segment,) = read_rollouts(tmp_path / "run" / "rollouts" / f"step-{record['step']:06d}.jsonl")
        own = [r for r in segment.rationales if r.origin == "sampled"]
        assert len(own) == 12
        assert record["reward"] == pytest.approx(sum(r.reward or 0 for r in own) / 12)
        tokens += sum(len(r.completion_ids) for r in own)
        assert record["num_tokens"] == tokens
        others = [r for r in segment.rationales if r.origin == "memory"]
        assert record["em/frac_memory"] == pytest.approx(len(others) / len(segment.rationales))
        assert all(r.reward == 1.0 and r.weight and r.step < record["step"] for r in others)


def test_the_loop_of_three_remembers_too(remembering: Recipe, tmp_path: Path) -> None:
    train(remembering, tmp_path / "train", TrainOptions(force=True))
    run: Path | None = None
    for n in range(1, 7):
        file = tmp_path / f"rollouts-{n}.jsonl"
        sample(remembering, run, file, SampleOptions(problems=6))
        score_file(file, remembering.data.reward)
        fit(remembering, [file], tmp_path / f"fit-{n}", run)
        run = tmp_path / f"fit-{n}"
    assert run is not None and last(run) == last(tmp_path / "train")


def test_a_damaged_memory_is_named(remembering: Recipe, tmp_path: Path) -> None:
    (tmp_path / "memory.jsonl").write_text('{"problem_id": "a"}\n')
    with pytest.raises(CheckpointError, match="success memory.*completion"):
        load_memory(tmp_path, 1)
    assert load_memory(tmp_path / "absent", 1).encode() == b""


def drawn(run: Path) -> Iterator[tuple[dict[str, object], list[list[Rationale]]]]:
    """(record, groups in order) of every step."""
    for record in read_metrics(run / "metrics.jsonl"):
        (segment,) = read_rollouts(run / "rollouts" / f"step-{record['step']:06d}.jsonl")
        rows = segment.rationales
        yield record, [list(rows[i : i + 2]) for i in range(0, len(rows), 2)]


@pytest.mark.parametrize("refill", [0, 4, 100])
def test_refill_draws_until_enough_teach_or_the_cap_is_reached(
    recipe_file: Path, tmp_path: Path, refill: int
) -> None:
    recipe = small(recipe_file, f"sampler.refill={refill}", "sampler.problems_per_step=5")
    train(recipe, tmp_path / "run", TrainOptions(force=True))
    steps = list(drawn(tmp_path / "run"))
    cap = min(refill, PROBLEMS - 5)  # no step holds a problem twice
    for record, groups in steps:
        teach = [any(r.weight for r in rows) for rows in groups]
        assert record["em/refilled"] == len(groups) - 5 <= cap
        assert len({rows[0].problem_id for rows in groups}) == len(groups)
        assert sum(teach) == 5 or len(groups) == 5 + cap
        assert sum(teach[:-1]) < 5 or len(groups) == 5, "no further problem than needed"
    refilled = sum(len(groups) - 5 for _, groups in steps)
    assert (refilled > 0) == (refill > 0)
    # The stream goes on behind what was drawn: the first epoch holds every problem once.
    order = [rows[0].problem_id for _, groups in steps for rows in groups][:PROBLEMS]
    assert len(set(order)) == PROBLEMS
    if refill == 4:
        assert last(resumed(recipe, tmp_path / "cut")) == last(tmp_path / "run")
