"""Base plus adapter, written out as plain matrices: what sampling reads when there is room for it.

A decoding step multiplies few rows by every weight, so what counts is how the weights are read. Through NF4
and LoRA modules that is seven times three products a layer, the base unpacked for each token; here it is four
products over fused matrices. The copy is made again from base and adapter whenever it is asked for: no
adapter is ever subtracted, and nothing is quantised twice.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from empg_lite.policy.kernels import PLAIN, Kernels, wide
from empg_lite.policy.network import Layer, Network, live_network


@dataclass(frozen=True, slots=True)
class _Fused:
    """One layer's matrices: A = H d queries, K = G d keys, D hidden, I intermediate.

    Attributes:
        qkv, bias: ``(A + 2 K, D)``, ``(A + 2 K,)``.
        out, gate_up, down: ``(D, A)``, ``(2 I, D)``, ``(D, I)``.
    """

    qkv: Tensor
    bias: Tensor
    out: Tensor
    gate_up: Tensor
    down: Tensor

    def mlp(self, x: Tensor, kernels: Kernels) -> Tensor:
        if "swiglu" in kernels.borrowed:  # which reads contiguous rows: two products
            gate, up = (F.linear(x, half) for half in self.gate_up.chunk(2))
        else:
            gate, up = F.linear(x, self.gate_up).chunk(2, -1)
        return F.linear(kernels.swiglu(gate, up), self.down)


class MergedCopy:
    """The linears of a policy's network in the computing type, at addresses that stay.

    Attributes:
        network: the same function as the policy's own, as of the last ``refresh``; no gradients.
    """

    def __init__(self, causal: Any, dtype: torch.dtype, kernels: Kernels = PLAIN) -> None:
        self._causal, live, self._kernels = causal, live_network(causal, kernels), kernels
        self._fused = [_buffers(layer, dtype) for layer in causal.model.layers]
        layers = zip(live.layers, self._fused, strict=True)
        self.network: Network = replace(live, layers=tuple(_layer(*pair, kernels) for pair in layers))
        self.refresh()

    @torch.no_grad()
    def refresh(self) -> None:
        """Write the weights anew: base, plus the adapter where it is switched on."""
        # Sampling runs under autocast, which would round B A to 16 bits before it is added.
        with torch.autocast(self._fused[0].out.device.type, enabled=False):
            for layer, fused in zip(self._causal.model.layers, self._fused, strict=True):
                for target, linear in _targets(layer, fused):
                    target.copy_(merged_weight(linear, self._kernels))


def _layer(live: Layer, fused: _Fused, kernels: Kernels) -> Layer:
    return replace(
        live,
        qkv=partial(F.linear, weight=fused.qkv, bias=fused.bias),
        out=partial(F.linear, weight=fused.out),
        mlp=partial(fused.mlp, kernels=kernels),
    )


def _projections(layer: Any) -> tuple[Any, Any, Any]:
    attention = layer.self_attn
    return attention.q_proj, attention.k_proj, attention.v_proj


def _buffers(layer: Any, dtype: torch.dtype) -> _Fused:
    heads = _projections(layer)
    device = heads[0].base_layer.weight.device

    def empty(*linears: Any) -> Tensor:
        rows = sum(linear.out_features for linear in linears)
        return torch.empty(rows, linears[0].in_features, dtype=dtype, device=device)

    mlp = layer.mlp
    return _Fused(
        qkv=empty(*heads),
        bias=torch.cat([linear.base_layer.bias.detach() for linear in heads]).to(dtype),
        out=empty(layer.self_attn.o_proj),
        gate_up=empty(mlp.gate_proj, mlp.up_proj),
        down=empty(mlp.down_proj),
    )


def _targets(layer: Any, fused: _Fused) -> Iterator[tuple[Tensor, Any]]:
    """(rows of a buffer, the linear whose weight belongs there)."""
    heads, mlp = _projections(layer), layer.mlp
    yield from zip(fused.qkv.split([linear.out_features for linear in heads]), heads, strict=True)
    yield fused.out, layer.self_attn.o_proj
    yield from zip(fused.gate_up.chunk(2), (mlp.gate_proj, mlp.up_proj), strict=True)
    yield fused.down, mlp.down_proj


def merged_weight(linear: Any, kernels: Kernels = PLAIN) -> Tensor:
    """``(out, in)`` weight of a PEFT LoRA layer as it acts now: W + scale B A, in float32 or better.

    Under autocast the sum would be rounded: call it outside.
    """
    weight = linear.base_layer.weight
    if hasattr(weight, "quant_state"):
        weight = kernels.dequantize(weight.data, weight.quant_state)
    if linear.disable_adapters:
        return wide(weight)
    a, b = linear.lora_A["default"].weight, linear.lora_B["default"].weight
    return torch.addmm(wide(weight), b, a, alpha=linear.scaling["default"])
