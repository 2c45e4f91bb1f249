"""Statistics checked against scipy, enumeration of subsets, and properties."""

from __future__ import annotations

import math
import random
from collections import Counter
from itertools import combinations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import binomtest

from empg_lite.core.stats import maj_at_k, mcnemar, pass_at_k, powers_of_two, wilson


@pytest.mark.parametrize(
    ("right", "n"), [(0, 10), (10, 10), (3, 10), (1, 500), (499, 500), (250, 500), (0, 1)]
)
def test_wilson_matches_scipy(right: int, n: int) -> None:
    expected = binomtest(right, n).proportion_ci(0.95, method="wilson")
    assert wilson(right, n) == pytest.approx((expected.low, expected.high), abs=1e-12)


@pytest.mark.parametrize(("n", "right"), [(5, 0), (5, 2), (5, 5), (8, 1)])
def test_pass_at_k_is_the_share_of_subsets(n: int, right: int) -> None:
    samples = [True] * right + [False] * (n - right)
    for k in range(1, n + 1):
        subsets = list(combinations(samples, k))
        assert pass_at_k(n, right, k) == pytest.approx(sum(map(any, subsets)) / len(subsets), abs=1e-12)


def brute_majority(ballots: list[tuple[str | None, float]], k: int) -> float:
    """Vote in every subset; equals share the win."""
    values: dict[str, list[float]] = {}
    for answer, value in ballots:
        if answer is not None:
            values.setdefault(answer, []).append(value)
    worth = {answer: sum(v) / len(v) for answer, v in values.items()}
    results = []
    for subset in combinations(ballots, k):
        votes = Counter(answer for answer, _ in subset if answer is not None)
        best = max(votes.values(), default=0)
        winners = [answer for answer, n in votes.items() if n == best]
        results.append(sum(worth[w] for w in winners) / len(winners) if winners else 0.0)
    return sum(results) / len(results)


ballot = st.tuples(st.sampled_from(["a", "b", "c", "d", None]), st.sampled_from([0.0, 0.5, 1.0]))


@given(st.lists(ballot, min_size=1, max_size=9))
def test_maj_at_k_is_the_mean_over_subsets(ballots: list[tuple[str | None, float]]) -> None:
    for k in range(1, len(ballots) + 1):
        assert maj_at_k(ballots, k) == pytest.approx(brute_majority(ballots, k), abs=1e-12)


def test_maj_at_k_by_hand() -> None:
    assert maj_at_k([("2", 1.0), ("3", 0.0), ("2", 1.0)], 3) == 1.0
    assert maj_at_k([("2", 1.0), ("3", 0.0), ("3", 0.0)], 3) == 0.0
    assert maj_at_k([("2", 1.0), ("3", 0.0)], 2) == 0.5  # a tie is shared
    assert maj_at_k([(None, 0.0), (None, 0.0), ("2", 1.0)], 3) == 1.0  # silence is no vote
    assert maj_at_k([(None, 0.0)], 1) == 0.0
    assert maj_at_k([("2", 1.0), ("3", 0.0), ("2", 1.0)], 1) == pytest.approx(2 / 3)  # the mean of singles


def test_maj_at_k_on_many_samples_is_fast_and_converges() -> None:
    """64 samples over 20 answers: no enumeration could do this; a large sample of subsets agrees."""
    rng = random.Random(0)
    ballots = [(a, float(a == 0)) for a in (min(int(rng.expovariate(0.2)), 19) for _ in range(64))]
    drawn = [brute_majority(rng.sample(ballots, 16), 16) for _ in range(4000)]
    mean = sum(drawn) / len(drawn)
    error = math.sqrt(sum((x - mean) ** 2 for x in drawn)) / len(drawn)
    assert maj_at_k(ballots, 16) == pytest.approx(mean, abs=4 * error)
    assert 0.05 < mean < 0.95


@pytest.mark.parametrize(("b", "c"), [(0, 0), (0, 1), (3, 3), (1, 9), (12, 40), (200, 260)])
def test_mcnemar_matches_scipy(b: int, c: int) -> None:
    expected = binomtest(b, b + c).pvalue if b + c else 1.0
    assert mcnemar(b, c) == pytest.approx(expected, abs=1e-12) == mcnemar(c, b)


def test_powers_of_two() -> None:
    assert [powers_of_two(n) for n in (0, 1, 2, 3, 8, 12)] == [[], [], [2], [2, 3], [2, 4, 8], [2, 4, 8, 12]]
