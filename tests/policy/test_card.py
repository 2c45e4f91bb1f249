"""The model card says what the model was trained on, and how."""

from __future__ import annotations

from pathlib import Path

import pytest

from empg_lite.policy.card import NAME_IT, Provenance, adapter_card
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
    groups = ["sampler.tries=null", "sampler.problems_per_step=16", "sampler.samples_per_problem=8"]
    recipe = load_recipe("tiny", [*groups, "run.steps=25", *overrides]).resolved()
    assert f"* Method: {sampled}" in adapter_card(Provenance(recipe, None, None))


def test_a_folder_is_no_base_model_to_the_hub(tmp_path: Path) -> None:
    """The hub refuses front matter with a path, which would tell everybody this machine's folders, too."""
    (tmp_path / "my qwen").mkdir()
    for name in (str(tmp_path / "my qwen"), "/gone/my qwen"):
        card = adapter_card(Provenance(load_recipe("tiny", [f"model.name={name}"]).resolved(), None, None))
        assert "base_model:" not in card.split("---")[1] and NAME_IT in card
        assert str(Path(name).parent) not in card and "LoRA adapter of my qwen" in card
    named = adapter_card(Provenance(load_recipe("tiny", ["model.name=owner/m"]).resolved(), None, None))
    assert "base_model: owner/m\n" in named and NAME_IT not in named
