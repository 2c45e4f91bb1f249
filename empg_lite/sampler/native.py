"""The engine of our own: a prompt goes through once for all its samples, ended rows make room."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch

from empg_lite.core.control import stop_point
from empg_lite.core.rationale import FinishReason
from empg_lite.core.sizes import CACHE_ALIGN, IDLE, MIN_ROWS, round_up
from empg_lite.policy.merged import MergedCopy
from empg_lite.policy.network import Network
from empg_lite.policy.policy import Policy
from empg_lite.sampler.base import (
    Completion,
    Engine,
    OnCompletion,
    OnToken,
    Prompt,
    SampleWork,
    check_finite,
)
from empg_lite.sampler.decoder import Decoder
from empg_lite.sampler.draw import Decoding
from empg_lite.sampler.graphs import Graphs
from empg_lite.sampler.stops import StopRule

#: ``Decoder.step`` or what stands for it: (places, tokens that attention looks at).
Step = Callable[[int, int], None]


class NativeSampler(Engine):
    """Decoding in places of a fixed cache; see ``decoder``.

    Args:
        batch_rows: most rows decoded at once; None for all. A prompt with more samples goes through once for
            each part of them.
        merged: over a merged copy of the weights, made anew for every call of ``sample``; else through the
            policy's own modules.
    """

    def __init__(self, policy: Policy, batch_rows: int | None = None, merged: bool = True) -> None:
        super().__init__(policy, batch_rows)
        self.merged = merged
        self._stop = StopRule(policy.tokenizer, policy.stop_ids, policy.template.stop)
        self._copy: MergedCopy | None = None
        self._graphs: Graphs | None = None

    def draw(
        self, prompts: Sequence[Prompt], decoding: Decoding, ended: OnCompletion, grew: OnToken | None
    ) -> None:
        """See ``base.Engine``."""
        try:
            with self.policy.sampling():
                decoder, step = self._ready(prompts, decoding)
                self.work += _Batch(decoder, step, self._stop, prompts, ended, grew).run()
        finally:
            if self._graphs is None:  # nobody holds the copy's addresses
                self.release()
            else:
                self._count(self._graphs)

    def release(self) -> None:
        """Give back what is kept between calls: captured graphs with their pool of memory, and the cache and
        merged copy that they address. Without graphs nothing is kept."""
        self._copy = self._graphs = None

    def _count(self, graphs: Graphs) -> None:
        """Move what the graphs have counted into ``work``."""
        self.work += SampleWork(
            graphs_captured=graphs.captured, graphs_replayed=graphs.replayed, eager_steps=graphs.eager
        )
        graphs.captured = graphs.replayed = graphs.eager = 0
        self.graph_failure = self.graph_failure or graphs.failure

    def _ready(self, prompts: Sequence[Prompt], decoding: Decoding) -> tuple[Decoder, Step]:
        """A decoder with room for these prompts, over the weights as they are now."""
        policy, started = self.policy, time.perf_counter()
        if not self.merged:
            return self._decoder(policy.decoding_network, prompts, decoding)
        if self._copy is None:
            self._copy = MergedCopy(policy.causal, policy.dtype, policy.kernels)
        else:
            self._copy.refresh()
        if policy.device.type == "cuda":
            torch.cuda.synchronize(policy.device)
        self.work += SampleWork(refresh_seconds=time.perf_counter() - started)
        return self._decoder(self._copy.network, prompts, decoding)

    def _decoder(
        self, network: Network, prompts: Sequence[Prompt], decoding: Decoding
    ) -> tuple[Decoder, Step]:
        total = sum(len(prompt.keys) for prompt in prompts)
        rows = max(min(total, self.batch_rows or total), MIN_ROWS)
        room = max(len(prompt.ids) for prompt in prompts) + decoding.max_new_tokens
        if self._captures:
            room = round_up(room, CACHE_ALIGN)

        def decoder_of(rows: int, room: int) -> Decoder:
            return Decoder(network, self.policy.head_weight, self.policy.dtype, decoding, rows, room)

        if not self._captures:
            decoder = decoder_of(rows, room)
            return decoder, decoder.step
        graphs = self._graphs
        if graphs is not None and not graphs.fits(rows, room):  # room for both: they do not take turns
            rows, room = max(rows, len(graphs.decoder.tokens)), max(room, graphs.decoder.room)
            graphs = self._graphs = None  # its cache goes before the next one comes
        if graphs is None:
            graphs = self._graphs = Graphs(decoder_of(rows, room))
        graphs.decoder.decoding = decoding
        graphs.adapter = self.merged or self.policy.adapter_on
        return graphs.decoder, graphs.step

    @property
    def _captures(self) -> bool:
        return self.policy.device.type == "cuda"


@dataclass(slots=True)
class _Row:
    """One sample being drawn: which (prompt, sample) it is, its prompt's tokens, and what it has so far."""

    name: tuple[int, int]
    prompt_tokens: int
    ids: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)


