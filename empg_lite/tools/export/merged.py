"""Base and adapter as one plain model, for transformers, vLLM and others."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from empg_lite.policy.card import merged_card, tokenizer_files
from empg_lite.policy.integrity import resolve_model
from empg_lite.policy.merged import (
    adapter_deltas,
    merged_bytes,
    merged_config,
    merged_tensors,
    put_on_original,
)
from empg_lite.run import store
from empg_lite.tools.export.compare import THRESHOLD, Export, begin, write_files

if TYPE_CHECKING:
    from empg_lite.core.view import View
    from empg_lite.rewards import Grader
    from empg_lite.run.target import Target

#: Bytes per weights file.
SHARD = 2_000_000_000


def export(
    target: Target,
    out: Path,
    grader: Grader,
    view: View | None = None,
    *,
    dtype: str = "auto",
    onto: str = "dequantized",
) -> dict[str, Any]:
    """Write the merged model's folder.

    Args:
        dtype: ``float32``, ``bfloat16``, ``float16``; ``auto``: the run's own.
        onto: for a run over an NF4 base: ``dequantized`` merges onto the base that the adapter was trained
            over; ``original`` onto the unquantized weights, which the adapter never saw.

    Returns:
        ``export``, ``bytes``, ``dtype``, ``onto``, the figures of ``Agreement``, and for an NF4 run the
        argmax agreement on either base, ``agreement_dequantized`` and ``agreement_original``.

    Raises:
        CheckFailed: it behaves differently from the adapter; nothing was written.
        StorageError: the disk is too full.
    """
    job = begin(target, out, grader, view)
    kind = str(job.learner.policy.dtype).removeprefix("torch.") if dtype == "auto" else dtype
    with store.staged_dir(out) as staged:
        facts = _merge(job, staged, kind, onto)
        store.write_file(staged / "README.md", merged_card(job.provenance, facts | {"dtype": kind}))
    return job.result({"dtype": kind, **facts})


def _merge(job: Export, staged: Path, kind: str, onto: str) -> dict[str, Any]:
    """Write the merged model and compare it."""
    model, dtype = job.learner.recipe.model, getattr(torch, kind)
    needed, deltas = merged_bytes(job.learner.policy, dtype), adapter_deltas(job.learner.policy)
    _write_model(job, staged, dtype, needed)
    section = model.model_copy(
        update={
            "name": str(staged),
            "adapter": None,
            "revision": None,
            "load_in_4bit": False,
            "dtype": kind,
            "backend": "transformers",
        }
    )
    merged = job.reload(section)
    found = job.compare(merged)
    facts: dict[str, Any] = {"onto": onto if model.load_in_4bit else "the base", **asdict(found)}
    if model.load_in_4bit:
        put_on_original(merged, resolve_model(model.name, model.revision)[0], deltas)
        other = job.compare(merged)
        facts |= {
            "agreement_dequantized": found.argmax_agreement,
            "agreement_original": other.argmax_agreement,
        }
        job.view.note(
            f"same top token at {found.argmax_agreement:.2%} of {found.compared_tokens} positions merged "
            f"onto the dequantized base, at {other.argmax_agreement:.2%} onto the original"
        )
        if onto == "original":
            found, facts = other, facts | asdict(other)
            _write_shards(staged, merged_tensors(merged, dtype), needed)
    todo = "try --dtype float32; `export --to adapter` changes nothing"
    job.require(found.argmax_agreement, found.compared_tokens, THRESHOLD, "merged model", todo)
    return facts


def _write_model(job: Export, folder: Path, dtype: torch.dtype, needed: int) -> None:
    policy = job.learner.policy
    job.view.note(f"writing {needed / 1e6:,.0f} MB to {job.out}")
    store.check_disk_space(folder, 1, needed + 50_000_000)
    config = json.dumps(merged_config(policy, dtype), indent=1).encode()
    write_files(folder, tokenizer_files(policy) | {"config.json": config})
    _write_shards(folder, merged_tensors(policy, dtype), needed)


def _write_shards(folder: Path, tensors: Iterator[tuple[str, Tensor]], total: int) -> None:
    """``model.safetensors``, or several files of at most ``SHARD`` bytes and their index."""
    from safetensors.torch import save

    sharded = total > SHARD
    index: dict[str, str] = {}
    pending: dict[str, Tensor] = {}
    shard = 1

    def flush() -> None:
        nonlocal shard
        name = f"model-{shard:05d}.safetensors" if sharded else "model.safetensors"
        data = save({k: t.contiguous() for k, t in pending.items()}, metadata={"format": "pt"})
        store.write_file(folder / name, data)
        index.update(dict.fromkeys(pending, name))
        pending.clear()
        shard += 1

    for key, tensor in tensors:
        if sharded and pending and sum(t.nbytes for t in pending.values()) + tensor.nbytes > SHARD:
            flush()
        pending[key] = tensor
    flush()
    if sharded:
        text = json.dumps({"metadata": {"total_size": total}, "weight_map": index}, indent=1)
        store.write_file(folder / "model.safetensors.index.json", text)
