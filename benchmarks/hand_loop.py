"""What a person writes by hand with transformers and peft: the plain rivals, and the gate's reference."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from empg_lite.core.rationale import Rationale
from empg_lite.policy.policy import Policy

#: (prompt ids, completion ids) of a row.
Row = tuple[tuple[int, ...], tuple[int, ...]]


def left_padded(policy: Policy, prompts: Sequence[Sequence[int]]) -> dict[str, Tensor]:
    """``input_ids`` and ``attention_mask`` (B, T) as ``generate`` wants them."""
    width = max(map(len, prompts))
    ids = [[policy.pad_id] * (width - len(p)) + list(p) for p in prompts]
    mask = [[0] * (width - len(p)) + [1] * len(p) for p in prompts]
    return {
        "input_ids": torch.tensor(ids, device=policy.device),
        "attention_mask": torch.tensor(mask, device=policy.device),
    }


def generate(policy: Policy, prompts: Sequence[Sequence[int]], **options: Any) -> list[tuple[int, ...]]:
    """Completions by ``model.generate``, adapter on, each cut behind its first stop token."""
    inputs = left_padded(policy, prompts)
    with policy.sampling():
        out = policy.model.generate(**inputs, pad_token_id=policy.pad_id, **options)
    return [cut(row, policy.stop_ids) for row in out[:, inputs["input_ids"].shape[1] :].tolist()]


def cut(ids: Sequence[int], stop_ids: frozenset[int]) -> tuple[int, ...]:
    """The tokens up to the first stop, it included; all where there is none."""
    end = next((i for i, token in enumerate(ids) if token in stop_ids), len(ids))
    return tuple(ids[: end + 1])


def padded_loss(policy: Policy, rows: Sequence[Row], weights: Sequence[float], z: float) -> Tensor:
    """-sum of w log pi / z of rows padded to the longest: logits of all places over the whole vocabulary."""
    width = max(len(p) + len(c) for p, c in rows)
    ids = torch.full((len(rows), width), policy.pad_id)
    mask = torch.zeros(len(rows), width, dtype=torch.long)
    w = torch.zeros(len(rows), width)
    for i, (prompt, completion) in enumerate(rows):
        end = len(prompt) + len(completion)
        ids[i, :end] = torch.tensor([*prompt, *completion])
        mask[i, :end] = 1
        w[i, len(prompt) : end] = weights[i]
    ids, mask, w = (x.to(policy.device) for x in (ids, mask, w))
    with policy.autocast():
        logits = policy.model(input_ids=ids, attention_mask=mask, use_cache=False).logits
    logprobs = logits[:, :-1].float().log_softmax(-1).gather(-1, ids[:, 1:, None]).squeeze(-1)
    return -(w[:, 1:] * logprobs).sum() / z


def padded_step(
    policy: Policy,
    optimizer: torch.optim.Optimizer,
    rationales: Sequence[Rationale],
    *,
    rows: int,
    rate: float,
    max_norm: float = 1.0,
) -> float:
    """One optimizer step of a plain loop: micro-batches of ``rows`` rows as they come. Returns the loss.

    Rows of weight 0 are computed like the others.
    """
    z = float(sum(len(r.completion_ids) for r in rationales))
    total = 0.0
    optimizer.zero_grad(set_to_none=True)
    with policy.training():
        for start in range(0, len(rationales), rows):
            part = rationales[start : start + rows]
            pairs = [(r.prompt_ids, r.completion_ids) for r in part]
            loss = padded_loss(policy, pairs, [r.weight or 0.0 for r in part], z)
            loss.backward()
            total += float(loss.detach())
        finish(policy, optimizer, rate, max_norm)
    return total


def finish(policy: Policy, optimizer: torch.optim.Optimizer, rate: float, max_norm: float) -> None:
    """Clip, set the rate, step."""
    torch.nn.utils.clip_grad_norm_(list(policy.trainable().values()), max_norm)
    for group in optimizer.param_groups:
        group["lr"] = rate
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
