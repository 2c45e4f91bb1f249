"""The bundled demo: word problems that the bundled ~1M-parameter models can learn to reason on."""

from __future__ import annotations

from empg_lite.data.tiny.problems import HARD, TINY, Difficulty, tiny_problems

__all__ = ["DIFFICULTY", "HARD", "TINY", "Difficulty", "tiny_problems"]

#: How hard the problems of a bundled source are.
DIFFICULTY = {"tiny": TINY, "tiny-hard": HARD}
