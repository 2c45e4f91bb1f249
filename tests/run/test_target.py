"""What a model may be called on the command line."""

from __future__ import annotations

from pathlib import Path

import pytest

from empg_lite.core.errors import MissingInput, UsageError
from empg_lite.run.target import resolve_target


@pytest.mark.parametrize("name", ["tiny", "tiny-hard", "smollm2-135m", "Qwen/Qwen2.5-0.5B"])
def test_models_without_a_folder_go_by_name(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In place of the recipe's own model, with its data and prompt."""
    monkeypatch.chdir(tmp_path)
    target = resolve_target(name, "tiny", ["data.reward=exact"], seed=3)
    model, data = target.recipe.model, target.recipe.data
    assert (model.name, model.adapter, target.label, target.run) == (name, None, name, None)
    assert (data.source, data.reward, target.recipe.run.seed) == ("tiny", "exact", 3)


@pytest.mark.parametrize(
    ("name", "todo"),
    [("tiny", "add --recipe tiny"), ("smollm2-135m", "add --recipe smollm2-135m"), ("a/b", "--recipe NAME")],
)
def test_a_model_alone_has_no_prompt_and_no_data(name: str, todo: str) -> None:
    with pytest.raises(UsageError, match=f"a model outside a run needs a recipe · {name} · .*{todo}$"):
        resolve_target(name)


@pytest.mark.parametrize("name", ["tinny", "smollm2", "runs/none", "a/b/c"])
def test_other_names_are_unknown(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs").mkdir()
    with pytest.raises(MissingInput, match="no such run, adapter or model"):
        resolve_target(name, "tiny")
