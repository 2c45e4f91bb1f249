"""Adapter, merged model and GGUF: written into a staged folder, loaded again, compared, then published."""

from __future__ import annotations

import gc
import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from empg_lite.core.errors import CheckFailed, MissingInput, UsageError
from empg_lite.core.rationale import Rationale
from empg_lite.core.view import View
from empg_lite.loop.learner import Learner, build_learner
from empg_lite.loop.recorder import read_figures
from empg_lite.policy import load_policy
from empg_lite.policy.adapter import adapter_files
from empg_lite.policy.card import Provenance, adapter_card, merged_card, tokenizer_files
from empg_lite.policy.integrity import resolve_model
from empg_lite.policy.merge import adapter_deltas, put_on_original, whole_bytes, whole_config, whole_tensors
from empg_lite.policy.policy import Policy
from empg_lite.rewards import Grader
from empg_lite.run import store
from empg_lite.run.target import Target
from empg_lite.tools.export.compare import (
    Agreement,
    Evidence,
    agreement,
    enough,
    evidence,
    stored_answers,
)
from empg_lite.tools.export.gguf import llama_choices, need_packages, write_gguf

#: Share of tokens at which an export has to choose as the adapter does.
THRESHOLD, THRESHOLD_GGUF = 0.99, 0.95
#: Bytes of one weights file.
SHARD = 2_000_000_000


@dataclass(slots=True)
class _Job:
    """A loaded run, what it did on the evidence, and where the export goes."""

    target: Target
    out: Path
    grader: Grader
    view: View
    learner: Learner
    rows: list[Rationale]
    mine: Evidence
    provenance: Provenance

    def compare(self, policy: Policy) -> Agreement:
        return agreement(self.mine, evidence(self.learner, policy, self.rows, self.grader))


def _begin(target: Target, out: Path, grader: Grader, view: View | None) -> _Job:
    """Load the run and ask it, before anything is written.

    Raises:
        UsageError: ``out`` exists, or the target is no run.
    """
    view = view or View()
    if out.exists():
        raise UsageError("it exists already", str(out), "name another --out, or move it away")
    if target.run is None:
        raise UsageError("what is exported is a run, or a checkpoint of one", target.label)
    rows = stored_answers(target.run)
    learner = build_learner(target.recipe)
    view.note(f"asking {target.label}: {sum(len(r.completion_ids) for r in enough(rows))} tokens")
    mine = evidence(learner, learner.policy, rows, grader)
    figures = read_figures(target.run, "after") if target.label.endswith("/adapter") else None
    provenance = Provenance(
        learner.recipe, learner.policy.revision, figures, read_figures(target.run, "before")
    )
    return _Job(target, out, grader, view, learner, rows, mine, provenance)


def _verdict(found: Agreement, threshold: float, what: str) -> None:
    """Refuse an export that does not act like the adapter.

    Raises:
        CheckFailed: it does not; nothing is published.
    """
    if found.argmax < threshold:
        raise CheckFailed(
            f"the {what} puts the adapter's token first at {found.argmax:.2%} of {found.tokens} places, "
            f"{threshold:.0%} are needed: nothing was written",
            "export",
            "try --dtype float32; `export --to adapter` changes nothing",
        )


def export_adapter(target: Target, out: Path, grader: Grader, view: View | None = None) -> dict[str, Any]:
    """The adapter as plain PEFT, with tokenizer, template, stop tokens and a model card.

    Returns:
        ``export`` (the folder), ``bytes``, and the figures of ``Agreement``.

    Raises:
        CheckFailed: what was written does not act like the run's adapter.
        UsageError: ``out`` exists.
    """
    job = _begin(target, out, grader, view)
    files = adapter_files(job.learner.policy) | tokenizer_files(job.learner.policy)
    with store.staged_dir(out) as staged:
        _write(staged, files)
        section = job.learner.recipe.model.model_copy(update={"adapter": str(staged)})
        found = job.compare(_reload(job, section))
        _verdict(found, THRESHOLD, "exported adapter")
        store.write_file(staged / "README.md", adapter_card(job.provenance, found.facts()))
    return {"export": str(out), "bytes": _size(out), **found.facts()}


