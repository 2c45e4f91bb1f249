"""Models bundled with the package, so nothing is downloaded. Built by ``scripts/make_tiny.py``."""

from __future__ import annotations

from importlib.resources import files
from pathlib import Path

#: Recipe name of each bundled model -> its folder.
BUNDLED = {"tiny": "model", "tiny-hard": "model_hard"}


def model_path(name: str = "tiny") -> Path:
    """Folder of a bundled model and tokenizer, for ``from_pretrained``."""
    return Path(str(files("empg_lite").joinpath("data", "tiny", BUNDLED[name])))
