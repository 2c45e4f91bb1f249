"""Steps that draw further problems where too few teach, and groups that are too old to teach."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from rationales import rationale

from empg_lite.core.rationale import Group, Rationale
from empg_lite.loop.estep import weigh
from empg_lite.loop.train import TrainOptions, train
from empg_lite.recipe.file import load_recipe
from empg_lite.recipe.schema import Recipe
from empg_lite.run.checkpoint import list_checkpoints
from empg_lite.run.journal import read_metrics
from empg_lite.run.rollouts import read_rollouts


def group(policy_step: int) -> Group:
    """One right, one wrong."""
    rows = [
        rationale(problem_id="a", step=1, policy_step=policy_step, sample_index=k, reward=r)
        for k, r in enumerate((1.0, 0.0))
    ]
    return Group("a", 1, tuple(rows))


def test_old_groups_weigh_nothing() -> None:
    def weights(*ages: int, **options: int) -> list[list[float | None]]:
        groups = [group(age) for age in ages]
        weighed = weigh(groups, weighting="posterior", current_step=8, **options)
        return [[r.weight for r in g.rationales] for g in weighed]

    # policy_step 2 is six steps old, 3 five; -1 is text, which has no age
    assert weights(2, 3, 8, -1, max_age=5) == [[0.0, 0.0], [2.0, 0.0], [2.0, 0.0], [2.0, 0.0]]
    assert weights(2, 3) == [[2.0, 0.0]] * 2


#: Of the fixture's twenty, two are for validation and two for evaluation.
PROBLEMS = 16


# --- in a run ---------------------------------------------------------------------------------------


def small(recipe_file: Path, *changes: str) -> Recipe:
    """Two samples a problem, few of them right; six problems a step, so that they come back soon."""
    common = ["run.eval_every=0", "sampler.samples_per_problem=2"]
    return load_recipe(str(recipe_file), [*common, "sampler.problems_per_step=6", "run.steps=6", *changes])


def last(run: Path) -> dict[str, bytes]:
    """What the newest checkpoint has learned."""
    names = ("adapter_model.safetensors", "optimizer.safetensors")
    folder = list_checkpoints(run)[-1]
    return {name: (folder / name).read_bytes() for name in names}


def resumed(recipe: Recipe, run: Path) -> Path:
    """The run, cut off after every step."""
    while train(recipe, run, TrainOptions(resume=True, max_minutes=0.0, force=True))["steps"] < 6:
        pass
    return run


def drawn(run: Path) -> Iterator[tuple[dict[str, object], list[list[Rationale]]]]:
    """(record, groups in order) of every step."""
    for record in read_metrics(run / "metrics.jsonl"):
        (segment,) = read_rollouts(run / "rollouts" / f"step-{record['step']:06d}.jsonl")
        rows = segment.rationales
        yield record, [list(rows[i : i + 2]) for i in range(0, len(rows), 2)]


@pytest.mark.parametrize("refill", [0, pytest.param(4, marks=pytest.mark.slow), 100])
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
