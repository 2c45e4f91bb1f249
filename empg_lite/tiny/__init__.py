"""The bundled demo: a ~1M-parameter Qwen2-architecture model and the word problems it can learn to reason on.

Both belong to the project: nothing is downloaded. ``scripts/make_tiny.py`` made the model.
"""

from __future__ import annotations

from importlib.resources import files
from pathlib import Path

from empg_lite.tiny.problems import HARD, TINY, Difficulty, tiny_problems

__all__ = ["HARD", "TINY", "Difficulty", "model_path", "tiny_problems"]


def model_path() -> Path:
    """Folder of the bundled model and its tokenizer, as ``from_pretrained`` takes it."""
    return Path(str(files(__name__).joinpath("model")))
