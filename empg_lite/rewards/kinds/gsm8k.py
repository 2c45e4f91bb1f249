"""``gsm8k``: a number equal to the gold one."""

from __future__ import annotations

from empg_lite.rewards.kinds.math import Math


class Gsm8k(Math):
    """``math`` where every answer is a number, written behind ``####``."""

    name = "gsm8k"
    written = "#### {}"
    numeric = True


KIND = Gsm8k()
