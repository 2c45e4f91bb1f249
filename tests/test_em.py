"""``empg_lite.em`` against slow references, exact expectations on an enumerable policy, and properties.

Each oracle comes with a deliberate error that it must reject (``rejects``). "Item n" counts the exact oracles
this module was specified by: score identity (1), Fisher (2), expected gradients (3-6), EM (7), and so on.
"""

from __future__ import annotations

import doctest
import itertools
from collections.abc import Sequence
from functools import partial
from typing import Any

import numpy as np
import pytest
import reference as ref
import torch
from torch import Tensor

from empg_lite import em
from empg_lite.em import denominator, em_weights, k3, k3_sum, log_ratios, m_step_loss

THETA = np.array([0.3, -0.4, 0.2, 0.5, -0.8])
BINARY = np.array([1.0, 0.0, 1.0, 0.0, 0.0, 1.0, 0.0])  # J = 0.517
GRADED = np.array([0.9, 0.2, 0.7, 0.0, 0.4, 1.0, 0.1])  # J = 0.506
# The bandit of the fixed-data limit: 20 samples of five answers, the first three right.
COUNTS, MU, RIGHT = (
    [6, 4, 3, 5, 2],
    np.array([0.30, 0.20, 0.15, 0.25, 0.10]),
    np.array([1.0, 1.0, 1.0, 0.0, 0.0]),
)
both = pytest.mark.parametrize("rewards", [BINARY, GRADED], ids=["binary", "graded"])


def agree(actual: Any, expected: Any) -> bool:
    """The one tolerance of this file, for float64: relative 1e-10, absolute 1e-12."""
    a, e = (np.asarray(x.detach() if isinstance(x, Tensor) else x) for x in (actual, expected))
    finite = bool(np.isfinite(a).all() and np.isfinite(e).all())
    return finite and a.shape == e.shape and bool(np.allclose(a, e, rtol=1e-10, atol=1e-12))


def close(actual: Any, expected: Any) -> None:
    assert agree(actual, expected), f"\n{actual}\n is not \n{expected}"


def rejects(actual: Any, wrong: Any) -> None:
    """A deliberate error, which the tolerance must see."""
    assert not agree(actual, wrong), f"took\n{actual}\n for \n{wrong}"


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


def cosine(a: np.ndarray, b: np.ndarray) -> float:
    return float(a @ b / np.linalg.norm(a) / np.linalg.norm(b))


# --- exact oracles -----------------------------------------------------------------------------------


def test_the_helper_objects_to_one_percent() -> None:
    close([1.0, 2.0], [1.0, 2.0])
    rejects([1.0, 2.0], [1.0, 2.02])
    rejects([1.0, 2.0], [1.0, 2.0 + 1e-9])
    rejects([float("nan")], [float("nan")])
    rejects([1.0, 1.0], [1.0])


def test_torch_policy_is_the_reference_policy() -> None:
    logp = torch.where(MASK, table(torch.tensor(THETA)), 0.0).sum(1)
    close(logp.exp(), ref.probabilities(THETA))
    close(logp.exp().sum(), 1.0)
    close([ascent(np.eye(7)[i]) for i in range(7)], ref.scores(THETA))


def test_scores_sum_to_zero() -> None:  # item 1
    pi = ref.probabilities(THETA)
    close(ascent(pi), np.zeros(5))
    no_stop = MASK & (IDS != ref.EOS)
    rejects(ascent(pi, mask=no_stop), np.zeros(5))


@both
def test_fisher_identity(rewards: np.ndarray) -> None:  # item 2
    j, grad_j = ref.success(THETA, rewards)
    posterior = ref.probabilities(THETA) * rewards / j
    close(ascent(posterior), grad_j / j)
    rejects(ascent(posterior * j), grad_j / j)  # unnormalised: grad J, not grad log J


