"""Pointwise operations between the matrix products: plain torch, or Unsloth's kernels while decoding.

Plain torch needs about twenty launches per layer, Unsloth's Triton kernels four. Each borrowed kernel is
compared with plain torch when the model is loaded, on the device and at the model's own sizes; one that fails
or differs is left out with a note. They have no gradients here: the M-step uses plain torch or Unsloth's own
forward pass (``shared_prefix``).

Shapes: N tokens, D hidden, H query and G key heads of size d, I intermediate.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

#: (residual (N, D), update (N, D) or None, weight (D,), eps) -> (their sum, the sum's RMSNorm), both (N, D).
#: May overwrite both inputs.
AddNorm = Callable[[Tensor, Tensor | None, Tensor, float], tuple[Tensor, Tensor]]
#: Cosines and sines (N, d) -> what ``Rotate`` takes; once for all layers.
Angles = Callable[[Tensor, Tensor], Any]
#: (queries and keys (N, H + G, d), angles) -> rotated, (N, H + G, d). May overwrite its input.
Rotate = Callable[[Tensor, Any], Tensor]
#: (gate (N, I), up (N, I)), both contiguous -> silu(gate) * up.
SwiGLU = Callable[[Tensor, Tensor], Tensor]
#: (packed NF4 weight, its quant_state) -> (out, in) in its original type.
Dequantize = Callable[[Tensor, Any], Tensor]

#: Numbers of tokens at which a borrowed kernel is verified.
VERIFIED_ROWS = (1, 8, 130)


# --- plain torch ------------------------------------------------------------------------------------


def wide(x: Tensor) -> Tensor:
    """In float32, or in float64 if it already is."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def head_dim(config: Any) -> int:
    """Size of an attention head of a transformers config."""
    return getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """RMSNorm of ``(..., D)``, computed in float32 or better; the weight is broadcast to that shape."""
    return weight * F.rms_norm(wide(x), x.shape[-1:], None, eps).to(x.dtype)


