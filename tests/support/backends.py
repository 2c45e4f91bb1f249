"""Loading backends in processes of their own, and what must hold for each."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import pytest
from processes import run_script

needs_unsloth = pytest.mark.skipif(
    importlib.util.find_spec("unsloth") is None, reason="Unsloth is not installed (extra `gpu`)"
)

#: Problems, samples of each, new tokens.
SIZES = (4, 4, 12)


def run_probe(backend: str, model: Path, cwd: Path) -> dict[str, Any]:
    """What ``backend_probe.py`` finds, in full precision and in NF4: one process, which imports once."""
    return run_script("backend_probe.py", backend, str(model), *map(str, SIZES), cwd=cwd)


def assert_sound(facts: dict) -> None:  # type: ignore[type-arg]
    """Acceptance c and the mechanics of a step, for one backend."""
    assert facts["native_equals_generate"]
    assert facts["gap_batch"] <= 1e-4 and facts["gap_alone"] <= 1e-4
    assert facts["adapter_effect"] > 1e-3
    assert facts["grad_norm"] > 0 and facts["all_b_changed"] and facts["base_unchanged"]