class _Batch:
    """The rows of one call: who waits, and who sits at which place."""

    def __init__(
        self,
        decoder: Decoder,
        step: Step,
        stop: StopRule,
        prompts: Sequence[Prompt],
        ended: OnCompletion,
        grew: OnToken | None,
    ) -> None:
        self.decoder, self.step, self.stop, self.prompts = decoder, step, stop, prompts
        self.ended, self.grew = ended, grew
        # like with like: prompts of one length pad nothing when they go through
        self.waiting = deque(sorted(range(len(prompts)), key=lambda i: (len(prompts[i].ids), i)))
        self.rows: list[_Row | None] = []  # by place; None has ended
        self.work = SampleWork()

    def run(self) -> SampleWork:
        """Draw all of them; what it took."""
        while self._settle():
            stop_point()
            n = max(len(self.rows), MIN_ROWS)
            self.step(n, max(row.prompt_tokens + len(row.ids) for row in self.rows if row))
            self.work += SampleWork(row_steps=n)
            self._collect(0)
        return self.work

    def _settle(self) -> bool:
        """Close up and let the next prompts in where that pays; whether anybody is left."""
        while True:
            alive = [place for place, row in enumerate(self.rows) if row]
            if not alive and not self.waiting:
                return False
            room = len(self.decoder.tokens) - len(alive)
            enter = (
                bool(self.waiting) and self._next <= room and (not alive or room >= self._share(alive, room))
            )
            idle = len(self.rows) - len(alive)
            shrink = idle >= max(1, IDLE * len(self.rows)) and len(self.rows) > MIN_ROWS
            if idle and (enter or shrink):
                self.decoder.compact(alive)
                self.rows = [self.rows[place] for place in alive]
            if not enter:
                return True
            self._enter(room)  # and look again: a sample may be a single token

    @staticmethod
    def _share(alive: Sequence[int], room: int) -> float:
        return IDLE * (len(alive) + room)

    @property
    def _next(self) -> int:
        return len(self.prompts[self.waiting[0]].keys)

    def _enter(self, room: int) -> None:
        """As many waiting prompts as there is room for, each with all its samples."""
        first, entering = len(self.rows), []
        while self.waiting and self._next <= room:
            entering.append(self.waiting.popleft())
            room -= len(self.prompts[entering[-1]].keys)
        chosen = [self.prompts[i] for i in entering]
        owner = [at for at, prompt in enumerate(chosen) for _ in prompt.keys]
        keys = [key for prompt in chosen for key in prompt.keys]
        self.decoder.begin([prompt.ids for prompt in chosen], owner, keys, first)
        names = [(i, k) for i in entering for k in range(len(self.prompts[i].keys))]
        self.rows += [_Row(name, len(self.prompts[name[0]].ids)) for name in names]
        self.work += SampleWork(prompt_tokens=sum(len(p.ids) for p in chosen), row_steps=len(names))
        self._collect(first)

    def _collect(self, first: int) -> None:
        """Take what has just been drawn at the places from ``first`` on; let go who has ended."""
        here = slice(first, len(self.rows))
        tokens, logprobs = self.decoder.tokens[here].tolist(), self.decoder.logprobs[here].tolist()
        kept = 0
        for place, (token, logprob) in enumerate(zip(tokens, logprobs, strict=True), first):
            row = self.rows[place]
            if row is None:
                continue
            kept += 1
            row.ids.append(token)
            row.logprobs.append(logprob)
            stopped = self.stop.stopped(row.ids)
            if stopped or len(row.ids) == self.decoder.decoding.max_new_tokens:
                self.rows[place] = None
                self.ended(*row.name, self._completion(row, "stop" if stopped else "length"))
            elif self.grew:
                self.grew(*row.name, row.ids)
        self.work += SampleWork(tokens=kept)

    def _completion(self, row: _Row, finish_reason: FinishReason) -> Completion:
        check_finite([row.logprobs])
        return Completion(tuple(row.ids), self.stop.text(row.ids), finish_reason, tuple(row.logprobs))
