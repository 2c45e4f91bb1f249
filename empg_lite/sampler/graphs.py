"""A decoding step without its launches, on a GPU.

A step of a 0.5B model is some 500 small kernels; started one by one they take longer than they run. Captured
as CUDA graphs they are started together. A graph is of one size, so sizes are rounded up: the places computed
in vain cost less than another capture. The network and the draw are captured apart, because the one does not
know the temperature and the other not the length: a run that samples and evaluates captures the network once.
Where a capture fails, steps are taken one by one. NOT RUN YET: no GPU was at hand when this was written.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Hashable

import torch

from empg_lite.core.errors import is_out_of_memory
from empg_lite.core.sizes import GRAPH_ROWS, GRAPH_TOKENS, round_up
from empg_lite.sampler.decoder import Decoder


class Graphs:
    """``decoder.step`` by captured graphs, one for each rounded size; they hold the decoder's addresses.

    All of them work in one pool of memory: they run one after another, and what a step leaves behind lies in
    the decoder's own tensors.

    Attributes:
        adapter: whether the adapter is on; without a merged copy a graph is of one or the other.
        captured, replayed, eager: graphs captured, replayed, and calls that went without; two a step.
        failure: why graphs cannot be captured; None where they can.
    """

    def __init__(self, decoder: Decoder) -> None:
        self.decoder = decoder
        self.adapter = True
        self.captured = self.replayed = self.eager = 0
        self.failure: str | None = None
        self._graphs: dict[Hashable, torch.cuda.CUDAGraph] = {}
        self._aside: torch.cuda.Stream | None = None  # one for all captures: each has memory of its own

    def fits(self, rows: int, room: int) -> bool:
        """Whether the decoder will do for so many rows of that length."""
        return len(self.decoder.tokens) >= rows and self.decoder.room >= room

    def step(self, n: int, seen: int) -> None:
        """See ``Decoder.step``.

        Raises:
            RuntimeError, torch.OutOfMemoryError: memory ran out in a capture (``is_out_of_memory``).
        """
        decoder = self.decoder
        n = min(round_up(n, GRAPH_ROWS), len(decoder.tokens))
        seen = min(round_up(seen, GRAPH_TOKENS), decoder.room)
        self._run(("network", n, seen, self.adapter), lambda: decoder.advance(n, seen))
        self._run(("draw", n, decoder.decoding), lambda: decoder.choose(n))

    def _run(self, key: Hashable, work: Callable[[], None]) -> None:
        """Replay the graph of this key, captured at its first use; without graphs, just do it."""
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
                why = f"CUDA graphs cannot be captured, sampling does without: {self.failure}"
                warnings.warn(why, stacklevel=2)
        if self.failure is None:
            self._graphs[key].replay()
            self.replayed += 1
        else:
            work()
            self.eager += 1

    def _capture(self, work: Callable[[], None]) -> torch.cuda.CUDAGraph:
        decoder, stream = self.decoder, torch.cuda.current_stream()
        moving = (decoder.tokens, decoder.lengths, decoder.drawn, decoder.logprobs)
        before = [tensor.clone() for tensor in moving]
        # Once outside of a graph, for libraries to set up; the cache gets what the first replay writes again.
        aside = self._aside = self._aside or torch.cuda.Stream()
        aside.wait_stream(stream)
        with torch.cuda.stream(aside):
            work()
        stream.wait_stream(aside)
        for tensor, value in zip(moving, before, strict=True):
            tensor.copy_(value)
        pool = next((graph.pool() for graph in self._graphs.values()), None)
        captured = torch.cuda.CUDAGraph()
        try:
            with torch.cuda.graph(captured, pool=pool):  # records, computes nothing
                work()
        finally:
            torch.cuda.set_stream(stream)  # a capture that failed may leave its own
        return captured
