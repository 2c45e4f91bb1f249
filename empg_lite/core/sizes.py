"""Sizes that the sampler and the fit use and the memory plan counts. No torch."""

from __future__ import annotations

from collections.abc import Sequence

#: Elements of one fp32 chunk of logits, drawn from or scored: 6 MB on a CPU; 256 MB on a GPU, where narrower
#: products waste the card.
LOGIT_CHUNK = {"cpu": 3 << 19, "cuda": 1 << 26}
#: Tokens (padding included) of the prompts in one prefill batch.
PREFILL_TOKENS = {"cpu": 4096, "cuda": 16_384}
#: Fewest rows decoded at once. Matrix products over one or two rows use other CPU kernels and differ by 1e-6
#: from wider ones; a batch that never gets narrower keeps a sample's numbers independent of its neighbors.
MIN_ROWS = 8
#: The sampler compacts its slots, or admits waiting prompts, when this share of them is idle.
IDLE = 1 / 8
#: Captured decoding steps are rounded up to these multiples: rows, and tokens that attention reads.
GRAPH_ROWS, GRAPH_TOKENS = 16, 128
#: Attention kernels on a GPU want strides of a multiple of this: lengths of a KV cache, columns of a mask.
ALIGN = 8
#: Prefixes shorter than this are repeated: they are not worth the indices.
SHARED_FROM = 16


def round_up(value: int, multiple: int) -> int:
    """The least multiple that is not below ``value``."""
    return -(-value // multiple) * multiple


def logit_rows(device: str, vocab: int) -> int:
    """Rows of logits in one chunk on this type of device."""
    return max(1, LOGIT_CHUNK[device] // vocab)


def decoder_slots(rows: int, limit: int | None) -> int:
    """Slots of a decoder for this many rows, at most ``limit`` of them at once."""
    return max(min(rows, limit or rows), MIN_ROWS)


def cache_len(tokens: int, captures: bool) -> int:
    """Length of the KV cache for rows of up to this many tokens, with or without CUDA graphs."""
    return round_up(tokens, ALIGN) if captures else tokens


def shared_prefix(prompts: Sequence[Sequence[int]]) -> int:
    """Leading tokens that all of several prompts share, but for their last one; 0 if they are few."""
    if len(prompts) < 2:
        return 0
    first, last = min(map(tuple, prompts)), max(map(tuple, prompts))  # what these share, all share
    limit = min(len(prompt) for prompt in prompts) - 1
    prefix = next((i for i in range(limit) if first[i] != last[i]), limit)
    return prefix if prefix >= SHARED_FROM else 0
