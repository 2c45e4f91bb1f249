"""Which samples run, wait and end while a decoder decodes."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from empg_lite.core.control import stop_point
from empg_lite.core.sizes import IDLE, MIN_ROWS
from empg_lite.sampler.base import Completion, SampleWork, check_finite

if TYPE_CHECKING:
    from empg_lite.core.rationale import FinishReason
    from empg_lite.sampler.base import Ask, OnCompletion, OnToken, Prompt, Turns
    from empg_lite.sampler.decoder import Decoder
    from empg_lite.sampler.stops import StopRule

#: ``Decoder.step`` or its captured equivalent: (rows, cached tokens that attention reads).
Step = Callable[[int, int], None]


@dataclass(slots=True)
class _Sequence:
    """One running sample: its (prompt, sample) indices, its prompt's length, and its tokens so far."""

    index: tuple[int, int]
    prompt_tokens: int
    ids: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)


class Schedule(ABC):
    """The waiting and running samples of one call."""

    def __init__(self, decoder: Decoder, step: Step, stop: StopRule) -> None:
        self.decoder, self.step, self.stop = decoder, step, stop
        self.running: list[_Sequence | None] = []  # by row; None has ended
        self.work = SampleWork()

    def run(self) -> SampleWork:
        """Draw every sample; returns the work done."""
        while self._schedule():
            stop_point()
            n = max(len(self.running), MIN_ROWS)
            self.step(n, max(s.prompt_tokens + len(s.ids) for s in self.running if s))
            self.work += SampleWork(row_steps=n)
            self._append_tokens(range(len(self.running)))
        return self.work

    def _own(self, prompts: Iterable[Sequence[int]]) -> int:
        """Tokens of these prompts behind what all share, which has been computed."""
        return sum(len(prompt) - self.decoder.prefix_len for prompt in prompts)

    @abstractmethod
    def _schedule(self) -> bool:
        """Fill rows where that pays; False when all samples are drawn, else at least one is running."""

    @abstractmethod
    def _ended(self, row: int, sequence: _Sequence, completion: Completion) -> None:
        """A sample has ended; its row is free."""

    def _grew(self, sequence: _Sequence) -> None:  # noqa: B027 (most schedules do not report tokens)
        """A sample has one token more and goes on."""

    def _compact(self, keep: Sequence[int]) -> list[int]:
        """Keep these rows, in front; see ``Decoder.compact``."""
        came_from = self.decoder.compact(keep)
        self.running = [self.running[row] for row in came_from]
        return came_from

    def _append_tokens(self, rows: Iterable[int]) -> None:
        """Append the tokens just drawn in these rows; report and drop the samples that end with them."""
        n = len(self.running)
        tokens, logprobs = self.decoder.tokens[:n].tolist(), self.decoder.logprobs[:n].tolist()
        kept = 0
        for row in rows:
            sequence = self.running[row]
            if sequence is None:
                continue
            kept += 1
            sequence.ids.append(tokens[row])
            sequence.logprobs.append(logprobs[row])
            stopped = self.stop.stopped(sequence.ids)
            if stopped or len(sequence.ids) == self.decoder.decoding.max_new_tokens:
                self.running[row] = None
                reason: FinishReason = "stop" if stopped else "length"
                self._ended(row, sequence, self._completion(sequence, reason))
            else:
                self._grew(sequence)
        self.work += SampleWork(tokens=kept)

    def _completion(self, sequence: _Sequence, finish_reason: FinishReason) -> Completion:
        check_finite([sequence.logprobs])
        ids = tuple(sequence.ids)
        return Completion(ids, self.stop.text(ids), finish_reason, tuple(sequence.logprobs))


