"""What every sampling engine takes and returns, and the out-of-memory back-off that they share."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import astuple, dataclass
from functools import partial
from typing import TYPE_CHECKING, Protocol

import torch

from empg_lite.core.errors import NumericalStop, OutOfMemory, forget_frames, is_out_of_memory
from empg_lite.core.sizes import MIN_ROWS
from empg_lite.sampler.stops import StopRule

if TYPE_CHECKING:
    from empg_lite.core.rationale import FinishReason
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
    """One sample as drawn.

    Attributes:
        ids: ``(T,)`` tokens, including those of the stop: all of them are trained.
        text: ends before the stop.
        logprobs: ``(T,)`` nats under the policy at temperature 1. A diagnostic: no loss uses them.
    """

    ids: tuple[int, ...]
    text: str
    finish_reason: FinishReason
    logprobs: tuple[float, ...]


@dataclass(frozen=True, slots=True)
class SampleWork:
    """What an engine has computed since it was created.

    Attributes:
        prompt_tokens: prompt tokens computed; what all prompts share counts once a call.
        row_steps: rows computed, summed over decoding steps, finished rows included.
        tokens: tokens drawn and kept.
        refresh_seconds: time spent refreshing the merged copy of the weights.
        graphs_captured, graphs_replayed: CUDA graphs, two for each decoding step (network, draw).
        eager_steps: calls that ran eagerly because capturing failed; two for each decoding step.
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
        """The work done after ``before`` was read."""
        return SampleWork(*(a - b for a, b in zip(astuple(self), astuple(before), strict=True)))


@dataclass(frozen=True, slots=True)
class Ask:
    """What a slot draws next: a continuation of this prompt with the random numbers of this key."""

    prompt: tuple[int, ...]
    key: int


class Turns(Protocol):
    """Samples drawn one after another in each of several slots: verdicts say what comes next.

    Attributes:
        prompts: all that may be asked.
    """

    @property
    def prompts(self) -> Sequence[tuple[int, ...]]: ...

    def __len__(self) -> int:
        """Number of slots."""

    def ask(self, slot: int) -> Ask | None:
        """What the slot draws next, until ``ended`` says that it was drawn; None: nothing more.

        Waits for the verdict on its last sample.
        """

    def ready(self, slot: int) -> bool:
        """Whether ``ask`` would not wait."""

    def ended(self, slot: int, completion: Completion) -> None:
        """The slot's sample is drawn."""


#: Called with (prompt index, sample index, completion) as soon as a sample finishes.
OnCompletion = Callable[[int, int, Completion], None]

#: Called with (prompt index, sample index, tokens so far) after every token that does not finish the sample.
#: After an out-of-memory back-off a sample restarts, and its tokens are reported again.
OnToken = Callable[[int, int, Sequence[int]], None]


class Sampler(ABC):
    """An engine that draws completions. After running out of memory it draws fewer rows at once; the samples
    stay the same, because each has its own random numbers.

    Attributes:
        work: accumulates what the engine computes.
        batch_rows: most rows drawn at once, None for all; reduced after running out of memory.
        graph_failure: why a GPU decodes without captured graphs; None where it has them, or without a GPU.
    """

    def __init__(self, policy: Policy, batch_rows: int | None = None) -> None:
        self.policy, self.batch_rows = policy, batch_rows
        self.work = SampleWork()
        self.graph_failure: str | None = None
        self._stop = StopRule(policy.tokenizer, policy.stop_ids, policy.template.stop)

    @abstractmethod
    def draw(
        self,
        prompts: Sequence[Prompt],
        decoding: Decoding,
        on_completion: OnCompletion,
        on_token: OnToken | None,
    ) -> None:
        """Draw all samples, reporting each completion once and each token before it."""

    @abstractmethod
    def draw_turns(self, turns: Turns, decoding: Decoding) -> None:
        """Draw until no slot asks for more."""

    def sample(
        self,
        prompts: Sequence[Prompt],
        decoding: Decoding,
        on_completion: OnCompletion | None = None,
        on_token: OnToken | None = None,
    ) -> list[list[Completion]]:
        """Draw ``len(prompt.keys)`` completions for each prompt.

        Args:
            on_completion: called once for every completion, in the order in which they finish, so that
                grading and progress need not wait for the slowest.
            on_token: called as samples grow, for display; no sample depends on it.

        Returns:
            One list for each prompt, in order, with a completion for each of its keys.

        Raises:
            NumericalStop: the policy's logits are not finite.
            OutOfMemory: at the smallest batch size.
        """
        results: dict[tuple[int, int], Completion] = {}
        indices = [[(i, k) for k in range(len(prompt.keys))] for i, prompt in enumerate(prompts)]
        parts = self._split(indices)

        def completed(part: int, at: int, completion: Completion) -> None:
            index = parts[part][at]
            results[index] = completion
            if on_completion:
                on_completion(*index, completion)

        def grew(part: int, at: int, ids: Sequence[int]) -> None:
            assert on_token is not None
            on_token(*parts[part][at], ids)

        while parts:
            batch = [Prompt(prompts[p[0][0]].ids, tuple(prompts[i].keys[k] for i, k in p)) for p in parts]
            longest = max(len(prompt.ids) for prompt in batch) + decoding.max_new_tokens
            if self._fits(
                partial(self.draw, batch, decoding, completed, grew if on_token else None),
                sum(map(len, parts)),
                longest,
            ):
                break
            # Finished samples are kept, the others restart.
            parts = self._split([[index for index in row if index not in results] for row in indices])
        return [[results[index] for index in row] for row in indices]

    def take_turns(self, turns: Turns, decoding: Decoding) -> None:
        """Draw the samples of slots, each one after the verdict on the last one of its slot.

        The samples are the same whatever the engine, the rows drawn at once and the order in which they end.

        Raises:
            NumericalStop, OutOfMemory: see ``sample``.
        """
        longest = max(map(len, turns.prompts)) + decoding.max_new_tokens
        while not self._fits(partial(self.draw_turns, turns, decoding), len(turns), longest):
            pass  # samples that ended are kept, the others restart

    def _fits(self, draw: Callable[[], None], rows: int, longest: int) -> bool:
        """Draw; False if memory ran out, after which fewer rows are drawn at once.

        Raises:
            OutOfMemory: at the smallest batch size.
        """
        try:
            draw()
            return True
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            forget_frames(failure := error)  # they hold the decoder that did not fit
        self._shrink(failure, rows, longest)
        return False

    def _split(self, indices: Sequence[list[tuple[int, int]]]) -> list[list[tuple[int, int]]]:
        """Each prompt's samples, split where there are more than may be drawn at once."""
        n = self.batch_rows or max(map(len, indices), default=1)
        return [row[at : at + n] for row in indices for at in range(0, len(row), n)]

    def _shrink(self, error: BaseException, rows: int, longest: int) -> None:
        """Halve the rows drawn at once and free what the engine keeps.

        Raises:
            OutOfMemory: already at the smallest batch size.
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
        """Free the memory kept between calls of ``sample``; most engines keep none."""
        return None


def check_finite(logprobs: Sequence[Sequence[float]]) -> None:
    """Reject samples of a policy whose weights have become NaN.

    Raises:
        NumericalStop: a log-probability is not finite.
    """
    if any(not math.isfinite(x) for row in logprobs for x in row):
        raise NumericalStop(
            "the policy's logits are not finite",
            "sampling",
            "lower optim.learning_rate and resume from a checkpoint",
        )
