"""The models that come with the package: nothing is downloaded. ``scripts/make_tiny.py`` made them."""

from __future__ import annotations

from importlib.resources import files
from pathlib import Path

#: What a recipe calls a bundled model, and its folder.
BUNDLED = {"tiny": "model", "tiny-hard": "model_hard"}


def model_path(name: str = "tiny") -> Path:
    """Folder of a bundled model and its tokenizer, as ``from_pretrained`` takes it."""
    return Path(str(files("empg_lite").joinpath("data", "tiny", BUNDLED[name])))
