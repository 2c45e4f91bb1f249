"""The forward pass of Llama, Qwen2 and Qwen3, layer by layer, over the policy's own modules.

Sampling from a static KV cache and fitting K completions behind one prompt replace attention, which
``transformers`` does not allow. Everything around attention is here, once: a layer turns tokens into queries,
keys and values (``qkv_heads``), the caller computes attention, and the layer continues (``after_attention``).
The residual travels as ``x`` and a pending ``update``, so that one kernel can add and normalize.

Shapes: N packed tokens, D hidden, H query heads, G key/value heads, d head size. Nothing here knows of
batches or padding.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from empg_lite.policy.kernels import PLAIN, Kernels, head_dim, rms_norm

#: (N, in) -> (N, out)
Map = Callable[[Tensor], Tensor]


@dataclass(frozen=True, slots=True)
class Layer:
    """One decoder layer.

    Attributes:
        norm, mlp_norm: ``(D,)`` RMSNorm weights before attention and before the MLP.
        qkv: ``(N, D) -> (N, (H + 2 G) d)``, queries, keys and values side by side.
        out: ``(N, H d) -> (N, D)``.
        mlp: ``(N, D) -> (N, D)``.
        qk_norm: ``(H + G, d)`` RMSNorm weights of each head's queries and keys, or None (Qwen3 has them).
    """

    norm: Tensor
    qkv: Map
    out: Map
    mlp_norm: Tensor
    mlp: Map
    qk_norm: Tensor | None = None


@dataclass(frozen=True, slots=True)
class Network:
    """Everything below the head.

    Attributes:
        embed: ``(N,) -> (N, D)``.
        rotary: positions ``(N,)`` -> cosines and sines, ``(N, d)`` each.
        norm: ``(D,)`` weight of the last RMSNorm.
        kernels: pointwise operations; only plain torch's have gradients.
    """

    embed: Map
    layers: tuple[Layer, ...]
    rotary: Callable[[Tensor], tuple[Tensor, Tensor]]
    norm: Tensor
    eps: float
    heads: int
    kv_heads: int
    head_dim: int
    kernels: Kernels = PLAIN

    def angles(self, positions: Tensor) -> Any:
        """The rotary angles of positions ``(N,)``, as ``qkv_heads`` takes them."""
        return self.kernels.angles(*self.rotary(positions))

    def qkv_heads(self, layer: Layer, normed: Tensor, angles: Any) -> tuple[Tensor, Tensor, Tensor]:
        """Rotated queries ``(N, H, d)`` and keys ``(N, G, d)``, and values ``(N, G, d)``, of ``(N, D)``."""
        mixed = layer.qkv(normed).view(len(normed), -1, self.head_dim)  # (N, H + 2 G, d)
        turning, values = mixed.split((self.heads + self.kv_heads, self.kv_heads), 1)
        if layer.qk_norm is not None:
            turning = rms_norm(turning, layer.qk_norm, self.eps)
        queries, keys = self.kernels.rotate(turning, angles).split((self.heads, self.kv_heads), 1)
        return queries, keys, values

    def after_attention(self, layer: Layer, x: Tensor, attended: Tensor) -> tuple[Tensor, Tensor]:
        """The layer's output after attention ``(N, H d)``: x and the pending update, ``(N, D)``."""
        x, normed = self.add_norm(x, layer.out(attended), layer.mlp_norm)
        return x, layer.mlp(normed)

    def add_norm(self, x: Tensor, update: Tensor | None, weight: Tensor) -> tuple[Tensor, Tensor]:
        """The sum of ``(N, D)`` and its update, and the sum's RMSNorm; both inputs may be overwritten."""
        return self.kernels.add_norm(x, update, weight, self.eps)


def live_network(causal: Any, kernels: Kernels = PLAIN) -> Network:
    """The network over the modules of a LoRA-adapted causal LM: gradients reach the adapter.

    Args:
        causal: a model of one of ``families.FAMILIES`` with PEFT layers in it.
        kernels: anything but plain torch gives no gradients.
    """
    config, model = causal.config, causal.model

    def qkv(attention: Any, x: Tensor) -> Tensor:
        projections = (attention.q_proj, attention.k_proj, attention.v_proj)
        return torch.cat([adapted(projection, x) for projection in projections], -1)

    def mlp(module: Any, x: Tensor) -> Tensor:
        gate, up = adapted(module.gate_proj, x), adapted(module.up_proj, x)
        return adapted(module.down_proj, kernels.swiglu(gate, up))

    return Network(
        embed=model.embed_tokens,
        layers=tuple(
            Layer(
                norm=layer.input_layernorm.weight,
                qkv=partial(qkv, layer.self_attn),
                out=partial(adapted, layer.self_attn.o_proj),
                mlp_norm=layer.post_attention_layernorm.weight,
                mlp=partial(mlp, layer.mlp),
                qk_norm=_qk_norm(layer.self_attn, config),
            )
            for layer in model.layers
        ),
        rotary=_rotary(causal),
        norm=model.norm.weight,
        eps=config.rms_norm_eps,
        heads=config.num_attention_heads,
        kv_heads=config.num_key_value_heads,
        head_dim=head_dim(config),
        kernels=kernels,
    )


def _qk_norm(attention: Any, config: Any) -> Tensor | None:
    """``(H + G, d)``: the weight of all query heads and that of all key heads, for one product."""
    if getattr(attention, "q_norm", None) is None:
        return None
    queries = attention.q_norm.weight.expand(config.num_attention_heads, -1)
    keys = attention.k_norm.weight.expand(config.num_key_value_heads, -1)
    return torch.cat((queries, keys)).detach()


def _rotary(causal: Any) -> Callable[[Tensor], tuple[Tensor, Tensor]]:
    """Positions ``(N,)`` -> cosines and sines ``(N, d)``; see ``Network``.

    Computed here because Unsloth replaces the model's own module on a GPU by one that takes no positions.
    """
    weight = causal.model.norm.weight
    speeds, scale = rotary_speeds(causal.config, weight.device)

    def rotary(positions: Tensor) -> tuple[Tensor, Tensor]:
        angles = (positions[:, None] * speeds).repeat(1, 2)
        return (angles.cos() * scale).to(weight.dtype), (angles.sin() * scale).to(weight.dtype)

    return rotary


def rotary_speeds(config: Any, device: torch.device | str = "cpu") -> tuple[Tensor, float]:
    """Radians per token ``(d/2,)``, and a factor on cosines and sines (only YaRN's is not 1)."""
    kind = config.rope_parameters["rope_type"]
    if kind == "default":
        width = head_dim(config)
        exponents = torch.arange(0, width, 2, dtype=torch.float32, device=device) / width
        return 1 / config.rope_parameters["rope_theta"] ** exponents, 1.0
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    speeds, scale = ROPE_INIT_FUNCTIONS[kind](config)
    return speeds.to(device), float(scale)


def adapted(linear: Any, x: Tensor) -> Tensor:
    """A PEFT LoRA layer, ``(N, in) -> (N, out)``, with scale and sum fused into its second product."""
    base = linear.base_layer(x)
    if linear.disable_adapters:
        return base
    a, b = linear.lora_A["default"].weight, linear.lora_B["default"].weight
    return torch.addmm(base, x @ a.T, b.T, alpha=linear.scaling["default"])
