"""The M-step's optimiser: AdamW without decay, its moments in float32 or in 8 bits."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

BETAS = (0.9, 0.999)


def make_adamw(
    parameters: Sequence[nn.Parameter], learning_rate: float, *, eight_bit: bool
) -> torch.optim.Optimizer:
    """AdamW over the adapter.

    Args:
        eight_bit: hold both moments in 8 bits with a scale for every 256 of them (T. Dettmers et al., "8-bit
            Optimizers via Block-wise Quantization", 2022); matrices below 4,096 elements stay in float32.
    """
    if not eight_bit:
        return torch.optim.AdamW(list(parameters), lr=learning_rate, betas=BETAS, weight_decay=0.0)
    from bitsandbytes.optim import AdamW8bit

    adam: torch.optim.Optimizer = AdamW8bit(list(parameters), lr=learning_rate, betas=BETAS, weight_decay=0.0)
    return adam
