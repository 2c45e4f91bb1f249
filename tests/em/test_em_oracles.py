"""``empg_lite.em`` against exact expectations on an enumerable policy, closed forms and known limits.

Each oracle comes with a deliberate error that it must reject (``rejects``); ``test_em_mutations.py`` puts
errors into the package itself. "Item n" counts the exact oracles this module was specified by: score
identity (1), Fisher (2), expected gradients (3-6), EM (7), no signal (8), micro-batches (9, in
``test_em.py``), scale and shift (10), fixed data (11, 12), methods with ratios (13, with TRL's code in
``test_baselines.py``), bounds (14), hints (15).
"""

from __future__ import annotations

from functools import partial
from typing import Any

import numpy as np
import pytest
import reference as ref
import torch
from enumerable import BINARY, GRADED, IDS, MASK, THETA, ascent, expected, table, weigh
from exact import agree, close, rejects
from torch import Tensor

from empg_lite import em
from empg_lite.em import denominator, em_weights, m_step_loss

# The bandit of the fixed-data limit: 20 samples of five answers, the first three right.
COUNTS, MU, RIGHT = (
    [6, 4, 3, 5, 2],
    np.array([0.30, 0.20, 0.15, 0.25, 0.10]),
    np.array([1.0, 1.0, 1.0, 0.0, 0.0]),
)
both = pytest.mark.parametrize("rewards", [BINARY, GRADED], ids=["binary", "graded"])


def cosine(a: np.ndarray, b: np.ndarray) -> float:
    return float(a @ b / np.linalg.norm(a) / np.linalg.norm(b))


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
    rejects(ascent(posterior * j), grad_j / j)  # unnormalized: grad J, not grad log J


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
        rejects(scaled, (k - 1) * (eta * (1 - j) + j) * grad_j)  # the positives scaled
    positive = expected(BINARY, k, weighting="centered", drop_negative=True)
    close(positive, (k - 1) * (1 - j) * grad_j)
    half = (positive + expected(BINARY, k, weighting="centered")) / 2  # neg_scale 1/2 of the package's two
    close(half, (k - 1) * (1 - j / 2) * grad_j)
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

    def slope(weights: np.ndarray) -> Any:
        """Gradient of the M-step by the logits of a tabular policy that is q already."""
        logits = torch.tensor([0.8, 0.2, 0.0], dtype=torch.float64).log().requires_grad_()
        logp = logits.log_softmax(0)[[0, 0, 0, 0, 1, 1, 2, 2]][:, None]
        m_step_loss(logp, torch.ones(8, 1, dtype=torch.bool), torch.tensor(8 * weights), 8.0).backward()
        return logits.grad

    close(slope(q), np.zeros(3))  # q is where the M-step ends
    rejects(slope(squared), np.zeros(3))


@both
def test_tabular_m_step_on_the_strings(rewards: np.ndarray) -> None:  # item 7
    pi, (j, _) = ref.probabilities(THETA), ref.success(THETA, rewards)
    squares = ref.success(THETA, rewards**2)[0]
    close((pi * rewards / j) @ rewards, squares / j)
    assert squares / j > j  # it improves
    rejects((pi * rewards) @ rewards, squares / j)  # not normalized


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
        positive = weigh([[reward] * k], weighting=weighting, drop_negative=True)[0]
        assert positive.tolist() == [exact] * k
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
    rejects(weights.sum(), k * (1 - beta) - k * beta if beta else 2.0 * k)  # the baseline of all-wrong groups
    if beta == 0:  # K = 1: posterior is raw
        rewards = [[1.0], [0.0], [1.0]]
        close(weigh(rewards), weigh(rewards, weighting="raw"))


@pytest.mark.parametrize("k", [2, 3, 5, 16])
def test_weights_scale_and_shift(k: int) -> None:  # item 10
    rewards = torch.rand(20, k, dtype=torch.float64, generator=torch.Generator().manual_seed(k))

    def w(r: Tensor, weighting: str, baseline: float = 0.0) -> Tensor:
        return weigh(r.tolist(), weighting=weighting, baseline=baseline)

    close(w(rewards, "loo"), w(rewards, "centered") * k / (k - 1))
    rejects(w(rewards, "loo"), w(rewards, "centered"))
    for shift in (0.7, -2.0):
        for name in ("centered", "loo", "standardized"):
            close(w(rewards + shift, name), w(rewards, name))
    for scale in (0.3, 7.0, 1e-9):
        close(w(rewards * scale, "posterior", 0.5), w(rewards, "posterior", 0.5))
        for name in ("posterior", "standardized"):
            close(w(rewards * scale, name), w(rewards, name))
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
    found = np.exp(ref.flow(MU, weights, steps=40_000, rate=2.5))
    filled = np.array([ref.water_filling(MU, w) for w in weights])
    assert np.abs(found - filled).max() < 1e-5  # slow tail of b = 0
    close(found[1:], filled[1:])
    assert found.round(4).tolist() == filled.round(4).tolist() == list(limits.values())
    rejects(found[1], found[2])


