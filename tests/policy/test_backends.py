"""Unsloth and plain transformers, each in its own process, give the same numbers from the same weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from backends import assert_sound, needs_unsloth, run_probe


@pytest.fixture(scope="module")
def transformers_found(model_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return run_probe("transformers", model_dir, tmp_path_factory.mktemp("transformers"))


@pytest.fixture(scope="module")
def unsloth_found(model_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("unsloth")
    found = run_probe("unsloth", model_dir, folder)
    assert not list(folder.iterdir()), "nothing is left in the working folder"
    return found


@pytest.mark.parametrize("precision", ["full", "nf4"])
def test_transformers_backend(transformers_found: dict[str, Any], precision: str) -> None:
    facts = transformers_found[precision]
    assert_sound(facts)
    assert facts["nf4"] is (precision == "nf4")


@needs_unsloth
@pytest.mark.unsloth
@pytest.mark.parametrize("precision", ["full", "nf4"])
def test_unsloth_gives_the_same_numbers(
    transformers_found: dict[str, Any], unsloth_found: dict[str, Any], precision: str
) -> None:
    ours, theirs = transformers_found[precision], unsloth_found[precision]
    assert theirs["backend"] == "unsloth"
    assert_sound(theirs)
    assert theirs["nf4"] is (precision == "nf4") and theirs["adapters"] == ours["adapters"]
    assert theirs["ids"] == ours["ids"]
    assert theirs["logprobs"] == pytest.approx(ours["logprobs"], abs=1e-5)
    assert theirs["loss"] == pytest.approx(ours["loss"], rel=1e-5)
    assert theirs["grad_norm"] == pytest.approx(ours["grad_norm"], rel=1e-4)
