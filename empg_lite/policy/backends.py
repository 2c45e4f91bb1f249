"""Two ways to get the same policy: Unsloth's kernels, or plain transformers + peft + bitsandbytes.

Both take the same local folder, quantise the same weights with bitsandbytes NF4 and put the same LoRA on
all linear layers, so they differ by kernel rounding only. Unsloth patches transformers when it is
imported, and must be imported first: a process uses one backend.
"""

from __future__ import annotations

import importlib.util
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
from empg_lite.policy.kernels import proven, unsloth_kernels
from empg_lite.policy.policy import Policy, collate

LINEARS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


@dataclass(frozen=True, slots=True)
class Loaded:
    """A ``PeftModel``, how its mode is set (True: training), and how to free what its sampling leaves."""

    model: Any
    set_mode: Callable[[Any, bool], None]
    free_buffers: Callable[[], None] | None = None


@dataclass(frozen=True, slots=True)
class Loading:
    """How base and adapter are held; ``seed`` initialises LoRA A."""

    dtype: torch.dtype
    load_in_4bit: bool
    lora_r: int
    lora_alpha: int
    checkpointing: bool
    seed: int


def choose_backend(asked: str) -> str:
    """``auto`` takes Unsloth where it is installed.

    Raises:
        UsageError: ``unsloth`` was asked for by name and is not installed, or came too late.
    """
    installed = importlib.util.find_spec("unsloth") is not None
    if asked == "auto":
        return "unsloth" if installed else "transformers"
    if asked == "unsloth" and not installed:
        raise UsageError("Unsloth is not installed", "model.backend: unsloth", "pip install 'empg-lite[gpu]'")
    return asked


def import_unsloth() -> Any:
    """Import Unsloth before what it patches, statistics off, its cache out of the working folder."""
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
    """Base by transformers, NF4 by bitsandbytes, LoRA by peft."""
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
        leave_the_file(base)
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
    """Base, NF4 and LoRA by Unsloth, with its mode switches and its gradient checkpointing."""
    FastLanguageModel = import_unsloth().FastLanguageModel
    base, _ = FastLanguageModel.from_pretrained(
        str(folder),
        dtype=how.dtype,
        load_in_4bit=how.load_in_4bit,
        max_seq_length=None,
        use_exact_model_name=True,
    )
    keep_nf4_unpacked(base)
    kind = "unsloth" if how.checkpointing else False
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


def free_decode_buffers(model: Any) -> None:
    """Free the keys and values of Unsloth's last ``generate``: it keeps them until its next forward pass."""
    from unsloth.models._decode_graphs import release_for_training

    release_for_training(model)


def borrow_from_unsloth(policy: Policy) -> None:
    """Give a policy those of Unsloth's kernels that prove right on this device, and notes about the rest.

    Raises:
        ModelUnusable: a token changes log-probabilities before it.
    """
    if (leak := future_leak(policy)) > LEAK:
        raise ModelUnusable(
            f"a token changes earlier log-probabilities by {leak:.1e} nats: attention is not causal",
            "model.backend: unsloth",
            "set model.backend: transformers",
        )
    if policy.device.type != "cuda":
        return  # Triton's kernels have no CPU; Unsloth is plain transformers there
    try:
        policy.kernels = proven(unsloth_kernels(), policy.causal, policy.dtype)
        policy.notes += policy.kernels.notes
    except ImportError as error:
        policy.notes += (f"kernels: {error}",)
    policy.shared_prefix = None  # ``prepare_fit`` tries it


#: Nats by which a token may move log-probabilities before it: the rounding of another batch, not knowledge.
LEAK = 0.05


@torch.no_grad()
def future_leak(policy: Policy) -> float:
    """Nats by which a last token changes those before it, in the backend's own forward pass."""
    ids = torch.randint(
        policy.head_weight.shape[0], (24,), generator=torch.Generator().manual_seed(0)
    ).tolist()
    rows = [(ids[:8], [*ids[8:-1], last]) for last in (ids[-1], ids[0])]
    with policy.training():
        logprobs, mask = policy.token_logprobs(collate(rows, policy.pad_id, policy.device))
    one, other = (row[seen][:-1] for row, seen in zip(logprobs, mask, strict=True))
    return float((one - other).abs().max())


def leave_the_file(model: Any) -> None:
    """Copy what was not quantised (embedding, norms) out of the mapped weights file, so that it is unmapped.

    One tensor that still points into the file keeps all of its 16-bit pages resident: 1 GB for 0.5B.
    """
    for parameter in model.parameters():
        if type(parameter) is torch.nn.Parameter:  # bitsandbytes' own kind is in memory of its own
            parameter.data = parameter.data.clone()


def keep_nf4_unpacked(model: Any) -> None:
    """Stop bitsandbytes from repacking NF4 weights in place at the first no-grad forward.

    On CPUs with avx512_bf16 it does so for good, and the next training step fails or is wrong.
    """
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False