def export_merged(
    target: Target,
    out: Path,
    grader: Grader,
    view: View | None = None,
    *,
    dtype: str = "auto",
    onto: str = "dequantized",
) -> dict[str, Any]:
    """Base and adapter as one plain model, for transformers, vLLM and others.

    Args:
        dtype: ``float32``, ``bfloat16``, ``float16``; ``auto``: the run's own.
        onto: for a run over an NF4 base: ``dequantized`` merges onto the base as it was trained over, which
            acts as the adapter did; ``original`` onto the unquantised weights, which never met the adapter.

    Returns:
        ``export``, ``bytes``, ``dtype``, ``onto``, the figures of ``Agreement``, and for an NF4 run the
        argmax agreement of either base, ``agreement_dequantized`` and ``agreement_original``.

    Raises:
        CheckFailed: it does not act like the adapter; nothing was written.
        StorageError: there is no room.
    """
    job = _begin(target, out, grader, view)
    four_bit = job.learner.recipe.model.load_in_4bit
    with store.staged_dir(out) as staged:
        kind, facts = _merge_into(job, staged, dtype, onto if four_bit else "dequantized")
        store.write_file(staged / "README.md", merged_card(job.provenance, facts | {"dtype": kind}))
    return {"export": str(out), "bytes": _size(out), "dtype": kind, **facts}


def _merge_into(job: _Job, staged: Path, dtype: str, onto: str) -> tuple[str, dict[str, Any]]:
    """Write the merged model and compare it; the type it is in, and what was found."""
    learner, policy = job.learner, job.learner.policy
    four_bit, name = learner.recipe.model.load_in_4bit, learner.recipe.model.name
    kind = str(policy.dtype).removeprefix("torch.") if dtype == "auto" else dtype
    needed = whole_bytes(policy, getattr(torch, kind))
    job.view.note(f"writing {needed / 1e6:,.0f} MB to {job.out}")
    store.check_disk_space(staged, 1, needed + 50_000_000)
    config, deltas = whole_config(policy, getattr(torch, kind)), adapter_deltas(policy)
    _write(staged, tokenizer_files(policy) | {"config.json": json.dumps(config, indent=1).encode()})
    _write_shards(staged, whole_tensors(policy, getattr(torch, kind)), needed)
    del policy

    section = learner.recipe.model.model_copy(
        update={"name": str(staged), "adapter": None, "revision": None, "load_in_4bit": False, "dtype": kind}
    )
    plain = _reload(job, section.model_copy(update={"backend": "transformers"}))
    found = job.compare(plain)
    facts: dict[str, Any] = {"onto": onto if four_bit else "the base", **found.facts()}
    if four_bit:
        put_on_original(plain, resolve_model(name, learner.recipe.model.revision)[0], deltas)
        other = job.compare(plain)
        facts |= {"agreement_dequantized": found.argmax, "agreement_original": other.argmax}
        job.view.note(
            f"the same token first at {found.argmax:.2%} of {found.tokens} places merged onto the "
            f"dequantised base, at {other.argmax:.2%} onto the original one"
        )
        if onto == "original":
            found, facts = other, facts | other.facts()
            _write_shards(staged, whole_tensors(plain, getattr(torch, kind)), needed)
    _verdict(found, THRESHOLD, "merged model")
    return kind, facts


