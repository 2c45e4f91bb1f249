"""GGUF, the format of llama.cpp: written with the ``gguf`` package, run with ``llama-cpp-python``."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from empg_lite.core.errors import CheckFailed, DataError, UsageError
from empg_lite.policy.card import tokenizer_files
from empg_lite.policy.merge import whole_tensors
from empg_lite.policy.policy import Policy

KINDS = ("f16", "f32", "bf16", "q8_0")


def need_packages() -> None:
    """Raises UsageError, with what to type, where a package is missing."""
    missing = [name for name in ("gguf", "llama_cpp") if importlib.util.find_spec(name) is None]
    if missing:
        raise UsageError(
            f"GGUF needs {' and '.join(missing)}", "--to gguf", "pip install gguf llama-cpp-python"
        )


def write_gguf(policy: Policy, file: Path, kind: str, *, name: str) -> None:
    """Write base and adapter, merged, with the tokenizer.

    Matrices are in ``kind``, vectors in float32, as llama.cpp has them.

    Raises:
        DataError: the tokenizer does not split text as Qwen2's does, the one of ours that llama.cpp knows.
    """
    import gguf

    config = policy.causal.config
    _refuse_other_tokenizer(policy.tokenizer)
    writer = gguf.GGUFWriter(file, "qwen2", use_temp_file=True)
    writer.add_name(name)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    types = {
        "f32": gguf.LlamaFileType.ALL_F32,
        "f16": gguf.LlamaFileType.MOSTLY_F16,
        "bf16": gguf.LlamaFileType.MOSTLY_BF16,
        "q8_0": gguf.LlamaFileType.MOSTLY_Q8_0,
    }
    writer.add_file_type(types[kind])
    _add_tokenizer(writer, policy)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.QWEN2, config.num_hidden_layers)
    matrix = gguf.GGMLQuantizationType[kind.upper()]
    for key, tensor in whole_tensors(policy, torch.float32):
        stem, _, ending = key.rpartition(".")
        theirs = names.get_name(stem)
        assert theirs is not None, key
        block, _ = gguf.GGML_QUANT_SIZES[matrix]
        fits = tensor.ndim == 2 and tensor.shape[-1] % block == 0
        chosen = matrix if fits else gguf.GGMLQuantizationType.F32
        data = gguf.quants.quantize(tensor.numpy(), chosen)
        writer.add_tensor(f"{theirs}.{ending}", data, raw_dtype=chosen)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _refuse_other_tokenizer(tokenizer: Any) -> None:
    from transformers import Qwen2Tokenizer

    def splitter(one: Any) -> Any:
        return json.loads(one.backend_tokenizer.to_str())["pre_tokenizer"]

    if splitter(tokenizer) != splitter(Qwen2Tokenizer()):
        raise DataError(
            "the tokenizer splits text otherwise than Qwen2's, and llama.cpp would split it wrongly",
            "--to gguf",
            "export it as merged",
        )


def _add_tokenizer(writer: Any, policy: Policy) -> None:
    """Vocabulary by id, its kinds, merges, special tokens; what the model has beyond it is unused."""
    import gguf

    tokenizer = policy.tokenizer
    added = tokenizer.added_tokens_decoder
    by_id = {i: text for text, i in tokenizer.get_vocab().items()}
    tokens, kinds = [], []
    for i in range(policy.head_weight.shape[0]):
        tokens.append(by_id.get(i, f"[PAD{i}]"))
        special = i in added and added[i].special
        kind = gguf.TokenType.CONTROL if special else gguf.TokenType.USER_DEFINED if i in added else None
        kinds.append(kind or (gguf.TokenType.NORMAL if i in by_id else gguf.TokenType.UNUSED))
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("qwen2")
    writer.add_token_list(tokens)
    writer.add_token_types(kinds)
    merges = json.loads(tokenizer.backend_tokenizer.to_str())["model"]["merges"]
    writer.add_token_merges([" ".join(m) if isinstance(m, list) else m for m in merges])
    end = policy.template.end
    ends = tokenizer.convert_tokens_to_ids(end) if end in tokenizer.get_vocab() else min(policy.stop_ids)
    writer.add_eos_token_id(ends)
    writer.add_pad_token_id(policy.pad_id)
    writer.add_add_bos_token(False)
    chat = tokenizer_files(policy).get("chat_template.jinja")
    if chat:
        writer.add_chat_template(chat.decode("utf-8"))


def llama_choices(file: Path, rows: Sequence[tuple[Sequence[int], Sequence[int]]]) -> Tensor:
    """llama.cpp's most likely token at each place of the completions, ``(n,)``, given all before it.

    Raises:
        CheckFailed: it does not load the file.
    """
    from llama_cpp import Llama

    longest = max(len(prompt) + len(completion) for prompt, completion in rows)
    size = {"n_ctx": longest + 8, "n_batch": longest + 8}
    try:
        model = Llama(str(file), **size, logits_all=True, n_gpu_layers=0, verbose=False)
    except ValueError as error:
        raise CheckFailed(f"llama.cpp does not load it ({error}): nothing was written", file.name) from error
    chosen = []
    for prompt, completion in rows:
        model.reset()
        model.eval([*prompt, *completion])
        start = len(prompt) - 1
        scores = torch.from_numpy(model.scores[start : start + len(completion)].copy())
        chosen.append(scores.argmax(-1))
    model.close()
    return torch.cat(chosen)
