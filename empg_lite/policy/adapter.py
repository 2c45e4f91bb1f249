"""The adapter: its optimizer, and its files, which peft, transformers and vLLM load without this package."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from empg_lite.core.bundled import hub_name
from empg_lite.core.errors import DataError, MissingInput

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor, nn
    from torch.optim import Optimizer

    from empg_lite.policy.policy import Policy

WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
#: Limits of a safetensors file: header bytes, tensors. An 8-bit optimizer of a 7B model has 2,400 tensors.
MAX_HEADER, MAX_TENSORS = 1 << 20, 4096


def make_adamw(parameters: Sequence[nn.Parameter], learning_rate: float, *, eight_bit: bool) -> Optimizer:
    """AdamW over the adapter, without weight decay.

    Args:
        eight_bit: hold both moments in 8 bits with a scale for every 256 values (T. Dettmers et al., "8-bit
            Optimizers via Block-wise Quantization", 2022); matrices below 4,096 elements stay in float32.
    """
    if eight_bit:
        from bitsandbytes.optim import AdamW8bit as AdamW
    else:
        from torch.optim import AdamW
    optimizer: Optimizer = AdamW(list(parameters), lr=learning_rate, betas=(0.9, 0.999), weight_decay=0.0)
    return optimizer


def adapter_files(policy: Policy) -> dict[str, bytes]:
    """``adapter_model.safetensors`` and ``adapter_config.json`` as bytes."""
    from safetensors.torch import save

    tensors = {
        name: tensor.detach().cpu().contiguous() for name, tensor in sorted(_state_dict(policy).items())
    }
    config = policy.model.peft_config["default"].to_dict()
    base = {"base_model_name_or_path": hub_name(policy.name), "revision": policy.revision}
    config |= {"inference_mode": True, **base}
    text = json.dumps(config, indent=1, sort_keys=True, default=_plain)
    return {WEIGHTS: save(tensors, metadata={"format": "pt"}), CONFIG: text.encode()}


def _state_dict(policy: Policy) -> dict[str, Tensor]:
    from peft import get_peft_model_state_dict

    tensors: dict[str, Tensor] = get_peft_model_state_dict(policy.model, save_embedding_layers=False)
    return tensors


def _plain(value: Any) -> Any:
    return sorted(value) if isinstance(value, (set, frozenset)) else str(value)


def read_adapter_config(folder: Path) -> dict[str, Any]:
    """What it takes to rebuild an adapter, from its config: ``lora_r``, ``lora_alpha``, ``base``.

    Raises:
        MissingInput: not an adapter folder.
        DataError: not a plain LoRA adapter.
    """
    path = folder / CONFIG
    if not path.is_file() or not (folder / WEIGHTS).is_file():
        raise MissingInput(f"no {CONFIG} and {WEIGHTS}: not an adapter", str(folder))
    try:
        config = json.loads(path.read_text("utf-8"))
        kind, rank, alpha = config["peft_type"], config["r"], config["lora_alpha"]
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise DataError(f"{CONFIG} cannot be read ({error})", str(path)) from error
    if kind != "LORA" or not isinstance(rank, int) or config.get("auto_mapping"):
        raise DataError(f"expected a plain LoRA adapter, found {kind}", str(path))
    return {"lora_r": rank, "lora_alpha": alpha, "base": config.get("base_model_name_or_path")}


def read_tensors(data: bytes, where: str) -> dict[str, Tensor]:
    """The tensors of a small safetensors file; its header is checked before anything is allocated.

    Raises:
        DataError: damaged, or over ``MAX_HEADER`` or ``MAX_TENSORS``.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load

    try:
        length = int.from_bytes(data[:8], "little")
        if length > min(MAX_HEADER, len(data) - 8):
            raise ValueError(f"a header of {length:,} bytes")
        if len(header := json.loads(data[8 : 8 + length])) > MAX_TENSORS:
            raise ValueError(f"{len(header):,} tensors")
        return load(data)
    except (SafetensorError, ValueError, TypeError, RecursionError) as error:
        raise DataError(f"damaged safetensors file ({str(error)[:200]})", where) from error


def load_adapter(policy: Policy, folder: Path) -> None:
    """Load an adapter's values into the policy's LoRA layers; names and shapes must match exactly.

    Raises:
        MissingInput, DataError: not an adapter folder, or not an adapter for this policy.
    """
    read_adapter_config(folder)
    load_adapter_bytes(policy, (folder / WEIGHTS).read_bytes(), str(folder / WEIGHTS))


def load_adapter_bytes(policy: Policy, data: bytes, where: str) -> None:
    """Same as ``load_adapter``, from the bytes of a safetensors file."""
    import torch
    from peft import set_peft_model_state_dict

    tensors, expected = read_tensors(data, where), _state_dict(policy)
    todo = "it was trained on another model or rank"
    if tensors.keys() != expected.keys():
        name = sorted(tensors.keys() ^ expected.keys())[0]
        raise DataError(f"only one of adapter and model has {name}", where, todo)
    for name, tensor in tensors.items():
        if tensor.shape != expected[name].shape:
            shapes = f"shape {tuple(tensor.shape)}, the model expects {tuple(expected[name].shape)}"
            raise DataError(f"{name} has {shapes}", where, todo)
        if not torch.isfinite(tensor).all():
            raise DataError(f"{name} contains NaN or infinity", where)
    set_peft_model_state_dict(policy.model, tensors)