class InGroups(Schedule):
    """A number of samples of each prompt, known from the start."""

    def __init__(
        self,
        decoder: Decoder,
        step: Step,
        stop: StopRule,
        prompts: Sequence[Prompt],
        on_completion: OnCompletion,
        on_token: OnToken | None,
    ) -> None:
        super().__init__(decoder, step, stop)
        self.prompts, self.on_completion, self.on_token = prompts, on_completion, on_token
        # Sorted by length: prompts of one length need no padding in prefill.
        self.waiting = deque(sorted(range(len(prompts)), key=lambda i: (len(prompts[i].ids), i)))

    def _schedule(self) -> bool:
        while True:
            alive = [row for row, sequence in enumerate(self.running) if sequence]
            if not alive and not self.waiting:
                return False
            free = len(self.decoder.tokens) - len(alive)
            enough_free = not alive or free >= IDLE * (len(alive) + free)
            admit = bool(self.waiting) and self._next_samples <= free and enough_free
            idle = len(self.running) - len(alive)
            shrink = idle >= max(1, IDLE * len(self.running)) and len(self.running) > MIN_ROWS
            if idle and (admit or shrink):
                self._compact(alive)
            if not admit:
                return True
            self._prefill(free)  # then look again: a sample may end at its first token

    @property
    def _next_samples(self) -> int:
        return len(self.prompts[self.waiting[0]].keys)

    def _prefill(self, free: int) -> None:
        """Move waiting prompts, each with all its samples, into the free rows."""
        first, admitted = len(self.running), []
        while self.waiting and self._next_samples <= free:
            admitted.append(self.waiting.popleft())
            free -= len(self.prompts[admitted[-1]].keys)
        chosen = [self.prompts[i] for i in admitted]
        owner = [at for at, prompt in enumerate(chosen) for _ in prompt.keys]
        keys = [key for prompt in chosen for key in prompt.keys]
        rows = range(first, first + len(owner))
        self.decoder.prefill([prompt.ids for prompt in chosen], owner, keys, rows)
        indices = [(i, k) for i in admitted for k in range(len(self.prompts[i].keys))]
        self.running += [_Sequence(index, len(self.prompts[index[0]].ids)) for index in indices]
        self.work += SampleWork(prompt_tokens=self._own(p.ids for p in chosen), row_steps=len(indices))
        self._append_tokens(rows)

    def _ended(self, row: int, sequence: _Sequence, completion: Completion) -> None:
        self.on_completion(*sequence.index, completion)

    def _grew(self, sequence: _Sequence) -> None:
        if self.on_token:
            self.on_token(*sequence.index, sequence.ids)


class InTurns(Schedule):
    """One sample after another in each slot; the verdict on the last one says what comes next.

    A slot that asks the same prompt again keeps its row, where the prompt is still cached; one that goes on
    to another prompt waits until enough others do, because a prefill costs about a decoding step. A row whose
    verdict is not in yet waits in its place.
    """

    def __init__(self, decoder: Decoder, step: Step, stop: StopRule, turns: Turns) -> None:
        super().__init__(decoder, step, stop)
        self.turns = turns
        asks = [(i, ask) for i in range(len(turns)) if (ask := turns.ask(i))]
        self.waiting = deque(sorted(asks, key=lambda item: (len(item[1].prompt), item[0])))
        self.held: dict[int, int] = {}  # row -> slot, until the verdict on its last sample is in
        self._prompts: dict[int, tuple[int, ...]] = {}  # slot -> what its row has cached

    def _schedule(self) -> bool:
        while True:
            self._take_answers()
            alive = [row for row, sequence in enumerate(self.running) if sequence]
            free = len(self.decoder.tokens) - len(alive) - len(self.held)
            ready = min(free, len(self.waiting))
            if ready and ready >= IDLE * len(alive):
                self._prefill(ready)  # then look again: a sample may end at its first token
            elif alive:
                self._shrink(sorted([*alive, *self.held]))
                return True
            elif self.held:
                self._take_answers(wait=True)
            else:
                return False

    def _take_answers(self, wait: bool = False) -> None:
        """Go on in the rows whose verdict is in.

        Args:
            wait: for one verdict, if none is in.
        """
        again: list[tuple[int, Ask]] = []
        for row, slot in list(self.held.items()):
            if not (wait or self.turns.ready(slot)):
                continue
            wait = False
            del self.held[row]
            ask = self.turns.ask(slot)
            if ask and ask.prompt == self._prompts[slot]:
                again.append((row, ask))
                self.running[row] = _Sequence((slot, 0), len(ask.prompt))
            elif ask:
                self.waiting.append((slot, ask))
        if again:
            rows, asks = zip(*again, strict=True)
            self.decoder.restart(rows, [ask.prompt for ask in asks], [ask.key for ask in asks])

    def _shrink(self, keep: Sequence[int]) -> None:
        """Compact where many rows are idle and nothing waits for them."""
        idle, size = len(self.running) - len(keep), len(self.running)
        if idle and not self.waiting and idle >= IDLE * size and size > MIN_ROWS:
            came_from = self._compact(keep)
            self.held = {at: self.held[row] for at, row in enumerate(came_from) if row in self.held}

    def _prefill(self, n: int) -> None:
        """Move n waiting slots into free rows, between the others where there are any."""
        chosen = [self.waiting.popleft() for _ in range(n)]
        rows = [row for row, s in enumerate(self.running) if s is None and row not in self.held][:n]
        rows += range(len(self.running), len(self.running) + n - len(rows))
        self.running += [None] * (max(rows) + 1 - len(self.running))
        prompts = [ask.prompt for _, ask in chosen]
        self.decoder.prefill(prompts, range(n), [ask.key for _, ask in chosen], rows)
        for row, (slot, ask) in zip(rows, chosen, strict=True):
            self.running[row] = _Sequence((slot, 0), len(ask.prompt))
            self._prompts[slot] = ask.prompt
        self.work += SampleWork(prompt_tokens=self._own(prompts), row_steps=n)
        self._append_tokens(rows)

    def _ended(self, row: int, sequence: _Sequence, completion: Completion) -> None:
        slot = sequence.index[0]
        self.held[row] = slot
        self.turns.ended(slot, completion)
