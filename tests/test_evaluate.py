"""The arithmetic of evaluation against brute force and scipy."""

from __future__ import annotations

from itertools import combinations
from pathlib import Path

import pytest
from scipy.stats import binomtest
from test_rationale import rationale

from empg_lite.evaluate import Evaluation, evaluate_target, majority_reward, pass_at_k, wilson
from empg_lite.target import resolve_target


@pytest.mark.parametrize(
    ("right", "n"), [(0, 10), (10, 10), (3, 10), (1, 500), (499, 500), (250, 500), (0, 1)]
)
def test_wilson_is_scipys(right: int, n: int) -> None:
    expected = binomtest(right, n).proportion_ci(0.95, method="wilson")
    assert wilson(right, n) == pytest.approx((expected.low, expected.high), abs=1e-12)


@pytest.mark.parametrize(("n", "right"), [(5, 0), (5, 2), (5, 5), (8, 1)])
def test_pass_at_k_is_the_share_of_subsets(n: int, right: int) -> None:
    samples = [True] * right + [False] * (n - right)
    for k in range(1, n + 1):
        subsets = list(combinations(samples, k))
        assert pass_at_k(n, right, k) == pytest.approx(sum(map(any, subsets)) / len(subsets), abs=1e-12)


def votes(*answers: tuple[str | None, float]):  # type: ignore[no-untyped-def]
    return [rationale(extracted=a, reward=r, sample_index=i) for i, (a, r) in enumerate(answers)]


def test_majority_vote() -> None:
    assert majority_reward(votes(("2", 1.0), ("3", 0.0), ("2", 1.0))) == 1.0
    assert majority_reward(votes(("2", 1.0), ("3", 0.0), ("3", 0.0))) == 0.0
    assert majority_reward(votes(("3", 0.0), ("2", 1.0))) == 0.0  # the first given among equals
    assert majority_reward(votes((None, 0.0), (None, 0.0), ("2", 1.0))) == 1.0  # silence is no vote
    assert majority_reward(votes((None, 0.0))) == 0.0


def test_summary_by_hand() -> None:
    greedy = (rationale(reward=1.0), rationale(reward=0.0, finish_reason="length", completion_ids=(1,) * 9))
    sampled = (
        tuple(votes(("2", 1.0), ("3", 0.0), ("2", 1.0))),
        tuple(votes(("3", 0.0), ("4", 0.0), ("5", 0.0))),
    )
    result = Evaluation(greedy, sampled).summary()
    assert result["n"] == 2 and result["pass@1"] == 0.5 and result["truncated"] == 0.5
    assert result["mean_length"] == 6.0
    assert result["t1_accuracy"] == pytest.approx(2 / 6)
    assert (result["pass@3"], result["maj@3"]) == (0.5, 0.5)
    assert result["pass@1_ci95"] == pytest.approx(list(wilson(1, 2)))


def test_base_and_tuned_answer_the_same_problems(recipe_file: Path, tmp_path: Path) -> None:
    from empg_lite.recipe_file import load_recipe
    from empg_lite.train import train

    run = tmp_path / "run"
    result = train(load_recipe(str(recipe_file), ["run.steps=12"]), run)
    tuned = evaluate_target(resolve_target(str(run)), k=3, base=True)
    assert tuned["pass@1"] == result["accuracy_after"]
    assert tuned["base"]["pass@1"] == result["accuracy_before"]
    assert tuned["n"] == tuned["base"]["n"] == 2 and {"pass@3", "maj@3", "t1_accuracy"} <= tuned.keys()
    by_path = evaluate_target(resolve_target(str(run / "adapter")))
    assert by_path["pass@1"] == tuned["pass@1"]
    limited = evaluate_target(resolve_target(str(run)), split="train", limit=5)
    assert limited["n"] == 5