def add_norm(x: Tensor, update: Tensor | None, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """See ``AddNorm``; differentiable, overwrites nothing."""
    x = x if update is None else x + update
    return x, rms_norm(x, weight, eps)


def angles(cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """Cosines and signed sines, ``(N, 1, d)``."""
    half = cos.shape[-1] // 2
    # rotate_half(x) is x rolled by half a head with its first half negated: the sine carries the sign
    return cos[:, None], torch.cat((-sin[:, :half], sin[:, half:]), -1)[:, None]


def rotate(turning: Tensor, turns: tuple[Tensor, Tensor]) -> Tensor:
    """See ``Rotate``; differentiable, overwrites nothing."""
    cos, signed_sin = turns
    return turning * cos + turning.roll(turning.shape[-1] // 2, -1) * signed_sin


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """See ``SwiGLU``; differentiable, takes rows of any stride."""
    return F.silu(gate) * up


def dequantize(packed: Tensor, quant_state: Any) -> Tensor:
    """See ``Dequantize``."""
    from bitsandbytes.functional import dequantize_4bit

    return dequantize_4bit(packed, quant_state)


@dataclass(frozen=True, slots=True)
class Kernels:
    """The pointwise operations in use.

    Attributes:
        borrowed: those of Unsloth's: some of ``add_norm``, ``rotate``, ``swiglu``, ``dequantize``.
        notes: why others were left out.
    """

    add_norm: AddNorm = add_norm
    angles: Angles = angles
    rotate: Rotate = rotate
    swiglu: SwiGLU = swiglu
    dequantize: Dequantize = dequantize
    borrowed: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()

    def without(self, name: str, why: str) -> Kernels:
        """The same with plain torch instead of a borrowed kernel."""
        fields = ("angles", "rotate") if name == "rotate" else (name,)
        plain = {field: getattr(PLAIN, field) for field in fields}
        left = tuple(n for n in self.borrowed if n != name)
        return replace(self, **plain, borrowed=left, notes=(*self.notes, f"{name}: {why}"))


PLAIN = Kernels()


# --- Unsloth's --------------------------------------------------------------------------------------


def unsloth_kernels() -> Kernels:
    """All of Unsloth's kernels, unverified: see ``verified``.

    Raises:
        ImportError: not where this version of Unsloth is expected to have them.
    """
    from unsloth.kernels.fused_add_rms_layernorm import fast_add_rms_layernorm_inference
    from unsloth.kernels.rope_embedding import decode_rope_inplace
    from unsloth.kernels.swiglu import swiglu_fg_kernel
    from unsloth.kernels.utils import fast_dequantize

    def add_norm(x: Tensor, update: Tensor | None, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
        if update is None:  # the kernel overwrites its input
            return x, fast_add_rms_layernorm_inference(x.clone(), torch.empty_like(x), weight, eps, add=False)
        return x, fast_add_rms_layernorm_inference(update, x, weight, eps)

    def angles(cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        # The kernel looks angles up by position; here each token has its own row. It takes two rows or more.
        at = torch.arange(len(cos), dtype=torch.int32, device=cos.device)
        return (cos, sin, at) if len(cos) > 1 else (cos.expand(2, -1), sin.expand(2, -1), at)

    def rotate(turning: Tensor, turns: tuple[Tensor, Tensor, Tensor]) -> Tensor:
        queries, keys = turning[:, :-1, None], turning[:, -1:, None]  # any split will do
        if not decode_rope_inplace(queries, keys, *turns):
            raise RuntimeError("the kernel does not take these shapes")
        return turning

    def swiglu(gate: Tensor, up: Tensor) -> Tensor:
        assert gate.is_contiguous() and up.is_contiguous(), "the kernel needs contiguous inputs"
        return swiglu_fg_kernel(gate[None], up[None])[0]

    names = ("add_norm", "rotate", "swiglu", "dequantize")
    return Kernels(add_norm, angles, rotate, swiglu, fast_dequantize, borrowed=names)


# --- verification -------------------------------------------------------------------------------------


def verified(kernels: Kernels, causal: Any, dtype: torch.dtype) -> Kernels:
    """The borrowed kernels that agree with plain torch on this device at this model's sizes.

    Args:
        causal: the LoRA-adapted causal LM.

    Returns:
        ``kernels`` without those that raised or differed by more than two roundings of ``dtype``.
    """
    for name in kernels.borrowed:
        trials = [_trial(name, n, causal, dtype) for n in VERIFIED_ROWS]
        if None in trials:
            kernels = kernels.without(name, "the weights are not in NF4")
            continue
        why = next((w for trial in trials if trial and (w := _difference(kernels, trial, dtype))), None)
        if why:
            kernels = kernels.without(name, why)
    return kernels


#: Runs one kernel of a set on inputs of its own, which the kernel may overwrite.
Trial = Callable[[Kernels], Tensor | tuple[Tensor, ...]]


def _trial(name: str, n: int, causal: Any, dtype: torch.dtype) -> Trial | None:
    """A trial of one kernel at N = n; None where the model does not need it."""
    config, weight = causal.config, causal.model.layers[0].mlp.down_proj.base_layer.weight
    d = head_dim(config)
    heads = config.num_attention_heads + config.num_key_value_heads
    # Values follow the keys in memory, unless queries and keys come from a norm of their own (Qwen3).
    values = 0 if hasattr(causal.model.layers[0].self_attn, "q_norm") else config.num_key_value_heads

    def normal(*shape: int) -> Tensor:
        numbers = torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)))
        return numbers.to(weight.device, dtype)

    def add_norm(k: Kernels) -> tuple[Tensor, ...]:
        x, scale = normal(n, config.hidden_size), normal(config.hidden_size)
        x, first = k.add_norm(x, None, scale, config.rms_norm_eps)
        first = first.clone()
        return (first, *k.add_norm(x, first.clone(), scale, config.rms_norm_eps))

    def rotate(k: Kernels) -> Tensor:
        turns = normal(n, d // 2).float().repeat(1, 2)
        mixed = normal(n, heads + values, d)
        return k.rotate(mixed[:, :heads], k.angles(turns.cos().to(dtype), turns.sin().to(dtype)))

    def swiglu(k: Kernels) -> Tensor:
        return k.swiglu(normal(n, config.intermediate_size), normal(n, config.intermediate_size).flip(1))

    def dequantize(k: Kernels) -> Tensor:
        return k.dequantize(weight.data, weight.quant_state)

    if name == "dequantize" and not hasattr(weight, "quant_state"):
        return None
    trials: dict[str, Trial] = dict(add_norm=add_norm, rotate=rotate, swiglu=swiglu, dequantize=dequantize)
    return trials[name]


def _all_of(result: Tensor | tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return result if isinstance(result, tuple) else (result,)


def _difference(kernels: Kernels, trial: Trial, dtype: torch.dtype) -> str | None:
    """How the results differ from plain torch's; None where they agree."""
    with torch.no_grad():
        expected = trial(PLAIN)
        try:
            found = trial(kernels)
        except Exception as error:  # the run continues without a kernel that raises anything
            return f"{type(error).__name__}: {' '.join(str(error).split())[:120]}"
    for one, other in zip(_all_of(found), _all_of(expected), strict=True):
        if one.shape != other.shape or one.dtype != other.dtype:
            return f"gave {one.dtype} {tuple(one.shape)}, not {other.dtype} {tuple(other.shape)}"
        off = float((wide(one) - wide(other)).abs().max() / wide(other).abs().max())
        if not off <= 2 * torch.finfo(dtype).eps:  # NaN too
            return f"differs from plain torch by {off:.1e}"
    return None
