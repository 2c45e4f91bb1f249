"""GGUF, the format of llama.cpp: written with the ``gguf`` package and run by llama.cpp before it is kept."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from empg_lite.core.errors import UsageError
from empg_lite.policy.card import merged_card, tokenizer_files
from empg_lite.policy.families import FAMILIES
from empg_lite.policy.kernels import head_dim
from empg_lite.policy.merged import merged_bytes, merged_tensors
from empg_lite.policy.network import rotary_speeds
from empg_lite.run import store
from empg_lite.tools.export.compare import begin, write_files
from empg_lite.tools.export.gguf_tokenizer import add_tokenizer, splitter_name
from empg_lite.tools.export.llama import installed_package, llama_choices

if TYPE_CHECKING:
    from empg_lite.core.view import View
    from empg_lite.policy.policy import Policy
    from empg_lite.rewards import Grader
    from empg_lite.run.target import Target

#: Share of the positions at which llama.cpp must choose the adapter's token.
THRESHOLD = 0.95
#: What a GGUF file does not hold: the prompt of training, and where an answer ends.
BESIDE = ("template.json", "generation_config.json")


def export(
    target: Target, out: Path, grader: Grader, view: View | None = None, *, kind: str = "f16"
) -> dict[str, Any]:
    """Write the merged model as one GGUF file, which llama.cpp runs before it is published.

    Args:
        out: a folder; the file in it is ``model-KIND.gguf``, beside the prompt and the stop tokens.
        kind: type of the matrices: ``f16``, ``f32``, ``bf16``, ``q8_0``.

    Returns:
        ``export``, ``bytes``, ``kind``, ``compared_tokens``, ``argmax_agreement`` (llama.cpp, adapter).

    Raises:
        UsageError: gguf is missing, or a package that runs llama.cpp.
        DataError: llama.cpp does not know the tokenizer.
        CheckFailed: llama.cpp chooses other tokens than the adapter; nothing was written.
    """
    if importlib.util.find_spec("gguf") is None or installed_package() is None:
        packages = "gguf xllamacpp"
        raise UsageError(f"GGUF needs the packages {packages}", "--to gguf", f"pip install {packages}")
    job = begin(target, out, grader, view)
    with store.staged_dir(out) as staged:
        store.check_disk_space(staged, 1, merged_bytes(job.learner.policy, torch.float32))
        file = staged / f"model-{kind}.gguf"
        write_gguf(job.learner.policy, file, kind, name=target.label)
        prompt = {name: data for name, data in tokenizer_files(job.learner.policy).items() if name in BESIDE}
        job.release()
        rows = [(r.prompt_ids, r.completion_ids) for r in job.rows]
        with job.view.phase("asking llama.cpp", len(job.evidence.choices)) as on_done:
            chosen = llama_choices(file, rows, on_done)
        share = float((chosen == job.evidence.choices).double().mean())
        job.require(share, len(chosen), THRESHOLD, "GGUF in llama.cpp", "try --gguf-type f16 or f32")
        facts = {"compared_tokens": len(chosen), "argmax_agreement": share}
        card = merged_card(job.provenance, {"dtype": f"GGUF {kind}", **facts})
        write_files(staged, {**prompt, "README.md": card.encode()})
    return job.result({"kind": kind, **facts})


def write_gguf(policy: Policy, file: Path, kind: str, *, name: str) -> None:
    """Write base and adapter, merged, with the tokenizer: matrices in ``kind``, vectors in float32.

    Raises:
        DataError: the tokenizer splits text as none of those that are mapped here.
    """
    import gguf

    splitter = splitter_name(policy.tokenizer)  # before anything is written
    writer = gguf.GGUFWriter(file, policy.causal.config.model_type, use_temp_file=True)
    writer.add_name(name)
    _add_shape(writer, policy.causal.config)
    prefix = "ALL" if kind == "f32" else "MOSTLY"
    writer.add_file_type(gguf.LlamaFileType[f"{prefix}_{kind.upper()}"])
    add_tokenizer(writer, policy, splitter)
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
    if head_dim(config) * config.num_attention_heads != config.hidden_size:  # what llama.cpp assumes
        writer.add_key_length(head_dim(config))
        writer.add_value_length(head_dim(config))
    _add_rope(writer, config)


def _add_rope(writer: Any, config: Any) -> None:
    """How angles are scaled; llama.cpp takes Llama 3's scaling as a tensor of divisors."""
    import gguf

    rope = config.rope_parameters
    if rope["rope_type"] == "llama3":
        speeds, _ = rotary_speeds(config)
        plain = rope["rope_theta"] ** -(torch.arange(0, head_dim(config), 2) / head_dim(config))
        writer.add_tensor("rope_freqs.weight", (plain / speeds).float().numpy())
    elif rope["rope_type"] in ("linear", "yarn"):
        writer.add_rope_scaling_type(gguf.RopeScalingType[rope["rope_type"].upper()])
        writer.add_rope_scaling_factor(rope["factor"])
        if "original_max_position_embeddings" in rope:
            writer.add_rope_scaling_orig_ctx_len(rope["original_max_position_embeddings"])


def _add_tensors(writer: Any, policy: Policy, matrix: Any) -> None:
    """A matrix whose rows are not whole blocks of the type stays in float32, as in llama.cpp."""
    import gguf

    config = policy.causal.config
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH[config.model_type.upper()], config.num_hidden_layers)
    block, _ = gguf.GGML_QUANT_SIZES[matrix]
    heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}
    for key, tensor in merged_tensors(policy, torch.float32):
        stem, _, ending = key.rpartition(".")
        name = names.get_name(stem)
        assert name is not None, key
        if FAMILIES[config.model_type].neighbors and (which := stem.rpartition(".")[2]) in heads:
            tensor = _neighbors(tensor, heads[which])
        fits = tensor.ndim == 2 and tensor.shape[-1] % block == 0
        kind = matrix if fits else gguf.GGMLQuantizationType.F32
        data = gguf.quants.quantize(tensor.numpy(), kind)
        writer.add_tensor(f"{name}.{ending}", data, raw_dtype=kind)


def _neighbors(weight: Tensor, heads: int) -> Tensor:
    """Rows of q or k ``(out, in)`` as llama.cpp rotates them: 0, d/2, 1, d/2 + 1, ... of each head of d."""
    out, width = weight.shape
    return weight.view(heads, 2, out // heads // 2, width).transpose(1, 2).reshape(out, width)
