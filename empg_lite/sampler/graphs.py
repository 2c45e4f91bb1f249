"""A decoding step without its launches, on a GPU.

A step of a 0.5B model is some 500 small kernels; started one by one they take longer than they run. Captured
once as a CUDA graph they are started together. A graph is of one size, so sizes are rounded up: the places
computed in vain cost less than another capture. NOT RUN YET: no GPU was at hand when this was written.
"""

from __future__ import annotations

import warnings

import torch

from empg_lite.sampler.decoder import Decoder
from empg_lite.sampler.draw import Decoding

#: Sizes are multiples of these: rows, and tokens that attention looks at.
ROWS, SEEN = 16, 128


class Graphs:
    """``decoder.step`` by captured graphs, one for each rounded size; they hold the decoder's addresses.

    All of them work in one pool of memory: they run one after another, and what a step leaves behind lies in
    the decoder's own tensors. Where a capture fails, steps are taken one by one, with one warning.
    """

    def __init__(self, decoder: Decoder) -> None:
        self.decoder = decoder
        self._captured: dict[tuple[int, int, Decoding], torch.cuda.CUDAGraph] = {}
        self._capturing = True

    def fits(self, rows: int, room: int) -> bool:
        """Whether the decoder will do for so many rows of that length."""
        return len(self.decoder.tokens) >= rows and self.decoder.room >= room

    def step(self, n: int, seen: int) -> None:
        """See ``Decoder.step``."""
        decoder = self.decoder
        size = min(_up(n, ROWS), len(decoder.tokens)), min(_up(seen, SEEN), decoder.room), decoder.decoding
        if self._capturing and size not in self._captured:
            try:
                self._captured[size] = self._capture(*size[:2])
            except torch.OutOfMemoryError:
                raise
            except RuntimeError as error:
                self._capturing = False
                self._captured.clear()
                why = " ".join(str(error).split())[:200]
                warnings.warn(f"CUDA graphs cannot be captured, sampling does without: {why}", stacklevel=2)
        if self._capturing:
            self._captured[size].replay()
        else:
            decoder.step(n, seen)

    def _capture(self, n: int, seen: int) -> torch.cuda.CUDAGraph:
        decoder, stream = self.decoder, torch.cuda.current_stream()
        moving = (decoder.tokens, decoder.lengths, decoder.drawn, decoder.logprobs)
        before = [tensor.clone() for tensor in moving]
        # Once outside of a graph, for libraries to set up; the cache gets what the first replay writes again.
        aside = torch.cuda.Stream()
        aside.wait_stream(stream)
        with torch.cuda.stream(aside):
            decoder.step(n, seen)
        stream.wait_stream(aside)
        for tensor, value in zip(moving, before, strict=True):
            tensor.copy_(value)
        pool = next((graph.pool() for graph in self._captured.values()), None)
        captured = torch.cuda.CUDAGraph()
        try:
            with torch.cuda.graph(captured, pool=pool):  # records, computes nothing
                decoder.step(n, seen)
        finally:
            torch.cuda.set_stream(stream)  # a capture that failed may leave its own
        return captured


def _up(value: int, multiple: int) -> int:
    return -(-value // multiple) * multiple
