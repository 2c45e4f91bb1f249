"""Evaluation figures: accuracy with its interval, pass@k, maj@k, length, behaviors.

An answer is right when the correctness part of its reward is 1; shaping never counts. Truncated answers and
grader failures count as wrong, and both are reported with the accuracy.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from empg_lite.core.behaviors import behavior_rates
from empg_lite.core.stats import maj_at_k, mcnemar, pass_at_k, powers_of_two, wilson
from empg_lite.rewards.math import ballot

if TYPE_CHECKING:
    from empg_lite.core.rationale import Rationale

#: Metadata a data source may provide, and the name of its breakdown.
BREAKDOWNS = {"level": "by_level", "subject": "by_subject"}


@dataclass(frozen=True, slots=True)
class Evaluation:
    """Answers to n problems, in the problems' order.

    Attributes:
        greedy: one rationale for each problem.
        sampled: k at temperature 1 for each problem, problem by problem; may be empty.
    """

    greedy: tuple[Rationale, ...]
    sampled: tuple[tuple[Rationale, ...], ...] = ()

    def summary(self) -> dict[str, Any]:
        """The figures ``eval --json`` prints: rates are fractions, lengths are in tokens, stops included."""
        right = [r for r in self.greedy if r.right]
        result: dict[str, Any] = {
            **_accuracy(self.greedy),
            "mean_length": _mean_length(self.greedy),
            "mean_length_right": _mean_length(right),
            "truncated": sum(r.finish_reason == "length" for r in self.greedy) / len(self.greedy),
            "grader_failures": sum(r.failed for r in self.greedy),
        }
        if any(r.terms for r in self.greedy):
            result["mean_reward"] = sum(r.reward or 0.0 for r in self.greedy) / len(self.greedy)
        if self.sampled:
            result |= _sampled_figures(self.sampled)
        result["behaviors"] = behavior_rates([r.completion for r in self.greedy])
        for name, breakdown in BREAKDOWNS.items():
            groups = _by_meta(self.greedy, name)
            if groups:
                result[breakdown] = {value: _accuracy(rows) for value, rows in groups.items()}
        return result


def _share(rows: Sequence[Rationale]) -> float:
    return sum(r.right for r in rows) / len(rows)


def _accuracy(rows: Sequence[Rationale]) -> dict[str, Any]:
    n, right = len(rows), sum(r.right for r in rows)
    return {"n": n, "pass@1": right / n, "pass@1_ci95": list(wilson(right, n))}


def _mean_length(rows: Sequence[Rationale]) -> float | None:
    return sum(len(r.completion_ids) for r in rows) / len(rows) if rows else None


def _sampled_figures(sampled: Sequence[Sequence[Rationale]]) -> dict[str, Any]:
    """T=1 accuracy, pass@k and maj@k for k = 2, 4, ..., all from one set of samples."""
    n, k = len(sampled), len(sampled[0])
    result = {"t1_accuracy": sum(map(_share, sampled)) / n}
    right = [sum(r.right for r in rows) for rows in sampled]
    votes = [[(ballot(_voted(r)), float(r.right)) for r in rows] for rows in sampled]
    for m in powers_of_two(k):
        result[f"pass@{m}"] = sum(pass_at_k(k, c, m) for c in right) / n
        result[f"maj@{m}"] = sum(maj_at_k(ballots, m) for ballots in votes) / n
    return result


def _voted(r: Rationale) -> str | None:
    return r.extracted if r.finish_reason == "stop" else None


def _by_meta(rows: Sequence[Rationale], name: str) -> dict[str, list[Rationale]]:
    """Rows grouped by metadata ``name``, sorted; rows without it are left out."""
    groups: dict[str, list[Rationale]] = {}
    for r in rows:
        if name in r.meta:
            groups.setdefault(str(r.meta[name]), []).append(r)
    return dict(sorted(groups.items()))


def paired(first: Sequence[Rationale], second: Sequence[Rationale]) -> dict[str, Any]:
    """Compare two models problem by problem, with a significance test.

    Returns:
        ``gain`` (second minus first, a fraction), ``only_first``, ``only_second`` (problems), ``p_value``
        (exact two-sided McNemar), and mean lengths on the problems both got right (None if there are none).
    """
    assert [r.problem_id for r in first] == [r.problem_id for r in second], "different problems or order"
    pairs = list(zip(first, second, strict=True))
    only_first = sum(a.right and not b.right for a, b in pairs)
    only_second = sum(b.right and not a.right for a, b in pairs)
    both = [(a, b) for a, b in pairs if a.right and b.right]
    return {
        "gain": (only_second - only_first) / len(pairs),
        "only_first": only_first,
        "only_second": only_second,
        "p_value": mcnemar(only_first, only_second),
        "both_right": len(both),
        "mean_length_first": _mean_length([a for a, _ in both]),
        "mean_length_second": _mean_length([b for _, b in both]),
    }
