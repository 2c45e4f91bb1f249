"""The bundled demo: word problems on which the bundled 1M-parameter models learn to reason."""

from __future__ import annotations

from empg_lite.data.tiny.problems import HARD, TINY, Difficulty, tiny_problems

__all__ = ["DIFFICULTY", "HARD", "TINY", "Difficulty", "tiny_problems"]

#: Difficulty by bundled source.
DIFFICULTY = {"tiny": TINY, "tiny-hard": HARD}
