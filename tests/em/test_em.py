"""``empg_lite.em`` against slow references and properties on random shapes; diagnostics; seams.

Exact expectations are in ``test_em_oracles.py``, whose items the comments count.
"""

from __future__ import annotations

import doctest
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import reference as ref
import torch
from enumerable import MASK, THETA, table, weigh
from exact import agree, close, rejects
from torch import Tensor

from empg_lite import em
from empg_lite.em import denominator, em_weights, k3, k3_sum, log_ratios, m_step_loss

# --- references and properties on random shapes ------------------------------------------------------


def random_step(seed: int) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, float]:
    """A step of a bigram policy: theta (V, V), previous and next ids (B, T), mask, weights (B,), Z.

    Completions end with their stop token; some are empty, some weights are 0.
    """
    g = torch.Generator().manual_seed(seed)
    b, t, v = (int(torch.randint(low, high, (), generator=g)) for low, high in ((2, 9), (1, 9), (3, 7)))
    lengths = torch.randint(0, t + 1, (b,), generator=g)
    ids = torch.randint(0, v, (2, b, t), generator=g)
    weights = torch.randn(b, generator=g, dtype=torch.float64) * (torch.rand(b, generator=g) < 0.7)
    theta = torch.randn(v, v, generator=g, dtype=torch.float64)
    z = denominator(lengths.tolist(), normalization="tokens", max_new_tokens=t)
    return theta, ids[0], ids[1], torch.arange(t) < lengths[:, None], weights, z


def bigram(theta: Tensor, previous: Tensor, following: Tensor) -> Tensor:
    return theta.log_softmax(-1)[previous, following]


def step_gradient(
    step: tuple[Any, ...], parts: Sequence[Tensor] | None = None, z: float | None = None
) -> Tensor:
    """Gradient (V, V) accumulated over micro-batches, each a set of row numbers."""
    theta, previous, following, mask, weights, z_step = step
    leaf = theta.clone().requires_grad_()
    for rows in [torch.arange(len(mask))] if parts is None else parts:
        width = max(int(mask[rows].sum(1).max()), 1)  # a micro-batch is as wide as its longest row
        logp = bigram(leaf, previous[rows, :width], following[rows, :width])
        m_step_loss(logp, mask[rows, :width], weights[rows], z or z_step).backward()
    return torch.zeros_like(leaf) if leaf.grad is None else leaf.grad


SEEDS = range(50)


def test_loss_and_gradient_match_triple_loops() -> None:
    for seed in SEEDS:
        theta, previous, following, mask, weights, z = random_step(seed)
        z += 2.5  # the step is larger than this micro-batch
        logp = bigram(theta, previous, following).requires_grad_()
        loss = m_step_loss(logp, mask, weights, z)
        loss.backward()
        slow_loss, slow_gradient = ref.m_step_loss(logp.tolist(), mask.tolist(), weights.tolist(), z)
        close(loss, slow_loss)
        close(logp.grad, slow_gradient)
        if slow_loss:
            rejects(1.01 * loss, slow_loss)


def test_micro_batches_and_row_order_change_nothing() -> None:  # item 9
    caught = 0
    for seed in SEEDS:
        step = random_step(seed)
        mask, order = step[3], torch.randperm(len(step[3]), generator=torch.Generator().manual_seed(seed))
        parts = order.split(1 + seed % 4)
        close(step_gradient(step, parts), step_gradient(step))
        # the error: every micro-batch divides by its own tokens
        own = sum(step_gradient(step, [p], max(float(mask[p].sum()), 1.0)) / len(parts) for p in parts)
        caught += not agree(own, step_gradient(step))
    assert caught > 35  # the others have one micro-batch, or nothing to fit


def test_zero_weight_rows_are_skipped_at_no_cost_to_the_math() -> None:  # item 9
    caught = 0
    for seed in SEEDS:
        step = random_step(seed)
        mask, weights, z = step[3:]
        kept = weights.nonzero()[:, 0]
        parts = [kept] if len(kept) else []
        close(step_gradient(step, parts), step_gradient(step))
        z_kept = max(float(mask[kept].sum()), 1.0)  # the error: skipped rows also leave the denominator
        caught += not agree(step_gradient(step, parts, z_kept), step_gradient(step))
    assert caught > 20


