"""What fits in memory: the sizes that a recipe leaves to ``auto``.

The counts follow from the architecture; constants are per-token activation counts of a Qwen2 block. What is
chosen here is written into the run and used again on resume, because free memory is not reproducible.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

#: Share of the free memory that one phase may plan with; the rest is workspace and fragmentation.
SHARE = 0.4
MIN_TOKENS, MAX_TOKENS = 256, 16_384
MIN_ROWS, MAX_ROWS = 8, 512


def free_memory(device: Any) -> int:
    """Bytes to be had on a torch device (on a CPU: what the kernel calls available)."""
    if device.type == "cuda":
        import torch

        return int(torch.cuda.mem_get_info(device)[0])
    found = re.search(r"MemAvailable:\s+(\d+) kB", Path("/proc/meminfo").read_text("ascii"))
    assert found, "/proc/meminfo has no MemAvailable"
    return int(found.group(1)) * 1024


def activation_bytes_per_token(config: Any, itemsize: int, checkpointing: bool) -> int:
    """Activations that the backward pass keeps for one token.

    A Qwen2 block keeps about 9 vectors of the hidden size and 4 of the intermediate size (norms, q/k/v/o
    inputs, gate, up, their product); with checkpointing one hidden vector a block, plus one block live twice.
    """
    block = 9 * config.hidden_size + 4 * config.intermediate_size
    if checkpointing:
        return itemsize * (config.num_hidden_layers * config.hidden_size + 2 * block)
    return itemsize * config.num_hidden_layers * block


def cache_bytes_per_token(config: Any, itemsize: int) -> int:
    """Keys and values of one token in all layers."""
    head_dim = config.hidden_size // config.num_attention_heads
    return 2 * config.num_hidden_layers * config.num_key_value_heads * head_dim * itemsize


def auto_micro_batch_tokens(config: Any, itemsize: int, checkpointing: bool, free: int) -> int:
    """Tokens of one M-step micro-batch: a power of two that fits a share of ``free`` bytes."""
    fits = int(SHARE * free) // activation_bytes_per_token(config, itemsize, checkpointing)
    return _power_of_two(fits, MIN_TOKENS, MAX_TOKENS)


def auto_batch_rows(config: Any, itemsize: int, tokens_per_row: int, free: int) -> int:
    """Rows decoded at once: a power of two whose caches (twice, while compacting) fit a share of ``free``."""
    logits = 3 * 4 * config.vocab_size  # fp32 logits, softmax and its cumulative sum
    row = 2 * tokens_per_row * cache_bytes_per_token(config, itemsize) + logits
    return _power_of_two(int(SHARE * free) // row, MIN_ROWS, MAX_ROWS)


def _power_of_two(value: int, low: int, high: int) -> int:
    return max(low, min(high, 1 << max(value, 1).bit_length() - 1))
