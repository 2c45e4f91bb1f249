"""The roofline: seconds that decoding and fitting need at least, given the device's measured rates."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from shapes import Shape

#: In the folder that all jobs share: what ``gpu_work`` measured of the device.
RATES = "rates.json"


def decode_floor(shape: Shape, lengths: Sequence[int], prompt: int, bandwidth: float, matmul: float) -> float:
    """Seconds that decoding takes at least: rows leave when they end, weights have 16 bits.

    For every token position the greater of two times: reading all linears, the head and the caches of the
    living rows at ``bandwidth`` (bytes/s), and their products at ``matmul`` (FLOP/s). The prompts' own
    forward pass is left out.
    """
    weights = shape.linear_parameters + shape.head_parameters
    total = 0.0
    for position in range(max(lengths)):
        alive = sum(length > position for length in lengths)
        cache = alive * (prompt + position) * shape.cache_bytes(2)
        total += max((2 * weights + cache) / bandwidth, 2 * weights * alive / matmul)
    return total


def fit_flops(shape: Shape, lengths: Sequence[int], prompt: int, samples: int) -> float:
    """FLOP of an M-step: forward, and as much backward, because only LoRA has a weight gradient.

    Each prompt once for its ``samples`` rows, the head at completion tokens only; attention (a few percent)
    is left out.
    """
    tokens = sum(lengths) + prompt * len(lengths) // samples
    return 2 * 2 * (shape.linear_parameters * tokens + shape.head_parameters * sum(lengths))


def of_floor(
    figure: str, seconds: float, shape: Shape, lengths: Sequence[int], prompt: int, samples: int, folder: Path
) -> dict[str, float]:
    """``of_floor``: the floor over the measured seconds; empty where the device's rates are not known."""
    try:
        rates: dict[str, Any] = json.loads((folder / RATES).read_text("utf-8"))
    except (OSError, ValueError):
        return {}
    if figure == "decode":
        least = decode_floor(shape, lengths, prompt, rates["bandwidth"], rates["matmul"])
    else:
        least = fit_flops(shape, lengths, prompt, samples) / rates["matmul"]
    return {"of_floor": least / seconds}
