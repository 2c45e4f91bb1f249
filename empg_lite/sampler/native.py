"""Continuous batching: a prompt is prefilled once for all its samples, and finished rows free their slots."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch

from empg_lite.core.sizes import cache_len, decoder_slots, shared_prefix
from empg_lite.policy.merged import MergedCopy
from empg_lite.sampler.base import Sampler, SampleWork
from empg_lite.sampler.decoder import Decoder
from empg_lite.sampler.graphs import Graphs
from empg_lite.sampler.schedule import InGroups, InTurns

if TYPE_CHECKING:
    from empg_lite.policy.network import Network
    from empg_lite.policy.policy import Policy
    from empg_lite.sampler.base import OnCompletion, OnToken, Prompt, Turns
    from empg_lite.sampler.draw import Decoding
    from empg_lite.sampler.schedule import Step


class NativeSampler(Sampler):
    """Continuous batching over a static KV cache; see ``decoder``.

    Args:
        batch_rows: most rows decoded at once; None for all. A prompt with more samples is prefilled once for
            each batch of them.
        merged: decode over a merged copy of the weights, refreshed at every draw, instead of the policy's
            own modules.
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
                rows = sum(len(p.keys) for p in prompts)
                decoder, step = self._decoder(rows, [p.ids for p in prompts], decoding)
                schedule = InGroups(decoder, step, self._stop, prompts, on_completion, on_token)
                self.work += schedule.run()
        finally:
            self._after_draw()

    def draw_turns(self, turns: Turns, decoding: Decoding) -> None:
        """See ``base.Sampler``."""
        try:
            with self.policy.sampling():
                decoder, step = self._decoder(len(turns), turns.prompts, decoding)
                self.work += InTurns(decoder, step, self._stop, turns).run()
        finally:
            self._after_draw()

    def _after_draw(self) -> None:
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
        self, rows: int, prompts: Sequence[Sequence[int]], decoding: Decoding
    ) -> tuple[Decoder, Step]:
        """A decoder for that many rows behind these prompts, which has begun with what they share.

        With graphs, the one whose graphs are captured, if it is large enough.
        """
        network, slots, captures = self._network(), decoder_slots(rows, self.batch_rows), self._captures
        prefix = prompts[0][: shared_prefix(prompts)]
        self.work += SampleWork(prompt_tokens=len(prefix))
        longest = max(map(len, prompts)) + decoding.max_new_tokens
        length = cache_len(longest if captures else longest - len(prefix), captures)

        def decoder_of(slots: int, length: int) -> Decoder:
            return Decoder(network, self.policy.head_weight, self.policy.dtype, decoding, slots, length)

        if not captures:
            decoder = decoder_of(slots, length)
            decoder.begin(prefix, in_slots=False)
            return decoder, decoder.step
        graphs = self._graphs
        if graphs is not None and not graphs.fits(slots, length):  # grow in both: calls must not alternate
            slots = max(slots, len(graphs.decoder.tokens))
            length = max(length, graphs.decoder.cache_len)
            graphs = self._graphs = None  # frees its cache before the next one is allocated
        if graphs is None:
            graphs = self._graphs = Graphs(decoder_of(slots, length))
        graphs.decoder.decoding = decoding
        graphs.decoder.begin(prefix)
        graphs.adapter = self.merged or self.policy.adapter_on
        return graphs.decoder, graphs.step

    @property
    def _captures(self) -> bool:
        return self.policy.device.type == "cuda"