@both
@pytest.mark.parametrize("k", [2, 3])
def test_raw_loo_and_centered_ascend_j(rewards: np.ndarray, k: int) -> None:  # item 3
    _, grad_j = ref.success(THETA, rewards)
    close(expected(rewards, k, weighting="raw"), k * grad_j)
    close(expected(rewards, k, weighting="loo"), k * grad_j)
    close(expected(rewards, k, weighting="centered"), (k - 1) * grad_j)
    rejects(expected(rewards, k, weighting="centered"), k * grad_j)  # the group mean is not independent
    with_self = ref.expected_gradient(THETA, rewards, k, lambda r: [x - max(r) for x in r])
    rejects(with_self, k * grad_j)


@pytest.mark.parametrize("k", [1, 2, 3])
def test_posterior_ascends_a_mixture_of_pass_at_k(k: int) -> None:  # item 4
    j, grad_j = ref.success(THETA, BINARY)

    def pass_at_k(n: int) -> Any:
        """n-term mixture: grad of sum_{i<=n} pass@i / i, by autograd."""
        leaf = torch.tensor(THETA, requires_grad=True)
        success = torch.where(MASK, table(leaf), 0.0).sum(1).exp() @ torch.tensor(BINARY)
        mixture = sum(((1 - (1 - success) ** i) / i for i in range(1, n + 1)), 0 * success)
        return torch.autograd.grad(mixture, leaf)[0].numpy()

    close(pass_at_k(k), (1 - (1 - j) ** k) / j * grad_j)
    close(expected(BINARY, k), k * pass_at_k(k))
    close(expected(BINARY, k, baseline=1.0), k * pass_at_k(k - 1))
    close(expected(BINARY, k, baseline=0.25), k * (0.75 * pass_at_k(k) + 0.25 * pass_at_k(k - 1)))
    mixed = ref.expected_gradient(THETA, BINARY, k, lambda r: ref.group_weights(r, "mixed_only"))
    close(mixed, k * (pass_at_k(k) - j ** (k - 1) * grad_j))
    rejects(expected(BINARY, k, baseline=1.0), k * pass_at_k(k))
    if k == 1:
        close(weigh([[1.0], [0.0]]), weigh([[1.0], [0.0]], weighting="raw"))
    else:  # one mean for the whole batch of groups instead of one a group
        batch_mean = ref.expected_gradient(THETA, BINARY, k, lambda r: [x / j for x in r])
        rejects(batch_mean, k * pass_at_k(k))


@pytest.mark.parametrize("k", [2, 3])
def test_standardized_and_scaled_negatives(k: int) -> None:  # item 5
    j, grad_j = ref.success(THETA, BINARY)
    close(expected(BINARY, k, weighting="standardized"), ref.standardized_scale(j, k) * grad_j)
    rejects(expected(BINARY, k, weighting="standardized"), ref.standardized_scale(j, k + 1) * grad_j)
    for eta in (0.0, 0.5):
        scaled = ref.expected_gradient(
            THETA, BINARY, k, partial(ref.group_weights, weighting="neg_scale", eta=eta)
        )
        close(scaled, (k - 1) * ((1 - j) + eta * j) * grad_j)
    positive = expected(BINARY, k, weighting="centered", drop_negative=True)
    close(positive, (k - 1) * (1 - j) * grad_j)
    rejects(expected(BINARY, k, weighting="centered"), positive)


@both
def test_normalizations(rewards: np.ndarray) -> None:  # item 6
    _, grad_j = ref.success(THETA, rewards)
    close(expected(rewards, 3, "max_length", weighting="loo"), grad_j / 2)  # 3 grad J over 3 rows of 2 tokens
    bias = [1 - cosine(expected(rewards, k, "tokens", weighting="loo"), grad_j) for k in (2, 3, 4)]
    assert bias[1] < 1e-3 and bias[0] > bias[1] > bias[2] > 1e-6  # a ratio bias, vanishing with rows
    means = ref.expected_gradient(
        THETA, rewards, 3, lambda r: ref.group_weights(r, "loo"), sequence_mean=True
    )
    assert cosine(means, grad_j) < 0.999  # what the package refuses
    rejects(expected(rewards, 3, "tokens", weighting="loo"), grad_j / 2)


