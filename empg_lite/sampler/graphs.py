"""A decoding step without its launches, on a GPU.

A step of a 0.5B model is some 500 small kernels; started one by one they take longer than they run. Captured
once as a CUDA graph they are started together. A graph is of one size, so sizes are rounded up: the places
computed in vain cost less than another capture. NOT RUN YET: no GPU was at hand when this was written.
"""

from __future__ import annotations

import torch

from empg_lite.sampler.decoder import Decoder
from empg_lite.sampler.draw import Decoding

#: Sizes are multiples of these: rows, and tokens that attention looks at.
ROWS, SEEN = 16, 128


class Graphs:
    """``decoder.step`` by captured graphs, one for each rounded size; they hold the decoder's addresses."""

    def __init__(self, decoder: Decoder) -> None:
        self.decoder = decoder
        self._captured: dict[tuple[int, int], torch.cuda.CUDAGraph] = {}

    def fits(self, rows: int, room: int, decoding: Decoding) -> bool:
        """Whether the decoder will do for so many rows, decoded so."""
        decoder = self.decoder
        return len(decoder.tokens) >= rows and decoder.room >= room and decoder.decoding == decoding

    def step(self, n: int, seen: int) -> None:
        """See ``Decoder.step``."""
        size = min(_up(n, ROWS), len(self.decoder.tokens)), min(_up(seen, SEEN), self.decoder.room)
        if size not in self._captured:
            self._captured[size] = self._capture(*size)
        self._captured[size].replay()

    def _capture(self, n: int, seen: int) -> torch.cuda.CUDAGraph:
        decoder = self.decoder
        moving = (decoder.tokens, decoder.lengths, decoder.drawn, decoder.logprobs)
        before = [tensor.clone() for tensor in moving]
        # Once outside of a graph, for libraries to set up; the cache gets what the first replay writes again.
        aside = torch.cuda.Stream()
        aside.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(aside):
            decoder.step(n, seen)
        torch.cuda.current_stream().wait_stream(aside)
        for tensor, value in zip(moving, before, strict=True):
            tensor.copy_(value)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):  # records, computes nothing
            decoder.step(n, seen)
        return graph


def _up(value: int, multiple: int) -> int:
    return -(-value // multiple) * multiple
