"""Packed micro-batches for the M-step: completions share their prompts, and the linears see no padding.

Repeated K times, the shared prompts would be a third of the M-step's work (prompt 150, completion 180 tokens,
K = 8), and padding to the longest row as much again. So all real tokens of a micro-batch form one packed
sequence of N, prompts first. Only attention works on rows: completions attend to the keys of their prompt and
to their own. A long prefix that all prompts share (instructions, examples) is computed once, too: it is four
fifths of a two-shot prompt.

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

from empg_lite.core.sizes import ALIGN, round_up, shared_prefix
from empg_lite.policy.attention import causal_attention

if TYPE_CHECKING:
    from empg_lite.policy.network import Layer, Network

Ids = tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Rows:
    """Index maps between the packed sequence and padded rows, whose first ``prefix`` tokens may be shared.

    Attributes:
        gather: ``(B, T)`` index into the N packed tokens; 0 in the padding.
        own: ``(B, T - prefix)`` index into the packed tokens behind the prefix; 0 in the padding.
        scatter: ``(n,)`` index of the rows' own n packed tokens, in order, into the B (T - prefix) entries
            behind the prefix.
        lengths: ``(B,)``, with the prefix.
        prefix: leading tokens that all rows share.
    """

    gather: Tensor
    own: Tensor
    scatter: Tensor
    lengths: Tensor
    prefix: int = 0

    @staticmethod
    def of(lengths: Sequence[int], start: int, device: torch.device, prefix: int = 0) -> Rows:
        """Rows of these lengths in the packed sequence from ``start`` on.

        Args:
            prefix: leading tokens that all rows share, packed once; the rest of the rows follows.
        """
        assert prefix == 0 or prefix < min(lengths), "every row has a last token of its own"
        width = max(lengths, default=0)
        size = torch.tensor(lengths, dtype=torch.long)[:, None]  # (B, 1)
        before = (size - prefix).cumsum(0) - (size - prefix)  # own tokens of the rows above
        columns = torch.arange(width)
        real = columns < size  # (B, T)
        packed = start + columns + torch.where(columns < prefix, 0, before)
        gather = packed.masked_fill(~real, 0).to(device)
        own = gather
        if prefix:
            own = (packed - prefix).masked_fill(~real, 0)[:, prefix:].contiguous().to(device)
        scatter = real[:, prefix:].flatten().nonzero().squeeze(-1)
        return Rows(gather, own, scatter.to(device), size.squeeze(-1).to(device), prefix)

    def pad(self, x: Tensor) -> Tensor:
        """(N, ...) -> (B, T, ...)."""
        return x.index_select(0, self.gather.flatten()).view(*self.gather.shape, *x.shape[1:])

    def unpad(self, x: Tensor) -> Tensor:
        """(B, T - prefix, ...) -> (n, ...)."""
        return x.flatten(0, 1).index_select(0, self.scatter)

    @property
    def ends(self) -> Tensor:
        """``(B,)`` index of each row's last token among the packed ones; no row is empty."""
        return self.gather.gather(1, self.lengths[:, None] - 1).squeeze(1)


def packed_prompts(prompts: Sequence[Sequence[int]], prefix: int) -> tuple[list[int], list[int]]:
    """Token IDs and positions of prompts in packed order: their prefix once, then the rest of each."""
    ids = [*prompts[0][:prefix], *(token for prompt in prompts for token in prompt[prefix:])]
    return ids, [*range(prefix), *(at for prompt in prompts for at in range(prefix, len(prompt)))]


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
    """Pack B pairs (prompt_ids, completion_ids), neither empty.

    Equal prompts are stored once, and so is a prefix that all of them share.
    """
    assert pairs and all(prompt and completion for prompt, completion in pairs)
    device = torch.device(device)
    prompts = list(dict.fromkeys(prompt for prompt, _ in pairs))
    number = {prompt: i for i, prompt in enumerate(prompts)}
    owner = [number[prompt] for prompt, _ in pairs]
    prefix = shared_prefix(prompts)
    ids, positions = packed_prompts(prompts, prefix)
    prompt_tokens = len(ids)
    ends = list(accumulate((len(p) - prefix for p in prompts), initial=prefix))[1:]  # past its last token
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
        prompts=Rows.of([len(p) for p in prompts], 0, device, prefix),
        completions=Rows.of([n - 1 for n in lengths], prompt_tokens, device),
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
    angles, group = network.angles(packed.positions), network.heads // network.kv_heads
    behind, mask = behind_prefix(packed.prompts, group, x.dtype), _mask(packed, group, x.dtype)

    def through(layer: Layer, x: Tensor) -> Tensor:
        x, normed = network.add_norm(x, None, layer.norm)
        queries, keys, values = network.qkv_heads(layer, normed, angles)
        x, update = network.after_attention(layer, x, _attend(packed, behind, mask, queries, keys, values))
        return x + update

    for layer in network.layers:
        if checkpointing and torch.is_grad_enabled():
            x = checkpoint(through, layer, x, use_reentrant=False)
        else:
            x = through(layer, x)
    return network.add_norm(x.index_select(0, packed.scored), None, network.norm)[1]


