"""Which attention kernel torch chooses, asked of torch itself."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend

from empg_lite.policy.network import Network
from empg_lite.policy.packing import shares_keys


def avoid_cudnn() -> None:
    """Take cuDNN's attention out of torch's choice.

    From sm90 on torch prefers it where cuDNN is newer than 9.15, and it plans anew for each shape: 0.2 s
    for each micro-batch of the M-step, which all differ. Flash and memory-efficient kernels plan nothing.
    """
    torch.backends.cuda.enable_cudnn_sdp(False)


def attention_kernels(network: Network, dtype: torch.dtype, device: torch.device) -> dict[str, str]:
    """The kernel of each place where tokens attend: the prompts' pass, a decoding step, a fit.

    Names are ``torch.nn.attention.SDPBackend``'s in lower case: ``flash_attention``, ``efficient_attention``,
    ``cudnn_attention``, ``math``; ``unknown`` where this torch cannot be asked.
    """
    h, g, d = network.heads, network.kv_heads, network.head_dim

    def some(rows: int, heads: int, tokens: int, grad: bool = False) -> Tensor:
        return torch.zeros(rows, heads, tokens, d, dtype=dtype, device=device, requires_grad=grad)

    def chosen(q: Tensor, k: Tensor, mask: Tensor | None = None) -> str:
        gqa = q.shape[1] != k.shape[1]
        try:  # private, and there is no public way to ask
            number = torch._fused_sdp_choice(q, k, k, mask, is_causal=mask is None, enable_gqa=gqa)
        except (AttributeError, TypeError, RuntimeError):
            return "unknown"
        return SDPBackend(number).name.lower()

    def mask(rows: int, queries: int, keys: int) -> Tensor:
        return torch.zeros(rows, 1, queries, keys, dtype=dtype, device=device)

    together = h // g  # query heads of a key head stand along the tokens
    decoding = chosen(some(8, g, together), some(8, g, 128), mask(8, together, 128).expand(-1, g, -1, -1))
    fitting = chosen(some(2, g, together * 40, True), some(2, g, 104, True), mask(2, together * 40, 104))
    return {
        "prompts": chosen(some(2, h, 64), some(2, g if shares_keys(device) else h, 64)),
        "decoding": "two products" if device.type == "cpu" else decoding,  # see sampler/decoder.py
        "fitting": fitting,
    }