@both
def test_em_never_lowers_log_success(rewards: np.ndarray) -> None:  # item 7
    j_old, _ = ref.success(THETA, rewards)
    q_old = ref.probabilities(THETA) * rewards / j_old

    def bound(theta: np.ndarray) -> float:
        return -float(m_step_loss(table(torch.tensor(theta)), MASK, torch.tensor(q_old), 1.0))

    def run(sign: float) -> list[float]:
        theta, gains = THETA.copy(), [0.0]
        for _ in range(200):
            theta = theta + sign * 0.1 * ascent(q_old, theta=theta)
            j, _ = ref.success(theta, rewards)
            q = ref.probabilities(theta) * rewards / j
            kl = sum(a * np.log(a / b) for a, b in zip(q_old, q, strict=True) if a > 0)
            gains.append(np.log(j) - np.log(j_old))
            close(gains[-1], bound(theta) - bound(THETA) + kl)
            rejects(gains[-1], bound(theta) - bound(THETA))  # without the KL it is only a bound
        return gains

    assert np.all(np.diff(run(+1.0)) > 0)
    assert np.all(np.diff(run(-1.0)) < 0)


def test_tabular_m_step() -> None:  # item 7: pi_new = q, J_new = E[R^2] / E[R]
    # eight samples of mu = (1/2, 1/4, 1/4) with R = (1, 1/2, 0): J = 5/8, E[R^2] = 9/16, J_new = 9/10
    rewards = np.array([1.0, 1.0, 1.0, 1.0, 0.5, 0.5, 0.0, 0.0])
    q = weigh([rewards.tolist()])[0].numpy() / 8
    close(q @ rewards, 0.9)
    close(q, rewards / 5)
    squared = weigh([(rewards**2).tolist()])[0].numpy() / 8
    rejects(squared @ rewards, 0.9)


@pytest.mark.parametrize("weighting", em.WEIGHTINGS)
@pytest.mark.parametrize("k", [1, 2, 3, 7, 49])
def test_equal_rewards(weighting: str, k: int) -> None:  # item 8
    rows = [i % 7 for i in range(k)]
    wrong = weigh([[0.0] * k], weighting=weighting)[0]
    assert not wrong.any() and not ascent(wrong, rows).any()
    for reward in (1.0, 0.1, 0.3, 1 / 3):  # exactly: a mean of 0.1s is not 0.1 in floating point
        same = weigh([[reward] * k], weighting=weighting)[0]
        exact = {"posterior": 1.0, "raw": reward}.get(weighting, 0.0)
        assert same.tolist() == [exact] * k
        assert ascent(same, rows).any() == (exact != 0)
        short = torch.full((1, k), reward, dtype=torch.float32)
        short_weights = em_weights(short, short > 0, weighting=weighting)[0]
        assert short_weights.tolist() == ([float(short[0, 0])] * k if weighting == "raw" else [exact] * k)
    if weighting not in ("posterior", "raw"):  # a row left out is not a reward of 0
        assert weigh([[-0.1] * k + [None]], weighting=weighting)[0].tolist() == [0.0] * (k + 1)
    naive = np.array([0.1] * 3) - np.mean([0.1] * 3)
    assert naive.any()


@pytest.mark.parametrize("k", [1, 3, 7, 49])
@pytest.mark.parametrize("beta", [0.0, 0.5, 1.0])
def test_all_right_under_posterior_weighs_k_times_one_minus_beta(k: int, beta: float) -> None:  # item 8
    weights = weigh([[1.0] * k, [0.0] * k], baseline=beta)
    assert weights.tolist() == [[1 - beta] * k, [0.0] * k]
    close(weights.sum(), k * (1 - beta))


