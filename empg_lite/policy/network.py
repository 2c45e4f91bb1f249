"""The Qwen2 forward pass, layer by layer, over the policy's own modules.

``transformers`` runs a whole batch from its first layer to its last. Sampling from a cache of fixed place and
fitting K completions behind one prompt need to put something of their own where attention happens. So what
lies around it is here, once: a layer turns tokens into queries, keys and values (``heads_of``), somebody lets
them attend, and the layer goes on from there (``after``). The residual travels as ``x`` and an ``update`` yet
to be added: adding and norming can be one kernel.

Shapes: N packed tokens, D hidden, H query heads, G key/value heads, d of one head. Nothing here knows of
batches or padding.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from empg_lite.policy.kernels import PLAIN, Kernels

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
    """

    norm: Tensor
    qkv: Map
    out: Map
    mlp_norm: Tensor
    mlp: Map


@dataclass(frozen=True, slots=True)
class Network:
    """Everything below the head.

    Attributes:
        embed: ``(N,) -> (N, D)``.
        rotary: positions ``(N,)`` -> cosines and sines, ``(N, d)`` each.
        norm: ``(D,)`` weight of the last RMSNorm.
        kernels: the pointwise work; only plain torch's has gradients.
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
        """The angles of positions ``(N,)``, as ``heads_of`` wants them."""
        return self.kernels.angles(*self.rotary(positions))

    def heads_of(self, layer: Layer, normed: Tensor, angles: Any) -> tuple[Tensor, Tensor, Tensor]:
        """Rotated queries ``(N, H, d)`` and keys ``(N, G, d)``, and values ``(N, G, d)``, of ``(N, D)``."""
        mixed = layer.qkv(normed).view(len(normed), -1, self.head_dim)  # (N, H + 2 G, d)
        turning, values = mixed.split((self.heads + self.kv_heads, self.kv_heads), 1)
        queries, keys = self.kernels.rotate(turning, angles).split((self.heads, self.kv_heads), 1)
        return queries, keys, values

    def after(self, layer: Layer, x: Tensor, attended: Tensor) -> tuple[Tensor, Tensor]:
        """What the layer gives, x and update ``(N, D)`` to be added, after attention's ``(N, H d)``."""
        x, normed = self.add_norm(x, layer.out(attended), layer.mlp_norm)
        return x, layer.mlp(normed)

    def add_norm(self, x: Tensor, update: Tensor | None, weight: Tensor) -> tuple[Tensor, Tensor]:
        """The sum of ``(N, D)`` and its update, and the sum's RMSNorm; both inputs may be overwritten."""
        return self.kernels.add_norm(x, update, weight, self.eps)


def live_network(causal: Any, kernels: Kernels = PLAIN) -> Network:
    """The network over the modules of a LoRA-adapted causal LM: gradients reach the adapter.

    Args:
        causal: a ``Qwen2ForCausalLM`` with PEFT layers in it.
        kernels: other than plain torch, and there are no gradients.
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
            )
            for layer in model.layers
        ),
        rotary=_rotary(causal),
        norm=model.norm.weight,
        eps=config.rms_norm_eps,
        heads=config.num_attention_heads,
        kv_heads=config.num_key_value_heads,
        head_dim=_head_dim(config),
        kernels=kernels,
    )


def _head_dim(config: Any) -> int:
    return getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads


def _rotary(causal: Any) -> Callable[[Tensor], tuple[Tensor, Tensor]]:
    """Positions ``(N,)`` -> cosines and sines ``(N, d)``; see ``Network``.

    Not by the model's own module: on a GPU Unsloth puts one in its place that takes no positions. Stretched
    angles, which Unsloth does not offer for Qwen2, are left to it.
    """
    config, model = causal.config, causal.model
    if config.rope_parameters["rope_type"] != "default":

        def by_module(positions: Tensor) -> tuple[Tensor, Tensor]:
            cos, sin = model.rotary_emb(model.norm.weight, positions[None])
            return cos[0], sin[0]

        return by_module
    weight, width = model.norm.weight, _head_dim(config)
    exponents = torch.arange(0, width, 2, dtype=torch.float32, device=weight.device) / width
    speeds = 1 / config.rope_parameters["rope_theta"] ** exponents  # (d/2,) radians a token

    def rotary(positions: Tensor) -> tuple[Tensor, Tensor]:
        angles = (positions[:, None] * speeds).repeat(1, 2)
        return angles.cos().to(weight.dtype), angles.sin().to(weight.dtype)

    return rotary


def adapted(linear: Any, x: Tensor) -> Tensor:
    """What a PEFT LoRA layer computes, ``(N, in) -> (N, out)``, scale and sum inside the second product."""
    base = linear.base_layer(x)
    if linear.disable_adapters:
        return base
    a, b = linear.lora_A["default"].weight, linear.lora_B["default"].weight
    return torch.addmm(base, x @ a.T, b.T, alpha=linear.scaling["default"])
