"""The bundled word problems: those of the demo, on which tiny models learn to reason, and easier ones."""

from __future__ import annotations

from empg_lite.data.tiny.problems import EASY, HARD, TINY, Difficulty, tiny_problems

__all__ = ["DIFFICULTY", "EASY", "HARD", "TINY", "Difficulty", "tiny_problems"]

#: Difficulty by bundled source.
DIFFICULTY = {"tiny": TINY, "tiny-hard": HARD, "word-problems": EASY}
