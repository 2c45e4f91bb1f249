"""Continuous batching: a prompt is prefilled once for all its samples, and finished rows free their slots."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch

from empg_lite.core.control import stop_point
from empg_lite.core.sizes import IDLE, MIN_ROWS, cache_len, decoder_slots
from empg_lite.policy.merged import MergedCopy
from empg_lite.sampler.base import Completion, Sampler, SampleWork, check_finite
from empg_lite.sampler.decoder import Decoder
from empg_lite.sampler.graphs import Graphs

if TYPE_CHECKING:
    from empg_lite.core.rationale import FinishReason
    from empg_lite.policy.network import Network
    from empg_lite.policy.policy import Policy
    from empg_lite.sampler.base import OnCompletion, OnToken, Prompt
    from empg_lite.sampler.draw import Decoding
    from empg_lite.sampler.stops import StopRule

#: ``Decoder.step`` or its captured equivalent: (slots, cached tokens that attention reads).
Step = Callable[[int, int], None]


class NativeSampler(Sampler):
    """Continuous batching over a static KV cache; see ``decoder``.

    Args:
        batch_rows: most rows decoded at once; None for all. A prompt with more samples is prefilled once for
            each batch of them.
        merged: decode over a merged copy of the weights, refreshed at every call of ``sample``, instead of
            the policy's own modules.
    """

    def __init__(self, policy: Policy, batch_rows: int | None = None, merged: bool = True) -> None:
        super().__init__(policy, batch_rows)
        self.merged = merged
        self._copy: MergedCopy | None = None
        self._graphs: Graphs | None = None

    def draw(
        self,
        prompts: Sequence[Prompt],
        decoding: Decoding,
        on_completion: OnCompletion,
        on_token: OnToken | None,
    ) -> None:
        """See ``base.Sampler``."""
        try:
            with self.policy.sampling():
                decoder, step = self._decoder(self._network(), prompts, decoding)
                scheduler = _Scheduler(decoder, step, self._stop, prompts, on_completion, on_token)
                self.work += scheduler.run()
        finally:
            if self._graphs is None:  # no graph holds the copy's addresses
                self.release()
            else:
                self._count(self._graphs)

    def release(self) -> None:
        """Free what is kept between calls: captured graphs with their memory pool, and the cache and merged
        copy that they address. Without graphs nothing is kept."""
        self._copy = self._graphs = None

    def _count(self, graphs: Graphs) -> None:
        """Move the graphs' counters into ``work``."""
        self.work += SampleWork(
            graphs_captured=graphs.captured, graphs_replayed=graphs.replayed, eager_steps=graphs.eager
        )
        graphs.captured = graphs.replayed = graphs.eager = 0
        self.graph_failure = self.graph_failure or graphs.failure

    def _network(self) -> Network:
        """The network to decode with, over the current weights."""
        policy, started = self.policy, time.perf_counter()
        if not self.merged:
            return policy.decoding_network
        if self._copy is None:
            self._copy = MergedCopy(policy.causal, policy.dtype, policy.kernels)
        else:
            self._copy.refresh()
        if policy.device.type == "cuda":
            torch.cuda.synchronize(policy.device)
        self.work += SampleWork(refresh_seconds=time.perf_counter() - started)
        return self._copy.network

    def _decoder(
        self, network: Network, prompts: Sequence[Prompt], decoding: Decoding
    ) -> tuple[Decoder, Step]:
        """A decoder large enough for these prompts; with graphs, the one whose graphs are captured."""
        slots = decoder_slots(sum(len(prompt.keys) for prompt in prompts), self.batch_rows)
        longest = max(len(prompt.ids) for prompt in prompts) + decoding.max_new_tokens
        length = cache_len(longest, self._captures)

        def decoder_of(slots: int, length: int) -> Decoder:
            return Decoder(network, self.policy.head_weight, self.policy.dtype, decoding, slots, length)

        if not self._captures:
            decoder = decoder_of(slots, length)
            return decoder, decoder.step
        graphs = self._graphs
        if graphs is not None and not graphs.fits(slots, length):  # grow in both: calls must not alternate
            slots = max(slots, len(graphs.decoder.tokens))
            length = max(length, graphs.decoder.cache_len)
            graphs = self._graphs = None  # frees its cache before the next one is allocated
        if graphs is None:
            graphs = self._graphs = Graphs(decoder_of(slots, length))
        graphs.decoder.decoding = decoding
        graphs.adapter = self.merged or self.policy.adapter_on
        return graphs.decoder, graphs.step

    @property
    def _captures(self) -> bool:
        return self.policy.device.type == "cuda"


