"""Drawing tokens with keyed random numbers, one key for each sample.

A draw depends only on (run seed, step, problem, sample index, token position), so the same tokens come out
whatever the batch layout, after an out-of-memory back-off, and after a resume. The generator is SplitMix64 in
counter mode (Steele, Lea & Flood, OOPSLA 2014): state = key + (position + 1) * gamma.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

import torch
from torch import Tensor


def _signed(value: int) -> int:
    """A 64-bit pattern as torch's int64, whose arithmetic wraps as needed."""
    return value - (1 << 64) if value >= 1 << 63 else value


_GAMMA = _signed(0x9E3779B97F4A7C15)
_MIX_1 = _signed(0xBF58476D1CE4E5B9)
_MIX_2 = _signed(0x94D049BB133111EB)


@dataclass(frozen=True, slots=True)
class Decoding:
    """Decoding parameters. ``temperature`` 0 is greedy; training uses 1 with top-p 1 and no top-k."""

    max_new_tokens: int
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0


def sample_key(seed: int, step: int, problem_id: str, sample_index: int) -> int:
    """The 64-bit key of one sample's random numbers, as a signed integer."""
    text = f"{seed}/{step}/{problem_id}/{sample_index}".encode()
    return int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "little", signed=True)


def _shift_right(x: Tensor, bits: int) -> Tensor:
    """Logical shift: torch's >> on int64 extends the sign."""
    return (x >> bits) & ((1 << (64 - bits)) - 1)


def uniforms(keys: Tensor, position: int | Tensor) -> Tensor:
    """One uniform number in [0, 1) for each key at a token position.

    Args:
        keys: ``(B,)`` int64.
        position: one for all keys, or ``(B,)`` int64.

    Returns:
        ``(B,)`` float64 with 53 random bits.
    """
    if isinstance(position, int):
        position = torch.tensor(position, device=keys.device)
    z = keys + (position + 1) * _GAMMA
    z = (z ^ _shift_right(z, 30)) * _MIX_1
    z = (z ^ _shift_right(z, 27)) * _MIX_2
    return _shift_right(z ^ _shift_right(z, 31), 11).double() * 2.0**-53


def _keep_nucleus(probs: Tensor, decoding: Decoding) -> Tensor:
    """Zero the probabilities outside top-k and top-p; ties at the edge are broken by token id."""
    ordered, order = probs.sort(dim=-1, descending=True, stable=True)
    drop = torch.zeros_like(ordered, dtype=torch.bool)
    if decoding.top_k:
        drop[:, decoding.top_k :] = True
    if decoding.top_p < 1:
        drop |= ordered.cumsum(-1) - ordered >= decoding.top_p  # the mass before it already suffices
    return probs.masked_fill(drop.scatter(-1, order, drop), 0.0)


def draw(logits: Tensor, keys: Tensor, position: int | Tensor, decoding: Decoding) -> tuple[Tensor, Tensor]:
    """Draw one token per row by inverting the cumulative distribution at the row's own uniform number.

    Args:
        logits: ``(B, V)``, any float type.
        keys: ``(B,)`` int64 sample keys.
        position: index of the token within its completion, one for all rows or ``(B,)``.

    Returns:
        Tokens ``(B,)`` and their log-probabilities ``(B,)`` float32 under the policy itself (temperature 1,
        no truncation), whatever the decoding parameters.
    """
    logits = logits.float()
    top = logits.amax(-1, keepdim=True)
    mass = (logits - top).exp_()  # unnormalized probabilities: nothing below needs them to sum to 1
    log_z = mass.sum(-1).log_() + top.squeeze(-1)
    if decoding.temperature == 0:
        tokens = logits.argmax(-1)
    else:
        if decoding.temperature != 1:
            mass = torch.exp((logits - top) / decoding.temperature)
        if decoding.top_k or decoding.top_p < 1:
            mass = _keep_nucleus(mass / mass.sum(-1, keepdim=True), decoding)
        cumulative = mass.cumsum_(-1)
        threshold = uniforms(keys, position).to(cumulative) * cumulative[:, -1]
        tokens = torch.searchsorted(cumulative, threshold[:, None], right=True).squeeze(-1)
        tokens = tokens.clamp_(max=logits.shape[-1] - 1)  # rounding may put the threshold on the last edge
    return tokens, logits.gather(-1, tokens[:, None]).squeeze(-1) - log_z
