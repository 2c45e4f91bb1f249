"""GGUF, the format of llama.cpp: written with the ``gguf`` package, run with ``llama-cpp-python``."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from empg_lite.core.errors import CheckFailed, DataError, UsageError
from empg_lite.policy.card import merged_card, tokenizer_files
from empg_lite.policy.merged import merged_bytes, merged_tensors
from empg_lite.run import store
from empg_lite.tools.export.compare import begin

if TYPE_CHECKING:
    from empg_lite.core.view import View
    from empg_lite.policy.policy import Policy
    from empg_lite.rewards import Grader
    from empg_lite.run.target import Target

#: Share of the positions at which llama.cpp must choose the adapter's token.
THRESHOLD = 0.95


def export(
    target: Target, out: Path, grader: Grader, view: View | None = None, *, kind: str = "f16"
) -> dict[str, Any]:
    """Write the merged model as one GGUF file, which llama.cpp runs before it is published.

    Args:
        out: a folder; the file in it is ``model-KIND.gguf``.
        kind: type of the matrices: ``f16``, ``f32``, ``bf16``, ``q8_0``.

    Returns:
        ``export``, ``bytes``, ``kind``, ``compared_tokens``, ``argmax_agreement`` (llama.cpp, adapter).

    Raises:
        UsageError: the packages gguf or llama-cpp-python are missing.
        DataError: llama.cpp does not know the tokenizer.
        CheckFailed: llama.cpp chooses other tokens than the adapter; nothing was written.
    """
    missing = [name for name in ("gguf", "llama_cpp") if importlib.util.find_spec(name) is None]
    if missing:
        raise UsageError(
            f"GGUF needs {' and '.join(missing)}", "--to gguf", "pip install gguf llama-cpp-python"
        )
    job = begin(target, out, grader, view)
    with store.staged_dir(out) as staged:
        store.check_disk_space(staged, 1, merged_bytes(job.learner.policy, torch.float32))
        file = staged / f"model-{kind}.gguf"
        write_gguf(job.learner.policy, file, kind, name=target.label)
        job.release()
        chosen = llama_choices(file, [(r.prompt_ids, r.completion_ids) for r in job.rows])
        share = float((chosen == job.evidence.choices).double().mean())
        job.require(share, len(chosen), THRESHOLD, "GGUF in llama.cpp", "try --gguf-type f16 or f32")
        facts = {"compared_tokens": len(chosen), "argmax_agreement": share}
        card = merged_card(job.provenance, {"dtype": f"GGUF {kind}", **facts})
        store.write_file(staged / "README.md", card)
    return job.result({"kind": kind, **facts})


def write_gguf(policy: Policy, file: Path, kind: str, *, name: str) -> None:
    """Write base and adapter, merged, with the tokenizer: matrices in ``kind``, vectors in float32.

    Raises:
        DataError: the tokenizer does not split text as Qwen2's does, the only one mapped here.
    """
    import gguf

    _refuse_other_tokenizer(policy.tokenizer)
    writer = gguf.GGUFWriter(file, "qwen2", use_temp_file=True)
    writer.add_name(name)
    _add_shape(writer, policy.causal.config)
    prefix = "ALL" if kind == "f32" else "MOSTLY"
    writer.add_file_type(gguf.LlamaFileType[f"{prefix}_{kind.upper()}"])
    _add_tokenizer(writer, policy)
    _add_tensors(writer, policy, gguf.GGMLQuantizationType[kind.upper()])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _add_shape(writer: Any, config: Any) -> None:
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)


def _add_tensors(writer: Any, policy: Policy, matrix: Any) -> None:
    """A matrix whose rows are not whole blocks of the type stays in float32, as in llama.cpp."""
    import gguf

    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.QWEN2, policy.causal.config.num_hidden_layers)
    block, _ = gguf.GGML_QUANT_SIZES[matrix]
    for key, tensor in merged_tensors(policy, torch.float32):
        stem, _, ending = key.rpartition(".")
        name = names.get_name(stem)
        assert name is not None, key
        fits = tensor.ndim == 2 and tensor.shape[-1] % block == 0
        kind = matrix if fits else gguf.GGMLQuantizationType.F32
        data = gguf.quants.quantize(tensor.numpy(), kind)
        writer.add_tensor(f"{name}.{ending}", data, raw_dtype=kind)


def _refuse_other_tokenizer(tokenizer: Any) -> None:
    from transformers import Qwen2Tokenizer

    def splitter(one: Any) -> Any:
        return json.loads(one.backend_tokenizer.to_str())["pre_tokenizer"]

    if splitter(tokenizer) != splitter(Qwen2Tokenizer()):
        raise DataError(
            "the tokenizer splits text differently from Qwen2's: llama.cpp would tokenize prompts wrongly",
            "--to gguf",
            "use --to merged",
        )


def _add_tokenizer(writer: Any, policy: Policy) -> None:
    """Vocabulary with token types, merges and special tokens; rows of the head beyond it are unused."""
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
    eos = tokenizer.convert_tokens_to_ids(end) if end in tokenizer.get_vocab() else min(policy.stop_ids)
    writer.add_eos_token_id(eos)
    writer.add_pad_token_id(policy.pad_id)
    writer.add_add_bos_token(False)
    chat = tokenizer_files(policy).get("chat_template.jinja")
    if chat:
        writer.add_chat_template(chat.decode("utf-8"))


def llama_choices(file: Path, rows: Sequence[tuple[Sequence[int], Sequence[int]]]) -> Tensor:
    """llama.cpp's most likely token at each position of the completions, ``(n,)``.

    Raises:
        CheckFailed: it cannot load the file.
    """
    from llama_cpp import Llama

    longest = max(len(prompt) + len(completion) for prompt, completion in rows)
    size = {"n_ctx": longest + 8, "n_batch": longest + 8}
    try:
        model = Llama(str(file), **size, logits_all=True, n_gpu_layers=0, verbose=False)
    except ValueError as error:
        raise CheckFailed(f"llama.cpp cannot load it ({error}); nothing was written", file.name) from error
    chosen = []
    for prompt, completion in rows:
        model.reset()
        model.eval([*prompt, *completion])
        start = len(prompt) - 1
        scores = torch.from_numpy(model.scores[start : start + len(completion)].copy())
        chosen.append(scores.argmax(-1))
    model.close()
    return torch.cat(chosen)