@dataclass(slots=True)
class _Sequence:
    """One running sample: its (prompt, sample) indices, its prompt's length, and its tokens so far."""

    index: tuple[int, int]
    prompt_tokens: int
    ids: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)


class _Scheduler:
    """The waiting and running samples of one call."""

    def __init__(
        self,
        decoder: Decoder,
        step: Step,
        stop: StopRule,
        prompts: Sequence[Prompt],
        on_completion: OnCompletion,
        on_token: OnToken | None,
    ) -> None:
        self.decoder, self.step, self.stop, self.prompts = decoder, step, stop, prompts
        self.on_completion, self.on_token = on_completion, on_token
        # Sorted by length: prompts of one length need no padding in prefill.
        self.waiting = deque(sorted(range(len(prompts)), key=lambda i: (len(prompts[i].ids), i)))
        self.running: list[_Sequence | None] = []  # by slot; None has finished
        self.work = SampleWork()

    def run(self) -> SampleWork:
        """Draw every sample; returns the work done."""
        while self._schedule():
            stop_point()
            n = max(len(self.running), MIN_ROWS)
            self.step(n, max(s.prompt_tokens + len(s.ids) for s in self.running if s))
            self.work += SampleWork(row_steps=n)
            self._append_tokens(0)
        return self.work

    def _schedule(self) -> bool:
        """Compact the slots and prefill waiting prompts where that pays; False when all samples are done."""
        while True:
            alive = [slot for slot, sequence in enumerate(self.running) if sequence]
            if not alive and not self.waiting:
                return False
            free = len(self.decoder.tokens) - len(alive)
            enough_free = not alive or free >= IDLE * (len(alive) + free)
            admit = bool(self.waiting) and self._next_samples <= free and enough_free
            idle = len(self.running) - len(alive)
            shrink = idle >= max(1, IDLE * len(self.running)) and len(self.running) > MIN_ROWS
            if idle and (admit or shrink):
                self.decoder.compact(alive)
                self.running = [self.running[slot] for slot in alive]
            if not admit:
                return True
            self._prefill(free)  # then look again: a sample may end at its first token

    @property
    def _next_samples(self) -> int:
        return len(self.prompts[self.waiting[0]].keys)

    def _prefill(self, free: int) -> None:
        """Move waiting prompts, each with all its samples, into the free slots."""
        first, admitted = len(self.running), []
        while self.waiting and self._next_samples <= free:
            admitted.append(self.waiting.popleft())
            free -= len(self.prompts[admitted[-1]].keys)
        chosen = [self.prompts[i] for i in admitted]
        owner = [at for at, prompt in enumerate(chosen) for _ in prompt.keys]
        keys = [key for prompt in chosen for key in prompt.keys]
        self.decoder.prefill([prompt.ids for prompt in chosen], owner, keys, first)
        indices = [(i, k) for i in admitted for k in range(len(self.prompts[i].keys))]
        self.running += [_Sequence(index, len(self.prompts[index[0]].ids)) for index in indices]
        self.work += SampleWork(prompt_tokens=sum(len(p.ids) for p in chosen), row_steps=len(indices))
        self._append_tokens(first)

    def _append_tokens(self, first: int) -> None:
        """Append the tokens just drawn in the slots from ``first`` on; report and drop finished samples."""
        here = slice(first, len(self.running))
        tokens, logprobs = self.decoder.tokens[here].tolist(), self.decoder.logprobs[here].tolist()
        kept = 0
        for slot, (token, logprob) in enumerate(zip(tokens, logprobs, strict=True), first):
            sequence = self.running[slot]
            if sequence is None:
                continue
            kept += 1
            sequence.ids.append(token)
            sequence.logprobs.append(logprob)
            stopped = self.stop.stopped(sequence.ids)
            if stopped or len(sequence.ids) == self.decoder.decoding.max_new_tokens:
                self.running[slot] = None
                reason: FinishReason = "stop" if stopped else "length"
                self.on_completion(*sequence.index, self._completion(sequence, reason))
            elif self.on_token:
                self.on_token(*sequence.index, sequence.ids)
        self.work += SampleWork(tokens=kept)

    def _completion(self, sequence: _Sequence, finish_reason: FinishReason) -> Completion:
        check_finite([sequence.logprobs])
        ids = tuple(sequence.ids)
        return Completion(ids, self.stop.text(ids), finish_reason, tuple(sequence.logprobs))
