"""The bundled demo: ~1M-parameter Qwen2-architecture models, and word problems they can learn to reason on.

All belong to the project: nothing is downloaded. ``scripts/make_tiny.py`` made the models.
"""

from __future__ import annotations

from importlib.resources import files
from pathlib import Path

from empg_lite.tiny.problems import HARD, TINY, Difficulty, tiny_problems

__all__ = ["BUNDLED", "HARD", "TINY", "Difficulty", "model_path", "tiny_problems"]


#: What a recipe calls the bundled models and their problems.
BUNDLED = {"tiny": TINY, "tiny-hard": HARD}


def model_path(name: str = "tiny") -> Path:
    """Folder of a bundled model and its tokenizer, as ``from_pretrained`` takes it."""
    return Path(str(files(__name__).joinpath({"tiny": "model", "tiny-hard": "model_hard"}[name])))
