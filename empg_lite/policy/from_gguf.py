"""A GGUF file of llama.cpp as the files of a plain model folder.

Matrices become 16-bit floats, which halves the folder. On SmolLM2-135M in Q4_1 the rounding to float16 costs
4e-6 nats of KL divergence a token (bfloat16: 6e-5).
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from empg_lite.core.errors import ModelUnusable

#: Tensor of a layer in GGUF -> in transformers' Llama.
_LAYER = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_OUTSIDE = {
    "token_embd.weight": "model.embed_tokens.weight",
    "output_norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
}
#: ``tokenizer.ggml.token_type`` of a control token.
_CONTROL = 3


def model_files(gguf: Path) -> dict[str, bytes]:
    """``config.json``, ``generation_config.json``, tokenizer files and ``model.safetensors``, by name.

    Raises:
        ModelUnusable: the file is damaged, or not a Llama model with SmolLM2's tokenizer.
    """
    fields, tensors = _read(gguf)
    known = ("llama", "gpt2", "smollm")
    found = tuple(
        fields.get(k) for k in ("general.architecture", "tokenizer.ggml.model", "tokenizer.ggml.pre")
    )
    if found != known:
        what = f"a GGUF file of {'/'.join(map(str, found))}, not {'/'.join(known)}"
        raise ModelUnusable(what, str(gguf), "name a GGUF file of SmolLM2")
    config = _config(fields, tied=all(t.name != "output.weight" for t in tensors))
    ends = {key: config[key] for key in ("bos_token_id", "eos_token_id", "pad_token_id")}
    tokens = {
        "tokenizer.json": _tokenizer(fields).to_str(),
        "tokenizer_config.json": json.dumps(_tokenizer_config(fields, ends), indent=1),
    }
    settings = {
        "config.json": json.dumps(config, indent=1),
        "generation_config.json": json.dumps(ends, indent=1),
    }
    texts = {name: text.encode("utf-8") for name, text in (settings | tokens).items()}
    return texts | {"model.safetensors": _weights(gguf, tensors, config)}


def _read(gguf: Path) -> tuple[dict[str, Any], list[Any]]:
    """The file's fields as plain values, and its tensors, mapped into memory."""
    from gguf import GGUFReader

    try:
        reader = GGUFReader(gguf)
        return {name: field.contents() for name, field in reader.fields.items()}, list(reader.tensors)
    except (OSError, ValueError, IndexError, KeyError) as error:  # a cut file shows as any of these
        reason = " ".join(str(error).split())[:100]
        raise ModelUnusable(
            f"damaged GGUF file ({reason})", str(gguf), "install or fetch it again"
        ) from error


def _config(fields: dict[str, Any], *, tied: bool) -> dict[str, Any]:
    """transformers' ``config.json`` for the file's sizes."""

    def size(name: str) -> int:
        return int(fields[f"llama.{name}"])

    heads = size("attention.head_count")
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": len(fields["tokenizer.ggml.tokens"]),
        "hidden_size": size("embedding_length"),
        "intermediate_size": size("feed_forward_length"),
        "num_hidden_layers": size("block_count"),
        "num_attention_heads": heads,
        "num_key_value_heads": size("attention.head_count_kv"),
        "head_dim": size("embedding_length") // heads,
        "max_position_embeddings": size("context_length"),
        # Stored as float32: 1e-5 reads as 9.999999747e-06.
        "rms_norm_eps": float(f"{fields['llama.attention.layer_norm_rms_epsilon']:.6g}"),
        "rope_parameters": {"rope_type": "default", "rope_theta": float(fields["llama.rope.freq_base"])},
        "hidden_act": "silu",
        "attention_bias": False,
        "mlp_bias": False,
        "tie_word_embeddings": tied,
        "dtype": "float16",
        **{
            f"{name}_token_id": int(fields[f"tokenizer.ggml.{long}_token_id"])
            for name, long in (("bos", "bos"), ("eos", "eos"), ("pad", "padding"))
        },
    }


# --- the tokenizer ----------------------------------------------------------------------------------------


def _tokenizer(fields: dict[str, Any]) -> Any:
    """Byte-level BPE of the file's vocabulary and merges, with digits one by one, as SmolLM2's is."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    tokens, kinds = fields["tokenizer.ggml.tokens"], fields["tokenizer.ggml.token_type"]
    merges = [tuple(merge.split(" ")) for merge in fields["tokenizer.ggml.merges"]]
    tokenizer = Tokenizer(models.BPE({token: i for i, token in enumerate(tokens)}, merges))
    digits, words = pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([digits, words])
    tokenizer.decoder = decoders.ByteLevel()
    control = [token for token, kind in zip(tokens, kinds, strict=True) if kind == _CONTROL]
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in control])
    return tokenizer


def _tokenizer_config(fields: dict[str, Any], ends: dict[str, int]) -> dict[str, Any]:
    """Names of the tokens that begin, end and pad, and the chat template.

    transformers' own reading of such a file takes the token that begins a turn for the end.
    """
    tokens = fields["tokenizer.ggml.tokens"]
    named = {name.removesuffix("_id"): tokens[i] for name, i in ends.items()}
    return {
        "tokenizer_class": "PreTrainedTokenizerFast",
        **named,
        "unk_token": tokens[int(fields["tokenizer.ggml.unknown_token_id"])],
        "model_max_length": int(fields["llama.context_length"]),
        "clean_up_tokenization_spaces": False,
        "chat_template": fields.get("tokenizer.chat_template"),
    }


# --- the weights ------------------------------------------------------------------------------------------


def _weights(gguf: Path, tensors: list[Any], config: dict[str, Any]) -> bytes:
    """All tensors under transformers' names, as the bytes of a safetensors file."""
    from safetensors.torch import save

    try:
        return save(dict(_named(tensors, config)), {"format": "pt"})
    except (ValueError, KeyError) as error:
        reason = " ".join(str(error).split())[:100]
        raise ModelUnusable(f"a tensor that a Llama model does not have ({reason})", str(gguf)) from error


def _named(tensors: list[Any], config: dict[str, Any]) -> Iterator[tuple[str, Any]]:
    import torch
    from gguf import dequantize

    heads = {"attn_q": config["num_attention_heads"], "attn_k": config["num_key_value_heads"]}
    for tensor in tensors:
        weight = torch.tensor(dequantize(tensor.data, tensor.tensor_type))  # (out, in) or (out,) float32
        name = _OUTSIDE.get(tensor.name)
        if name is None:
            _, layer, part, _ = tensor.name.split(".")
            name = f"model.layers.{layer}.{_LAYER[part]}.weight"
            if part in heads:
                weight = _halves(weight, heads[part])
        yield name, weight.half() if weight.ndim == 2 else weight


def _halves(weight: Any, heads: int) -> Any:
    """Rows of q or k in the order of transformers, which rotates the halves of a head against each other.

    llama.cpp rotates neighbors: its rows are r0, r32, r1, r33, ... of each head of 64.
    """
    out, width = weight.shape
    pairs = weight.view(heads, out // heads // 2, 2, width)
    return pairs.transpose(1, 2).reshape(out, width)
