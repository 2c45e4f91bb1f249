"""What every sampling engine takes and gives."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import astuple, dataclass
from typing import Protocol

import torch

from empg_lite.core.errors import NumericalStop, OutOfMemory, forget_frames, is_out_of_memory
from empg_lite.core.rationale import FinishReason
from empg_lite.core.sizes import MIN_ROWS
from empg_lite.policy.policy import Policy
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
        graphs_captured, graphs_replayed: CUDA graphs, two a decoding step (network, draw).
        eager_steps: what such graphs were meant for and could not be captured, by the same count.
    """

    prompt_tokens: int = 0
    row_steps: int = 0
    tokens: int = 0
    refresh_seconds: float = 0.0
    graphs_captured: int = 0
    graphs_replayed: int = 0
    eager_steps: int = 0

    def __add__(self, other: SampleWork) -> SampleWork:
        return SampleWork(*(a + b for a, b in zip(astuple(self), astuple(other), strict=True)))

    def since(self, before: SampleWork) -> SampleWork:
        """What was done after ``before`` was read."""
        return SampleWork(*(a - b for a, b in zip(astuple(self), astuple(before), strict=True)))


#: Called with (index of the prompt, index of the sample, completion) as soon as the sample has ended.
OnCompletion = Callable[[int, int, Completion], None]

#: Called with (index of the prompt, index of the sample, its tokens so far) after every token that does not
#: end the sample. Where memory ran out a sample begins again, and the same tokens are told once more.
OnToken = Callable[[int, int, Sequence[int]], None]


class Sampler(Protocol):
    """An engine that draws completions; ``work`` grows with what it computes.

    Attributes:
        batch_rows: most rows drawn at once; smaller after memory ran out.
        graph_failure: why a GPU decodes without captured graphs; None where it has them, or there is no GPU.
    """

    work: SampleWork
    batch_rows: int | None
    graph_failure: str | None

    def sample(
        self,
        prompts: Sequence[Prompt],
        decoding: Decoding,
        on_completion: OnCompletion | None = None,
        on_token: OnToken | None = None,
    ) -> list[list[Completion]]:
        """Draw ``len(prompt.keys)`` completions for each prompt.

        Args:
            on_completion: told of every completion once, in the order in which they end: grading and
                progress need not wait for the slowest.
            on_token: told of the samples as they grow, for somebody who watches; nothing that is drawn
                depends on it.

        Returns:
            One list for each prompt, in order, with a completion for each of its keys.

        Raises:
            NumericalStop: the policy's logits are not finite.
            OutOfMemory: with as few rows at once as can be.
        """
        ...

    def release(self) -> None:
        """Give back the memory that is kept between calls of ``sample``."""
        ...


class Engine(ABC):
    """What the engines share: where memory runs out, fewer rows are drawn at once, and the samples stay the
    same, for each has random numbers of its own.

    Args:
        batch_rows: most rows drawn at once; None for all.
    """

    def __init__(self, policy: Policy, batch_rows: int | None = None) -> None:
        self.policy, self.batch_rows = policy, batch_rows
        self.work = SampleWork()
        self.graph_failure: str | None = None

    @abstractmethod
    def draw(
        self, prompts: Sequence[Prompt], decoding: Decoding, ended: OnCompletion, grew: OnToken | None
    ) -> None:
        """Draw all of them, telling ``ended`` of each completion once, and ``grew`` of each token before."""

    def sample(
        self,
        prompts: Sequence[Prompt],
        decoding: Decoding,
        on_completion: OnCompletion | None = None,
        on_token: OnToken | None = None,
    ) -> list[list[Completion]]:
        """See ``Sampler``."""
        results: dict[tuple[int, int], Completion] = {}
        places = [[(i, k) for k in range(len(prompt.keys))] for i, prompt in enumerate(prompts)]
        parts = self._parts(places)

        def ended(part: int, at: int, completion: Completion) -> None:
            place = parts[part][at]
            results[place] = completion
            if on_completion:
                on_completion(*place, completion)

        def grew(part: int, at: int, ids: Sequence[int]) -> None:
            assert on_token is not None
            on_token(*parts[part][at], ids)

        while parts:
            asked = [Prompt(prompts[p[0][0]].ids, tuple(prompts[i].keys[k] for i, k in p)) for p in parts]
            try:
                self.draw(asked, decoding, ended, grew if on_token else None)
                break
            except (RuntimeError, MemoryError) as error:
                if not is_out_of_memory(error):
                    raise
                forget_frames(failure := error)  # they hold the decoder that did not fit
            longest = max(len(prompt.ids) for prompt in asked) + decoding.max_new_tokens
            self._shrink(failure, sum(map(len, parts)), longest)
            # What has ended is kept, the rest begins again.
            parts = self._parts([[place for place in row if place not in results] for row in places])
        return [[results[place] for place in row] for row in places]

    def _parts(self, places: Sequence[list[tuple[int, int]]]) -> list[list[tuple[int, int]]]:
        """Each prompt's samples, cut where they are more than may be drawn at once."""
        n = self.batch_rows or max(map(len, places), default=1)
        return [row[at : at + n] for row in places for at in range(0, len(row), n)]

    def _shrink(self, error: BaseException, rows: int, longest: int) -> None:
        """Half of the rows that could be drawn at once, and what the engine keeps given back.

        Raises:
            OutOfMemory: they are as few as can be.
        """
        rows = min(self.batch_rows or rows, rows)
        if rows <= MIN_ROWS:
            raise OutOfMemory(
                f"{rows} rows of {longest} tokens do not fit in memory",
                "sampling",
                "lower sampler.max_new_tokens, or set sampler.merged: false",
            ) from error
        self.batch_rows = max(rows // 2, MIN_ROWS)
        self.release()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()

    def release(self) -> None:
        """Give back the memory that is kept between calls of ``sample``; most keep none."""
        return None


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
