"""The model card says what the model was trained on, and how."""

from __future__ import annotations

import pytest

from empg_lite.policy.card import Provenance, adapter_card
from empg_lite.recipe.file import load_recipe


@pytest.mark.parametrize(
    ("overrides", "sampled"),
    [
        ([], "posterior weights, 16 problems x 8 rationales per step, 25 steps"),
        (
            ["sampler.tries=6", "sampler.samples_per_problem=2"],
            "posterior weights, 16 x 2 rationales per step, each problem asked until right, at most 6 times",
        ),
    ],
)
def test_the_card_says_how_problems_were_sampled(overrides: list[str], sampled: str) -> None:
    recipe = load_recipe("tiny", overrides).resolved()
    assert f"* Method: {sampled}" in adapter_card(Provenance(recipe, None, None))
