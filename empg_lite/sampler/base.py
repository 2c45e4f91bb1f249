"""What every sampling engine takes and gives."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import astuple, dataclass
from typing import Protocol

from empg_lite.errors import NumericalStop
from empg_lite.rationale import FinishReason
from empg_lite.sampler.draw import Decoding


@dataclass(frozen=True, slots=True)
class Prompt:
    """A prompt and one random key for each of its K samples."""

    ids: tuple[int, ...]
    keys: tuple[int, ...]

    def __post_init__(self) -> None:
        assert self.ids and self.keys


@dataclass(frozen=True, slots=True)
class Completion:
    """One sample as it was drawn.

    Attributes:
        ids: ``(T,)`` the tokens that completed the stop included: all of them are trained.
        text: ends before the stop.
        logprobs: ``(T,)`` nats under the policy at temperature 1. A diagnostic: no loss uses them.
    """

    ids: tuple[int, ...]
    text: str
    finish_reason: FinishReason
    logprobs: tuple[float, ...]


@dataclass(frozen=True, slots=True)
class SampleWork:
    """What an engine has computed since it was made.

    Attributes:
        prompt_tokens: tokens of prompts that went through the network.
        row_steps: rows computed at every decoding step, those that had ended already included.
        tokens: tokens drawn and kept.
        refresh_seconds: spent on a merged copy of the weights.
    """

    prompt_tokens: int = 0
    row_steps: int = 0
    tokens: int = 0
    refresh_seconds: float = 0.0

    def __add__(self, other: SampleWork) -> SampleWork:
        return SampleWork(*(a + b for a, b in zip(astuple(self), astuple(other), strict=True)))

    def since(self, before: SampleWork) -> SampleWork:
        """What was done after ``before`` was read."""
        return SampleWork(*(a - b for a, b in zip(astuple(self), astuple(before), strict=True)))


#: Called with (index of the prompt, index of the sample, completion) as soon as the sample has ended.
OnCompletion = Callable[[int, int, Completion], None]


class Sampler(Protocol):
    """An engine that draws completions; ``work`` grows with what it computes."""

    work: SampleWork

    def sample(
        self, prompts: Sequence[Prompt], decoding: Decoding, on_completion: OnCompletion | None = None
    ) -> list[list[Completion]]:
        """Draw ``len(prompt.keys)`` completions for each prompt.

        Args:
            on_completion: told of every completion once, in the order in which they end: grading and
                progress need not wait for the slowest.

        Returns:
            One list for each prompt, in order, with a completion for each of its keys.

        Raises:
            NumericalStop: the policy's logits are not finite.
        """
        ...

    def release(self) -> None:
        """Give back the memory that is kept between calls of ``sample``."""
        ...


def check_finite(logprobs: Sequence[Sequence[float]]) -> None:
    """Refuse samples of a policy that has gone NaN.

    Raises:
        NumericalStop: some log-probability is not finite.
    """
    if any(not math.isfinite(x) for row in logprobs for x in row):
        raise NumericalStop(
            "the policy's logits are not finite",
            "sampling",
            "lower optim.learning_rate and resume from a checkpoint",
        )
