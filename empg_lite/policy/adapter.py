"""The adapter as files: plain PEFT, loadable by peft, transformers and vLLM without this package."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from empg_lite.core.errors import DataError, MissingInput

if TYPE_CHECKING:
    from torch import Tensor

    from empg_lite.policy.policy import Policy

WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"


def adapter_files(policy: Policy) -> dict[str, bytes]:
    """``adapter_model.safetensors`` and ``adapter_config.json`` as bytes."""
    from peft import get_peft_model_state_dict
    from safetensors.torch import save

    tensors = {
        name: tensor.detach().cpu().contiguous()
        for name, tensor in sorted(
            get_peft_model_state_dict(policy.model, save_embedding_layers=False).items()
        )
    }
    config = policy.model.peft_config["default"].to_dict()
    config |= {"inference_mode": True, "base_model_name_or_path": policy.name, "revision": policy.revision}
    text = json.dumps(config, indent=1, sort_keys=True, default=_plain)
    return {WEIGHTS: save(tensors, metadata={"format": "pt"}), CONFIG: text.encode()}


def _plain(value: Any) -> Any:
    return sorted(value) if isinstance(value, (set, frozenset)) else str(value)


def read_adapter_config(folder: Path) -> dict[str, Any]:
    """The parts of ``adapter_config.json`` that say how to rebuild the adapter.

    Raises:
        MissingInput: not an adapter folder.
        DataError: not a LoRA adapter that this package can hold.
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
        raise DataError(f"a plain LoRA adapter is needed, this is {kind}", str(path))
    return {"lora_r": rank, "lora_alpha": alpha, "base": config.get("base_model_name_or_path")}


#: Of a safetensors file: bytes of the header, tensors. An 8-bit optimiser of a 7B model has 2,400.
MAX_HEADER, MAX_TENSORS = 1 << 20, 4096


def read_tensors(data: bytes, where: str) -> dict[str, Tensor]:
    """Tensors of a small safetensors file; its header is looked at before anything is made of it.

    Raises:
        DataError: it is damaged, or has more than a file of ours could have.
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
    """Put an adapter's values into the policy's LoRA layers; names and shapes must match exactly.

    Raises:
        MissingInput, DataError: the folder is not an adapter, or not one for this policy.
    """
    read_adapter_config(folder)
    load_adapter_bytes(policy, (folder / WEIGHTS).read_bytes(), str(folder / WEIGHTS))


def load_adapter_bytes(policy: Policy, data: bytes, where: str) -> None:
    """As ``load_adapter``, from the bytes of a safetensors file."""
    import torch
    from peft import get_peft_model_state_dict, set_peft_model_state_dict

    tensors = read_tensors(data, where)
    expected = get_peft_model_state_dict(policy.model, save_embedding_layers=False)
    if tensors.keys() != expected.keys():
        odd = sorted(tensors.keys() ^ expected.keys())[0]
        raise DataError(
            f"adapter and model differ in {odd}", where, "it was trained on another model or rank"
        )
    for name, tensor in tensors.items():
        if tensor.shape != expected[name].shape:
            raise DataError(
                f"{name} has shape {tuple(tensor.shape)}, the model's is {tuple(expected[name].shape)}",
                where,
                "it was trained on another model or rank",
            )
        if not torch.isfinite(tensor).all():
            raise DataError(f"{name} holds NaN or infinity", where)
    set_peft_model_state_dict(policy.model, tensors)
