"""Unsloth against plain transformers for the other families, each in its own process."""

from __future__ import annotations

from pathlib import Path

import pytest
from backends import assert_sound, needs_unsloth, run_probe
from family_model import PUBLISHED, build_family
from processes import run_script

NAMES = [name for name in PUBLISHED if name != "Qwen2.5-0.5B"]


@needs_unsloth
@pytest.mark.unsloth
@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_unsloth_gives_the_same_numbers(name: str, tmp_path: Path) -> None:
    """Loaded, sampled from and fitted, in full precision and in NF4."""
    folder = build_family(tmp_path / "model", name)
    plain, found = (run_probe(backend, folder, tmp_path) for backend in ("transformers", "unsloth"))
    for precision in ("full", "nf4"):
        ours, theirs = plain[precision], found[precision]
        assert theirs["backend"] == "unsloth" and theirs["ids"] == ours["ids"]
        for facts in (ours, theirs):
            assert_sound(facts)
        assert theirs["logprobs"] == pytest.approx(ours["logprobs"], abs=1e-5)
        assert theirs["grad_norm"] == pytest.approx(ours["grad_norm"], rel=1e-4)


@needs_unsloth
@pytest.mark.unsloth
@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_unsloths_shared_prefix_is_used_only_where_it_agrees(name: str, tmp_path: Path) -> None:
    """Its FlexAttention in the layers of each family; without it, or with other positions, it is refused."""
    facts = run_script("unsloth_probe.py", "prefix", str(build_family(tmp_path / "m", name)), cwd=tmp_path)
    assert facts["with it"] is None and facts["apart"] <= 1e-5
    assert "log-probabilities differ" in facts["without its attention"]
    assert "log-probabilities differ" in facts["with positions that are off"]
