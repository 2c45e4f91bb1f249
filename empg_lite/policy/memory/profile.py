"""Where a run's time went, and how far that is from the device's limits.

Everything but the device's rates comes from the metrics of the steps, which are always written.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import torch

from empg_lite.policy.memory.terms import cache_bytes_per_token, linear_weights

if TYPE_CHECKING:
    from empg_lite.policy.memory.shape import Shape
    from empg_lite.policy.memory.terms import Settings

#: Seconds spent measuring each of the two rates.
PROBE_SECONDS = 0.25


@dataclass(frozen=True, slots=True)
class Rates:
    """The device's measured rates, from which the floor is computed.

    Attributes:
        bytes_per_second: read and written by a copy.
        flops_per_second: of a square matrix product in the compute type.
    """

    bytes_per_second: float
    flops_per_second: float


def probe(device: torch.device, dtype: torch.dtype) -> Rates:
    """Measure the rates with the run's threads, in half a second."""
    large = device.type == "cuda"
    source = torch.ones(1 << (26 if large else 24), device=device)  # 256 or 64 MB: larger than a cache
    target = torch.empty_like(source)
    n = 8192 if large else 768
    a, b = (torch.ones(n, n, device=device, dtype=dtype) for _ in range(2))
    out = torch.empty_like(a)
    return Rates(
        bytes_per_second=2 * source.nbytes / _fastest(lambda: target.copy_(source), device),
        flops_per_second=2 * n**3 / _fastest(lambda: torch.mm(a, b, out=out), device),
    )


def _fastest(work: Callable[[], object], device: torch.device) -> float:
    """Seconds of the fastest call within ``PROBE_SECONDS``, after a warm-up."""

    def once() -> float:
        started = time.perf_counter()
        work()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return time.perf_counter() - started

    once()
    end, best = time.perf_counter() + PROBE_SECONDS, once()
    while time.perf_counter() < end:
        best = min(best, once())
    return best


def profile(
    records: Sequence[Mapping[str, Any]], shape: Shape, settings: Settings, rates: Rates, seconds: float
) -> dict[str, Any]:
    """The profile of some steps.

    Args:
        records: their metrics, at least one step.
        seconds: wall time of the whole invocation; time outside the steps is ``everything_else``.

    Returns:
        ``steps``; ``seconds`` and ``shares`` by part; ``tokens_per_second`` (sampled tokens, of sampling and
        of whole steps); ``wasted_row_steps`` (rows computed after they finished), ``padding`` (of the M-step)
        and ``rows_skipped`` (rows of weight 0), all as shares; ``rates``; ``floor``: least seconds that
        sampling and fitting would need at these rates; ``of_floor``: that over the seconds they took.
    """
    assert records, "a profile needs at least one step"

    def total(name: str) -> float:
        return float(sum(record[name] for record in records))

    tokens = sum(map(sampled_tokens, records))
    parts = {
        "sampling": total("time/sample") - total("time/refresh"),
        "refresh": total("time/refresh"),
        "grading": total("time/score"),
        "fitting": total("time/fit"),
        "everything_else": max(seconds - total("step_time"), 0.0),
    }
    floor = {
        "sampling": sampling_floor(shape, settings, rates, tokens, total),
        "fitting": fitting_floor(shape, rates, total),
    }
    return {
        "steps": len(records),
        "seconds": parts,
        "shares": {name: _share(part, sum(parts.values())) for name, part in parts.items()},
        "tokens_per_second": {
            "sampling": _share(tokens, total("time/sample")),
            "step": _share(tokens, total("step_time")),
        },
        "wasted_row_steps": _share(total("time/row_steps") - tokens, total("time/row_steps")),
        "padding": _share(
            total("time/tokens_padded") - total("time/tokens_computed"), total("time/tokens_padded")
        ),
        "rows_skipped": _share(total("em/rows_skipped"), total("em/rows_skipped") + total("em/rows_fitted")),
        "rates": asdict(rates),
        "floor": floor,
        "of_floor": {name: _share(floor[name], parts[name]) for name in floor},
    }


def sampled_tokens(record: Mapping[str, Any]) -> int:
    """Tokens drawn in a step."""
    rows = record["em/rows_fitted"] + record["em/rows_skipped"]
    return round(record["completions/mean_length"] * rows)


Total = Callable[[str], float]


def sampling_floor(shape: Shape, s: Settings, rates: Rates, tokens: int, total: Total) -> float:
    """Least seconds of the E-step at the device's rates.

    The weights are read once for each pass of all rows, a row's keys and values once for each of its tokens,
    and each prompt is prefilled once, what all share once a call; reading the keys of that, attention's own
    products and the draws are left out.
    """
    passes = tokens / s.decoded_rows
    weights = linear_weights(shape, s) if not s.merged else shape.linear_params * s.itemsize
    read = passes * (weights + shape.vocab * shape.hidden * s.itemsize)
    read += total("em/context_tokens") * cache_bytes_per_token(shape, s.itemsize)
    multiplied = 2 * tokens * (shape.linear_params + shape.vocab * shape.hidden)
    prompts = 2 * total("time/prompt_tokens") * shape.linear_params
    decoding = max(read / rates.bytes_per_second, multiplied / rates.flops_per_second)
    return decoding + prompts / rates.flops_per_second


def fitting_floor(shape: Shape, rates: Rates, total: Total) -> float:
    """Least seconds of the M-step's products at the device's rate: forward, and backward to the inputs (the
    base is frozen). Recomputation, LoRA, attention and the head are left out."""
    return 4 * total("time/tokens_computed") * shape.linear_params / rates.flops_per_second


def _share(part: float, whole: float) -> float:
    """0 for an empty whole."""
    return part / whole if whole else 0.0
