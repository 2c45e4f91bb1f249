"""What the oracles of ``empg_lite.em`` share: groups given as lists, and the enumerable policy in torch.

The policy is that of ``reference.py``: seven strings, five parameters, so every expectation is a finite sum.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import numpy as np
import reference as ref
import torch
from torch import Tensor

from empg_lite.em import denominator, em_weights, m_step_loss

THETA = np.array([0.3, -0.4, 0.2, 0.5, -0.8])
BINARY = np.array([1.0, 0.0, 1.0, 0.0, 0.0, 1.0, 0.0])  # J = 0.517
GRADED = np.array([0.9, 0.2, 0.7, 0.0, 0.4, 1.0, 0.1])  # J = 0.506


def weigh(rewards: Sequence[Any], **options: Any) -> Tensor:
    """``em_weights`` of groups given as lists; None is a row left out (and NaN in the tensor)."""
    rows = torch.tensor(
        [[float("nan") if r is None else r for r in group] for group in rewards], dtype=torch.float64
    )
    return em_weights(rows, ~rows.isnan(), **options)


# --- the enumerable policy in torch ------------------------------------------------------------------

PHI = torch.tensor(
    [[[ref.features(s[:t], v) for v in range(3)] for t in range(2)] for s in ref.STRINGS], dtype=torch.float64
)  # (7, 2, 3, 5)
IDS = torch.tensor([[*s, 0][:2] for s in ref.STRINGS])  # (7, 2)
MASK = torch.tensor([[True, len(s) == 2] for s in ref.STRINGS])  # (7, 2)


def table(theta: Tensor) -> Tensor:
    """(7, 2) token log-probabilities of all strings; padding is -inf, so every oracle meets it."""
    logp = (PHI @ theta).log_softmax(-1).gather(-1, IDS[..., None])[..., 0]
    return torch.where(MASK, logp, -torch.inf)


def ascent(
    weights: Any, rows: Any = range(7), z: float = 1.0, theta: np.ndarray = THETA, mask: Tensor = MASK
) -> Any:
    """Minus the gradient (5,) of the package's loss on the strings ``rows``."""
    leaf = torch.tensor(theta, requires_grad=True)
    rows = torch.as_tensor(list(rows))
    m_step_loss(table(leaf)[rows], mask[rows], torch.as_tensor(weights), z).backward()
    assert leaf.grad is not None
    return -leaf.grad.numpy()


def expected(rewards: np.ndarray, k: int, normalization: str | None = None, **options: Any) -> Any:
    """E over all K-tuples of the package's gradient: each tuple a group, its probability in the weights."""
    tuples = list(itertools.product(range(7), repeat=k))
    weights = weigh(rewards[np.array(tuples)].tolist(), **options)  # (7^k, k)
    share = torch.tensor(ref.probabilities(THETA)[np.array(tuples)].prod(1))
    if normalization:
        lengths = [[len(ref.STRINGS[i]) for i in chosen] for chosen in tuples]
        share /= torch.tensor(
            [denominator(n, normalization=normalization, max_new_tokens=2) for n in lengths]
        )
    return ascent((weights * share[:, None]).flatten(), np.array(tuples).flatten())
