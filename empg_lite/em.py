"""The EM policy gradient: the weights of the E-step and the loss of the M-step. Tensors in, tensors out.

For a problem x the policy draws K rationales z_k ~ pi_old(z|x) and a verifier gives R_k in [0, 1].
Maximize log J(x) = log E_{z~pi}[R], with z latent:

    E-step   q(z|x) ∝ pi_old(z|x) R(z)        on K samples:  w_k = R_k / mean_j R_j   (K times the posterior)
    M-step   maximize  (1/Z) sum_k w_k sum_t log pi_theta(z_kt | x, z_k,<t)

The gradient of the M-step, E_{pi_old}[w grad log pi_theta], is the EM policy gradient. At theta = old it
is the gradient of log J (Fisher's identity); elsewhere it is the gradient of a lower bound of log J.
This is *our reading of the abstract* of arXiv 2504.18587 (T. Xu, 2025); ``WEIGHTINGS`` holds the other
plausible readings, for comparison.

Absent on purpose: importance ratio, clipping, critic, reference model, stored log-probabilities. For
w >= 0 the bound needs none of them. ``logprobs_old`` appears below in diagnostics only.

Shapes: P problems, K rationales of each, B rows (sequences), T padded tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

WEIGHTINGS = ("posterior", "centered", "loo", "standardized", "raw")
NORMALIZATIONS = ("tokens", "max_length")


def em_weights(
    rewards: Tensor,
    valid: Tensor,
    *,
    weighting: str = "posterior",
    baseline: float = 0.0,
    drop_negative: bool = False,
) -> Tensor:
    """E-step: what each rationale counts in the M-step. Statistics never cross problems.

    With R the rewards of one problem, n its valid rows and Rbar their mean:

    ================  =============================  ====================================================
    ``posterior``     R / Rbar - baseline            0 where no R > 0; ascends log J as a mixture of pass@k
    ``centered``      R - Rbar                       ascends J
    ``loo``           R - mean of the others         ``centered`` times n / (n - 1); 0 where n = 1
    ``standardized``  (R - Rbar) / population std    0 where the std is 0
    ``raw``           R                              ascends J
    ================  =============================  ====================================================

    Equal rewards give exactly 0 (``posterior``: exactly 1 - baseline), whatever the rounding of their mean,
    because the caller skips a row exactly when its weight is 0.

    Args:
        rewards: ``(P, K)`` float32 or float64; anything, NaN included, where ``valid`` is False.
        valid: ``(P, K)`` bool. False (grader failure, padding of ragged groups) leaves the row out of its
            problem's mean and n, with weight 0.
        weighting: one of ``WEIGHTINGS``.
        baseline: share of the prior to subtract, in [0, 1]; ``posterior`` only.
        drop_negative: clamp at 0, for samples that are reused or stale: there the bound fails for w < 0.

    Returns:
        ``(P, K)`` weights of the dtype of ``rewards``, detached.

    Raises:
        ValueError: unknown ``weighting``, unusable ``baseline``, or a negative reward under ``posterior``.

    >>> R = torch.tensor([[1.0, 0.0, 0.0, 1.0], [0.0, 0.0, 0.0, 0.0]])
    >>> em_weights(R, torch.ones_like(R, dtype=torch.bool)).tolist()
    [[2.0, 0.0, 0.0, 2.0], [0.0, 0.0, 0.0, 0.0]]
    """
    _check_options(weighting, baseline)
    rewards = _known(rewards, valid)  # (P, K)
    if weighting == "posterior":
        weights = _posterior(rewards, valid, baseline)
    elif weighting == "raw":
        weights = rewards
    else:
        weights = _centered(rewards, valid)
        if weighting == "loo":
            n = valid.sum(1, keepdim=True)  # (P, 1)
            weights = weights * n / (n - 1).clamp(min=1)
        elif weighting == "standardized":
            std = _mean(weights.square(), valid).sqrt()  # (P, 1)
            weights = torch.where(std > 0, weights / std, 0.0)
    weights = torch.where(valid, weights, 0.0)
    return weights.clamp(min=0.0) if drop_negative else weights


def denominator(lengths: Sequence[int], *, normalization: str = "tokens", max_new_tokens: int) -> float:
    """The one Z of an optimizer step, counted before its first micro-batch.

    Args:
        lengths: trained tokens of every row sampled for the step; rows of weight 0 count too.
        normalization: ``tokens``: all of them together; ``max_length``: rows times ``max_new_tokens``, a
            constant. A mean per sequence is not offered: with w >= 0 it collapses to short guesses.
        max_new_tokens: limit of one completion; used by ``max_length`` only.

    Returns:
        Z >= 1, so a step of empty completions stays finite.

    Raises:
        ValueError: unknown ``normalization``.
    """
    if normalization not in NORMALIZATIONS:
        raise ValueError(f"normalization {normalization!r} is not one of {', '.join(NORMALIZATIONS)}")
    total = sum(lengths) if normalization == "tokens" else len(lengths) * max_new_tokens
    return float(max(total, 1))


def m_step_loss(logprobs: Tensor, mask: Tensor, weights: Tensor, denominator: float) -> Tensor:
    """M-step: the weighted negative log-likelihood of one micro-batch.

    Losses of micro-batches add up to the loss of the step, as every one is divided by the same Z.
    Entries outside ``mask`` or in rows of weight 0 affect neither value nor gradient, even if they are
    infinite or NaN. A trained token with a non-finite log-probability makes the loss non-finite: the caller
    checks.

    Args:
        logprobs: ``(B, T)`` log pi_theta of the tokens, nats, float32 or float64.
        mask: ``(B, T)`` bool, True on sampled tokens, those that completed the stop included.
        weights: ``(B,)`` from ``em_weights``.
        denominator: Z of the whole step, from ``denominator``.

    Returns:
        Scalar ``-(1/Z) sum_b w_b sum_t mask logprobs``.
    """
    _check_rows(logprobs, mask)
    assert weights.shape == logprobs.shape[:1], f"weights {tuple(weights.shape)}, rows {len(logprobs)}"
    assert not weights.requires_grad, "weights carry no gradient"
    assert denominator > 0, f"denominator {denominator}"
    trained = mask & (weights != 0)[:, None]  # (B, T)
    # where, not multiply: 0 * -inf is NaN, in the value and in the gradient
    row_logprobs = torch.where(trained, logprobs, 0.0).sum(1)  # (B,)
    return -(weights.to(logprobs.dtype) * row_logprobs).sum() / denominator


@torch.no_grad()
def log_ratios(logprobs: Tensor, logprobs_old: Tensor, mask: Tensor) -> Tensor:
    """Token-wise log pi_theta - log pi_old, ``(B, T)`` in nats, 0 outside ``mask``. A diagnostic."""
    _check_rows(logprobs, mask)
    assert logprobs_old.shape == logprobs.shape, f"{tuple(logprobs_old.shape)}, {tuple(logprobs.shape)}"
    return torch.where(mask, logprobs - logprobs_old, 0.0)


def k3_sum(logprobs: Tensor, logprobs_old: Tensor, mask: Tensor) -> float:
    """Sum of ``k3`` over the masked tokens of one micro-batch, for accumulation over several."""
    d = log_ratios(logprobs, logprobs_old, mask)  # (B, T)
    return float((torch.expm1(d) - d).sum(dtype=torch.float64))


def k3(logprobs: Tensor, logprobs_old: Tensor, mask: Tensor) -> float:
    """KL(pi_old || pi_theta) in nats per token, estimated on samples of pi_old; its sum is unbiased.

    Mean over ``mask`` of exp(d) - 1 - d >= 0 with d = log pi_theta - log pi_old (J. Schulman,
    "Approximating KL Divergence", 2020). It is a KL only over all rows, right and wrong; 0 for an empty mask.

    Args:
        logprobs, logprobs_old: ``(B, T)`` nats, of the trainer, never of the sampler.
        mask: ``(B, T)`` bool.
    """
    return k3_sum(logprobs, logprobs_old, mask) / max(int(mask.sum()), 1)


@dataclass(frozen=True, slots=True)
class Drift:
    """How far a fit has moved the policy, measured on the step's own samples.

    Attributes:
        k3, k1: two estimates of KL(pi_old || pi_theta), nats a token, over all rows, right and wrong.
        right, wrong: mean of log pi_theta - log pi_old of a whole rationale, nats; 0 where there is none.
            Wrong ones diving while right ones hardly rise is how weights below 0 end a run.
        largest: largest absolute log-ratio of a token, nats.
    """

    k3: float = 0.0
    k1: float = 0.0
    right: float = 0.0
    wrong: float = 0.0
    largest: float = 0.0


def drift(logprobs: Tensor, logprobs_old: Tensor, mask: Tensor, right: Tensor) -> Drift:
    """See ``Drift``.

    Args:
        logprobs, logprobs_old: ``(B, T)`` nats, of the trainer, all rows of the step.
        mask: ``(B, T)`` bool.
        right: ``(B,)`` bool.
    """
    assert right.shape == mask.shape[:1] and right.dtype == torch.bool
    d = log_ratios(logprobs, logprobs_old, mask).double()  # (B, T)
    rows, tokens = d.sum(1), int(mask.sum())  # (B,)
    return Drift(
        k3=k3(logprobs, logprobs_old, mask),
        k1=-float(d.sum()) / max(tokens, 1),
        right=float(rows[right].mean()) if right.any() else 0.0,
        wrong=float(rows[~right].mean()) if not right.all() else 0.0,
        largest=float(d.abs().max()) if d.numel() else 0.0,
    )


def effective_sample_size(weights: Tensor) -> float:
    """(sum |w|)^2 / (N sum w^2): the share of N rows that carries the step; 0 where all weights are 0.

    Args:
        weights: any shape, N elements. Leave the padding of ragged groups out: ``weights[valid]``.
    """
    w = weights.detach().double().abs()
    total = float(w.square().sum()) * w.numel()
    return float(w.sum()) ** 2 / total if total > 0 else 0.0


def group_signal(rewards: Tensor, valid: Tensor) -> dict[str, float]:
    """Which problems can teach, as shares of the problems with a valid row (all 0 where there is none).

    ``frac_all_right``: every reward is 1. ``frac_all_wrong``: every reward is 0. ``frac_mixed``: rewards
    differ. ``frac_reward_zero_std``: they do not. Graded rewards may be equal and neither 0 nor 1.

    Args:
        rewards, valid: ``(P, K)`` as in ``em_weights``.
    """
    rewards = _known(rewards, valid)
    group = valid.any(1)  # (P,)
    low = rewards.masked_fill(~valid, torch.inf).amin(1)[group]
    high = rewards.masked_fill(~valid, -torch.inf).amax(1)[group]
    kinds = {
        "frac_all_right": (low == 1) & (high == 1),
        "frac_all_wrong": (low == 0) & (high == 0),
        "frac_mixed": low < high,
        "frac_reward_zero_std": low == high,
    }
    return {name: float(kind.sum()) / max(len(kind), 1) for name, kind in kinds.items()}


def _check_options(weighting: str, baseline: float) -> None:
    if weighting not in WEIGHTINGS:
        raise ValueError(f"weighting {weighting!r} is not one of {', '.join(WEIGHTINGS)}")
    if not 0.0 <= baseline <= 1.0:
        raise ValueError(f"baseline {baseline} is outside [0, 1]")
    if baseline and weighting != "posterior":
        raise ValueError(f"baseline {baseline} has no meaning under weighting {weighting!r}")


def _check_rows(logprobs: Tensor, mask: Tensor) -> None:
    assert logprobs.ndim == 2 and mask.shape == logprobs.shape, (
        f"logprobs {tuple(logprobs.shape)}, mask {tuple(mask.shape)}"
    )
    assert logprobs.dtype in (torch.float32, torch.float64), f"log-softmax in fp32, not {logprobs.dtype}"
    assert mask.dtype == torch.bool, f"mask is {mask.dtype}"


def _known(rewards: Tensor, valid: Tensor) -> Tensor:
    """Checked rewards ``(P, K)`` with 0 in the rows left out."""
    assert rewards.ndim == 2 and rewards.shape[1] > 0, f"rewards {tuple(rewards.shape)}"
    assert valid.shape == rewards.shape, f"rewards {tuple(rewards.shape)}, valid {tuple(valid.shape)}"
    assert rewards.dtype in (torch.float32, torch.float64) and valid.dtype == torch.bool
    known = torch.where(valid, rewards.detach(), 0.0)
    assert bool(known.isfinite().all()), "a valid reward is not finite"
    return known


def _mean(values: Tensor, valid: Tensor) -> Tensor:
    """Mean of each problem's valid values, ``(P, 1)``; 0 where there is none."""
    return torch.where(valid, values, 0.0).sum(1, keepdim=True) / valid.sum(1, keepdim=True).clamp(min=1)


def _posterior(rewards: Tensor, valid: Tensor, baseline: float) -> Tensor:
    if (rewards < 0).any():
        raise ValueError("weighting 'posterior' needs rewards >= 0: shift or clip them")
    # In units of the largest reward: equal ones become exactly 1, and the mean of tiny ones is not 0.
    top = rewards.amax(1, keepdim=True)  # (P, 1)
    share = rewards / top  # (P, K)
    return torch.where(top > 0, share / _mean(share, valid) - baseline, 0.0)  # top 0: no posterior


def _centered(rewards: Tensor, valid: Tensor) -> Tensor:
    # From the largest reward down: equal ones become exactly 0, which R - Rbar misses by rounding
    # (three rewards of 0.1 have a mean of 0.10000000000000002, and a standardized weight of -1).
    gap = rewards - rewards.masked_fill(~valid, -torch.inf).amax(1, keepdim=True)  # (P, K)
    return gap - _mean(gap, valid)
