"""Drawing completions: one protocol, several engines."""

from __future__ import annotations

from typing import TYPE_CHECKING

from empg_lite.core.errors import UsageError
from empg_lite.recipe.schema import choose_engine
from empg_lite.sampler.base import Ask, Completion, OnCompletion, OnToken, Prompt, Sampler, SampleWork, Turns
from empg_lite.sampler.draw import Decoding, sample_key
from empg_lite.sampler.stops import StopRule, TextStream

if TYPE_CHECKING:
    from empg_lite.policy.policy import Policy

__all__ = [
    "Ask",
    "Completion",
    "Decoding",
    "OnCompletion",
    "OnToken",
    "Prompt",
    "SampleWork",
    "Sampler",
    "StopRule",
    "TextStream",
    "Turns",
    "make_sampler",
    "sample_key",
]


def make_sampler(
    policy: Policy, engine: str = "auto", batch_rows: int | None = None, merged: bool = True
) -> Sampler:
    """Create a sampling engine over a policy.

    Args:
        engine: ``native``, continuous batching; ``generate``, the backend's own ``generate``; ``unsloth``,
            the same where Unsloth has installed its kernels.
        batch_rows: most rows decoded at once; None for all.
        merged: let ``native`` decode over a merged copy of the weights.

    Raises:
        UsageError: ``unsloth`` over another backend.
    """
    engine = choose_engine(engine)
    if engine == "native":
        from empg_lite.sampler.native import NativeSampler

        return NativeSampler(policy, batch_rows, merged)
    if engine == "unsloth" and policy.backend != "unsloth":
        raise UsageError(
            f"the model was loaded by {policy.backend}",
            "sampler.engine: unsloth",
            "set model.backend: unsloth",
        )
    from empg_lite.sampler.generate import GenerateSampler

    return GenerateSampler(policy, batch_rows)
