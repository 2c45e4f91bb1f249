"""Packed micro-batches for the M-step: completions share their prompts, and the linears see no padding.

Repeated K times, the shared prompts would be a third of the M-step's work (prompt 150, completion 180 tokens,
K = 8), and padding to the longest row as much again. So all real tokens of a micro-batch form one packed
sequence of N, prompts first. Only attention works on rows: completions attend to the keys of their prompt and
to their own.

Shapes: P prompts, B completions (rows), N packed tokens, M scored tokens (all completion tokens).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from empg_lite.core.sizes import ALIGN, round_up
from empg_lite.policy.attention import causal_attention

if TYPE_CHECKING:
    from empg_lite.policy.network import Layer, Network

Ids = tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Rows:
    """Index maps between the packed sequence and padded rows.

    Attributes:
        gather: ``(B, T)`` index into the N packed tokens; 0 in the padding.
        scatter: ``(n,)`` index of the n real tokens, in packed order, into the B T padded entries.
        lengths: ``(B,)``.
    """

    gather: Tensor
    scatter: Tensor
    lengths: Tensor

    @staticmethod
    def of(lengths: Sequence[int], start: int, device: torch.device) -> Rows:
        """Rows of these lengths, consecutive in the packed sequence from ``start`` on."""
        width = max(lengths, default=0)
        starts = [start + before for before in accumulate([0, *lengths])][: len(lengths)]
        size = torch.tensor(lengths, dtype=torch.long)[:, None]  # (B, 1)
        columns = torch.arange(width)
        real = columns < size  # (B, T)
        gather = torch.where(real, torch.tensor(starts, dtype=torch.long)[:, None] + columns, 0)
        scatter = real.flatten().nonzero().squeeze(-1)
        return Rows(gather.to(device), scatter.to(device), size.squeeze(-1).to(device))

    def pad(self, x: Tensor) -> Tensor:
        """(N, ...) -> (B, T, ...)."""
        return x.index_select(0, self.gather.flatten()).view(*self.gather.shape, *x.shape[1:])

    def unpad(self, x: Tensor) -> Tensor:
        """(B, T, ...) -> (n, ...)."""
        return x.flatten(0, 1).index_select(0, self.scatter)


@dataclass(frozen=True, slots=True)
class Pack:
    """One micro-batch.

    Attributes:
        ids, positions: ``(N,)`` prompts, then each completion without its last token, which predicts nothing.
        prompts, completions: their index maps.
        owner: ``(B,)`` index of each completion's prompt.
        scored: ``(M,)`` index of the packed token whose hidden state predicts each completion token.
        targets: ``(M,)`` those completion tokens, row after row.
        rows: ``(M,)`` the completion that each belongs to.
    """

    ids: Tensor
    positions: Tensor
    prompts: Rows
    completions: Rows
    owner: Tensor
    scored: Tensor
    targets: Tensor
    rows: Tensor


def pack(pairs: Sequence[tuple[Ids, Ids]], device: torch.device | str = "cpu") -> Pack:
    """Pack B pairs (prompt_ids, completion_ids), neither empty; equal prompts are stored once."""
    assert pairs and all(prompt and completion for prompt, completion in pairs)
    device = torch.device(device)
    prompts = list(dict.fromkeys(prompt for prompt, _ in pairs))
    number = {prompt: i for i, prompt in enumerate(prompts)}
    owner = [number[prompt] for prompt, _ in pairs]
    ends = list(accumulate(len(p) for p in prompts))  # one past each prompt's last token
    ids = [token for prompt in prompts for token in prompt]
    positions = [at for prompt in prompts for at in range(len(prompt))]
    scored: list[int] = []
    for (prompt, completion), which in zip(pairs, owner, strict=True):
        start = len(ids)
        ids += completion[:-1]
        positions += range(len(prompt), len(prompt) + len(completion) - 1)
        scored += [ends[which] - 1, *range(start, len(ids))]

    def tensor(values: Sequence[int]) -> Tensor:
        return torch.tensor(values, dtype=torch.long, device=device)

    lengths = [len(completion) for _, completion in pairs]
    return Pack(
        ids=tensor(ids),
        positions=tensor(positions),
        prompts=Rows.of([len(p) for p in prompts], 0, device),
        completions=Rows.of([n - 1 for n in lengths], ends[-1], device),
        owner=tensor(owner),
        scored=tensor(scored),
        targets=tensor([token for _, completion in pairs for token in completion]),
        rows=tensor([row for row, n in enumerate(lengths) for _ in range(n)]),
    )


def packed_hidden(network: Network, packed: Pack, *, checkpointing: bool = False) -> Tensor:
    """Hidden states ``(M, D)`` that predict each completion token.

    Args:
        checkpointing: keep one hidden state for each token and layer, and recompute layers in the backward
        pass.
    """
    x = network.embed(packed.ids)  # (N, D)
    angles, mask = network.angles(packed.positions), _mask(packed, network, x.dtype)

    def through(layer: Layer, x: Tensor) -> Tensor:
        x, normed = network.add_norm(x, None, layer.norm)
        queries, keys, values = network.qkv_heads(layer, normed, angles)
        x, update = network.after_attention(layer, x, _attend(packed, mask, queries, keys, values))
        return x + update

    for layer in network.layers:
        if checkpointing and torch.is_grad_enabled():
            x = checkpoint(through, layer, x, use_reentrant=False)
        else:
            x = through(layer, x)
    return network.add_norm(x.index_select(0, packed.scored), None, network.norm)[1]


def _mask(packed: Pack, network: Network, dtype: torch.dtype) -> Tensor:
    """What completion tokens attend to, ``(B, 1, H/G Tc, Tp + Tc)``: their prompt and themselves; 0 or -inf.

    A float mask in the type of the queries, made once: from a bool mask every layer would make and keep its
    own.
    """
    owner, prompts, completions = packed.owner, packed.prompts, packed.completions
    width, prompt_width = completions.gather.shape[1], prompts.gather.shape[1]
    rows, device = len(owner), packed.ids.device
    seen = torch.arange(prompt_width, device=device) < prompts.lengths[owner][:, None]  # (B, Tp)
    causal = torch.ones(width, width, dtype=torch.bool, device=device).tril()  # padding is last: never seen
    mask = torch.cat((seen[:, None].expand(rows, width, prompt_width), causal.expand(rows, width, width)), -1)
    mask = mask[:, None].repeat(1, 1, network.heads // network.kv_heads, 1)
    # Aligned strides, as a GPU's attention wants; otherwise every layer keeps an aligned copy.
    columns = round_up(mask.shape[-1], ALIGN)
    added = torch.zeros(*mask.shape[:-1], columns, dtype=dtype, device=device)[..., : mask.shape[-1]]
    return added.masked_fill_(~mask, -torch.inf)


def _attend(packed: Pack, mask: Tensor, queries: Tensor, keys: Tensor, values: Tensor) -> Tensor:
    """(N, H, d), (N, G, d), (N, G, d) -> (N, H d): prompts attend to themselves, completions to both."""
    prompts, completions = packed.prompts, packed.completions
    q, k, v = (prompts.pad(x).transpose(1, 2) for x in (queries, keys, values))  # (P, H or G, Tp, d)
    attended = prompts.unpad(causal_attention(q, k, v).transpose(1, 2))  # padding is last: never seen
    if not completions.scatter.numel():  # every completion is a single token, and none is computed
        return attended.flatten(1)
    own_k, own_v = (completions.pad(x).transpose(1, 2) for x in (keys, values))  # (B, G, Tc, d)
    k = torch.cat((k.index_select(0, packed.owner), own_k), 2)  # (B, G, Tp + Tc, d)
    v = torch.cat((v.index_select(0, packed.owner), own_v), 2)
    out = F.scaled_dot_product_attention(_folded(completions.pad(queries), k.shape[1]), k, v, attn_mask=mask)
    out = _unfolded(out, completions.gather.shape[1])  # (B, Tc, H, d)
    return torch.cat((attended, completions.unpad(out))).flatten(1)


def _folded(q: Tensor, kv_heads: int) -> Tensor:
    """(B, T, H, d) -> (B, G, H/G T, d): heads of one key lie along the tokens, keys are not repeated."""
    rows, tokens, heads, d = q.shape
    grouped = q.view(rows, tokens, kv_heads, heads // kv_heads, d)
    return grouped.permute(0, 2, 3, 1, 4).reshape(rows, kv_heads, -1, d)


def _unfolded(out: Tensor, tokens: int) -> Tensor:
    """(B, G, H/G T, d) -> (B, T, H, d)."""
    rows, kv_heads, _, d = out.shape
    return out.view(rows, kv_heads, -1, tokens, d).permute(0, 3, 1, 2, 4).reshape(rows, tokens, -1, d)
