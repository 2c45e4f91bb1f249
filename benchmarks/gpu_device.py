"""The device of the GPU benchmark: what it is, and what it reaches at its best."""

from __future__ import annotations

import os
import platform
import time
from collections.abc import Callable
from typing import Any

import torch
from machine import describe_commit, versions
from timing import settle

PACKAGES = ("torch", "triton", "transformers", "peft", "bitsandbytes", "unsloth", "unsloth_zoo", "trl")


def probe() -> dict[str, Any]:
    """What the device does at its best: bytes a second of a copy (read and written), FLOP/s of a matmul."""
    cuda = torch.cuda.is_available()
    device, dtype = ("cuda", torch.bfloat16) if cuda else ("cpu", torch.float32)
    side, length = (8192, 1 << 30) if cuda else (512, 1 << 24)
    source = torch.empty(length // 4, dtype=torch.float32, device=device).fill_(1.0)
    target = torch.empty_like(source)
    a, b = (torch.randn(side, side, device=device, dtype=dtype) for _ in range(2))
    copying = _fastest(lambda: target.copy_(source))
    multiplying = _fastest(lambda: a @ b)
    name = torch.cuda.get_device_name(0) if cuda else "CPU"
    return {"device": name, "bandwidth": 2 * length / copying, "matmul": 2 * side**3 / multiplying}


def _fastest(run: Callable[[], Any], repeats: int = 20) -> float:
    run()
    best = float("inf")
    for _ in range(repeats):
        settle()
        started = time.perf_counter()
        run()
        settle()
        best = min(best, time.perf_counter() - started)
    return best


def machine() -> dict[str, Any]:
    """Versions, card and commit; whatever cannot be found is left out."""
    facts = {"python": platform.python_version(), "cores": os.cpu_count(), **versions(*PACKAGES)}
    if torch.cuda.is_available():
        card = torch.cuda.get_device_properties(0)
        facts |= {"card": card.name, "gb": round(card.total_memory / 1e9, 1), "cuda": torch.version.cuda}
        facts |= {"capability": f"{card.major}.{card.minor}", "cudnn": torch.backends.cudnn.version()}
    return {**facts, "commit": describe_commit() or "unknown"}
