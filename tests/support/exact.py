"""Comparison to the last digits, shared by the exact oracles: NumPy and torch in, AssertionError out."""

from __future__ import annotations

from typing import Any

import numpy as np
from torch import Tensor


def agree(actual: Any, expected: Any) -> bool:
    """The one tolerance of the oracles, for float64: relative 1e-12, absolute 1e-12, finite."""
    a, e = (np.asarray(x.detach() if isinstance(x, Tensor) else x) for x in (actual, expected))
    finite = bool(np.isfinite(a).all() and np.isfinite(e).all())
    return finite and a.shape == e.shape and bool(np.allclose(a, e, rtol=1e-12, atol=1e-12))


def close(actual: Any, expected: Any) -> None:
    assert agree(actual, expected), f"\n{actual}\n is not \n{expected}"


def rejects(actual: Any, wrong: Any) -> None:
    """A deliberate error, which the tolerance must see."""
    assert not agree(actual, wrong), f"took\n{actual}\n for \n{wrong}"
