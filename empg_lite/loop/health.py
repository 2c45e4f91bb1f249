"""Diagnose whether samples carry a training signal, and name the one change that would help.

Pure functions of each step's metrics; preflight calls them before step 1, the loop after each step.
The truncation threshold is that of common guides to GRPO runs; the others are this project's.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

#: Share of truncated rationales above which to warn, and above which a run is hopeless. Guides call a run
#: healthy below 0.3; at 0.9 hardly any sample can earn a reward.
TRUNCATED_WARN, TRUNCATED_STOP = 0.3, 0.9
#: Share of problems with both right and wrong rationales below which to warn.
MIXED_WARN = 0.1
#: Under ``sampler.tries``: share of the problems given up above which to warn, among at least that many.
GIVEN_UP_WARN, LEAST_ENDED = 0.5, 8
#: Share of graded answers on which the grader failed, above which to warn; above the second, two steps in a
#: row, training stops.
FAILURES_WARN, FAILURES_STOP = 0.2, 0.5
#: Nats a wrong rationale may lose in one fit while a right one gains less than the second value.
WRONG_DIVES, RIGHT_RISES = 2.0, 0.2


@dataclass(frozen=True, slots=True)
class Finding:
    """One problem with the samples.

    Attributes:
        kind: a stable name, for events and for avoiding repeats.
        what: the problem, with its figure.
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
    """Share of graded rationales on which the grader failed; truncated ones are not graded."""
    handed = 1.0 - record["completions/clipped_ratio"]
    return record["reasons/failed"] / handed if handed > 0 else 0.0


def diagnose(
    record: Mapping[str, Any], *, rows: int, max_new_tokens: int, error: str | None = None
) -> tuple[Finding, ...]:
    """Problems with a step's samples; empty if there are none.

    Args:
        record: ``estep_metrics`` of the samples, and the fit's ``Drift`` metrics if measured.
        rows: number of samples.
        error: message of the last grader failure.
    """
    truncated, failures = record["completions/clipped_ratio"], graded_failures(record)
    found: list[Finding] = []
    if truncated > TRUNCATED_WARN:
        what = f"{truncated:.0%} of the rationales were cut off at {max_new_tokens} tokens and earn 0"
        todo = f"raise sampler.max_new_tokens, to {2 * max_new_tokens} to start with"
        found.append(Finding("truncated", what, todo, hopeless=truncated > TRUNCATED_STOP))
    if failures < 1 and truncated <= TRUNCATED_STOP:  # else hardly any answer was graded
        found += _signal(record, rows, said=bool(found))
    if failures > FAILURES_WARN:
        said = f" ({error})" if error else ""
        what = f"the grader failed on {failures:.0%} of the answers{said}; they are left out"
        todo = "see `empg-lite inspect`, and test one with `empg-lite grade`"
        found.append(Finding("grader_failures", what, todo))
    if record["em/frac_wrong_paid"]:
        share = f"{record['em/frac_wrong_paid']:.0%}"
        what = f"in {share} of the problems no answer is right but rewards differ, which trains wrong answers"
        todo = "multiply shaping by correctness (`math * concise:600`)"
        found.append(Finding("wrong_paid", what, todo))
    if record.get("em/dlogp_wrong", 0.0) < -WRONG_DIVES and record["em/dlogp_right"] < RIGHT_RISES:
        what = f"the fit took {-record['em/dlogp_wrong']:.1f} nats from each wrong rationale and gave right "
        what += f"ones {record['em/dlogp_right']:.1f}: it suppresses more than it reinforces"
        todo = "lower optim.learning_rate or em.passes, or use em.weighting: posterior"
        found.append(Finding("collapse", what, todo))
    return tuple(found)


def _signal(record: Mapping[str, Any], rows: int, said: bool) -> list[Finding]:
    """Whether rewards differ; ``said``: a cause was already found."""
    if record.get("em/frac_text") == 1.0 and record["em/frac_all_right"] > 0.5:
        return []  # written solutions are not the policy's own: to fit right ones alone is the point
    if record["em/frac_all_right"] == 1.0:
        what = f"all {rows} rationales are right: nothing left to learn"
        return [Finding("all_right", what, "use harder problems")]
    if record["em/frac_all_wrong"] == 1.0:
        what = f"none of {rows} rationales earned a reward ({_reasons(record)})"
        return [Finding("all_wrong", what, _help_for_wrong(record), hopeless=True)]
    if "em/given_up" in record:  # drawn in turns: a problem's samples need not differ
        return _given_up(record, said)
    if record["em/frac_mixed"] < MIXED_WARN and not said:
        easy = record["em/frac_all_right"] > record["em/frac_all_wrong"]
        what = f"only {record['em/frac_mixed']:.0%} of the problems have both right and wrong rationales, "
        what += f"most are all {'right' if easy else 'wrong'}"
        todo = "use harder problems" if easy else "use easier ones, or raise sampler.samples_per_problem"
        return [Finding("few_mixed", what, todo)]
    return []


def _given_up(record: Mapping[str, Any], said: bool) -> list[Finding]:
    """Whether slots spend their tries on problems that are never answered."""
    given_up, ended = record["em/given_up"], record["em/finished"]
    if said or ended < LEAST_ENDED or given_up <= GIVEN_UP_WARN * ended:
        return []
    what = f"{given_up / ended:.0%} of the problems that ended were given up after sampler.tries"
    return [Finding("given_up", what, "if it stays so, use easier problems or fewer sampler.tries")]


def _help_for_wrong(record: Mapping[str, Any]) -> str:
    """The fix depends on whether answers were truncated, missing or wrong."""
    if record["completions/clipped_ratio"] > TRUNCATED_WARN:
        return "raise sampler.max_new_tokens"
    if record.get("reasons/no_answer", 0.0) > 0.5:
        return "data.prompt and data.reward expect different answer formats; see `empg-lite inspect`"
    return "use easier problems or a stronger model; `empg-lite check` tests the gold answers"


def _reasons(record: Mapping[str, Any]) -> str:
    """Verdicts by frequency: ``80% different, 20% no_answer``."""
    shares = {k.removeprefix("reasons/"): v for k, v in record.items() if k.startswith("reasons/") and v}
    shares.pop("failed", None)
    return ", ".join(f"{v:.0%} {k}" for k, v in sorted(shares.items(), key=lambda item: -item[1]))
