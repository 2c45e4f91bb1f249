"""The families of decoders that are tested, and what tells them apart.

All are the same network: RMSNorm, grouped attention with rotated queries and keys, a SwiGLU MLP. Code that
has a model reads the differences off its modules (``network.py``, ``merged.py``); what must be known before,
or in another program's words, is here.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, slots=True)
class Family:
    """One family.

    Attributes:
        models: which of its models are tested, for messages.
        qkv_bias: queries, keys and values have biases.
        qk_norm: each head's queries and keys go through an RMSNorm before they are rotated.
        neighbors: llama.cpp rotates neighboring numbers of a head, not its halves as transformers does.
    """

    models: str
    qkv_bias: bool = False
    qk_norm: bool = False
    neighbors: bool = False


#: By ``model_type`` of ``config.json``, which is llama.cpp's name of the architecture too. A new one is an
#: entry here if it is that network; otherwise its forward pass goes into ``network.py``, fused matrices into
#: ``merged.py``, sizes into ``memory/shape.py``.
FAMILIES = {
    "qwen2": Family("Qwen2.5", qkv_bias=True),
    "llama": Family("SmolLM2, Llama 3.2", neighbors=True),
    "qwen3": Family("Qwen3", qk_norm=True),
}

#: Their angles depend on a token's position alone; those of ``dynamic`` and ``longrope`` on the row's length.
ROPE_TYPES = ("default", "linear", "llama3", "yarn")


def unsupported(config: Mapping[str, Any]) -> str | None:
    """What a ``config.json`` of a known family asks for beyond it; None if nothing."""
    if config.get("hidden_act", "silu") != "silu":
        return f"activation {config['hidden_act']!r}"
    for name in ("attention_bias", "mlp_bias", "use_sliding_window"):
        if config.get(name):
            return f"{name}: true"
    rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
    if not isinstance(rope, Mapping):
        return f"rope_parameters {rope!r}"
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind not in ROPE_TYPES:
        return f"rope type {kind!r}"
    share = rope.get("partial_rotary_factor", config.get("partial_rotary_factor")) or 1.0
    return None if share == 1.0 else f"partial_rotary_factor: {share}"
