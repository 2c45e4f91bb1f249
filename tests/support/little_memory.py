"""Machines that run out of memory at a given number of rows."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from empg_lite.policy.policy import Policy
from empg_lite.sampler.decoder import Decoder


def only(most: int, sizes: list[int], at: int = 0) -> Callable[..., Any]:
    """``completion_loss`` of a machine that has room for so many rows, and once runs out at call ``at``."""
    real = Policy.completion_loss

    def loss(self: Policy, pairs: Any, *rest: Any) -> Any:
        sizes.append(len(pairs))
        if len(pairs) > most or len(sizes) == at:
            sizes[-1] *= -1  # refused
            raise torch.OutOfMemoryError("pretended")
        return real(self, pairs, *rest)

    return loss


def rows_at_once(most: int) -> Callable[..., None]:
    """A decoder's ``__init__`` on a machine with room for so many rows."""
    real = Decoder.__init__

    def init(self: Decoder, *args: Any) -> None:
        if args[4] > most:
            raise torch.OutOfMemoryError("pretended")
        real(self, *args)

    return init