def test_weights_scale_and_shift() -> None:  # item 10
    rewards = torch.rand(20, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0))

    def w(r: Tensor, weighting: str) -> Tensor:
        return weigh(r.tolist(), weighting=weighting)

    close(w(rewards, "loo"), w(rewards, "centered") * 5 / 4)
    rejects(w(rewards, "loo"), w(rewards, "centered"))
    for name in ("centered", "loo", "standardized"):
        close(w(rewards + 0.7, name), w(rewards, name))
    for name in ("posterior", "standardized"):
        close(w(rewards * 0.3, name), w(rewards, name))
    rejects(w(rewards + 0.7, "posterior"), w(rewards, "posterior"))
    rejects(w(rewards * 0.3, "centered"), w(rewards, "centered"))
    close(weigh([[5e-324, 0.0]]), [[2.0, 0.0]])  # the mean of subnormal rewards underflows to 0


def bandit(**options: Any) -> Any:
    """(5,) weights of the bandit's answers from one group of its 20 samples."""
    weights = weigh([np.repeat(RIGHT, COUNTS).tolist()], **options)[0].numpy()
    return weights[np.cumsum(COUNTS) - 1]


def test_bandit_gradient_is_the_flow() -> None:  # ties items 11 and 12 to the package's loss
    for seed, weighting in enumerate(em.WEIGHTINGS):
        logits = torch.tensor(np.random.default_rng(seed).normal(size=5), requires_grad=True)
        rows = torch.tensor(np.repeat(np.arange(5), COUNTS))
        weights = weigh([np.repeat(RIGHT, COUNTS).tolist()], weighting=weighting)[0]
        logp = logits.log_softmax(0)[rows][:, None]
        m_step_loss(logp, torch.ones(20, 1, dtype=torch.bool), weights, 20.0).backward()
        assert logits.grad is not None
        direction = ref.flow_direction(logits.detach().numpy(), MU, bandit(weighting=weighting))
        close(-logits.grad, direction)
        rejects(-logits.grad, 1.01 * direction)


def test_fixed_data_limit_is_water_filling() -> None:  # item 11
    limits = {  # b: R - b is the posterior weight with beta = b / E[R], up to scale
        0.0: [0.4615, 0.3077, 0.2308, 0.0, 0.0],
        0.3: [0.5, 0.3, 0.2, 0.0, 0.0],
        0.5: [0.6111, 0.2778, 0.1111, 0.0, 0.0],
        0.6: [0.9, 0.1, 0.0, 0.0, 0.0],
        0.64: [1.0, 0.0, 0.0, 0.0, 0.0],
    }
    weights = np.array([bandit(baseline=b / 0.65) for b in limits])
    found = np.exp(ref.flow(MU, weights, steps=40_000, rate=2.0))
    filled = np.array([ref.water_filling(MU, w) for w in weights])
    assert np.abs(found - filled).max() < 2e-5  # slow tail of b = 0
    close(found[1:], filled[1:])
    assert found.round(4).tolist() == filled.round(4).tolist() == list(limits.values())
    rejects(found[1], found[2])


def test_zero_sum_weights_are_unbounded_on_fixed_data() -> None:  # item 11, b = mean
    def objective(weights: np.ndarray, steps: int) -> float:
        return float((MU * weights * ref.flow(MU, weights, steps, rate=0.5)).sum())

    centered = bandit(weighting="centered")
    assert [f"{objective(centered, n):.3g}" for n in (100, 1000, 10_000)] == ["2.5", "24.7", "247"]
    q = ref.water_filling(MU, bandit())[:3]
    assert 0 < q @ np.log(q) - objective(bandit(), 10_000) < 1e-3  # posterior: bounded, and nearly there


