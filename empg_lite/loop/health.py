"""Is there anything to learn from these samples? In plain words, with the one change that would help.

Pure functions of the figures that every step records; the preflight asks them before step 1, the loop after
each step. The thresholds are ours: those of the field's guides where they exist, stated with each.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

#: Shares of truncated rationales: above the first it is said, above the second a run is hopeless. Guides call
#: a run healthy below 0.3; at 0.9 hardly a sample can earn anything.
TRUNCATED_WARN, TRUNCATED_STOP = 0.3, 0.9
#: Share of problems with both right and wrong rationales under which a step says little.
MIXED_WARN = 0.1
#: Share of the answers handed to the grader on which it failed: above the first it is said; above the second,
#: two steps in a row, the rewards are noise.
FAILURES_WARN, FAILURES_STOP = 0.2, 0.5
#: Nats that a wrong rationale may lose in one fit while a right one gains less than the second figure.
WRONG_DIVES, RIGHT_RISES = 2.0, 0.2


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing that is wrong, or worth knowing.

    Attributes:
        kind: a stable name, for events and for not saying the same thing at every step.
        what: in plain words, with the figure.
        todo: the one change that would help.
        hopeless: nothing can be learned with these settings.
    """

    kind: str
    what: str
    todo: str
    hopeless: bool = False

    def __str__(self) -> str:
        return f"{self.what} · {self.todo}"


def graded_failures(record: Mapping[str, Any]) -> float:
    """Share of the rationales handed to the grader on which it failed; truncated ones never get there."""
    handed = 1.0 - record["completions/clipped_ratio"]
    return record["reasons/failed"] / handed if handed > 0 else 0.0


def diagnose(
    record: Mapping[str, Any], *, rows: int, max_new_tokens: int, error: str | None = None
) -> tuple[Finding, ...]:
    """What keeps a step's samples from teaching; empty where they are fine.

    Args:
        record: ``estep_metrics`` of the samples, and what the fit measured of its ``Drift``, if it did.
        rows: how many samples those are.
        error: what the last grader failure said.
    """
    truncated, failures = record["completions/clipped_ratio"], graded_failures(record)
    found: list[Finding] = []
    if truncated > TRUNCATED_WARN:
        what = f"{truncated:.0%} of the rationales were cut off at {max_new_tokens} tokens, which earns 0"
        todo = f"raise sampler.max_new_tokens, to {2 * max_new_tokens} for a start"
        found.append(Finding("truncated", what, todo, hopeless=truncated > TRUNCATED_STOP))
    if failures < 1 and truncated <= TRUNCATED_STOP:  # else hardly an answer is known
        found += _signal(record, rows, said=bool(found))
    if failures > FAILURES_WARN:
        said = f" ({error})" if error else ""
        what = f"the grader failed on {failures:.0%} of the answers{said}; those are left out"
        todo = "`empg-lite inspect` shows on what, `empg-lite grade` tries one"
        found.append(Finding("grader_failures", what, todo))
    if record["em/frac_wrong_paid"]:
        share = f"{record['em/frac_wrong_paid']:.0%}"
        what = f"in {share} of the problems no answer is right, yet rewards differ, which teaches to be wrong"
        todo = "let shaping multiply correctness (`math * concise:600`)"
        found.append(Finding("wrong_paid", what, todo))
    if record.get("em/dlogp_wrong", 0.0) < -WRONG_DIVES and record["em/dlogp_right"] < RIGHT_RISES:
        what = f"the fit took {-record['em/dlogp_wrong']:.1f} nats from each wrong rationale and gave the "
        what += f"right ones {record['em/dlogp_right']:.1f}: it pushes away more than it teaches"
        todo = "lower optim.learning_rate or em.passes, or take em.weighting: posterior"
        found.append(Finding("collapse", what, todo))
    return tuple(found)


def _signal(record: Mapping[str, Any], rows: int, said: bool) -> list[Finding]:
    """Whether rewards differ; ``said``: a cause has been named already."""
    if record["em/frac_all_right"] == 1.0:
        what = f"all of {rows} rationales are right: nothing left to learn here"
        return [Finding("all_right", what, "take harder problems")]
    if record["em/frac_all_wrong"] == 1.0:
        what = f"none of {rows} rationales earned anything ({_reasons(record)})"
        return [Finding("all_wrong", what, _help_for_wrong(record), hopeless=True)]
    if record["em/frac_mixed"] < MIXED_WARN and not said:
        easy = record["em/frac_all_right"] > record["em/frac_all_wrong"]
        what = f"only {record['em/frac_mixed']:.0%} of the problems have both right and wrong rationales, "
        what += f"most are all {'right' if easy else 'wrong'}"
        todo = "take harder problems" if easy else "take easier ones, or raise sampler.samples_per_problem"
        return [Finding("few_mixed", what, todo)]
    return []


def _help_for_wrong(record: Mapping[str, Any]) -> str:
    """What to do depends on whether the answers were cut off, missing or wrong."""
    if record["completions/clipped_ratio"] > TRUNCATED_WARN:
        return "let them end first: raise sampler.max_new_tokens"
    if record.get("reasons/no_answer", 0.0) > 0.5:
        return "data.prompt and data.reward disagree on how an answer is written: `empg-lite inspect`"
    return "take easier problems or a stronger model; `empg-lite check` tests the gold answers"


def _reasons(record: Mapping[str, Any]) -> str:
    """What became of the rationales, most frequent first: ``80% different, 20% no_answer``."""
    shares = {k.removeprefix("reasons/"): v for k, v in record.items() if k.startswith("reasons/") and v}
    shares.pop("failed", None)
    return ", ".join(f"{v:.0%} {k}" for k, v in sorted(shares.items(), key=lambda item: -item[1]))
