"""Sizes that the sampler and the fit work with, and that the memory plan counts. No torch."""

from __future__ import annotations

#: Elements of one fp32 chunk of logits, drawn from or scored: 6 MB on a CPU; 256 MB on a GPU, where narrower
#: products waste the card.
LOGIT_CHUNK = {"cpu": 3 << 19, "cuda": 1 << 26}
#: Tokens (padding included) of the prompts that go through the network together before decoding.
PREFILL_TOKENS = {"cpu": 4096, "cuda": 16_384}
#: Fewest rows decoded at once. Matrix products over one or two rows use other CPU kernels and differ by 1e-6
#: from wider ones; a batch that never gets narrower keeps a sample's numbers independent of its neighbours.
MIN_ROWS = 8
#: The decoder compacts its rows, or lets the next prompts in, when this share of them is idle.
IDLE = 1 / 8
#: Captured decoding steps are of these multiples: rows, and tokens that attention reads.
GRAPH_ROWS, GRAPH_TOKENS = 16, 128
#: The length of a key/value cache is a multiple of this: attention kernels on a GPU want aligned strides.
CACHE_ALIGN = 8


def round_up(value: int, multiple: int) -> int:
    """The least multiple that is not below ``value``."""
    return -(-value // multiple) * multiple
