"""Run in a process of its own: what one backend does with one model, as a JSON object on the last line.

python tests/support/backend_probe.py BACKEND MODEL_FOLDER PROBLEMS SAMPLES NEW_TOKENS
"""

from __future__ import annotations

import hashlib
import json
import sys
from typing import Any


def digest(tensors) -> str:  # type: ignore[no-untyped-def]
    import torch

    state = hashlib.sha256()
    for name, tensor in tensors:
        state.update(name.encode())
        state.update(tensor.detach().contiguous().view(torch.uint8).numpy().tobytes())
    return state.hexdigest()


def gaps(policy: Any, rows: list, sampled: list, batched: Any, mask: Any) -> tuple[float, float]:  # type: ignore[type-arg]
    """Largest difference between sampled and recomputed log-probs: rows in one batch, and each alone."""
    import torch

    from empg_lite.policy.policy import collate

    in_batch = by_itself = 0.0
    for i, (row, logprobs) in enumerate(zip(rows, map(torch.tensor, sampled), strict=True)):
        in_batch = max(in_batch, float((batched[i][mask[i]] - logprobs).abs().max()))
        alone, alone_mask = policy.token_logprobs(collate([row], policy.pad_id))
        by_itself = max(by_itself, float((alone[alone_mask] - logprobs).abs().max()))
    return in_batch, by_itself


def draws(policy: Any, n_problems: int, samples: int, new_tokens: int) -> tuple[list, list, list]:  # type: ignore[type-arg]
    """Prompts of different lengths, and their samples by the native engine and by ``generate``."""
    from empg_lite.sampler import Decoding, Prompt, make_sampler, sample_key

    prompts = [
        Prompt(
            policy.encode_prompt("word " * (1 + 3 * i))[1],
            tuple(sample_key(0, 1, str(i), k) for k in range(samples)),
        )
        for i in range(n_problems)
    ]
    native, reference = (
        make_sampler(policy, engine).sample(prompts, Decoding(new_tokens))
        for engine in ("native", "generate")
    )
    return prompts, native, reference


def probe(backend: str, model: str, four_bit: bool, n_problems: int, samples: int, new_tokens: int) -> dict:  # type: ignore[type-arg]
    from empg_lite.policy import load_policy
    from empg_lite.recipe.schema import ModelSection

    section = ModelSection(
        name=model, backend=backend, dtype="float32", load_in_4bit=four_bit, lora_r=4, lora_alpha=8
    )
    policy = load_policy(section, "plain", seed=0, gradient_checkpointing=True)

    import torch

    from empg_lite.core.rationale import Rationale
    from empg_lite.loop.mstep import FitSettings, m_step
    from empg_lite.policy.policy import collate

    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in policy.trainable().values():
            parameter.add_(0.02 * torch.randn(parameter.shape, generator=generator))
    before = {name: p.detach().clone() for name, p in policy.trainable().items()}
    frozen = [(n, p) for n, p in policy.model.named_parameters() if not p.requires_grad]
    base = digest(frozen)

    prompts, native, reference = draws(policy, n_problems, samples, new_tokens)
    completions = [c for row in native for c in row]
    rows = [(p.ids, c.ids) for p, row in zip(prompts, native, strict=True) for c in row]
    with torch.no_grad():
        batched, mask = policy.token_logprobs(collate(rows, policy.pad_id))
        gap_batch, gap_alone = gaps(policy, rows, [c.logprobs for c in completions], batched, mask)
        with policy.reference():
            off, _ = policy.token_logprobs(collate(rows, policy.pad_id))

    rationales = [
        Rationale("p", "", "", "", p, "", c, "stop", 1, 0, k, 1.0, "equal", 1.0)
        for k, (p, c) in enumerate(rows)
    ]
    adam = torch.optim.AdamW(list(policy.trainable().values()), lr=1e-3, weight_decay=0.0)
    settings = FitSettings(1e-3, 1.0, 1, 1.0, "tokens", new_tokens, 256)
    stats = m_step(policy, adam, rationales, settings)
    after = policy.trainable()
    return {
        "backend": policy.backend,
        "adapters": sorted(before),
        "native_equals_generate": [c.ids for c in completions] == [c.ids for row in reference for c in row],
        "gap_batch": gap_batch,
        "gap_alone": gap_alone,
        "adapter_effect": float((batched - off).abs().max()),
        "logprobs": batched[mask].tolist()[:64],
        "ids": [list(c.ids) for c in completions[:2]],
        "loss": stats.loss,
        "grad_norm": stats.grad_norm,
        "all_b_changed": all(not torch.equal(before[n], p) for n, p in after.items() if "lora_B" in n),
        "base_unchanged": digest(frozen) == base,
        "nf4": any(p.dtype == torch.uint8 for _, p in frozen),
    }


def both_precisions(backend: str, model: str, *sizes: int) -> dict[str, Any]:
    """What ``probe`` finds in full precision and in NF4."""
    return {
        name: probe(backend, model, four_bit, *sizes) for name, four_bit in (("full", False), ("nf4", True))
    }


if __name__ == "__main__":
    backend, model, *counts = sys.argv[1:]
    print(json.dumps(both_precisions(backend, model, *map(int, counts))))
