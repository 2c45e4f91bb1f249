"""Unsloth, in a process of its own, and plain transformers give the same numbers from the same weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from backend_probe import both_precisions
from backends import SIZES, assert_sound, needs_unsloth
from processes import run_script


@pytest.fixture(scope="module")
def transformers_found(model_dir: Path) -> dict[str, Any]:
    return both_precisions("transformers", str(model_dir), *SIZES)


@pytest.fixture(scope="module")
def unsloth_found(model_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """One process for all, as importing Unsloth takes most of its time."""
    folder = tmp_path_factory.mktemp("unsloth")
    found = run_script("unsloth_probe.py", "numbers", str(model_dir), *map(str, SIZES), cwd=folder)
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


@needs_unsloth
@pytest.mark.unsloth
def test_unsloths_shared_prefix_equals_the_packed_pass(unsloth_found: dict[str, Any]) -> None:
    """Its table of segments and its FlexAttention, forward; its mask, backward. And its buffers are freed.

    On a CPU Unsloth has no layers of its own, and layers that ignore the table are detected.
    """
    facts = unsloth_found["prefix"]
    assert facts["facts"]["backend"] == "unsloth" and facts["facts"]["fit"] == "packed"
    assert facts["leak"] <= 1e-6
    assert "log-probabilities differ" in facts["without its attention"]
    assert facts["with it"] is None and facts["apart"] <= 1e-5
    assert "log-probabilities differ" in facts["with positions that are off"]
    assert facts["adapter as before"] and facts["no gradient left"]
    assert facts["buffers while sampling"] and not facts["buffers afterwards"]