def test_garbage_outside_the_mask_stays_outside() -> None:  # item 9, padding
    for seed in SEEDS:
        theta, previous, following, mask, weights, z = random_step(seed)
        clean = bigram(theta, previous, following).requires_grad_()
        m_step_loss(clean, mask, weights, z).backward()
        for garbage in (float("nan"), float("inf"), -float("inf"), 1e300):
            columns = torch.full((len(mask), 3), garbage, dtype=torch.float64)
            off = torch.zeros_like(columns, dtype=torch.bool)
            inner = torch.where(mask & (weights != 0)[:, None], clean.detach(), garbage)
            dirty = torch.cat([columns, inner, columns], 1).requires_grad_()
            padded = torch.cat([off, mask, off], 1)
            loss = m_step_loss(dirty, padded, weights, z)
            loss.backward()
            close(loss, m_step_loss(clean, mask, weights, z))
            assert dirty.grad is not None and clean.grad is not None
            close(dirty.grad[:, 3:-3], clean.grad)
            assert not dirty.grad[~padded].any()
            assert k3(dirty.detach(), dirty.detach(), padded & (weights != 0)[:, None]) == 0.0
            if not np.isfinite(garbage):  # the error: multiply by the mask
                assert not (dirty.detach() * padded).sum().isfinite()


def test_the_stop_token_is_trained() -> None:
    caught = 0
    for seed in SEEDS:
        theta, previous, following, mask, weights, z = random_step(seed)
        stop = mask & (mask.cumsum(1) == mask.sum(1, keepdim=True))  # last token of each completion
        step = (theta, previous, following, mask, weights, z)
        without = (theta, previous, following, mask & ~stop, weights, z)
        # grad log softmax: one-hot of the token minus the distribution, -w/Z times at the stop alone
        known = torch.zeros_like(theta)
        for b, t in stop.nonzero().tolist():
            known[previous[b, t]] += weights[b] / z * theta[previous[b, t]].softmax(0)
            known[previous[b, t], following[b, t]] -= weights[b] / z
        close(step_gradient(step) - step_gradient(without), known)
        caught += bool(known.any())
    assert caught > 40


@pytest.mark.parametrize("weighting", em.WEIGHTINGS)
def test_weights_match_exact_arithmetic_and_each_group_alone(weighting: str) -> None:
    rng = np.random.default_rng(0)
    for seed in SEEDS:
        p, k = rng.integers(1, 6), rng.integers(1, 9)
        values = rng.random((p, k)) if seed % 2 else rng.integers(0, 2, (p, k)).astype(float)
        groups = [[None if rng.random() < 0.25 else float(r) for r in row] for row in values]
        baseline = float(rng.choice([0.0, 0.25, 1.0])) if weighting == "posterior" else 0.0
        found = weigh(groups, weighting=weighting, baseline=baseline)
        close(found, [ref.group_weights(g, weighting, baseline) for g in groups])
        for row, group in zip(found, groups, strict=True):
            kept = [i for i, r in enumerate(group) if r is not None]
            assert not row[[i for i, r in enumerate(group) if r is None]].any()
            if kept:  # a ragged group equals itself alone, without the padding
                alone = weigh([[group[i] for i in kept]], weighting=weighting, baseline=baseline)[0]
                close(row[kept], alone)
        clamped = weigh(groups, weighting=weighting, baseline=baseline, drop_negative=True)
        assert torch.equal(clamped, found.clamp(min=0))
    # the error: a grader failure taken for a wrong answer
    failed, wrong = (weigh([[1.0, 0.0, 1.0, x]], weighting=weighting)[0, :3] for x in (None, 0.0))
    if weighting != "raw":
        rejects(failed, wrong)


def test_a_failed_row_counts_neither_in_the_mean_nor_in_k() -> None:
    close(weigh([[1.0, 0.0, None, None]]), [[2.0, 0.0, 0.0, 0.0]])  # mean 1/2 of two, not 1/4 of four
    close(weigh([[1.0, 0.0, None]], baseline=0.5), [[1.5, -0.5, 0.0]])
    close(weigh([[1.0, 0.0, 0.0, None]], weighting="loo"), [[1.0, -0.5, -0.5, 0.0]])
    close(weigh([[1.0, None]], weighting="loo"), [[0.0, 0.0]])
    close(weigh([[None, None], [1.0, 0.0]], baseline=1.0), [[0.0, 0.0], [1.0, -1.0]])


