"""Drawing completions: one protocol, several engines."""

from __future__ import annotations

from empg_lite.core.errors import UsageError
from empg_lite.policy.policy import Policy
from empg_lite.recipe.schema import choose_engine
from empg_lite.sampler.base import Completion, OnCompletion, OnToken, Prompt, Sampler, SampleWork
from empg_lite.sampler.draw import Decoding, sample_key
from empg_lite.sampler.generate import GenerateSampler
from empg_lite.sampler.native import NativeSampler
from empg_lite.sampler.stops import StopRule, TextStream

__all__ = [
    "Completion",
    "Decoding",
    "OnCompletion",
    "OnToken",
    "Prompt",
    "SampleWork",
    "Sampler",
    "StopRule",
    "TextStream",
    "make_sampler",
    "sample_key",
]


def make_sampler(
    policy: Policy, engine: str = "auto", batch_rows: int | None = None, merged: bool = True
) -> Sampler:
    """The engine of that name over a policy.

    Args:
        engine: ``native`` is ours; ``generate`` is the backend's own ``generate``; ``unsloth`` is the same
            where Unsloth has put its kernels into it.
        batch_rows: most rows decoded at once; None: all.
        merged: let ``native`` decode over a merged copy of the weights.

    Raises:
        UsageError: ``unsloth`` over another backend.
    """
    engine = choose_engine(engine)
    if engine == "native":
        return NativeSampler(policy, batch_rows, merged)
    if engine == "unsloth" and policy.backend != "unsloth":
        raise UsageError(
            f"the model was loaded by {policy.backend}",
            "sampler.engine: unsloth",
            "set model.backend: unsloth",
        )
    return GenerateSampler(policy, batch_rows)
