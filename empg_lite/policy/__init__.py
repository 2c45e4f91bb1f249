"""Base model, adapter, tokenizer, prompt: the only package that imports unsloth, bitsandbytes, peft."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import TYPE_CHECKING, Any

from empg_lite.policy.templates import TEMPLATES, Template, load_template

if TYPE_CHECKING:
    from empg_lite.policy.policy import Policy

__all__ = ["TEMPLATES", "Template", "load_policy", "load_template", "load_tokenizer", "resolve_dtype"]


def resolve_dtype(asked: str) -> Any:
    """``auto``: float32 on a CPU (exact resume), bfloat16 where the card has it, else float16 (T4)."""
    import torch

    if asked != "auto":
        return getattr(torch, asked)
    if not torch.cuda.is_available():
        return torch.float32
    return torch.bfloat16 if torch.cuda.get_device_capability() >= (8, 0) else torch.float16


def load_tokenizer(folder: Path) -> Any:
    """The model's tokenizer, checked to split and join as its files say."""
    from transformers import AutoConfig, AutoTokenizer

    from empg_lite.errors import ModelUnusable
    from empg_lite.policy.integrity import check_tokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(folder)
    except (OSError, ValueError, TypeError) as error:
        raise ModelUnusable(
            f"tokenizer cannot be loaded ({' '.join(str(error).split())[:200]})", str(folder)
        ) from error
    check_tokenizer(tokenizer, folder, AutoConfig.from_pretrained(folder).vocab_size)
    return tokenizer


def quiet() -> None:
    """Switch off the progress bars and advice that libraries print while loading."""
    from transformers.utils import logging as transformers_logging

    transformers_logging.disable_progress_bar()
    transformers_logging.set_verbosity_error()
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)


def load_policy(model: Any, prompt: str, *, seed: int, gradient_checkpointing: bool | str = "auto") -> Policy:
    """Load base and adapter as a recipe's ``model`` section says.

    Args:
        model: the recipe's ``model`` section (name, revision, adapter, backend, dtype, load_in_4bit, lora_r,
            lora_alpha).
        prompt: template name or file.
        seed: initialises the adapter (LoRA A; B is zero).
        gradient_checkpointing: ``auto`` is on with a GPU, off without.

    Raises:
        MissingInput: model, adapter or template is not there.
        ModelUnusable: the files are damaged, incomplete or of an untested architecture.
        UsageError: the backend asked for is not installed.
    """
    from empg_lite.policy import backends

    template = load_template(prompt)
    backend = backends.choose_backend(model.backend)
    if backend == "unsloth":
        backends.import_unsloth()  # before transformers and peft, which it patches
    import torch

    from empg_lite.policy.adapter import load_adapter, read_adapter_config
    from empg_lite.policy.attention import avoid_cudnn
    from empg_lite.policy.integrity import check_config, check_weights, resolve_model
    from empg_lite.policy.policy import Policy

    quiet()
    adapter = Path(model.adapter) if model.adapter else None
    shape = (
        read_adapter_config(adapter) if adapter else {"lora_r": model.lora_r, "lora_alpha": model.lora_alpha}
    )
    folder, revision = resolve_model(model.name, model.revision)
    check_config(folder)
    check_weights(folder)
    tokenizer = load_tokenizer(folder)
    dtype = resolve_dtype(model.dtype)
    checkpointing = (
        torch.cuda.is_available() if gradient_checkpointing == "auto" else bool(gradient_checkpointing)
    )
    load = backends.load_unsloth if backend == "unsloth" else backends.load_transformers
    how = backends.Loading(
        dtype, model.load_in_4bit, shape["lora_r"], shape["lora_alpha"], checkpointing, seed
    )
    avoid_cudnn()
    loaded = load(folder, how)
    policy = Policy(
        loaded.model,
        tokenizer,
        template,
        dtype=dtype,
        backend=backend,
        name=model.name,
        revision=revision,
        checkpointing=checkpointing,
        set_mode=loaded.set_mode,
        free_buffers=loaded.free_buffers,
    )
    if adapter:
        load_adapter(policy, adapter)
    if backend == "unsloth":
        backends.borrow_from_unsloth(policy)
    return policy
