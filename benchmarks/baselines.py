"""The methods EMPG is compared with, as pure functions: GRPO, Dr.GRPO, RLOO, RAFT, REINFORCE. No state.

The package offers none of them. ``tests/benchmarks/test_baselines.py`` compares advantages, losses and
gradients with TRL's. Every loss is a sum over rows divided by constants of the whole step, so micro-batches
add up.

Shapes: P problems, K rationales of each, B rows, T padded tokens.
"""

from __future__ import annotations

import torch
from torch import Tensor

#: Half-width of the trust region of the ratio, as in TRL.
CLIP = 0.2
#: Added to a standard deviation, as in TRL.
STD_FLOOR = 1e-4

METHODS = ("grpo", "dr_grpo", "rloo", "raft", "reinforce")


def advantages(method: str, rewards: Tensor) -> Tensor:
    """What each rationale counts.

    =============  ===============================  =======================================================
    ``grpo``       (R - mean) / (std + 1e-4)        std with n - 1 (arXiv 2402.03300, as TRL has it)
    ``dr_grpo``    R - mean                         arXiv 2503.20783
    ``rloo``       R - mean of the others           arXiv 2402.14740
    ``raft``       1 for the best of a problem      if it earned anything; ties all count (arXiv 2304.06767)
    ``reinforce``  R - mean of the whole step       the one whose statistics cross problems; any K
    =============  ===============================  =======================================================

    Args:
        rewards: ``(P, K)`` in [0, 1], K > 1 but for ``reinforce``.

    Returns:
        ``(P, K)``, detached.
    """
    rewards = rewards.detach()
    if method == "reinforce":
        return rewards - rewards.mean()
    k = rewards.shape[1]
    centered = rewards - rewards.mean(1, keepdim=True)  # (P, K)
    if method == "grpo":
        return centered / (rewards.std(1, keepdim=True) + STD_FLOOR)
    if method == "dr_grpo":
        return centered
    if method == "rloo":
        return centered * k / (k - 1)
    if method == "raft":
        best = rewards.amax(1, keepdim=True)
        return ((rewards == best) & (best > 0)).to(rewards.dtype)
    raise ValueError(f"method {method!r} is not one of {', '.join(METHODS)}")


def policy_loss(
    method: str,
    logprobs: Tensor,
    logprobs_old: Tensor,
    mask: Tensor,
    advantages: Tensor,
    *,
    rows: int,
    max_new_tokens: int,
) -> Tensor:
    """One micro-batch's share of the step's loss.

    Args:
        logprobs, logprobs_old: ``(B, T)`` nats under the policy now, and under the one that sampled the rows.
        mask: ``(B, T)`` bool.
        advantages: ``(B,)``.
        rows: rows of the whole step, those of advantage 0 too.
        max_new_tokens: the constant of ``dr_grpo`` and ``reinforce``.

    Returns:
        Scalar; over all micro-batches the mean over rows of the token mean (``grpo``), of the token sum over
        ``max_new_tokens`` (``dr_grpo``, ``reinforce``, ``raft``), or of the whole sequence's clipped ratio
        (``rloo``).
    """
    if method not in METHODS:
        raise ValueError(f"method {method!r} is not one of {', '.join(METHODS)}")
    logprobs = torch.where(mask, logprobs, 0.0)
    if method == "raft":
        return -(advantages * logprobs.sum(1)).sum() / (rows * max_new_tokens)
    log_ratio = logprobs - torch.where(mask, logprobs_old, 0.0)  # (B, T)
    if method == "rloo":
        return _clipped(log_ratio.sum(1).exp(), advantages).sum() / rows
    per_token = torch.where(mask, _clipped(log_ratio.exp(), advantages[:, None]), 0.0)  # (B, T)
    lengths = mask.sum(1).clamp(min=1) if method == "grpo" else max_new_tokens
    return (per_token.sum(1) / lengths).sum() / rows


def _clipped(ratio: Tensor, advantages: Tensor) -> Tensor:
    """The pessimistic of the plain and the clipped surrogate, negated."""
    return -torch.minimum(ratio * advantages, ratio.clamp(1 - CLIP, 1 + CLIP) * advantages)
