"""The frozen carriers that travel between the stages.

Shape legend, used everywhere:

    P  problems in a step            K  rationales of one problem
    B  rows (= sequences) of a batch  T  padded tokens    N  completion tokens of a batch
    V  vocabulary                     D  hidden size

A *rationale* is one sampled completion: reasoning and answer. Its ids are exactly what the policy emitted,
including the stop tokens, which are trained too. Ids take precedence over text because re-tokenizing does not
round-trip.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

FinishReason = Literal["stop", "length"]

#: What the grader found; the reward counts.
VERDICTS = frozenset({"equal", "different", "no_answer", "parse", "too_long", "truncated"})
#: The grader itself failed; the row is excluded from its problem's mean and K.
FAILURES = frozenset({"timeout", "memory", "crash"})
#: Source of a completion's token ids: sampled by a policy, or tokenized from text.
ORIGINS = frozenset({"sampled", "text"})


def problem_id(question: str) -> str:
    """Stable id of a problem: the first 16 hex digits of the SHA-256 of its question."""
    return hashlib.sha256(question.encode("utf-8", "surrogatepass")).hexdigest()[:16]


@dataclass(frozen=True, slots=True)
class Problem:
    """One question with its verifiable answer.

    ``meta`` holds further facts from the data source, as JSON types (MATH: ``level``, ``subject``).
    """

    id: str
    question: str
    gold: str
    meta: Mapping[str, Any] = field(default_factory=dict)

    @classmethod
    def asked(cls, question: str, gold: str = "") -> Problem:
        """A problem typed by the user; without ``gold`` it cannot be graded."""
        return cls(problem_id(question), question, gold)


@dataclass(frozen=True, slots=True)
class Rationale:
    """One sampled completion and, once known, its reward and weight.

    Attributes:
        step: the E-step it was sampled for; keys its random numbers.
        policy_step: optimizer steps the sampling policy had taken.
        prompt_ids, completion_ids: ``(T_prompt,)`` and ``(T_completion,)`` token ids.
        finish_reason: ``stop`` (a stop token or string) or ``length`` (cut off: reward 0).
        reward: in [0, 1], or None before scoring.
        reason: one of ``VERDICTS`` or ``FAILURES``.
        weight: assigned by the E-step; for the record only, ``fit`` recomputes it.
        extracted, rule: the answer the grader extracted, and the rule that matched.
        terms: parts of a combined reward by name, each in [0, 1], including ``correct``; else empty.
        meta: the problem's.
        origin: one of ``ORIGINS``; ``text`` ids were tokenized here and not sampled by a policy.
        position, tries: under ``sampler.tries`` the problem's place in the stream, and which of its tries
            this is, from 1 on; else None and 0. ``sample_index`` is then slot x K + draw.
    """

    problem_id: str
    question: str
    gold: str
    prompt: str
    prompt_ids: tuple[int, ...]
    completion: str
    completion_ids: tuple[int, ...]
    finish_reason: FinishReason
    step: int
    policy_step: int
    sample_index: int
    reward: float | None = None
    reason: str | None = None
    weight: float | None = None
    extracted: str | None = None
    rule: str | None = None
    terms: Mapping[str, float] = field(default_factory=dict)
    meta: Mapping[str, Any] = field(default_factory=dict)
    origin: str = "sampled"
    position: int | None = None
    tries: int = 0

    @property
    def tokens(self) -> int:
        """Prompt and completion tokens together."""
        return len(self.prompt_ids) + len(self.completion_ids)

    @property
    def correct(self) -> float:
        """The correctness part of the reward: all of it, unless the reward was shaped."""
        return self.terms.get("correct", self.reward or 0.0)

    @property
    def right(self) -> bool:
        """Whether the answer earned full correctness."""
        return self.correct == 1.0

    @property
    def failed(self) -> bool:
        """Whether the grader failed: the reward of 0 is then a placeholder, not a verdict."""
        return self.reason in FAILURES


@dataclass(frozen=True, slots=True)
class Group:
    """The K rationales of one problem from one E-step; statistics never cross groups."""

    problem_id: str
    step: int
    rationales: tuple[Rationale, ...]

    def __post_init__(self) -> None:
        assert self.rationales, "a group has at least one rationale"
        assert all(r.problem_id == self.problem_id and r.step == self.step for r in self.rationales)


def group_rationales(rationales: Iterable[Rationale]) -> list[Group]:
    """Collect rationales into groups by (step, problem), in order of first appearance."""
    by_key: dict[tuple[int, str], list[Rationale]] = {}
    for rationale in rationales:
        by_key.setdefault((rationale.step, rationale.problem_id), []).append(rationale)
    return [
        Group(pid, step, tuple(sorted(rows, key=lambda r: r.sample_index)))
        for (step, pid), rows in by_key.items()
    ]


def flatten(groups: Iterable[Group]) -> list[Rationale]:
    """All rationales, group by group."""
    return [rationale for group in groups for rationale in group.rationales]
