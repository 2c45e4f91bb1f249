"""Unsloth and plain transformers, each in its own process: the same numbers from the same weights."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

needs_unsloth = pytest.mark.skipif(
    importlib.util.find_spec("unsloth") is None, reason="Unsloth is not installed (extra `gpu`)"
)


def run_probe(backend: str, model: Path, cwd: Path) -> dict[str, Any]:
    """What ``backend_probe.py`` finds, in full precision and in NF4: one process, which imports once."""
    return run_script("backend_probe.py", backend, str(model), "4", "4", "12", cwd=cwd)


def run_script(name: str, *arguments: str, cwd: Path, env: dict[str, str] | None = None) -> dict:  # type: ignore[type-arg]
    """The JSON object that a script beside the tests prints last, run in a process of its own."""
    tests = Path(__file__).parents[1]
    script = tests / "support" / name
    paths = os.pathsep.join(str(tests / folder) for folder in ("", "sampler", ".."))
    done = subprocess.run(
        [sys.executable, str(script), *arguments],
        capture_output=True,
        text=True,
        cwd=cwd,
        env={**(env or os.environ), "HF_HUB_OFFLINE": "1", "PYTHONPATH": paths},
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


def assert_sound(facts: dict) -> None:  # type: ignore[type-arg]
    """Acceptance c and the mechanics of a step, for one backend."""
    assert facts["native_equals_generate"]
    assert facts["gap_batch"] <= 1e-4 and facts["gap_alone"] <= 1e-4
    assert facts["adapter_effect"] > 1e-3
    assert facts["grad_norm"] > 0 and facts["all_b_changed"] and facts["base_unchanged"]


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
