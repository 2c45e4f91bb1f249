"""Causal attention, and which kernel torch chooses for it on this device."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.attention import SDPBackend

if TYPE_CHECKING:
    from empg_lite.policy.network import Network


def causal_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Causal attention of queries (B, H, T, d) over keys and values (B, G, T, d)."""
    if shares_keys(q.device):
        return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
    k, v = (x.repeat_interleave(q.shape[1] // k.shape[1], 1) for x in (k, v))
    return F.scaled_dot_product_attention(q, k, v, is_causal=True)


def shares_keys(device: torch.device) -> bool:
    """Whether attention kernels let H/G query heads share a key head.

    Below sm80 (T4) there is no flash kernel and the memory-efficient one refuses: the fallback would write
    fp32 scores.
    """
    return device.type != "cuda" or torch.cuda.get_device_capability(device) >= (8, 0)


def avoid_cudnn() -> None:
    """Disable cuDNN attention.

    From sm90 on torch prefers it where cuDNN is newer than 9.15, and it builds a plan for each new shape: 0.2
    s for each micro-batch of the M-step, which all differ. Flash and memory-efficient kernels need no plan.
    """
    torch.backends.cuda.enable_cudnn_sdp(False)


def attention_kernels(network: Network, dtype: torch.dtype, device: torch.device) -> dict[str, str]:
    """The attention kernel that torch chooses for prefill, a decoding step and a fit.

    Names are ``torch.nn.attention.SDPBackend``'s in lower case: ``flash_attention``, ``efficient_attention``,
    ``cudnn_attention``, ``math``; ``unknown`` where this version of torch cannot be asked.
    """
    h, g, d = network.heads, network.kv_heads, network.head_dim

    def some(rows: int, heads: int, tokens: int, grad: bool = False) -> Tensor:
        return torch.zeros(rows, heads, tokens, d, dtype=dtype, device=device, requires_grad=grad)

    def chosen(q: Tensor, k: Tensor, mask: Tensor | None = None) -> str:
        gqa = q.shape[1] != k.shape[1]
        try:  # private: torch has no public way to ask
            number = torch._fused_sdp_choice(q, k, k, mask, is_causal=mask is None, enable_gqa=gqa)
        except (AttributeError, TypeError, RuntimeError):
            return "unknown"
        return SDPBackend(number).name.lower()

    def mask(rows: int, queries: int, keys: int) -> Tensor:
        return torch.zeros(rows, 1, queries, keys, dtype=dtype, device=device)

    group = h // g  # the query heads of one key head lie along the token dimension
    decoding = chosen(some(8, g, group), some(8, g, 128), mask(8, group, 128).expand(-1, g, -1, -1))
    fitting = chosen(some(2, g, group * 40, True), some(2, g, 104, True), mask(2, group * 40, 104))
    return {
        "prompts": chosen(some(2, h, 64), some(2, g if shares_keys(device) else h, 64)),
        "decoding": "two products" if device.type == "cpu" else decoding,  # see sampler/decoder.py
        "fitting": fitting,
    }
