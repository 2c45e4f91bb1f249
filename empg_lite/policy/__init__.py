"""Base model, adapter, tokenizer and prompt: the only package that imports unsloth, bitsandbytes and peft."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import TYPE_CHECKING, Any

from empg_lite.policy.templates import TEMPLATES, Template, load_template

if TYPE_CHECKING:
    from empg_lite.policy.backends import Loading
    from empg_lite.policy.policy import Policy

__all__ = [
    "TEMPLATES",
    "Template",
    "import_libraries",
    "load_policy",
    "load_template",
    "load_tokenizer",
    "resolve_dtype",
]


def resolve_dtype(name: str) -> Any:
    """A torch dtype; ``auto``: float32 on a CPU (exact resume), bfloat16 if supported, else float16 (T4)."""
    import torch

    if name != "auto":
        return getattr(torch, name)
    if not torch.cuda.is_available():
        return torch.float32
    return torch.bfloat16 if torch.cuda.get_device_capability() >= (8, 0) else torch.float16


def load_tokenizer(folder: Path) -> tuple[Any, tuple[str, ...]]:
    """The model's tokenizer, checked against its files, and notes on what was mended in it."""
    from transformers import AutoConfig, AutoTokenizer

    from empg_lite.core.errors import ModelUnusable
    from empg_lite.policy.integrity import check_tokenizer
    from empg_lite.policy.tokens import mend_end

    try:
        tokenizer = AutoTokenizer.from_pretrained(folder)
    except (OSError, ValueError, TypeError) as error:
        raise ModelUnusable(
            f"tokenizer cannot be loaded ({' '.join(str(error).split())[:200]})", str(folder)
        ) from error
    check_tokenizer(tokenizer, folder, AutoConfig.from_pretrained(folder).vocab_size)
    return tokenizer, mend_end(tokenizer)


def quiet() -> None:
    """Disable the progress bars and advice that libraries print while loading."""
    from transformers.utils import logging as transformers_logging

    transformers_logging.disable_progress_bar()
    transformers_logging.set_verbosity_error()


def import_libraries(backend: str) -> None:
    """Import a backend's libraries; Unsloth first, because it patches the others.

    Raises:
        UsageError: the backend is not installed, or peft was imported before Unsloth.
    """
    from empg_lite.policy import backends

    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # it logs while it is imported
    if backends.choose_backend(backend) == "unsloth":
        backends.import_unsloth()
    from peft import get_peft_model  # noqa: F401
    from transformers import AutoModelForCausalLM  # noqa: F401


def load_policy(model: Any, prompt: str, *, seed: int, gradient_checkpointing: bool | str = "auto") -> Policy:
    """Load base and adapter according to a recipe's ``model`` section.

    Args:
        model: the recipe's ``model`` section (name, revision, adapter, backend, dtype, load_in_4bit, lora_r,
            lora_alpha).
        prompt: template name or file.
        seed: initializes the adapter (LoRA A; B is zero).
        gradient_checkpointing: ``auto`` means on with a GPU, off without.

    Raises:
        MissingInput: model, adapter or template does not exist.
        ModelUnusable: the files are damaged, incomplete or of an untested architecture.
        UsageError: the requested backend is not installed.
    """
    from empg_lite.policy import backends

    template = load_template(prompt)  # before anything slow: its name may be misspelt
    backend = backends.choose_backend(model.backend)
    import_libraries(backend)
    from empg_lite.policy.adapter import load_adapter
    from empg_lite.policy.attention import avoid_cudnn
    from empg_lite.policy.integrity import check_config, check_weights, resolve_model
    from empg_lite.policy.policy import Policy
    from empg_lite.policy.tokens import fit_template

    quiet()
    folder, revision = resolve_model(model.name, model.revision)
    check_config(folder)
    check_weights(folder)
    tokenizer, mended = load_tokenizer(folder)
    template, fitted = fit_template(template, tokenizer)
    how = _loading(model, seed, gradient_checkpointing)
    avoid_cudnn()
    loaded = (backends.load_unsloth if backend == "unsloth" else backends.load_transformers)(folder, how)
    policy = Policy(
        loaded.model,
        tokenizer,
        template,
        dtype=how.dtype,
        backend=backend,
        name=model.name,
        revision=revision,
        checkpointing=how.checkpointing,
        set_mode=loaded.set_mode,
        free_buffers=loaded.free_buffers,
        notes=(*mended, *fitted),
    )
    if model.adapter:
        load_adapter(policy, Path(model.adapter))
    if backend == "unsloth":
        backends.borrow_from_unsloth(policy)
    return policy


def _loading(model: Any, seed: int, gradient_checkpointing: bool | str) -> Loading:
    """How to load base and adapter, every ``auto`` resolved; see ``load_policy``."""
    import torch

    from empg_lite.policy.adapter import read_adapter_config
    from empg_lite.policy.backends import Loading

    rank, alpha = model.lora_r, model.lora_alpha
    if model.adapter:
        stored = read_adapter_config(Path(model.adapter))
        rank, alpha = stored["lora_r"], stored["lora_alpha"]
    on = torch.cuda.is_available() if gradient_checkpointing == "auto" else bool(gradient_checkpointing)
    return Loading(resolve_dtype(model.dtype), model.load_in_4bit, rank, alpha, on, seed)
