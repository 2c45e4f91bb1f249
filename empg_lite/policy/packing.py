"""Completions behind their prompts, each prompt once: what the M-step feeds the network.

K completions of one problem share its prompt. Written out K times it is a third of the M-step's work (prompt
150, completion 180 tokens, K = 8), and padding to the longest row is as much again. So all real tokens of a
micro-batch lie in one row of N, prompts first; only attention sees rows, where completions look at the keys
of their prompt as well as at their own.

Shapes: P prompts, B completions (rows), N packed tokens, M scored tokens (all completion tokens).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from empg_lite.policy.network import Layer, Network

Ids = tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Rows:
    """Where the tokens of padded rows lie in the packed row.

    Attributes:
        gather: ``(B, T)`` index into the N packed tokens; anything (0) in the padding.
        scatter: ``(n,)`` index into the B T padded places of the n real tokens, in packed order.
        lengths: ``(B,)``.
    """

    gather: Tensor
    scatter: Tensor
    lengths: Tensor

    @staticmethod
    def of(lengths: Sequence[int], start: int, device: torch.device) -> Rows:
        """Rows of these lengths that follow each other in the packed row from ``start`` on."""
        width = max(lengths, default=0)
        starts = [start + before for before in accumulate([0, *lengths])][: len(lengths)]
        size = torch.tensor(lengths, dtype=torch.long)[:, None]  # (B, 1)
        places = torch.arange(width)
        real = places < size  # (B, T)
        gather = torch.where(real, torch.tensor(starts, dtype=torch.long)[:, None] + places, 0)
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
        ids, positions: ``(N,)`` prompts, then of each completion all tokens but the last: that one predicts
            nothing.
        prompts, completions: where they lie.
        owner: ``(B,)`` the prompt of each completion.
        scored: ``(M,)`` the packed token whose hidden state predicts each completion token.
        targets: ``(M,)`` these tokens, completion after completion.
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
    """Pack (prompt_ids, completion_ids) pairs, B of them; equal prompts are held once.

    A completion has at least one token, as has a prompt.
    """
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
        checkpointing: keep one hidden state a token and layer, and compute the layer again going backward.
    """
    x = network.embed(packed.ids)  # (N, D)
    angles, mask = network.angles(packed.positions), _mask(packed, network, x.dtype)

    def through(layer: Layer, x: Tensor) -> Tensor:
        x, normed = network.add_norm(x, None, layer.norm)
        queries, keys, values = network.heads_of(layer, normed, angles)
        x, update = network.after(layer, x, _attend(packed, mask, queries, keys, values))
        return x + update

    for layer in network.layers:
        if checkpointing and torch.is_grad_enabled():
            x = checkpoint(through, layer, x, use_reentrant=False)
        else:
            x = through(layer, x)
    return network.add_norm(x.index_select(0, packed.scored), None, network.norm)[1]


def _mask(packed: Pack, network: Network, dtype: torch.dtype) -> Tensor:
    """What a completion's tokens see, ``(B, 1, H/G Tc, Tp + Tc)``: its prompt, itself up to there; 0 or -inf.

    In the type of the queries, once for all layers: each would make and keep one of its own from a bool.
    """
    owner, prompts, completions = packed.owner, packed.prompts, packed.completions
    width, prompt_width = completions.gather.shape[1], prompts.gather.shape[1]
    device = packed.ids.device
    seen = torch.arange(prompt_width, device=device) < prompts.lengths[owner][:, None]  # (B, Tp)
    causal = torch.ones(
        width, width, dtype=torch.bool, device=device
    ).tril()  # padding is last: nobody sees it
    rows = len(owner)
    mask = torch.cat((seen[:, None].expand(rows, width, prompt_width), causal.expand(rows, width, width)), -1)
    mask = mask[:, None].repeat(1, 1, network.heads // network.kv_heads, 1)
    # Strides of a multiple of 8, which is what a GPU's attention wants: else every layer keeps a copy.
    width = -(-mask.shape[-1] // 8) * 8
    added = torch.zeros(*mask.shape[:-1], width, dtype=dtype, device=device)[..., : mask.shape[-1]]
    return added.masked_fill_(~mask, -torch.inf)


def _attend(packed: Pack, mask: Tensor, queries: Tensor, keys: Tensor, values: Tensor) -> Tensor:
    """(N, H, d), (N, G, d), (N, G, d) -> (N, H d): prompts within themselves, completions behind theirs."""
    prompts, completions = packed.prompts, packed.completions
    q, k, v = (prompts.pad(x).transpose(1, 2) for x in (queries, keys, values))  # (P, H or G, Tp, d)
    attended = prompts.unpad(causal_attention(q, k, v).transpose(1, 2))  # padding is last: nobody sees it
    if not completions.scatter.numel():  # every completion is a single token: nothing of it is computed
        return attended.flatten(1)
    own_k, own_v = (completions.pad(x).transpose(1, 2) for x in (keys, values))  # (B, G, Tc, d)
    k = torch.cat((k.index_select(0, packed.owner), own_k), 2)  # (B, G, Tp + Tc, d)
    v = torch.cat((v.index_select(0, packed.owner), own_v), 2)
    out = F.scaled_dot_product_attention(_folded(completions.pad(queries), k.shape[1]), k, v, attn_mask=mask)
    out = _unfolded(out, completions.gather.shape[1])  # (B, Tc, H, d)
    return torch.cat((attended, completions.unpad(out))).flatten(1)


def causal_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """(B, H, T, d) over keys and values (B, G, T, d), each token seeing those up to itself."""
    if shares_keys(q.device):
        return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
    k, v = (x.repeat_interleave(q.shape[1] // k.shape[1], 1) for x in (k, v))
    return F.scaled_dot_product_attention(q, k, v, is_causal=True)


def shares_keys(device: torch.device) -> bool:
    """Whether attention's kernels let H/G query heads share a key head.

    Below sm80 (T4) the flash kernel is missing and the others refuse: what is left writes fp32 scores.
    """
    return device.type != "cuda" or torch.cuda.get_device_capability(device) >= (8, 0)


def _folded(q: Tensor, kv_heads: int) -> Tensor:
    """(B, T, H, d) -> (B, G, H/G T, d): the query heads of one key head lie along the tokens, so that no key
    is written out H/G times."""
    rows, tokens, heads, d = q.shape
    grouped = q.view(rows, tokens, kv_heads, heads // kv_heads, d)
    return grouped.permute(0, 2, 3, 1, 4).reshape(rows, kv_heads, -1, d)


def _unfolded(out: Tensor, tokens: int) -> Tensor:
    """(B, G, H/G T, d) -> (B, T, H, d)."""
    rows, kv_heads, _, d = out.shape
    return out.view(rows, kv_heads, -1, tokens, d).permute(0, 3, 1, 2, 4).reshape(rows, tokens, -1, d)
