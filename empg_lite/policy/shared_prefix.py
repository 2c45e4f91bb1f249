"""Unsloth's own forward pass over completions that share their prompt: its kernels in the M-step.

Unsloth's Llama, Qwen2 and Qwen3 layers take a stream in which each prompt is followed by its completions,
and a segment table; attention (FlexAttention) lets a completion attend to its prompt and itself. Its RMSNorm,
RoPE and LoRA kernels and its offloaded checkpoints come with it. It computes the same as ``packing``, which
is the fallback and the reference: see ``disagreement``.

Shapes: N tokens of the stream, M scored tokens, D hidden.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from empg_lite.policy.packing import Ids

if TYPE_CHECKING:
    from empg_lite.policy.policy import Policy

#: Tolerances against the packed pass: log-probabilities (nats, root mean square) and gradient (relative).
#: 16-bit kernels that sum in another order differ by a hundredth of a nat, a wrong mask by whole nats.
LOGPROBS = {torch.float32: 1e-4, torch.bfloat16: 0.05, torch.float16: 0.02}
GRADIENT = {torch.float32: 1e-3, torch.bfloat16: 0.05, torch.float16: 0.02}


@dataclass(frozen=True, slots=True)
class Stream:
    """Prompts, each followed by its completions without their last tokens, which predict nothing.

    Attributes:
        ids, positions: N tokens.
        groups: (tokens of the prompt, tokens of each completion) in the order of the stream.
        scored: M indices whose hidden state predicts each completion token, row after row.
        targets: M tokens they predict.
        rows: M indices of the completion that each belongs to.
    """

    ids: list[int]
    positions: list[int]
    groups: list[tuple[int, list[int]]]
    scored: list[int]
    targets: list[int]
    rows: list[int]


def stream(pairs: Sequence[tuple[Ids, Ids]]) -> Stream:
    """Lay out (prompt_ids, completion_ids) pairs, neither empty; equal prompts are stored once."""
    members: dict[Ids, list[int]] = {}
    for row, (prompt, _) in enumerate(pairs):
        members.setdefault(prompt, []).append(row)
    ids: list[int] = []
    positions: list[int] = []
    groups: list[tuple[int, list[int]]] = []
    indices: dict[int, list[int]] = {}
    for prompt, rows in members.items():
        last = len(ids) + len(prompt) - 1
        ids += prompt
        positions += range(len(prompt))
        for row in rows:
            computed = pairs[row][1][:-1]
            indices[row] = [last, *range(len(ids), len(ids) + len(computed))]
            ids += computed
            positions += range(len(prompt), len(prompt) + len(computed))
        groups.append((len(prompt), [len(pairs[row][1]) - 1 for row in rows]))
    return Stream(
        ids,
        positions,
        groups,
        scored=[index for row in range(len(pairs)) for index in indices[row]],
        targets=[token for _, completion in pairs for token in completion],
        rows=[row for row, (_, completion) in enumerate(pairs) for _ in completion],
    )


def shared_prefix_hidden(policy: Policy, pairs: Sequence[tuple[Ids, Ids]]) -> tuple[Tensor, Tensor, Tensor]:
    """Hidden states ``(M, D)`` before each completion token, the tokens and their rows ``(M,)``.

    Raises:
        ImportError, RuntimeError: this version of Unsloth lacks the pass, or it fails here.
    """
    from unsloth.utils.prefix_grouper_kernel import build_seg_info_multigroup

    laid = stream(pairs)

    def tensor(values: Sequence[int]) -> Tensor:
        return torch.tensor(values, dtype=torch.long, device=policy.device)

    table, _ = build_seg_info_multigroup(laid.groups, policy.device)
    out = policy.backbone(
        tensor(laid.ids)[None],
        position_ids=tensor(laid.positions)[None],
        prefix_seg_info=table,
        use_cache=False,
    )
    hidden = out.last_hidden_state[0].index_select(0, tensor(laid.scored))
    return hidden, tensor(laid.targets), tensor(laid.rows)


def forget_masks() -> None:
    """Free the masks cached between calls: lengths differ at every step, so none is used again."""
    from unsloth.utils.prefix_grouper_kernel import clear_block_mask_cache

    clear_block_mask_cache()


# --- verification -----------------------------------------------------------------------------------


def check_pairs(vocab: int) -> list[tuple[Ids, Ids]]:
    """Two prompts, five completions of 1 to 150 tokens: groups end within FlexAttention's blocks of 128."""
    generator = torch.Generator().manual_seed(0)

    def some(n: int) -> Ids:
        return tuple(torch.randint(vocab, (n,), generator=generator).tolist())

    first, second = some(37), some(90)
    return [(first, some(1)), (second, some(64)), (first, some(150)), (first, some(20)), (second, some(2))]


def disagreement(policy: Policy) -> str | None:
    """Why Unsloth's pass cannot be used for this policy; None where it agrees with the packed pass.

    Compares log-probabilities of synthetic rows and the gradient of a weighted sum of them. The adapter is
    perturbed for the check and restored: its B starts at zero, where A has no gradient.
    """
    pairs = check_pairs(policy.head_weight.shape[0])
    parameters = list(policy.trainable().values())
    kept = [p.detach().clone() for p in parameters]
    generator = torch.Generator().manual_seed(1)
    try:
        with torch.no_grad():
            for p in parameters:
                p.add_((0.01 * torch.randn(p.shape, generator=generator)).to(p))
        with policy.training():
            expected, wanted = _logprobs_and_gradient(policy, pairs, shared=False)
            found, got = _logprobs_and_gradient(policy, pairs, shared=True)
    except Exception as error:  # the run continues without a pass that raises anything
        return f"{type(error).__name__}: {' '.join(str(error).split())[:160]}"
    finally:
        with torch.no_grad():
            for p, before in zip(parameters, kept, strict=True):
                p.copy_(before)
                p.grad = None
    nats = float((found - expected).square().mean().sqrt())
    if not nats <= LOGPROBS[policy.dtype]:  # NaN too
        return f"log-probabilities differ from the packed pass's by {nats:.1e} nats"
    off = float((got - wanted).norm() / wanted.norm())
    if not off <= GRADIENT[policy.dtype]:
        return f"the gradient differs from the packed pass's by {off:.1e}"
    return None


def _logprobs_and_gradient(
    policy: Policy, pairs: Sequence[tuple[Ids, Ids]], *, shared: bool
) -> tuple[Tensor, Tensor]:
    """All log-probabilities ``(M,)``, and the gradient of their sum, weighted row by row, as one vector."""
    logprobs = policy.completion_logprobs(pairs, shared=shared)
    sum((1.0 - 0.5 * (row % 2)) * row_logprobs.sum() for row, row_logprobs in enumerate(logprobs)).backward()  # type: ignore[union-attr]
    gradient = torch.cat(
        [p.grad.flatten().float() for p in policy.trainable().values() if p.grad is not None]
    )
    for p in policy.trainable().values():
        p.grad = None
    return torch.cat(logprobs).detach(), gradient
