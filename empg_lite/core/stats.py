"""Evaluation statistics: confidence intervals, pass@k, maj@k, paired significance. No torch."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Hashable, Sequence

Z_95 = 1.959963984540054  # two-sided 95% quantile of the normal distribution


def wilson(successes: int, n: int, z: float = Z_95) -> tuple[float, float]:
    """Wilson score interval of a proportion (JASA 1927): reliable near 0 and 1."""
    assert n > 0 and 0 <= successes <= n
    p = successes / n
    center = (p + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    return max(0.0, center - half), min(1.0, center + half)


def pass_at_k(n: int, right: int, k: int) -> float:
    """Probability that k of n samples, without replacement, hold a correct one (Chen et al. 2021, eq. 1)."""
    assert 0 <= right <= n and 1 <= k <= n
    return 1.0 - math.comb(n - right, k) / math.comb(n, k)


def maj_at_k(ballots: Sequence[tuple[Hashable | None, float]], k: int) -> float:
    """Expected value of the majority answer of k samples, over all k-subsets of the n samples.

    Exact, like ``pass_at_k``: subsets are counted, not sampled. Tied answers share the win; a sample without
    an answer (None) is included but does not vote; a subset without votes has value 0.

    Args:
        ballots: (answer, its value in [0, 1]) of each of n samples; equal answers are pooled at their mean
            value.
    """
    n = len(ballots)
    assert 1 <= k <= n
    counts = Counter(answer for answer, _ in ballots if answer is not None)
    silent = n - sum(counts.values())
    total = 0.0
    for winner, held in counts.items():
        value = sum(v for answer, v in ballots if answer == winner) / held
        if not value:
            continue
        others = [count for answer, count in counts.items() if answer != winner]
        for votes in range(1, min(held, k) + 1):
            ways = _minorities(others, silent, k - votes, votes)
            total += value * math.comb(held, votes) * sum(w / (1 + ties) for ties, w in enumerate(ways))
    return total / math.comb(n, k)


def _minorities(others: Sequence[int], silent: int, size: int, most: int) -> list[int]:
    """Number of ``size``-subsets of the other samples where no answer exceeds ``most`` votes, by ties.

    Args:
        others: number of samples with each other answer.
        silent: number of samples without an answer.
    """
    ways = {(s, 0): math.comb(silent, s) for s in range(min(silent, size) + 1)}  # (drawn, ties) -> subsets
    for count in others:
        grown: Counter[tuple[int, int]] = Counter()
        for (drawn, ties), number in ways.items():
            for votes in range(min(count, most, size - drawn) + 1):
                grown[drawn + votes, ties + (votes == most)] += number * math.comb(count, votes)
        ways = dict(grown)
    return [ways.get((size, ties), 0) for ties in range(len(others) + 1)]


def powers_of_two(n: int) -> list[int]:
    """2, 4, 8, ... below n, and n itself: the k to report pass@k and maj@k for; [] for n < 2.

    >>> powers_of_two(12)
    [2, 4, 8, 12]
    """
    return [*(2**i for i in range(1, n.bit_length()) if 2**i < n), n] if n > 1 else []


def mcnemar(only_first: int, only_second: int) -> float:
    """Two-sided exact p-value of McNemar's test (Psychometrika 1947): do two models differ on the same items?

    Args:
        only_first, only_second: items that only the first, or only the second, got right.
    """
    n, fewer = only_first + only_second, min(only_first, only_second)
    tail = sum(math.comb(n, i) for i in range(fewer + 1))
    return min(1.0, 2 * tail / 2**n)