def test_inputs_are_untouched_and_weights_detached() -> None:
    theta, previous, following, mask, weights, z = random_step(3)
    rewards = torch.tensor([[1.0, 0.0, float("nan")]], requires_grad=True)
    valid = torch.tensor([[True, True, False]])
    logp = bigram(theta, previous, following)
    tensors = [rewards, valid, logp, mask, weights]
    before = [x.detach().clone() for x in tensors]
    for weighting in em.WEIGHTINGS:
        for drop in (False, True):
            w = em_weights(rewards, valid, weighting=weighting, drop_negative=drop)
            assert not w.requires_grad and w.dtype == torch.float32 and w.shape == rewards.shape
            w += 1.0  # not a view of the rewards either
    loss = m_step_loss(logp.float(), mask, weights, z)
    assert loss.dtype == torch.float32 and loss.shape == ()
    assert not log_ratios(logp.clone().requires_grad_(), logp, mask).requires_grad
    k3(logp, logp + 0.1, mask)
    em.group_signal(rewards, valid)
    em.effective_sample_size(weights)
    for x, y in zip(tensors, before, strict=True):
        assert torch.equal(x.detach().nan_to_num(), y.nan_to_num()) and x.dtype == y.dtype


def test_empty_completions_stay_finite() -> None:
    logp = torch.full((2, 3), -1.0, dtype=torch.float64, requires_grad=True)
    mask = torch.tensor([[False] * 3, [True] * 3])
    m_step_loss(logp, mask, torch.tensor([2.0, 1.0]), 3.0).backward()
    close(logp.grad, [[0.0] * 3, [-1 / 3] * 3])
    z = denominator([0, 0], normalization="tokens", max_new_tokens=3)
    assert z == 1.0 and m_step_loss(logp, ~mask & mask, torch.ones(2), z).item() == 0.0
    assert k3(logp, logp, ~mask & mask) == 0.0
    assert m_step_loss(logp[:, :0], mask[:, :0], torch.ones(2), z).item() == 0.0


def test_denominator_counts_every_sampled_row() -> None:
    assert denominator([3, 0, 4, 8], normalization="tokens", max_new_tokens=8) == 15.0
    assert denominator([3, 0, 4, 8], normalization="max_length", max_new_tokens=8) == 32.0
    assert isinstance(denominator([1], normalization="tokens", max_new_tokens=8), float)


# --- diagnostics -------------------------------------------------------------------------------------


def test_k3_is_the_kl_of_old_from_new() -> None:
    rng = np.random.default_rng(1)
    for _ in range(20):
        theta = THETA + rng.normal(size=5)
        old, new = table(torch.tensor(THETA)), table(torch.tensor(theta))
        p, q = ref.probabilities(THETA), ref.probabilities(theta)
        kl, reverse = float(p @ np.log(p / q)), float(q @ np.log(q / p))
        rows = [k3_sum(new[i : i + 1], old[i : i + 1], MASK[i : i + 1]) for i in range(7)]
        close(p @ rows, kl)
        rejects(p @ rows, reverse)
        rejects(p @ [k3_sum(old[i : i + 1], new[i : i + 1], MASK[i : i + 1]) for i in range(7)], kl)
        close(k3(new, old, MASK), ref.k3(new.tolist(), old.tolist(), MASK.tolist()))
        close(sum(rows) / int(MASK.sum()), k3(new, old, MASK))  # micro-batches add up
        close(log_ratios(new, old, MASK).sum(1), np.log(q / p))