def test_kimi_regulariser_bounds_the_same_bandit() -> None:  # item 12
    centered = bandit(weighting="centered")
    found = np.exp(ref.flow(MU, centered, steps=5000, rate=0.5, tau=0.5))
    assert found.round(4).tolist() == [0.4203, 0.2802, 0.2102, 0.0638, 0.0255]
    ideal = MU * np.exp(RIGHT / 0.5) / (MU * np.exp(RIGHT / 0.5)).sum()
    assert ideal.round(4).tolist() == [0.4302, 0.2868, 0.2151, 0.0485, 0.0194]
    close(ref.flow_direction(np.log(found), MU, centered, tau=0.5), np.zeros(5))
    rejects(ref.flow_direction(np.log(found), MU, centered, tau=0.6), np.zeros(5))


def sampled_groups(seed: int) -> tuple[Any, Tensor, float]:
    """Three groups of four strings: rows, centered weights, Z."""
    rows = np.random.default_rng(seed).integers(0, 7, (3, 4))
    weights = weigh(GRADED[rows].tolist(), weighting="centered").flatten()
    lengths = [len(ref.STRINGS[i]) for i in rows.flatten()]
    return rows.flatten(), weights, denominator(lengths, normalization="tokens", max_new_tokens=2)


@pytest.mark.parametrize("method", ["dr_grpo", "cispo", "taper", "kimi", "kl"])
def test_first_step_equals_the_methods_with_ratios(method: str) -> None:  # item 13
    moved = THETA + np.array([0.4, -0.3, 0.2, -0.5, 0.3])
    for seed in range(5):
        rows, weights, z = sampled_groups(seed)
        close(ascent(weights, rows, z), ref.ratio_gradient(method, THETA, THETA, rows, weights.tolist(), z))
        rejects(
            ascent(weights, rows, z, theta=moved),
            ref.ratio_gradient(method, moved, THETA, rows, weights.tolist(), z),
        )


def test_surrogate_bounds_the_improvement() -> None:  # item 14
    rng, pi_old = np.random.default_rng(0), ref.probabilities(THETA)
    for _ in range(200):
        advantages, theta = rng.uniform(0.1, 1, 7), THETA + rng.normal(size=5)
        weights = torch.tensor(advantages * pi_old)
        old, new = (m_step_loss(table(torch.tensor(t)), MASK, weights, 1.0) for t in (THETA, theta))
        negative = m_step_loss(table(torch.tensor(theta)), MASK, -weights, 1.0) + old
        improvement = advantages @ (ref.probabilities(theta) - pi_old)
        assert float(old - new) < improvement  # pessimistic for w > 0
        assert float(-negative) > -improvement  # optimistic for w < 0: the principle fails


def test_hint_example() -> None:  # item 15: proposal with hint, importance-corrected rewards
    # pi_old (.5, .3, .15, .05), R (.02, .1, .4, .9), proposal (.55, .05, .05, .35) = 20 samples
    pi, rewards, counts = np.array([0.5, 0.3, 0.15, 0.05]), np.array([0.02, 0.1, 0.4, 0.9]), [11, 1, 1, 7]
    proposal = np.array(counts) / 20

    def fit(values: np.ndarray) -> np.ndarray:
        """Tabular M-step on the 20 samples."""
        w = weigh([np.repeat(values, counts).tolist()])[0].numpy() / 20
        return np.add.reduceat(w, np.cumsum([0, *counts[:-1]]))

    corrected = fit(rewards * pi / proposal)
    close(corrected, pi * rewards / (pi @ rewards))
    assert corrected.round(3).tolist() == [0.069, 0.207, 0.414, 0.310]
    assert fit(rewards).round(3).tolist() == [0.031, 0.014, 0.057, 0.897]  # filtering alone
    assert [round(float(q @ rewards), 3) for q in (pi, proposal, corrected)] == [0.145, 0.351, 0.467]
    spread = torch.tensor(np.repeat(rewards * pi / proposal, counts))
    assert round(em.effective_sample_size(spread), 3) == 0.219


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


def test_zero_weight_rows_are_skipped_at_no_cost_to_the_maths() -> None:  # item 9
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
