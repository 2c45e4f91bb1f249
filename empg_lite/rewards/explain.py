"""A verdict as steps in plain words: what was read, by which rule, and what was compared with what."""

from __future__ import annotations

from typing import TYPE_CHECKING

from empg_lite.rewards.kind import MAX_TEXT, Case
from empg_lite.rewards.spec import parse_spec

if TYPE_CHECKING:
    from empg_lite.rewards.kind import Verdict

_FAILED = {"timeout": "ran out of time", "memory": "ran out of memory", "crash": "crashed"}


def explain(
    spec: str, gold: str, prediction: str, question: str | None = None, *, verdict: Verdict | None = None
) -> list[str]:
    """The steps of a verdict, in order.

    Args:
        spec: the reward, as ``Grader.grade`` takes it.
        gold: the gold answer.
        prediction: the text that was graded.
        question: the problem's text, where the grader knew it.
        verdict: what the grader returned; the last step then states it. Without it the steps end where
            algebra in the worker would begin.

    Raises:
        ValueError: ``spec`` is invalid.
    """
    parsed = parse_spec(spec)
    if len(prediction) > MAX_TEXT:
        steps = [f"a text over {MAX_TEXT} characters is not read"]
    else:
        steps = parsed.kind.explain(Case(gold, prediction, question), parsed.correctness.argument)
    if verdict is None:
        return steps
    if verdict.terms:
        sign = " + " if parsed.added else " * "
        terms = sign.join(f"{name} {value:.3g}" for name, value in verdict.terms.items())
        steps.append(f"{'the mean of' if parsed.added else 'multiplied'} its terms: {terms}")
    return [*steps, _ending(verdict)]


def _ending(verdict: Verdict) -> str:
    if verdict.failed:
        return f"the grader {_FAILED[verdict.reason]}: no verdict, the row is left out of training"
    if verdict.reason == "parse":
        return "reward 0: the worker could not read one of the two as mathematics"
    return f"reward {verdict.reward:g}: {verdict.reason.replace('_', ' ')}"
