"""The sizes of a model, known before its weights are loaded.

They come from ``config.json`` where it is available, and for the models of the shipped recipes from a small
table: a plan needs neither torch nor a network.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from empg_lite.core.bundled import BUNDLED, PACKAGED
from empg_lite.core.errors import DataError, MissingInput
from empg_lite.policy.families import FAMILIES, Family
from empg_lite.policy.integrity import check_config, resolve_model


@dataclass(frozen=True, slots=True)
class Shape:
    """A decoder: L layers, D hidden, I intermediate, H query and G key/value heads of d, V tokens."""

    layers: int
    hidden: int
    intermediate: int
    heads: int
    kv_heads: int
    head_dim: int
    vocab: int
    tied: bool
    family: Family = FAMILIES["qwen2"]

    @property
    def queries(self) -> int:
        """Width of all query heads, H d."""
        return self.heads * self.head_dim

    @property
    def keys(self) -> int:
        """Width of all key heads, G d; the values' too."""
        return self.kv_heads * self.head_dim

    @property
    def linears(self) -> tuple[tuple[int, int], ...]:
        """(out, in) of one layer's seven linears: q, k, v, o, gate, up, down."""
        d, i = self.hidden, self.intermediate
        q, k = self.queries, self.keys
        return ((q, d), (k, d), (k, d), (d, q), (i, d), (i, d), (d, i))

    @property
    def linear_params(self) -> int:
        """Weights of all linears below the head."""
        return self.layers * sum(out * width for out, width in self.linears)

    @property
    def embedding_params(self) -> int:
        """Input embedding, and the head where it is not tied to it."""
        return self.vocab * self.hidden * (1 if self.tied else 2)

    @property
    def small_params(self) -> int:
        """RMSNorm weights, and the biases of q, k and v."""
        norms = 2 * self.hidden + (2 * self.head_dim if self.family.qk_norm else 0)
        return self.layers * (norms + self.biases) + self.hidden

    @property
    def biases(self) -> int:
        """Biases of one layer's q, k and v."""
        return self.queries + 2 * self.keys if self.family.qkv_bias else 0


#: Qwen2.5, base and Instruct alike (their published config.json).
KNOWN = {
    "0.5B": Shape(24, 896, 4864, 14, 2, 64, 151_936, True),
    "1.5B": Shape(28, 1536, 8960, 12, 2, 128, 151_936, True),
    "3B": Shape(36, 2048, 11_008, 16, 2, 128, 151_936, True),
    "7B": Shape(28, 3584, 18_944, 28, 4, 128, 152_064, False),
}


#: Packaged models; a plan does not unpack them.
_PACKAGED = {"smollm2-135m": Shape(30, 576, 1536, 9, 3, 64, 49_152, True, FAMILIES["llama"])}


#: The other tested families (their published config.json), by the name without owner, -Instruct and -Base.
_LLAMA, _QWEN3 = FAMILIES["llama"], FAMILIES["qwen3"]
FURTHER = {
    "SmolLM2-135M": Shape(30, 576, 1536, 9, 3, 64, 49_152, True, _LLAMA),
    "SmolLM2-360M": Shape(32, 960, 2560, 15, 5, 64, 49_152, True, _LLAMA),
    "SmolLM2-1.7B": Shape(24, 2048, 8192, 32, 32, 64, 49_152, True, _LLAMA),
    "Llama-3.2-1B": Shape(16, 2048, 8192, 32, 8, 64, 128_256, True, _LLAMA),
    "Llama-3.2-3B": Shape(28, 3072, 8192, 24, 8, 128, 128_256, True, _LLAMA),
    "Qwen3-0.6B": Shape(28, 1024, 3072, 16, 8, 128, 151_936, True, _QWEN3),
    "Qwen3-1.7B": Shape(28, 2048, 6144, 16, 8, 128, 151_936, True, _QWEN3),
    "Qwen3-4B": Shape(36, 2560, 9728, 32, 8, 128, 151_936, True, _QWEN3),
    "Qwen3-8B": Shape(36, 4096, 12_288, 32, 8, 128, 151_936, False, _QWEN3),
}


def shape_of(config: Mapping[str, Any], where: str) -> Shape:
    """The shape that a ``config.json`` describes.

    Raises:
        DataError: a number is missing or not positive.
    """

    def number(name: str) -> int:
        value = config.get(name)
        if not isinstance(value, int) or value < 1:
            raise DataError(f"config.json has no usable {name}", where, "download the model again")
        return value

    heads = number("num_attention_heads")
    return Shape(
        layers=number("num_hidden_layers"),
        hidden=number("hidden_size"),
        intermediate=number("intermediate_size"),
        heads=heads,
        kv_heads=number("num_key_value_heads"),
        head_dim=config.get("head_dim") or number("hidden_size") // heads,
        vocab=number("vocab_size"),
        tied=bool(config.get("tie_word_embeddings", False)),
        family=FAMILIES[config["model_type"]],
    )


def read_shape(name: str, revision: str | None = None) -> Shape:
    """The shape of ``model.name``: a folder, a bundled or packaged model, or a hub id; nothing is downloaded.

    Raises:
        MissingInput: a hub id that is neither cached nor in the table.
        DataError: the configuration is unreadable or of another architecture.
    """
    if name in BUNDLED or os.path.isdir(name):
        folder = resolve_model(name, revision)[0]
        return shape_of(check_config(folder), str(folder))
    if name in PACKAGED:
        return _PACKAGED[name]
    cached = _cached_config(name, revision)
    if cached is not None:
        return shape_of(check_config(cached), str(cached))
    found = re.fullmatch(r"Qwen/Qwen2\.5-([\d.]+B)(-Instruct)?", name)
    if found and found[1] in KNOWN:
        return KNOWN[found[1]]
    found = re.fullmatch(r"(?:Qwen|HuggingFaceTB|meta-llama|unsloth)/([\w.-]+?)(-Instruct|-Base)?", name)
    if found and found[1] in FURTHER:
        return FURTHER[found[1]]
    raise MissingInput(
        f"the sizes of {name!r} are not known", "model.name", "give a folder that contains its config.json"
    )


def _cached_config(name: str, revision: str | None) -> Path | None:
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    try:
        found = try_to_load_from_cache(name, "config.json", revision=revision)
    except HFValidationError:
        return None
    return Path(found).parent if isinstance(found, str) else None