def _mask(packed: Pack, group: int, dtype: torch.dtype) -> Tensor:
    """What completion tokens attend to, ``(B, 1, H/G Tc, Tp + Tc)``: their prompt and themselves."""
    owner, prompts, completions = packed.owner, packed.prompts, packed.completions
    width, prompt_width = completions.gather.shape[1], prompts.gather.shape[1]
    rows, device = len(owner), packed.ids.device
    seen = torch.arange(prompt_width, device=device) < prompts.lengths[owner][:, None]  # (B, Tp)
    causal = torch.ones(width, width, dtype=torch.bool, device=device).tril()  # padding is last: never seen
    mask = torch.cat((seen[:, None].expand(rows, width, prompt_width), causal.expand(rows, width, width)), -1)
    return _added(mask, group, dtype)


def behind_prefix(prompts: Rows, group: int, dtype: torch.dtype) -> Tensor | None:
    """What prompts' own tokens attend to, ``(1, 1, H/G (Tp - prefix), Tp)``: prefix and what precedes them.

    None without a prefix: attention is causal.
    """
    if not prompts.prefix:
        return None
    width = prompts.gather.shape[1]
    causal = torch.ones(width, width, dtype=torch.bool, device=prompts.gather.device).tril()
    return _added(causal[None, prompts.prefix :], group, dtype)


def _added(seen: Tensor, group: int, dtype: torch.dtype) -> Tensor:
    """(B, Q, S) of bools -> (B, 1, H/G Q, S) of 0 and -inf for ``_folded`` queries.

    A float mask in the type of the queries, made once: from a bool mask every layer would make and keep its
    own.
    """
    mask = seen[:, None].repeat(1, 1, group, 1)
    # Aligned strides, as a GPU's attention wants; otherwise every layer keeps an aligned copy.
    columns = round_up(mask.shape[-1], ALIGN)
    added = torch.zeros(*mask.shape[:-1], columns, dtype=dtype, device=mask.device)[..., : mask.shape[-1]]
    return added.masked_fill_(~mask, -torch.inf)


def attend_prompts(rows: Rows, behind: Tensor | None, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Prompts attend to themselves; a prefix that they share attends once.

    Args:
        behind: see ``behind_prefix``.
        q: ``(N, H, d)``: the prefix, then the prompts' own tokens, in packed order; more may follow.
        k, v: ``(P, G, T, d)``, the padded prompts.

    Returns:
        ``(n, H, d)`` for the prefix and the prompts' own tokens, in packed order.
    """
    own = attend_behind(rows, behind, q[rows.prefix :], k, v)
    if behind is None:
        return own
    first = q[None, : rows.prefix].transpose(1, 2), *(x[:1, :, : rows.prefix] for x in (k, v))
    return torch.cat((causal_attention(*first)[0].transpose(0, 1), own))


def attend_behind(rows: Rows, behind: Tensor | None, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """The prompts' own tokens attend to the prefix and to what precedes them; see ``attend_prompts``.

    Args:
        q: ``(n, H, d)`` of the own tokens alone; more may follow.

    Returns:
        ``(n, H, d)``.
    """
    own = q.index_select(0, rows.own.flatten()).view(*rows.own.shape, *q.shape[1:])  # (P, T - prefix, H, d)
    if behind is None:
        attended = causal_attention(own.transpose(1, 2), k, v)  # padding is last: never seen
        return rows.unpad(attended.transpose(1, 2))
    out = F.scaled_dot_product_attention(_folded(own, k.shape[1]), k, v, attn_mask=behind)
    return rows.unpad(_unfolded(out, own.shape[1]))


def _attend(
    packed: Pack, behind: Tensor | None, mask: Tensor, queries: Tensor, keys: Tensor, values: Tensor
) -> Tensor:
    """(N, H, d), (N, G, d), (N, G, d) -> (N, H d): prompts attend to themselves, completions to both."""
    prompts, completions = packed.prompts, packed.completions
    k, v = (prompts.pad(x).transpose(1, 2) for x in (keys, values))  # (P, G, Tp, d)
    attended = attend_prompts(prompts, behind, queries, k, v)  # (n, H, d)
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
