"""Slow, independent references for ``empg_lite.em``: plain Python and NumPy in float64, no torch, no project.

Three parts: (1) weights, loss and diagnostics written as loops over their definitions; (2) an enumerable
policy, where every expectation is a finite sum; (3) tabular flows and neighbouring estimators (GRPO, CISPO,
TOPR, Kimi), which the package does not offer and is compared with.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from fractions import Fraction

import numpy as np

# --- 1. definitions, as loops ------------------------------------------------------------------------


def group_weights(
    rewards: Sequence[float | None], weighting: str = "posterior", baseline: float = 0.0, eta: float = 0.0
) -> list[float]:
    """Weights of one group in exact rational arithmetic; None is a row left out.

    Beyond the package: ``mixed_only`` (posterior, 0 where all are right) and ``neg_scale`` (centered,
    negatives times ``eta``; ``eta`` 0 is ``positive``).
    """
    known = [Fraction(r) for r in rewards if r is not None]
    mean = sum(known, Fraction(0)) / max(len(known), 1)
    variance = sum(((r - mean) ** 2 for r in known), Fraction(0)) / max(len(known), 1)
    weights = []
    for index, reward in enumerate(rewards):
        if reward is None:
            weights.append(0.0)
            continue
        r = Fraction(reward)
        others = [Fraction(s) for j, s in enumerate(rewards) if j != index and s is not None]
        w: Fraction | float
        if weighting == "posterior":
            w = r / mean - Fraction(baseline) if mean > 0 else Fraction(0)
        elif weighting == "mixed_only":
            w = r / mean if mean > 0 and variance > 0 else Fraction(0)
        elif weighting == "centered":
            w = r - mean
        elif weighting == "loo":
            w = r - sum(others) / len(others) if others else Fraction(0)
        elif weighting == "standardized":
            w = float(r - mean) / math.sqrt(variance) if variance > 0 else 0.0
        elif weighting == "raw":
            w = r
        elif weighting == "neg_scale":
            w = r - mean if r > mean else Fraction(eta) * (r - mean)
        else:
            raise ValueError(weighting)
        weights.append(float(w))
    return weights


def m_step_loss(
    logprobs: Sequence[Sequence[float]],
    mask: Sequence[Sequence[bool]],
    weights: Sequence[float],
    denominator: float,
) -> tuple[float, list[list[float]]]:
    """Loss of the M-step and its gradient by each log-probability; reads nothing outside the mask."""
    loss = 0.0
    gradient = [[0.0] * len(row) for row in logprobs]
    for b, weight in enumerate(weights):
        for t, trained in enumerate(mask[b]):
            if trained and weight != 0.0:
                loss -= weight * logprobs[b][t] / denominator
                gradient[b][t] = -weight / denominator
    return loss, gradient


def k3(
    new: Sequence[Sequence[float]], old: Sequence[Sequence[float]], mask: Sequence[Sequence[bool]]
) -> float:
    """Mean over the mask of exp(d) - 1 - d."""
    terms = [
        math.exp(new[b][t] - old[b][t]) - 1.0 - (new[b][t] - old[b][t])
        for b, row in enumerate(mask)
        for t, trained in enumerate(row)
        if trained
    ]
    return sum(terms) / max(len(terms), 1)


# --- 2. the enumerable policy ------------------------------------------------------------------------

A, B, EOS = 0, 1, 2
#: All strings of at most two tokens over {a, b, EOS}: EOS ends one, and so does its second token.
STRINGS = ((EOS,), (A, EOS), (B, EOS), (A, A), (A, B), (B, A), (B, B))


def features(prefix: tuple[int, ...], token: int) -> list[float]:
    """The five features of ``token`` after ``prefix``; the policy is softmax(theta . features)."""
    return [
        float(token == A),
        float(token == B),
        float(token == EOS and not prefix),
        float(bool(prefix) and token == prefix[-1]),
        float(prefix == (A,) and token == B),
    ]


def _token(theta: np.ndarray, prefix: tuple[int, ...], token: int) -> tuple[float, np.ndarray]:
    """log pi(token | prefix) and its gradient (5,)."""
    phi = [np.array(features(prefix, v)) for v in (A, B, EOS)]
    scores = [math.exp(float(theta @ f)) for f in phi]
    mean_phi = sum(s * f for s, f in zip(scores, phi, strict=True)) / sum(scores)
    return math.log(scores[token] / sum(scores)), phi[token] - mean_phi


def token_logprobs(theta: np.ndarray, string: tuple[int, ...]) -> list[float]:
    """log pi of each token of one string."""
    return [_token(theta, string[:t], string[t])[0] for t in range(len(string))]


def token_scores(theta: np.ndarray, string: tuple[int, ...]) -> list[np.ndarray]:
    """grad log pi of each token of one string, each (5,)."""
    return [_token(theta, string[:t], string[t])[1] for t in range(len(string))]


def probabilities(theta: np.ndarray) -> np.ndarray:
    """(7,) probability of every string."""
    return np.array([math.exp(sum(token_logprobs(theta, s))) for s in STRINGS])


def scores(theta: np.ndarray) -> np.ndarray:
    """(7, 5) gradient of every string's log-probability."""
    return np.array([sum(token_scores(theta, s)) for s in STRINGS])


