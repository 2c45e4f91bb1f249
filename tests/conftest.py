"""Shared fixtures. Thread count is fixed so that floating-point sums do not depend on the machine's load."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder of real data beside the checkout."""
    root = Path(os.environ.get("EMPG_SHARED", Path(__file__).parents[2] / "shared"))
    if not (root / "data").is_dir():
        pytest.skip(f"real data not found at {root} (set EMPG_SHARED)")
    return root / "data"


@pytest.fixture(scope="session")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The fixture model, built once a session."""
    from fixture_model import build_model

    return build_model(tmp_path_factory.mktemp("model"))
