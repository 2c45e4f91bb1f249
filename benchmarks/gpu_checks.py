"""What has to hold on a GPU, as functions that work on any device: used by ``gpu.py`` and by the tests.

Each returns what it found; the caller decides what is good enough.
"""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any
from unittest.mock import patch

import torch
from timing import settle
from torch import Tensor

from empg_lite.policy.memory import machine
from empg_lite.policy.memory.machine import LIBRARIES
from empg_lite.policy.policy import Policy, collate
from empg_lite.sampler import Completion, Decoding, Prompt, Sampler, make_sampler
from empg_lite.sampler.draw import uniforms
from empg_lite.sampler.native import NativeSampler

Pairs = Sequence[tuple[tuple[int, ...], tuple[int, ...]]]


# --- sampling ----------------------------------------------------------------------------------------


@contextmanager
def without_graphs() -> Iterator[None]:
    """Within this, samplers made here decode step by step, on a GPU too."""
    with patch.object(NativeSampler, "_captures", new=property(lambda _: False)):
        yield


def ids_of(drawn: Sequence[Sequence[Completion]]) -> list[list[tuple[int, ...]]]:
    """Their tokens."""
    return [[completion.ids for completion in row] for row in drawn]


def three_ways(policy: Policy, prompts: Sequence[Prompt], decoding: Decoding) -> dict[str, Any]:
    """The tokens by captured graphs, step by step, and by the backend's ``generate``.

    Each is tokens, or the error that it ended with.
    """

    def eager() -> Any:
        with without_graphs():
            return make_sampler(policy, "native").sample(prompts, decoding)

    ways: dict[str, Callable[[], Any]] = {
        "graphs": lambda: make_sampler(policy, "native").sample(prompts, decoding),
        "unmerged": lambda: make_sampler(policy, "native", merged=False).sample(prompts, decoding),
        "eager": eager,
        "generate": lambda: make_sampler(policy, "generate").sample(prompts, decoding),
    }
    found: dict[str, Any] = {}
    for name, draw in ways.items():
        try:
            found[name] = ids_of(draw())
        except Exception as error:  # one way that fails must not hide the others
            found[name] = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
    return found


@dataclass(frozen=True, slots=True)
class Parting:
    """Where two samples of one prompt differ: after the ``common`` tokens one has ``a``, the other ``b``."""

    prompt: Prompt
    key: int
    common: tuple[int, ...]
    a: int
    b: int


def partings(prompts: Sequence[Prompt], ours: Any, theirs: Any) -> list[Parting]:
    """Of all pairs of samples that are not the same tokens, where they part.

    Raises:
        AssertionError: one sample ends where the other goes on, though all tokens before are equal.
    """
    found = []
    for prompt, row, other in zip(prompts, ours, theirs, strict=True):
        for key, a, b in zip(prompt.keys, row, other, strict=True):
            at = next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), None)
            if at is None:
                assert len(a) == len(b), "equal tokens, but only one sample ended"
                continue
            found.append(Parting(prompt, key, tuple(b[:at]), a[at], b[at]))
    return found


def plain_logits(policy: Policy, ids: Sequence[int]) -> Tensor:
    """``(V,)`` float64 logits of the next token, by the backend's plain forward pass."""
    with policy.sampling():
        given = torch.tensor([list(ids)], device=policy.device)
        return policy.model(input_ids=given, use_cache=False).logits[0, -1].double()


def greedy_gap(policy: Policy, parting: Parting) -> tuple[float, float]:
    """How far apart the two tokens' logits lie, and the spacing of the computing type at the top logit.

    Greedy tokens of two right implementations differ only where the gap is a few spacings.
    """
    logits = plain_logits(policy, (*parting.prompt.ids, *parting.common))
    gap = abs(float(logits[parting.a] - logits[parting.b]))
    top = float(logits.abs().max())
    return gap, top * torch.finfo(policy.dtype).eps


def edge_distance(policy: Policy, parting: Parting, decoding: Decoding) -> float:
    """How far the sample's random number lies from the edges between the two tokens.

    Two right implementations draw different tokens only where rounding moves an edge across the number.
    """
    logits = plain_logits(policy, (*parting.prompt.ids, *parting.common)).cpu()
    edges = (logits / decoding.temperature).softmax(-1).cumsum(-1)
    low, high = sorted((parting.a, parting.b))
    u = uniforms(torch.tensor([parting.key]), len(parting.common)).item()
    return max(abs(float(edges[low]) - u), abs(float(edges[high - 1]) - u))


def engine_facts(sampler: Sampler) -> dict[str, Any]:
    """What a sampler says of its graphs: numbers captured and replayed, steps without, why they failed."""
    work, failure = sampler.work, sampler.graph_failure
    counts = {name: getattr(work, name) for name in ("graphs_captured", "graphs_replayed", "eager_steps")}
    return counts | ({"graph_failure": failure} if failure else {})


# --- log-probabilities -------------------------------------------------------------------------------


def logprob_ways(policy: Policy, pairs: Pairs) -> dict[str, list[list[float]]]:
    """Log-probabilities (nats) of the completions by every path there is.

    ``alone``: one row at a time through the backend's forward pass; ``left``, ``right``: all rows, padded on
    that side; ``packed``: this package's packed pass; ``fit``: what the M-step takes, if that is another.
    """
    policy.prepare_fit()
    with policy.training(), torch.no_grad():
        logprobs, mask = policy.token_logprobs(collate(pairs, policy.pad_id, policy.device))
        found = {
            "right": [x[m].tolist() for x, m in zip(logprobs, mask, strict=True)],
            "alone": [row for pair in pairs for row in _left(policy, [pair])],
            "left": list(_left(policy, pairs)),
        }
        found["packed"] = [x.tolist() for x in policy.completion_logprobs(pairs, shared=False)]
        if policy.shared_prefix:
            found["fit"] = [x.tolist() for x in policy.completion_logprobs(pairs)]
    return found


