"""Settings and optimizer for M-steps whose gradient is read from the movement of the parameters."""

from __future__ import annotations

import torch

from empg_lite.loop.mstep import FitSettings

SETTINGS = FitSettings(
    learning_rate=1e-2,
    max_grad_norm=1e9,
    passes=1,
    kl_stop=1e9,
    normalization="tokens",
    max_new_tokens=9,
    micro_batch_tokens=10_000,
)


def sgd(policy, rate: float = 1.0) -> torch.optim.Optimizer:  # type: ignore[no-untyped-def]
    return torch.optim.SGD(list(policy.trainable().values()), lr=rate)