def test_zero_sum_weights_are_unbounded_on_fixed_data() -> None:  # item 11, b = mean
    def objective(weights: np.ndarray, steps: int) -> float:
        return float((MU * weights * ref.flow(MU, weights, steps, rate=0.5)).sum())

    centered = bandit(weighting="centered")
    found = [objective(centered, n) for n in (100, 1000, 10_000, 100_000)]
    assert np.abs(found / np.array([2.5, 24.7, 247, 2466]) - 1).max() < 2e-3  # linear in the steps
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


def sampled_groups(seed: int, rewards: np.ndarray) -> tuple[Any, Tensor, float]:
    """Three groups of four strings: rows, centered weights, Z."""
    rows = np.random.default_rng(seed).integers(0, 7, (3, 4))
    weights = weigh(rewards[rows].tolist(), weighting="centered").flatten()
    lengths = [len(ref.STRINGS[i]) for i in rows.flatten()]
    return rows.flatten(), weights, denominator(lengths, normalization="tokens", max_new_tokens=2)


@both
@pytest.mark.parametrize("method", ["dr_grpo", "cispo", "taper", "kimi", "kl"])
def test_first_step_equals_the_methods_with_ratios(method: str, rewards: np.ndarray) -> None:  # item 13
    moved, caught = THETA + np.array([0.4, -0.3, 0.2, -0.5, 0.3]), 0
    for seed in range(10):
        rows, weights, z = sampled_groups(seed, rewards)
        close(ascent(weights, rows, z), ref.ratio_gradient(method, THETA, THETA, rows, weights.tolist(), z))
        later = ref.ratio_gradient(method, moved, THETA, rows, weights.tolist(), z)
        caught += not agree(ascent(weights, rows, z, theta=moved), later)
    assert caught > 7  # the error: equal on later passes too; the taper spares some groups


def test_surrogate_bounds_the_improvement() -> None:  # item 14
    rng, pi_old = np.random.default_rng(0), ref.probabilities(THETA)

    def surrogate(advantages: np.ndarray, theta: np.ndarray) -> float:
        """E_old[A log rho] by the package's loss."""
        weights = torch.tensor(advantages * pi_old)
        old, new = (float(m_step_loss(table(torch.tensor(t)), MASK, weights, 1.0)) for t in (THETA, theta))
        return old - new

    broken = 0
    for _ in range(200):
        advantages, theta = rng.uniform(0.1, 1, 7), THETA + rng.normal(size=5)
        gain = ref.probabilities(theta) - pi_old  # pi_old (rho - 1)
        assert surrogate(advantages, theta) < advantages @ gain  # pessimistic for A > 0
        assert surrogate(-advantages, theta) > -advantages @ gain  # optimistic for A < 0: the principle fails
        for one in np.eye(7):  # string by string
            assert surrogate(one, theta) <= one @ gain and surrogate(-one, theta) >= -one @ gain
        mixed = advantages * rng.choice([-1, 1], 7)
        broken += surrogate(mixed, theta) > mixed @ gain
    assert 20 < broken < 180  # the error: the bound taken for signs of both kinds
    for advantages in (BINARY, GRADED, GRADED - 0.5):  # tight at theta = old, to first order
        close(surrogate(advantages, THETA), 0.0)
        close(ascent(advantages * pi_old), ref.success(THETA, advantages)[1])


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
    close(corrected, np.array([2, 6, 12, 9]) / 29)
    close(fit(np.ones(4)), [0.55, 0.05, 0.05, 0.35])  # unweighted: the proposal, hint and all
    assert fit(rewards).round(3).tolist() == [0.031, 0.014, 0.057, 0.897]  # filtering alone
    rejects(fit(rewards), corrected)
    rejects(fit(rewards * proposal / pi), corrected)  # the ratio upside down
    assert [round(float(q @ rewards), 3) for q in (pi, proposal, corrected)] == [0.145, 0.351, 0.467]
    spread = torch.tensor(np.repeat(rewards * pi / proposal, counts))
    assert round(em.effective_sample_size(spread), 3) == 0.219
