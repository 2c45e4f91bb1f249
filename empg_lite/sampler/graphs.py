"""Decoding steps as CUDA graphs.

A step of a 0.5B model is about 500 small kernels that take longer to launch than to run; a captured graph
launches them together. A graph has one size, so sizes are rounded up: the idle slots computed cost less than
another capture. Network and draw are captured apart, because the network does not depend on the temperature
nor the draw on the length: a run that samples and evaluates captures the network once. Where a capture fails,
steps run eagerly. Measured on one card: docs/gpu.md.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Hashable
from typing import TYPE_CHECKING

import torch

from empg_lite.core.errors import is_out_of_memory
from empg_lite.core.sizes import GRAPH_ROWS, GRAPH_TOKENS, round_up

if TYPE_CHECKING:
    from empg_lite.sampler.decoder import Decoder


class Graphs:
    """``decoder.step`` as captured graphs, one for each rounded size; they hold the decoder's addresses.

    All share one memory pool: they run one after another, and a step's results are in the decoder's tensors.

    Attributes:
        adapter: whether the adapter is on; without a merged copy a graph is captured for each.
        captured, replayed, eager: graphs captured, graphs replayed, and eager calls; two for each step.
        failure: why graphs cannot be captured; None where they can.
    """

    def __init__(self, decoder: Decoder) -> None:
        self.decoder = decoder
        self.adapter = True
        self.captured = self.replayed = self.eager = 0
        self.failure: str | None = None
        self._graphs: dict[Hashable, torch.cuda.CUDAGraph] = {}
        self._stream: torch.cuda.Stream | None = (
            None  # shared by all captures: each stream has its own memory
        )

    def fits(self, slots: int, cache_len: int) -> bool:
        """Whether the decoder has at least these sizes."""
        return len(self.decoder.tokens) >= slots and self.decoder.cache_len >= cache_len

    def step(self, n: int, context: int) -> None:
        """See ``Decoder.step``.

        Raises:
            RuntimeError, torch.OutOfMemoryError: memory ran out in a capture (``is_out_of_memory``).
        """
        decoder = self.decoder
        n = min(round_up(n, GRAPH_ROWS), len(decoder.tokens))
        context = min(round_up(context, GRAPH_TOKENS), decoder.cache_len)
        self._run(("network", n, context, self.adapter), lambda: decoder.forward(n, context))
        self._run(("draw", n, decoder.decoding), lambda: decoder.draw_next(n))

    def _run(self, key: Hashable, work: Callable[[], None]) -> None:
        """Replay the graph of this key, captured at first use; run ``work`` eagerly without graphs."""
        if self.failure is None:
            try:
                if key not in self._graphs:
                    self._graphs[key] = self._capture(work)
                    self.captured += 1
            except RuntimeError as error:
                if is_out_of_memory(error):
                    raise
                self.failure = " ".join(str(error).split())[:200]
                self._graphs.clear()
                why = f"CUDA graphs cannot be captured, sampling continues without them: {self.failure}"
                warnings.warn(why, stacklevel=2)
        if self.failure is None:
            self._graphs[key].replay()
            self.replayed += 1
        else:
            work()
            self.eager += 1

    def _capture(self, work: Callable[[], None]) -> torch.cuda.CUDAGraph:
        decoder, current = self.decoder, torch.cuda.current_stream()
        changed = (decoder.tokens, decoder.lengths, decoder.drawn, decoder.logprobs)
        before = [tensor.clone() for tensor in changed]
        # A warm-up outside the graph lets libraries initialize; the first replay rewrites the same cache
        # entries.
        stream = self._stream = self._stream or torch.cuda.Stream()
        stream.wait_stream(current)
        with torch.cuda.stream(stream):
            work()
        current.wait_stream(stream)
        for tensor, value in zip(changed, before, strict=True):
            tensor.copy_(value)
        pool = next((graph.pool() for graph in self._graphs.values()), None)
        captured = torch.cuda.CUDAGraph()
        try:
            with torch.cuda.graph(captured, pool=pool):  # records, computes nothing
                work()
        finally:
            torch.cuda.set_stream(current)  # a failed capture may leave its own stream current
        return captured
