"""Base plus adapter as plain matrices: fused for the sampler, or whole by name for an export.

A decoding step multiplies few rows by every weight, so its cost is reading the weights. Through NF4 and LoRA
modules that is seven times three products per layer, the base dequantized for each token; here it is four
products over fused matrices. The copy is always made from base and adapter: no adapter is ever subtracted,
and nothing is quantized twice.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from copy import deepcopy
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn import functional as F

from empg_lite.core.errors import ModelUnusable
from empg_lite.policy.kernels import PLAIN, Kernels, wide
from empg_lite.policy.network import Layer, Network, live_network

if TYPE_CHECKING:
    from pathlib import Path

    from empg_lite.policy.policy import Policy


def merged_weight(linear: Any, kernels: Kernels = PLAIN) -> Tensor:
    """``(out, in)`` effective weight of a PEFT LoRA layer: W + scale B A, in float32 or better.

    Call it outside autocast, which would round the sum.
    """
    weight = linear.base_layer.weight
    if hasattr(weight, "quant_state"):
        weight = kernels.dequantize(weight.data, weight.quant_state)
    if linear.disable_adapters:
        return wide(weight)
    a, b = linear.lora_A["default"].weight, linear.lora_B["default"].weight
    return torch.addmm(wide(weight), b, a, alpha=linear.scaling["default"])


# --- for the sampler --------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Fused:
    """One layer's matrices: A = H d queries, K = G d keys, D hidden, I intermediate.

    Attributes:
        qkv: ``(A + 2 K, D)``.
        bias: ``(A + 2 K,)``, or None (only Qwen2 has biases).
        out, gate_up, down: ``(D, A)``, ``(2 I, D)``, ``(D, I)``.
    """

    qkv: Tensor
    bias: Tensor | None
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
    """The linears of a policy's network in the compute type, at fixed addresses.

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
        """Rewrite the weights: base, plus the adapter where it is enabled."""
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

    biases, mlp = [linear.base_layer.bias for linear in heads], layer.mlp
    return _Fused(
        qkv=empty(*heads),
        bias=None if biases[0] is None else torch.cat(biases).detach().to(dtype),
        out=empty(layer.self_attn.o_proj),
        gate_up=empty(mlp.gate_proj, mlp.up_proj),
        down=empty(mlp.down_proj),
    )


def _targets(layer: Any, fused: _Fused) -> Iterator[tuple[Tensor, Any]]:
    """(rows of a buffer, the linear whose weight they hold)."""
    heads, mlp = _projections(layer), layer.mlp
    yield from zip(fused.qkv.split([linear.out_features for linear in heads]), heads, strict=True)
    yield fused.out, layer.self_attn.o_proj
    yield from zip(fused.gate_up.chunk(2), (mlp.gate_proj, mlp.up_proj), strict=True)
    yield fused.down, mlp.down_proj


# --- for an export ----------------------------------------------------------------------------------


def _modules(causal: Any) -> Iterator[tuple[str, Any]]:
    """LoRA layers and the modules outside them, in the model's order; a tied head is left out."""
    for name, module in causal.named_modules():
        inside_lora = ".base_layer" in name or ".lora_" in name
        if not inside_lora and not (name == "lm_head" and causal.config.tie_word_embeddings):
            yield name, module


def merged_tensors(policy: Policy, dtype: torch.dtype) -> Iterator[tuple[str, Tensor]]:
    """(name, tensor) of the merged model under transformers' names, on the CPU, one at a time.

    Base weights are those in memory: an NF4 base is dequantized, so that the result acts as the adapter did.
    """
    for name, module in _modules(policy.causal):
        if hasattr(module, "base_layer"):
            with torch.no_grad():
                yield f"{name}.weight", merged_weight(module).to(dtype).cpu()
            if module.base_layer.bias is not None:
                yield f"{name}.bias", module.base_layer.bias.detach().to(dtype).cpu()
        else:
            for key, parameter in module.named_parameters(recurse=False):
                yield f"{name}.{key}", parameter.detach().to(dtype).cpu()


def merged_bytes(policy: Policy, dtype: torch.dtype) -> int:
    """Size of all those tensors in bytes."""
    total = 0
    for _, module in _modules(policy.causal):
        if hasattr(module, "base_layer"):
            total += module.out_features * (module.in_features + (module.base_layer.bias is not None))
        else:
            total += sum(p.numel() for p in module.parameters(recurse=False))
    return total * dtype.itemsize


def merged_config(policy: Policy, dtype: torch.dtype) -> dict[str, Any]:
    """``config.json`` of the merged model: the base's without its quantization."""
    config = deepcopy(policy.causal.config)
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    config.dtype = dtype
    facts: dict[str, Any] = json.loads(config.to_json_string(use_diff=True))
    for name in ("_name_or_path", "quantization_config"):
        facts.pop(name, None)
    return facts


def adapter_deltas(policy: Policy) -> dict[str, tuple[Tensor, Tensor, float]]:
    """(B, A, scale) by the name of each adapted weight: the adapter adds scale * B A."""
    return {
        f"{name}.weight": (
            module.lora_B["default"].weight.detach().cpu().clone(),
            module.lora_A["default"].weight.detach().cpu().clone(),
            float(module.scaling["default"]),
        )
        for name, module in policy.causal.named_modules()
        if hasattr(module, "base_layer")
    }


@torch.no_grad()
def put_on_original(policy: Policy, base: Path, deltas: dict[str, tuple[Tensor, Tensor, float]]) -> None:
    """Load the original base weights plus an adapter into an unquantized policy, in place.

    Args:
        base: folder of the base model.

    Raises:
        ModelUnusable: the base's files lack a weight.
    """
    from safetensors import safe_open

    remaining, modules = dict(deltas), dict(policy.causal.named_modules())
    for path in sorted(base.glob("*.safetensors")):
        with safe_open(path, framework="pt") as file:
            for name in sorted(set(file.keys()) & remaining.keys()):
                b, a, scale = remaining.pop(name)
                merged = torch.addmm(wide(file.get_tensor(name)), wide(b), wide(a), alpha=scale)
                modules[name.removesuffix(".weight")].base_layer.weight.copy_(merged)
    if remaining:
        raise ModelUnusable(f"the base model has no {sorted(remaining)[0]}", str(base))