def export_gguf(
    target: Target, out: Path, grader: Grader, view: View | None = None, *, kind: str = "f16"
) -> dict[str, Any]:
    """The merged model as a GGUF file for llama.cpp, which runs it before it is published.

    Args:
        out: a folder; the file in it is ``model-KIND.gguf``.
        kind: one of ``gguf.KINDS``.

    Returns:
        ``export``, ``bytes``, ``kind``, ``compared_tokens``, ``argmax_agreement`` (llama.cpp, adapter).

    Raises:
        UsageError: the packages gguf or llama-cpp-python are missing.
        DataError: llama.cpp does not know the tokenizer.
        CheckFailed: llama.cpp does not choose as the adapter does; nothing was written.
    """
    need_packages()
    job = _begin(target, out, grader, view)
    policy = job.learner.policy
    rows, needed = enough(job.rows), whole_bytes(policy, torch.float32)
    with store.staged_dir(out) as staged:
        store.check_disk_space(staged, 1, needed)
        file = staged / f"model-{kind}.gguf"
        write_gguf(policy, file, kind, name=job.target.label)
        del policy
        _let_go(job.learner)
        theirs = llama_choices(file, [(r.prompt_ids, r.completion_ids) for r in rows])
        share = float((theirs == job.mine.choices).double().mean())
        if share < THRESHOLD_GGUF:
            raise CheckFailed(
                f"llama.cpp puts the adapter's token first at {share:.2%} of {len(theirs)} places, "
                f"{THRESHOLD_GGUF:.0%} are needed: nothing was written",
                str(out),
                "try --gguf-type f16 or f32",
            )
        found = {"compared_tokens": len(theirs), "argmax_agreement": share}
        store.write_file(
            staged / "README.md", merged_card(job.provenance, {"dtype": f"GGUF {kind}", **found})
        )
    return {"export": str(out), "bytes": _size(out), "kind": kind, **found}


def upload_adapter(
    target: Target,
    repo: str,
    grader: Grader,
    view: View | None = None,
    *,
    private: bool = True,
    api: Any = None,
) -> dict[str, Any]:
    """Export the adapter with its card and upload it to the Hugging Face hub. Nothing else is sent.

    Args:
        repo: ``owner/name``; made where it does not exist.
        api: what to talk to; None: ``huggingface_hub.HfApi()`` with the token of ``hf auth login``.

    Returns:
        ``export`` (the repository's address), ``private``, and the figures of ``Agreement``.

    Raises:
        MissingInput: the hub cannot be reached, or says no.
    """
    import tempfile

    from httpx import HTTPError
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalTokenNotFoundError

    api = api or HfApi()
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch) / "adapter"
        result = export_adapter(target, folder, grader, view)
        try:
            address = api.create_repo(repo, private=private, exist_ok=True)
            api.upload_folder(
                repo_id=repo, folder_path=folder, commit_message="Adapter trained with empg-lite"
            )
        except (HfHubHTTPError, HFValidationError, LocalTokenNotFoundError, HTTPError, OSError) as error:
            said = " ".join(str(error).split())[:200]
            raise MissingInput(
                f"the hub did not take it ({said})", repo, "check the name, the network and `hf auth login`"
            ) from error
    return {**result, "export": str(address), "private": private}


# --- pieces -------------------------------------------------------------------------------------------


def _write(folder: Path, files: Mapping[str, bytes]) -> None:
    for name, data in files.items():
        store.write_file(folder / name, data)


def _write_shards(folder: Path, tensors: Iterator[tuple[str, Tensor]], total: int) -> None:
    """``model.safetensors``, or several files of at most ``SHARD`` bytes and their index."""
    from safetensors.torch import save

    shards: list[list[str]] = []
    waiting: dict[str, Tensor] = {}
    name: Callable[[int], str] = lambda i: f"model-{i:05d}.safetensors"  # noqa: E731

    def flush() -> None:
        data = save({k: t.contiguous() for k, t in waiting.items()}, metadata={"format": "pt"})
        store.write_file(folder / (name(len(shards) + 1) if total > SHARD else "model.safetensors"), data)
        shards.append(list(waiting))
        waiting.clear()

    for key, tensor in tensors:
        if total > SHARD and waiting and sum(t.nbytes for t in waiting.values()) + tensor.nbytes > SHARD:
            flush()
        waiting[key] = tensor
    flush()
    if total > SHARD:
        index = {k: name(i) for i, keys in enumerate(shards, 1) for k in keys}
        text = json.dumps({"metadata": {"total_size": total}, "weight_map": index}, indent=1)
        store.write_file(folder / "model.safetensors.index.json", text)


def _reload(job: _Job, section: Any) -> Policy:
    """Load what was written, after the policy that was trained has left the memory."""
    _let_go(job.learner)
    return load_policy(section, str(job.learner.recipe.data.prompt), seed=0, gradient_checkpointing=False)


def _let_go(learner: Learner) -> None:
    """Two models at once may be one too many."""
    learner.policy = learner.optimizer = None  # type: ignore[assignment]
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def _size(folder: Path) -> int:
    return sum(p.stat().st_size for p in folder.iterdir())