def success(theta: np.ndarray, rewards: np.ndarray) -> tuple[float, np.ndarray]:
    """J = E[R] and its gradient (5,), by summation over all strings."""
    weighted = probabilities(theta) * rewards
    return float(weighted.sum()), weighted @ scores(theta)


def expected_gradient(
    theta: np.ndarray,
    rewards: np.ndarray,
    samples: int,
    weigh: Callable[[list[float]], list[float]],
    *,
    sequence_mean: bool = False,
) -> np.ndarray:
    """E over all tuples of ``samples`` strings of sum_i w_i grad log pi(o_i), optionally each over |o_i|."""
    p, s = probabilities(theta), scores(theta)
    total = np.zeros(5)
    for chosen in itertools.product(range(len(STRINGS)), repeat=samples):
        weights = weigh([float(rewards[i]) for i in chosen])
        for i, w in zip(chosen, weights, strict=True):
            total += math.prod(p[j] for j in chosen) * w * s[i] / (len(STRINGS[i]) if sequence_mean else 1)
    return total


def standardized_scale(j: float, k: int) -> float:
    """c_K(J): E[gradient of ``standardized``] = c_K(J) grad J, for binary rewards."""
    return sum(
        math.comb(k, s) * j**s * (1 - j) ** (k - s) * k * math.sqrt(s / k * (1 - s / k)) / (j * (1 - j))
        for s in range(k + 1)
    )


# --- 3. tabular flows, neighbouring estimators -------------------------------------------------------


def log_softmax(logits: np.ndarray) -> np.ndarray:
    """Over the last axis."""
    shifted = logits - logits.max(-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))


def flow_direction(logits: np.ndarray, mu: np.ndarray, weights: np.ndarray, tau: float = 0.0) -> np.ndarray:
    """Gradient by the logits of E_mu[w log pi] (tau > 0: minus Kimi's tau/2 E_mu[(log pi/mu)^2])."""
    logp = log_softmax(logits)
    pull = mu * (weights - tau * (logp - np.log(mu)))
    return pull - np.exp(logp) * pull.sum(-1, keepdims=True)


def flow(mu: np.ndarray, weights: np.ndarray, steps: int, rate: float, tau: float = 0.0) -> np.ndarray:
    """log pi after gradient ascent on fixed data from pi = mu; ``weights`` (..., 5), one flow a row."""
    logits = np.broadcast_to(np.log(mu), weights.shape).copy()
    for _ in range(steps):
        logits += rate * flow_direction(logits, mu, weights, tau)
    return log_softmax(logits)


def water_filling(mu: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Limit of the flow for W = E_mu[w] > 0: (mu w - c)^+ / W, with the c >= 0 that makes it sum to 1."""
    pull, total = mu * weights, float((mu * weights).sum())
    low, high = 0.0, float(pull.max())
    for _ in range(200):
        c = (low + high) / 2
        low, high = (c, high) if np.maximum(pull - c, 0).sum() > total else (low, c)
    return np.maximum(pull - low, 0) / total


def ratio_gradient(
    method: str,
    theta: np.ndarray,
    theta_old: np.ndarray,
    rows: Sequence[int],
    weights: Sequence[float],
    denominator: float,
) -> np.ndarray:
    """Ascent direction (5,) of an estimator with ratios on the strings ``rows``, tokens summed over Z.

    ``dr_grpo`` (clip 0.2), ``cispo`` (cap 1.2), ``taper`` (TOPR), ``kimi`` (tau 0.5), ``kl`` (minus k3).
    """
    total = np.zeros(5)
    for row, w in zip(rows, weights, strict=True):
        string = STRINGS[row]
        new, old = token_logprobs(theta, string), token_logprobs(theta_old, string)
        sequence = sum(new) - sum(old)
        for t, score in enumerate(token_scores(theta, string)):
            ratio = math.exp(new[t] - old[t])
            if method == "dr_grpo":
                clipped = ratio > 1.2 if w > 0 else ratio < 0.8
                factor = 0.0 if clipped else w * ratio
            elif method == "cispo":
                factor = w * min(ratio, 1.2)
            elif method == "taper":
                factor = w if w >= 0 else w * min(1.0, math.exp(sequence))
            elif method == "kimi":
                factor = w - 0.5 * sequence
            elif method == "kl":
                factor = w - (ratio - 1)
            else:
                raise ValueError(method)
            total += factor * score / denominator
    return total
