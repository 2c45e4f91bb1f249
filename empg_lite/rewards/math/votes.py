"""Which answers count as the same in a majority vote."""

from __future__ import annotations

import re

from empg_lite.rewards.math.exact import read_exact
from empg_lite.rewards.math.normalize import normalize
from empg_lite.rewards.math.units import strip_units


def ballot(extracted: str | None) -> str | None:
    """An extracted answer in the spelling that equal answers share; None where none was extracted.

    Numbers count by value (``1/2``, ``0.5`` and ``50%`` are the same), other answers by normalized text.
    Without algebra, two spellings of a formula split their votes, as they do in published majority figures.
    """
    if extracted is None:
        return None
    text = strip_units(normalize(extracted))
    exact = read_exact(text)
    return str(exact.value) if exact is not None else re.sub(r"\s+", "", text).casefold()
