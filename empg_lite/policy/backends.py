"""Two ways to load the same policy: Unsloth, or plain transformers + peft + bitsandbytes.

Both take the same local folder, quantize the same weights to bitsandbytes NF4 and put the same LoRA on all
linear layers, so they differ only by kernel rounding. Unsloth patches transformers and must be imported
first: a process uses one backend.
"""

from __future__ import annotations

import importlib.util
import json
import os
import sys
import tempfile
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from empg_lite.core.errors import ModelUnusable, UsageError
from empg_lite.policy.kernels import unsloth_kernels, verified
from empg_lite.policy.policy import Policy, collate

LINEARS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


@dataclass(frozen=True, slots=True)
class Loaded:
    """A ``PeftModel``, how to set its mode (True: training), and how to free its sampling buffers."""

    model: Any
    set_mode: Callable[[Any, bool], None]
    free_buffers: Callable[[], None] | None = None


@dataclass(frozen=True, slots=True)
class Loading:
    """How to load base and adapter; ``seed`` initializes LoRA A."""

    dtype: torch.dtype
    load_in_4bit: bool
    lora_r: int
    lora_alpha: int
    checkpointing: bool
    seed: int


def choose_backend(name: str) -> str:
    """The backend to use; ``auto`` is Unsloth where it is installed.

    Raises:
        UsageError: ``unsloth`` was requested by name and is not installed.
    """
    installed = importlib.util.find_spec("unsloth") is not None
    if name == "auto":
        return "unsloth" if installed else "transformers"
    if name == "unsloth" and not installed:
        raise UsageError("Unsloth is not installed", "model.backend: unsloth", "pip install 'empg-lite[gpu]'")
    return name


def import_unsloth() -> Any:
    """Import Unsloth before the libraries it patches, without telemetry, its cache in a temporary folder."""
    os.environ.setdefault("UNSLOTH_DISABLE_STATISTICS", "1")
    os.environ.setdefault("UNSLOTH_COMPILE_LOCATION", str(Path(tempfile.gettempdir()) / "empg-lite-unsloth"))
    if "unsloth" not in sys.modules and "peft" in sys.modules:
        raise UsageError(
            "Unsloth must be imported before peft", "model.backend: unsloth", "use a fresh process"
        )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import unsloth
    return unsloth


def load_transformers(folder: Path, how: Loading) -> Loaded:
    """Load the base with transformers, NF4 with bitsandbytes, LoRA with peft."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    device = "cuda" if torch.cuda.is_available() else "cpu"
    quantization = None
    if how.load_in_4bit:
        quantization = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=how.dtype,
        )
    base = AutoModelForCausalLM.from_pretrained(
        folder,
        dtype=how.dtype,
        quantization_config=quantization,
        device_map={"": device},
        attn_implementation="sdpa",
    )
    keep_nf4_unpacked(base)
    if how.load_in_4bit and device == "cpu":
        copy_out_of_file(base)
    base.requires_grad_(False)
    torch.manual_seed(how.seed)
    model = get_peft_model(
        base,
        LoraConfig(
            r=how.lora_r,
            lora_alpha=how.lora_alpha,
            lora_dropout=0.0,
            target_modules=list(LINEARS),
            task_type="CAUSAL_LM",
        ),
    )
    if how.checkpointing:
        base.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    return Loaded(model, lambda m, training: m.train(training))


def load_unsloth(folder: Path, how: Loading) -> Loaded:
    """Load base, NF4 and LoRA with Unsloth, with its mode switches and gradient checkpointing."""
    FastLanguageModel = import_unsloth().FastLanguageModel
    kind = "unsloth" if how.checkpointing else False
    base, _ = FastLanguageModel.from_pretrained(
        str(folder),
        dtype=how.dtype,
        load_in_4bit=how.load_in_4bit,
        max_seq_length=context_length(folder),
        use_gradient_checkpointing=kind,
        use_exact_model_name=True,
    )
    keep_nf4_unpacked(base)
    torch.manual_seed(how.seed)
    model = FastLanguageModel.get_peft_model(
        base,
        r=how.lora_r,
        lora_alpha=how.lora_alpha,
        lora_dropout=0,
        target_modules=list(LINEARS),
        bias="none",
        use_gradient_checkpointing=kind,
        random_state=how.seed,
    )

    def set_mode(m: Any, training: bool) -> None:
        if training:
            FastLanguageModel.for_training(m, use_gradient_checkpointing=kind)
        else:
            FastLanguageModel.for_inference(m)

    return Loaded(model, set_mode, partial(free_decode_buffers, model))


def context_length(folder: Path) -> int:
    """Tokens that a model was made for. On a GPU Unsloth compares its ``max_seq_length``, None included."""
    config = json.loads((folder / "config.json").read_text("utf-8"))
    return int(config["max_position_embeddings"])


def free_decode_buffers(model: Any) -> None:
    """Free the KV cache of Unsloth's last ``generate``, which it keeps until its next forward pass."""
    from unsloth.models._decode_graphs import release_for_training

    release_for_training(model)


def borrow_from_unsloth(policy: Policy) -> None:
    """Use those of Unsloth's kernels that pass verification on this device, with notes on the others.

    Raises:
        ModelUnusable: attention is not causal.
    """
    if (leak := future_leak(policy)) > LEAK:
        raise ModelUnusable(
            f"a token changes earlier log-probabilities by {leak:.1e} nats: attention is not causal",
            "model.backend: unsloth",
            "set model.backend: transformers",
        )
    if policy.device.type != "cuda":
        return  # Triton kernels do not run on a CPU; Unsloth is plain transformers there
    try:
        policy.kernels = verified(unsloth_kernels(), policy.causal, policy.dtype)
        policy.notes += policy.kernels.notes
    except ImportError as error:
        policy.notes += (f"kernels: {error}",)
    policy.shared_prefix = None  # ``prepare_fit`` verifies it


#: Nats by which a token may change log-probabilities before it, through rounding.
LEAK = 0.05


@torch.no_grad()
def future_leak(policy: Policy) -> float:
    """Nats by which the last token changes those before it, in the backend's own forward pass."""
    ids = torch.randint(
        policy.head_weight.shape[0], (24,), generator=torch.Generator().manual_seed(0)
    ).tolist()
    rows = [(ids[:8], [*ids[8:-1], last]) for last in (ids[-1], ids[0])]
    with policy.training():
        logprobs, mask = policy.token_logprobs(collate(rows, policy.pad_id, policy.device))
    one, other = (row[seen][:-1] for row, seen in zip(logprobs, mask, strict=True))
    return float((one - other).abs().max())


def copy_out_of_file(model: Any) -> None:
    """Copy unquantized tensors (embedding, norms) out of the mapped weights file, so that it is unmapped.

    A single tensor pointing into the file keeps all of its 16-bit pages resident: 1 GB for 0.5B.
    """
    for parameter in model.parameters():
        if type(parameter) is torch.nn.Parameter:  # bitsandbytes' own type has its own memory
            parameter.data = parameter.data.clone()


def keep_nf4_unpacked(model: Any) -> None:
    """Keep bitsandbytes from repacking NF4 weights in place at the first no-grad forward pass.

    On CPUs with avx512_bf16 the repacking is permanent, and the next training step fails or is wrong.
    """
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False