def _left(policy: Policy, pairs: Pairs) -> Iterator[list[float]]:
    from hand_loop import left_padded

    inputs = left_padded(policy, [[*prompt, *completion] for prompt, completion in pairs])
    with policy.autocast():
        logits = policy.model(**inputs, use_cache=False).logits
    logprobs = logits[:, :-1].float().log_softmax(-1).gather(-1, inputs["input_ids"][:, 1:, None])
    for i, (_, completion) in enumerate(pairs):
        yield logprobs[i, -len(completion) :, 0].tolist()


def farthest(rows: Sequence[Sequence[float]], others: Sequence[Sequence[float]]) -> float:
    """The greatest difference in nats."""
    pairs = (p for row, other in zip(rows, others, strict=True) for p in zip(row, other, strict=True))
    return max(abs(a - b) for a, b in pairs)


# --- kernels -----------------------------------------------------------------------------------------

#: What a kernel is for, by its name: Unsloth's Triton kernels are named after their Python functions.
KERNELS: Mapping[str, str] = {
    "RMSNorm": r"rms_layernorm",
    "RoPE": r"rope_embedding|_rope_",
    "SwiGLU": r"^_fg_kernel|_DWf_DW_dfg",
    "NF4 dequantization": r"[dD]equantizeBlockwise|dequantize_blockwise",
}
#: Which kernel attention went through; the last one that fits anything is the unfused way.
ATTENTION: Mapping[str, str] = {
    "cudnn": r"cudnn.*(sdpa|fmha|attention|flash)",
    "flex": r"flex_attention|triton_tem_fused.*flex",
    "flash": r"flash_(fwd|bwd)|flash::|FlashAttn",
    "efficient": r"fmha_cutlass|Attention(Backward)?Kernel|mem_eff",
    "math": r"(?i)softmax",
}


@dataclass(frozen=True, slots=True)
class Profile:
    """The kernels of a stretch of work: name -> (calls, seconds), and the wall seconds of all of it."""

    kernels: Mapping[str, tuple[int, float]]
    wall: float

    @property
    def busy(self) -> float:
        """Share of the wall time in which a kernel ran; low where launches are what takes time."""
        return sum(seconds for _, seconds in self.kernels.values()) / self.wall if self.wall else 0.0

    def top(self, n: int) -> list[tuple[str, int, float]]:
        """The n kernels that took longest: name, calls, seconds."""
        ordered = sorted(self.kernels.items(), key=lambda item: -item[1][1])
        return [(name, calls, seconds) for name, (calls, seconds) in ordered[:n]]


def sorted_out(names: Iterable[str]) -> dict[str, list[str]]:
    """Which kinds of kernel appear among these names, and the attention kernels in ``attention``."""
    names = list(names)
    kinds = [kind for kind, words in KERNELS.items() if any(re.search(words, name) for name in names)]
    attention = [kind for kind, words in ATTENTION.items() if any(re.search(words, name) for name in names)]
    return {"kinds": kinds, "attention": attention}


def profiled(work: Callable[[], Any]) -> tuple[Profile, Any]:
    """Do ``work`` under torch's profiler; its kernels (on a CPU its operators), and what it returned."""
    from torch.profiler import ProfilerActivity, profile

    cuda = torch.cuda.is_available()
    settle()
    started = time.perf_counter()
    # Kernels alone: the operators of a captured graph are not there, and a record of each costs time.
    with profile(activities=[ProfilerActivity.CUDA if cuda else ProfilerActivity.CPU]) as found:
        result = work()
        settle()
    wall = time.perf_counter() - started
    kernels = {}
    for event in found.key_averages():
        device = getattr(event, "device_type", None)
        on_device = str(device).endswith("CUDA")
        if cuda and not on_device:
            continue
        name = "self_device_time_total" if cuda else "self_cpu_time_total"
        spent = getattr(event, name, None)
        spent = getattr(event, "self_cuda_time_total", 0.0) if spent is None else spent
        kernels[event.key] = (event.count, float(spent) / 1e6)
    return Profile(kernels, wall), result


# --- memory ------------------------------------------------------------------------------------------


@contextmanager
def capped(usable: int) -> Iterator[None]:
    """Within this, torch gets so many bytes of the card and no more, what it holds already included."""
    total = torch.cuda.get_device_properties(torch.cuda.current_device()).total_memory
    torch.cuda.empty_cache()
    torch.cuda.set_per_process_memory_fraction(min(1.0, usable / total))
    try:
        yield
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
        torch.cuda.empty_cache()


def shrink(gigabytes: float) -> None:
    """Make the card that small for the rest of the process; ``auto`` plans for no more.

    On a CPU only the plan is told so: nothing is enforced.
    """
    usable = int(gigabytes * 1e9) - LIBRARIES  # the CUDA context is not torch's to count
    if torch.cuda.is_available():
        total = torch.cuda.get_device_properties(torch.cuda.current_device()).total_memory
        torch.cuda.set_per_process_memory_fraction(usable / total)
    machine.free_memory = lambda device: usable - _allocated(device)


def _allocated(device: torch.device) -> int:
    return torch.cuda.memory_allocated(device) if device.type == "cuda" else 0