def test_drift_by_definition() -> None:
    old, new = table(torch.tensor(THETA)), table(torch.tensor(THETA + np.array([0.3, 0, 0.3, 0, -0.2])))
    right = torch.tensor([True, False, True, False, False, True, False])
    moved = em.drift(new, old, MASK, right)
    d = [
        [float(new[b, t] - old[b, t]) for t in range(2) if MASK[b, t]] for b in range(7)
    ]  # token by token, ragged
    tokens, sums = [x for row in d for x in row], np.array([sum(row) for row in d])
    close(moved.k1, -sum(tokens) / len(tokens))
    close(moved.k3, ref.k3(new.tolist(), old.tolist(), MASK.tolist()))
    close([moved.right, moved.wrong], [sums[right].mean(), sums[~right].mean()])
    rejects(moved.right, sums.mean())
    close(moved.largest, max(map(abs, tokens)))
    assert em.drift(old, old, MASK, right) == em.Drift()
    assert em.drift(new, old, MASK, right | True).wrong == 0.0


def test_effective_sample_size() -> None:
    assert em.effective_sample_size(torch.zeros(4)) == 0.0
    assert em.effective_sample_size(torch.zeros(0)) == 0.0
    close(em.effective_sample_size(torch.tensor([[2.0, -2.0], [2.0, 2.0]])), 1.0)
    close(em.effective_sample_size(torch.tensor([3.0, 0.0, 0.0, 0.0])), 0.25)
    close(em.effective_sample_size(torch.tensor([1.0, -3.0])), 0.8)  # (1+3)^2 / (2 (1+9))


def test_group_signal() -> None:
    nan = float("nan")
    rewards = torch.tensor(
        [[1.0, 1.0], [0.0, 0.0], [1.0, 0.0], [0.5, 0.5], [1.0, nan], [nan, nan], [1.0, nan], [0, nan]]
    )
    assert em.group_signal(rewards, ~rewards.isnan()) == {
        "frac_all_right": 3 / 7,
        "frac_all_wrong": 2 / 7,
        "frac_mixed": 1 / 7,
        "frac_reward_zero_std": 6 / 7,
    }
    assert set(em.group_signal(rewards[5:6], ~rewards[5:6].isnan()).values()) == {0.0}


# --- seams -------------------------------------------------------------------------------------------


def test_wrong_requests_are_refused() -> None:
    r, v = torch.tensor([[1.0, 0.0]]), torch.ones(1, 2, dtype=torch.bool)
    for options, words in (
        ({"weighting": "grpo"}, "not one of posterior, centered"),
        ({"baseline": 1.5}, "outside"),
        ({"baseline": float("nan")}, "outside"),
        ({"baseline": 0.5, "weighting": "loo"}, "no meaning"),
    ):
        with pytest.raises(ValueError, match=words):
            em_weights(r, v, **options)
    with pytest.raises(ValueError, match="rewards >= 0"):
        em_weights(-r, v)
    em_weights(-r, v, weighting="loo")
    em_weights(-r, torch.tensor([[False, True]]))  # a row left out may hold anything
    with pytest.raises(ValueError, match="not one of tokens"):
        denominator([1], normalization="sequence_mean", max_new_tokens=2)


def test_seams_are_asserted() -> None:
    r, v = torch.tensor([[1.0, 0.0]]), torch.ones(1, 2, dtype=torch.bool)
    for bad in ((r[0], v[0]), (r, v[:, :1]), (r.long(), v), (r, v.float()), (r / 0, v), (r[:, :0], v[:, :0])):
        with pytest.raises(AssertionError):
            em_weights(*bad)
    logp, mask, w = -torch.ones(2, 3), torch.ones(2, 3, dtype=torch.bool), torch.ones(2)
    for args in (
        (logp, mask[:, :2], w, 1.0),  # (B, T) against (B, T - 1)
        (logp[0], mask[0], torch.ones(3), 1.0),
        (logp, mask.float(), w, 1.0),
        (logp.half(), mask, w, 1.0),
        (logp, mask, torch.ones(3), 1.0),
        (logp, mask, torch.ones(2, 1), 1.0),
        (logp, mask, w.clone().requires_grad_(), 1.0),
        (logp, mask, w, 0.0),
    ):
        with pytest.raises(AssertionError):
            m_step_loss(*args)
    with pytest.raises(AssertionError):
        k3(logp, logp[:, :2], mask)


def test_docstring_examples_run() -> None:
    results = doctest.testmod(em)
    assert results.attempted >= 2 and results.failed == 0
