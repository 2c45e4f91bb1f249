"""Drawing completions: one protocol, two engines."""

from __future__ import annotations

from collections.abc import Callable

from empg_lite.policy.policy import Policy
from empg_lite.sampler.base import Completion, OnCompletion, Prompt, Sampler, SampleWork
from empg_lite.sampler.draw import Decoding, sample_key
from empg_lite.sampler.generate import GenerateSampler
from empg_lite.sampler.native import NativeSampler

__all__ = [
    "Completion",
    "Decoding",
    "OnCompletion",
    "Prompt",
    "SampleWork",
    "Sampler",
    "choose_engine",
    "make_sampler",
    "sample_key",
]

ENGINES: dict[str, Callable[[Policy, int | None], Sampler]] = {
    "native": NativeSampler,
    "generate": GenerateSampler,
}


def choose_engine(asked: str, policy: Policy) -> str:
    """``auto``: our own engine, but Unsloth's ``generate`` where Unsloth has kernels of its own (a GPU)."""
    if asked != "auto":
        return asked
    return "generate" if policy.backend == "unsloth" and policy.device.type == "cuda" else "native"


def make_sampler(policy: Policy, engine: str = "auto", batch_rows: int | None = None) -> Sampler:
    """The engine of that name over a policy; ``batch_rows`` bounds the rows decoded at once."""
    return ENGINES[choose_engine(engine, policy)](policy, batch_rows)
