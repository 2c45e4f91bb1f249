"""Base and adapter as one plain model: the tensors that transformers loads, by their own names."""

from __future__ import annotations

import json
from collections.abc import Iterator
from copy import deepcopy
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from empg_lite.core.errors import ModelUnusable
from empg_lite.policy.kernels import wide
from empg_lite.policy.merged import merged_weight
from empg_lite.policy.policy import Policy


def whole_tensors(policy: Policy, dtype: torch.dtype) -> Iterator[tuple[str, Tensor]]:
    """(name, tensor) of the merged model, on the CPU, one at a time.

    Base weights are those in memory: an NF4 base is unpacked, so that the result acts as the adapter did.
    """
    causal = policy.causal
    for name, module in causal.named_modules():
        if hasattr(module, "base_layer"):
            with torch.no_grad():
                yield f"{name}.weight", merged_weight(module).to(dtype).cpu()
            if module.base_layer.bias is not None:
                yield f"{name}.bias", module.base_layer.bias.detach().to(dtype).cpu()
        elif ".base_layer" not in name and ".lora_" not in name:
            for key, parameter in module.named_parameters(recurse=False):
                if not (name == "lm_head" and causal.config.tie_word_embeddings):
                    yield f"{name}.{key}", parameter.detach().to(dtype).cpu()


def whole_bytes(policy: Policy, dtype: torch.dtype) -> int:
    """Bytes of all those tensors."""
    causal, total = policy.causal, 0
    for name, module in causal.named_modules():
        if hasattr(module, "base_layer"):
            total += module.in_features * module.out_features
            total += 0 if module.base_layer.bias is None else module.out_features
        elif ".base_layer" not in name and ".lora_" not in name:
            if not (name == "lm_head" and causal.config.tie_word_embeddings):
                total += sum(p.numel() for p in module.parameters(recurse=False))
    return total * dtype.itemsize


def whole_config(policy: Policy, dtype: torch.dtype) -> dict[str, Any]:
    """``config.json`` of the merged model: the base's, without what says how it was quantised."""
    config = deepcopy(policy.causal.config)
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    config.dtype = dtype
    facts: dict[str, Any] = json.loads(config.to_json_string(use_diff=True))
    for name in ("_name_or_path", "quantization_config"):
        facts.pop(name, None)
    return facts


def adapter_deltas(policy: Policy) -> dict[str, tuple[Tensor, Tensor, float]]:
    """Name of each weight that the adapter changes -> (B, A, scale): it adds scale * B A."""
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
    """Give an unquantised policy the weights of the original base plus an adapter's, in place.

    Args:
        base: folder of the base model.

    Raises:
        ModelUnusable: the base's files lack a weight.
    """
    from safetensors import safe_open

    waiting, modules = dict(deltas), dict(policy.causal.named_modules())
    for path in sorted(base.glob("*.safetensors")):
        with safe_open(path, framework="pt") as file:
            for name in sorted(set(file.keys()) & waiting.keys()):
                b, a, scale = waiting.pop(name)
                merged = torch.addmm(wide(file.get_tensor(name)), wide(b), wide(a), alpha=scale)
                modules[name.removesuffix(".weight")].base_layer.weight.copy_(merged)
    if waiting:
        raise ModelUnusable(f"the base model lacks {sorted(waiting)[0]}", str(base))
